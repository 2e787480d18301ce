"""What a cache holds, what is removed from it, and what must stay."""

from __future__ import annotations

import json
import os
import time

import pytest
from filelock import FileLock

from cl_graft.experiment import cache
from cl_graft.store.files import RecordError
from cl_graft.training.stages import Stages
from tests.command import assert_refused
from tests.training.test_stages import TASK, sft_job


@pytest.fixture
def filled(nano, tmp_path):
    """A stage, the leftover of another, and pairs."""
    Stages(tmp_path).run(*nano, *sft_job(TASK, 0))
    work = tmp_path / "stages" / "abc.work" / "checkpoint-4"
    work.mkdir(parents=True)
    (work / "optimizer.pt").write_bytes(b"0" * 1000)
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "x.jsonl").write_text(
        '{"lines": 1}\n{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
    )
    return tmp_path


def kinds(found):
    return sorted(entry.kind for entry in found)


def test_entries_tell_kind_size_and_what_it_is_of(filled):
    found = {entry.kind: entry for entry in cache.entries(filled)}
    assert set(found) == {"stage", "unfinished", "pairs"}
    assert found["stage"].about == "sft, 8 steps of 4, seed 0" and found["stage"].current
    files = found["stage"].path.rglob("*")
    assert found["stage"].bytes == sum(f.stat().st_size for f in files if f.is_file())
    assert found["unfinished"].bytes == 1000 and found["pairs"].about == "1 pairs"


def test_prune_removes_only_what_cannot_be_recalled(filled):
    assert cache.prune(filled) == []
    (marker,) = filled.glob("stages/*/stage.json")
    made = json.loads(marker.read_text())
    made["made_by"]["torch"] = "1.0"
    marker.write_text(json.dumps(made))
    assert kinds(cache.prune(filled)) == ["stage"]
    assert not marker.parent.exists() and kinds(cache.entries(filled)) == ["pairs", "unfinished"]


def test_a_stage_whose_removal_was_cut_short_is_none(filled, monkeypatch):
    def cut_short(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(cache.shutil, "rmtree", cut_short)
    with pytest.raises(KeyboardInterrupt):
        cache.prune(filled, everything=True)
    found = [entry for entry in cache.entries(filled) if entry.kind == "stage"]
    assert found == [] and len(list(filled.glob("stages/*/stage.json"))) == 1
    monkeypatch.undo()
    cache.prune(filled, everything=True)
    assert list(filled.glob("stages/*/")) == [] and list(filled.glob("stages/.*/")) == []


def test_prune_by_age_and_everything(filled):
    long_ago = time.time() - 10 * 86400
    os.utime(filled / "pairs" / "x.jsonl", (long_ago, long_ago))
    assert kinds(cache.prune(filled, older=86400)) == ["pairs"]
    assert kinds(cache.prune(filled, everything=True)) == ["stage", "unfinished"]


def test_what_a_process_is_working_on_stays(filled):
    with FileLock(filled / "stages" / "abc.lock"):
        assert kinds(cache.prune(filled, everything=True)) == ["pairs", "stage"]
    assert (filled / "stages" / "abc.work").is_dir()


def test_a_stage_that_a_cell_still_reads_stays(nano, tmp_path):
    """While it compresses, say: its training is over, and nothing holds the stage's lock."""
    stages = Stages(tmp_path)
    folder, _ = stages.run(*nano, *sft_job(TASK, 0))
    assert cache.prune(tmp_path, everything=True) == [] and folder.is_dir()
    del stages
    assert kinds(cache.prune(tmp_path, everything=True)) == ["stage"]
    assert list((tmp_path / "stages").iterdir()) == []


def test_the_command_lists_and_prunes_a_results_folder(filled, call, tmp_path):
    out = tmp_path / "results"
    out.mkdir()
    for name in ("stages", "pairs"):
        (out / "cache").mkdir(exist_ok=True)
        (filled / name).rename(out / "cache" / name)
    listed = call("cache", "ls", out).out
    assert "sft, 8 steps of 4, seed 0" in listed and "in 3, of which 0 B in 0" in listed
    assert "removed 3" in call("cache", "prune", out, "--all").out
    assert_refused(call("cache", "ls", tmp_path / "none"), "holds no stages")
    with pytest.raises(RecordError):
        cache.entries(tmp_path / "none")
