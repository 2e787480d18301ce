"""What a build leaves on disk: build.json first as the identity, last as the marker that all files are whole.

<out>/samples.jsonl   every answer, one line a source and prompt, in the order they were sampled; grows
<out>/rewards.jsonl   how each was judged, line by line the same; grows
<out>/sft.jsonl, dpo.jsonl, README.md   the data set, for `datasets.load_dataset(out, "sft")` or "dpo"
<out>/logits-0.safetensors, ...         what each source says of the SFT rows, where asked for
<out>/report.json, report.md            yields, lengths, rewards, and why pairs were dropped
<out>/build.json      settings, digests of what was asked, versions; with the digest of every file when complete
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from cl_graft.store.files import RecordError, write_json

FORMAT = 1
SAMPLES, REWARDS, SFT, DPO = "samples.jsonl", "rewards.jsonl", "sft.jsonl", "dpo.jsonl"
FILES = (SAMPLES, REWARDS, SFT, DPO, "report.json", "report.md", "README.md")
PARTS = ("sampling", "judging", "selection")


def begin(out: Path, identity: Mapping[str, Any]) -> None:
    """Write build.json, or check that the one there was begun with the same settings.

    What was sampled and how it is judged cannot change, except that further sources may come behind those of before,
    and that a build which has not come to its end is judged anew under another rule; which gaps a pair may have can
    always change, since selecting costs nothing.
    Raises RecordError for other settings, for files changed since, and for a folder that no build began.
    """
    marker = read_marker(out)
    if marker is None:
        others = [file.name for file in out.iterdir() if file.name != ".lock"]
        if others:
            raise RecordError(
                f"{out} holds {sorted(others)[0]} and no build.json; choose an empty folder as --out."
            )
        write_json(out / "build.json", {"format": FORMAT, **identity})
        return
    complete = "files" in marker
    _refuse_other(out, "sampling", marker, identity)
    if complete:
        _refuse_other(out, "judging", marker, identity)
        _refuse_changed(out, marker, (SAMPLES, REWARDS))
    if marker["judging"] != identity["judging"]:
        (out / REWARDS).unlink(missing_ok=True)
    if any(marker[part] != identity[part] for part in PARTS):
        kept = {key: value for key, value in marker.items() if key != "files"}
        write_json(out / "build.json", {**kept, **{part: identity[part] for part in PARTS}})


def finish(out: Path, sources: int = 0) -> None:
    """Write the marker: build.json with the digest of every file. sources: of how many there are stored logits."""
    marker = read_marker(out)
    assert marker is not None
    stored = [file_of(out, number).name for number in range(sources)]
    marker["files"] = {name: digest(out / name) for name in (*FILES, *stored)}
    write_json(out / "build.json", marker)


def file_of(out: Path, number: int) -> Path:
    """The file of what source `number` says of the SFT rows."""
    return out / f"logits-{number}.safetensors"


def read_marker(out: Path) -> dict[str, Any] | None:
    """What build.json says, None where there is none. Raises RecordError for one that is not of this version."""
    path = out / "build.json"
    if not path.is_file():
        return None
    try:
        marker = json.loads(path.read_text(encoding="utf-8"))
        if marker["format"] == FORMAT and all(isinstance(marker[part], dict) for part in PARTS):
            return marker
    except (OSError, ValueError, TypeError, KeyError):
        pass
    raise RecordError(
        f"{path} was not written by this version of `cl-graft transfer build`; choose another --out, or delete "
        "the folder."
    )


def _refuse_other(
    out: Path, part: str, marker: Mapping[str, Any], identity: Mapping[str, Any]
) -> None:
    then, now = marker[part], identity[part]
    other = [key for key in now if then.get(key) != now[key] and not _goes_on(key, then, now)]
    if other == ["sources"]:
        before = ", ".join(source["name"] for source in then["sources"])
        raise RecordError(
            f"{out} was begun with the sources {before}; give these as they were, in this order, further ones behind "
            "them, or choose another --out."
        )
    if other:
        shown = " and ".join(key.replace("_", " ") for key in other)
        raise RecordError(
            f"{out} was begun with another {shown} than now; choose another --out or delete the folder."
        )


def _goes_on(key: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether it is sources, and those of before come first: their answers are the same."""
    return key == "sources" and then[key] == now[key][: len(then[key])]


def _refuse_changed(out: Path, marker: Mapping[str, Any], names: Iterable[str]) -> None:
    for name in names:
        if not (out / name).is_file() or digest(out / name) != marker["files"].get(name):
            raise RecordError(
                f"{out / name} is not as the build left it; build the data again into another --out."
            )


def _complete(out: Path, wanted: Callable[[str], bool]) -> dict[str, str]:
    """{file: digest} of the wanted files of a complete build. Raises RecordError for another, or a changed file."""
    marker = read_marker(out)
    if marker is None or "files" not in marker:
        why = "is not complete" if marker else "holds no build.json"
        raise RecordError(
            f"{out} {why}; make it, or finish it, with `cl-graft transfer build --out {out}`."
        )
    names = [name for name in marker["files"] if wanted(name)]
    _refuse_changed(out, marker, names)
    return {name: marker["files"][name] for name in names}


def logits_of(out: Path) -> dict[str, str]:
    """{file: digest} of the stored logits of a complete build; none where there are none.

    Raises RecordError for an incomplete build and for a changed file.
    """
    return _complete(out, lambda name: name.startswith("logits-"))


def read_rows(out: Path, name: str) -> list[dict[str, Any]]:
    """Rows of one file of a complete build. Raises RecordError for an incomplete one and for a changed file."""
    _complete(out, name.__eq__)
    return [json.loads(line) for line in (out / name).read_text(encoding="utf-8").splitlines()]


def digest(path: Path) -> str:
    """BLAKE2b of a file's bytes, 32 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
