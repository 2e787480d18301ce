"""A cell's copy at a URL, and going on from it on another machine's disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from cl_graft.config import RunConfig
from cl_graft.errors import CLGraftError, Refused
from cl_graft.experiment.attempt import attempt
from cl_graft.experiment.cell import run
from cl_graft.store.mirror import Mirror


@pytest.fixture
def url() -> Iterator[str]:
    """In memory: a file system that is not the disk."""
    yield "memory://sweep"
    fsspec.filesystem("memory").store.clear()


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_json", ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_what_is_pushed_is_pulled_elsewhere(url: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", result_json="{}", stages__00__stage_json="{1}", cell_json="x")
    Mirror(url).push(folder, "cell")
    Mirror(url).pull("cell", tmp_path / "b")
    found = {f.relative_to(tmp_path / "b"): f.read_text() for f in (tmp_path / "b").rglob("*.*")}
    assert {str(k): v for k, v in found.items()} == {
        "result.json": "{}",
        "stages/00/stage.json": "{1}",
        "cell.json": "x",
    }


def test_a_single_file(url: str, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    Mirror(url).push(tmp_path / "pairs.jsonl", "cache/pairs.jsonl")
    Mirror(url).pull("cache/pairs.jsonl", tmp_path / "new" / "mine.jsonl")
    assert (tmp_path / "new" / "mine.jsonl").read_text() == "{}\n"
    Mirror(url).pull("cache/none.jsonl", tmp_path / "none.jsonl")
    assert not (tmp_path / "none.jsonl").exists()


def test_markers_go_last_and_a_process_own_files_stay(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(
        tmp_path / "a", result_json="{}", stages__01__stage_json="{}", packs__01="p", zzz="z"
    )
    (folder / ".lock").write_text("")
    (folder / ".stage.json.7.tmp").write_text("")
    order = []
    memory = fsspec.filesystem("memory")
    put = type(memory).put_file
    monkeypatch.setattr(
        type(memory), "put_file", lambda self, a, b: (order.append(Path(a).name), put(self, a, b))
    )
    Mirror(url).push(folder, "cell")
    assert order == ["01", "zzz", "stage.json", "result.json"]
    Mirror(url).push(folder, "cell")
    assert len(order) == 4, "what is there is not sent again"


@pytest.mark.parametrize("wrong", ["nothing://x", "s3://bucket/x"])
def test_a_url_that_nobody_knows(wrong: str, tmp_path: Path) -> None:
    try:
        import s3fs  # noqa: F401

        pytest.skip("s3fs is installed")
    except ImportError:
        pass
    with pytest.raises(CLGraftError, match="cannot be used.*give a URL that fsspec knows"):
        Mirror(wrong).pull("cell", tmp_path)


def test_several_send_the_same_file(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes that finish a stage at once: whoever is second finds no file of its own gone."""
    folder = write(tmp_path / "a", cell_json="x")
    memory = type(fsspec.filesystem("memory"))
    move, moves = memory.mv, []

    def late(self: object, source: str, target: str) -> None:
        moves.append((source, target))
        if len(moves) == 1:
            Mirror(url).push(folder, "cell")
        move(self, source, target)

    monkeypatch.setattr(memory, "mv", late)
    Mirror(url).push(folder, "cell")
    assert len({source for source, _ in moves}) == 2
    assert fsspec.filesystem("memory").find("/sweep") == ["/sweep/cell/cell.json"]


def config(out: Path, mirror: str | None) -> RunConfig:
    sizes = {"tasks": "math,cipher", "steps": 4, "train_size": 32, "test_size": 8}
    return RunConfig(
        scenario="mini",
        strategy="graftllm",
        model="nano-llama",
        out=out,
        mirror=mirror,
        wandb="off",
        options={"mini": sizes},
    )


@pytest.mark.slow
def test_what_could_not_be_sent_at_last_is_sent_by_the_next_attempt(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = config(tmp_path, url)
    push = Mirror.push

    def fails(self: Mirror, folder: Path, name: str) -> None:
        if (folder / "result.json").exists():
            raise Refused("memory:// cannot be written.")
        push(self, folder, name)

    monkeypatch.setattr(Mirror, "push", fails)
    refused = attempt(made, lambda *_: None, True)
    assert (refused.state, refused.reason) == ("refused", "memory:// cannot be written.")
    monkeypatch.undo()
    assert attempt(made, lambda *_: None, True).state == "done"
    Mirror(url).pull(made.cell, tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "result.json").is_file()


@pytest.mark.slow
def test_a_cell_goes_on_from_its_copy_on_another_disk(url: str, tmp_path: Path) -> None:
    """The first machine is lost after the first task: with all of its disk."""

    class Lost(Exception):
        pass

    def until_cipher(what: str, done: float, at: str) -> None:
        if what == "training cipher":
            raise Lost

    with pytest.raises(Lost):
        run(config(tmp_path / "first", url), until_cipher)
    seen: list[str] = []
    second = config(tmp_path / "second", url)
    result = run(second, lambda what, done, at: seen.append(what))
    assert "training math" not in seen and "training cipher" in seen
    alone = run(config(tmp_path / "alone", None))
    assert result["matrix"] == alone["matrix"]
    Mirror(url).pull(second.cell, tmp_path / "third")
    assert json.loads((tmp_path / "third" / "result.json").read_text()) == result
    (asked,) = fsspec.filesystem("memory").find("/sweep/data")
    assert asked == f"/sweep/data/{result['data']}.jsonl"
    kinds = {path.split("/")[3] for path in fsspec.filesystem("memory").find("/sweep/cache")}
    assert kinds == {"stages", "evaluations", "divergences"}
