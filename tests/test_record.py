"""Results on disk: whole or absent, one writer at a time, and no folder continued that tells another experiment."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cl_graft.store import record
from cl_graft.store.files import RecordError, read_json, read_jsonl, write_json, write_text
from cl_graft.store.record import CellFolder
from tests.refusals import one_sentence

IDENTITY: dict[str, Any] = {
    "config": {"scenario": "mini", "strategy": "lora", "seed": 0, "budget": "10%"},
    "options": {"rank": 8},
    "base": "b" * 32,
    "data": "d" * 32,
    "tasks": ["math"],
}

refusal = partial(one_sentence, kind=RecordError, ends=".")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all that hypothesis tries."""
    return tmp_path_factory.mktemp("scratch")


# --- writing ---


def test_a_file_is_written_with_its_folders(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "c.json"
    write_json(file, {"é": [1, None, 0.1]})
    assert read_json(file) == {"é": [1, None, 0.1]}
    assert [p.name for p in file.parent.iterdir()] == ["c.json"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    file = tmp_path / "result.json"
    write_text(file, "old")

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, step, full)
    message = refusal(lambda: write_text(file, "new"))
    assert str(file) in message and "No space left on device" in message
    assert "free space" in message and "run the same command again" in message
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_an_interrupt_while_writing_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "result.json"
    write_text(file, "old")

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_text(file, "new")
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_a_target_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    assert "taken cannot be written" in refusal(lambda: write_text(tmp_path / "taken", "x"))
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_a_parent_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = refusal(lambda: write_text(tmp_path / "file" / "sub" / "x.json", "x"))
    assert "x.json cannot be written" in message


WRITER = """
import resource, signal, sys
from pathlib import Path
from cl_graft.store.files import RecordError, write_text
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_text(Path(sys.argv[1]), "x" * 5000)
except RecordError as error:
    print(error)
"""


def test_a_disk_that_takes_only_part_of_a_file(tmp_path: Path) -> None:
    """The system's own refusal in the middle of a write, by a limit on the size of files."""
    file = tmp_path / "result.json"
    write_text(file, "old")
    done = subprocess.run(
        [sys.executable, "-c", WRITER, str(file)], check=True, capture_output=True, text=True
    )
    assert "result.json cannot be written (File too large)" in done.stdout
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


REWRITER = """
import itertools, sys
from pathlib import Path
from cl_graft.store.files import write_json
for n in itertools.count():
    write_json(Path(sys.argv[1]), {"n": n, "filling": [n] * 50_000})
    if not n:
        print("begun", flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path: Path) -> None:
    folder = CellFolder(tmp_path)
    file = tmp_path / "result.json"
    for wait in (0.0, 0.013, 0.029):
        process = subprocess.Popen(
            [sys.executable, "-c", REWRITER, str(file)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout and process.stdout.readline() == "begun\n"
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        found = read_json(file)
        assert found["filling"] == [found["n"]] * 50_000
    with folder.lock():  # whoever continues the cell sweeps up what the killed left
        assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*.tmp"))


# --- reading ---


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1', b"\xff\xfe{}", b"nul"])
def test_a_broken_json_file_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "result.json"
    file.write_bytes(content)
    message = refusal(lambda: read_json(file))
    assert str(file) in message and "delete its cell's folder" in message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "none.json" in refusal(lambda: read_json(tmp_path / "none.json"))
    assert "none.jsonl" in refusal(lambda: list(read_jsonl(tmp_path / "none.jsonl")))


LINES = [{"a": 1, "text": "é"}, {"b": "two\nlines\u2028"}, {"c": [None, 0.5]}]


@settings(deadline=None)
@given(st.integers(0, 200), st.booleans())
def test_a_torn_last_line_is_passed_over(scratch: Path, cut: int, ascii_only: bool) -> None:
    """Wherever a kill cut the file, also within a character, the whole lines before it are read."""
    whole = [json.dumps(line, ensure_ascii=ascii_only).encode() for line in LINES]
    data = b"".join(line + b"\n" for line in whole)[:cut]
    file = scratch / "torn.jsonl"
    file.write_bytes(data)
    complete = data.count(b"\n") + (data.rpartition(b"\n")[2] in whole)
    assert list(read_jsonl(file)) == LINES[:complete]


@pytest.mark.parametrize("broken", ['{"b": ', "{'b': 2}", "junk", "\ufffd"])
def test_a_broken_line_elsewhere_is_refused_with_its_number(tmp_path: Path, broken: str) -> None:
    file = tmp_path / "examples.jsonl"
    for text in (f'{{"a": 1}}\n\n{broken}\n{{"c": 3}}\n', f'{{"a": 1}}\n\n{broken}\n'):
        file.write_text(text, encoding="utf-8")
        message = refusal(lambda: list(read_jsonl(file)))
        assert f"{file}, line 3 is not JSON" in message


# --- a cell's folder ---

HOLDER = """
import sys
from pathlib import Path
from cl_graft.store.record import CellFolder
with CellFolder(Path(sys.argv[1])).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, None])
def test_two_processes_cannot_hold_one_cell(tmp_path: Path, end: signal.Signals | None) -> None:
    """The lock ends with its process, however that ends."""
    folder = CellFolder(tmp_path / "cell")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout and holder.stdout.readline() == "held\n"

    def take() -> None:
        with folder.lock():
            pass

    begun = time.monotonic()
    assert f"{folder.path} is being computed by another process" in refusal(take)
    assert time.monotonic() - begun < 30, "it waits for nobody"
    if end:
        holder.send_signal(end)
    holder.communicate()
    take()


def test_the_lock_ends_with_an_error_and_passes_it_on(tmp_path: Path) -> None:
    folder = CellFolder(tmp_path)
    for error in (ValueError("mine"), OSError(errno.ENOSPC, "full"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as passed, folder.lock():
            raise error
        assert passed.value is error
    with folder.lock():
        pass


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    def take() -> None:
        with CellFolder(tmp_path / "file" / "cell").lock():
            pass

    assert "cannot be made" in refusal(take) and "another --out" in refusal(take)


def test_a_cell_is_begun_once_and_then_recognised(tmp_path: Path) -> None:
    folder = CellFolder(tmp_path / "cell")
    folder.begin(IDENTITY)
    before = (folder.path / "cell.json").read_text()
    folder.begin({**IDENTITY, "tasks": ["ignored"]})
    assert (folder.path / "cell.json").read_text() == before
    assert read_json(folder.path / "cell.json") == {"format": record.FORMAT, **IDENTITY}
    assert not folder.complete and folder.experiences() == []


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"data": "e" * 32}, "another data"),
        ({"base": "e" * 32}, "another base"),
        ({"options": {"rank": 4}}, "another options"),
        ({"config": {**IDENTITY["config"], "seed": 1}}, "another seed"),
    ],
)
def test_another_experiment_does_not_continue_a_folder(
    tmp_path: Path, changed: dict[str, Any], named: str
) -> None:
    folder = CellFolder(tmp_path)
    folder.begin(IDENTITY)
    message = refusal(lambda: folder.begin({**IDENTITY, **changed}))
    assert named in message and str(tmp_path) in message and "another --out" in message


@pytest.mark.parametrize("content", [{"format": record.FORMAT + 1}, {}, [], {"format": "old"}])
def test_a_folder_of_another_version_is_refused(tmp_path: Path, content: Any) -> None:
    write_json(tmp_path / "cell.json", content)
    message = refusal(lambda: CellFolder(tmp_path).begin(IDENTITY))
    assert "results format" in message and f"knows {record.FORMAT}" in message
    assert read_json(tmp_path / "cell.json") == content


def outcome(task: str, index: int, **changed: Any) -> dict[str, Any]:
    return {
        "task": task,
        "metric": "exact",
        "index": index,
        "score": 1.0,
        "answer": "é",
        "note": "",
        **changed,
    }


def test_an_experience_counts_once_its_record_is_there(tmp_path: Path) -> None:
    folder = CellFolder(tmp_path)
    for experience in (0, 1, 3):
        folder.write_experience(
            experience, [outcome("math", i) for i in range(3)], {"experience": experience}
        )
    assert folder.experiences() == [{"experience": 0}, {"experience": 1}]
    (folder.experience_path(1) / "experience.json").unlink()  # as if killed between its two files
    assert folder.experiences() == [{"experience": 0}]
    assert len(list(read_jsonl(folder.experience_path(1) / "examples.jsonl"))) == 3


@settings(max_examples=30, deadline=None)
@given(st.text(alphabet=st.characters()))
@example("\ud800")
def test_any_answer_and_note_can_be_recorded(scratch: Path, text: str) -> None:
    """A program that raises an error about half a surrogate pair must not end the run that scores it."""
    folder, line = CellFolder(scratch), outcome("code", 0, answer=text, note=text)
    folder.write_experience(0, [line], {})
    assert list(read_jsonl(folder.experience_path(0) / "examples.jsonl")) == [line]


def test_cells_are_found_below_a_folder(tmp_path: Path) -> None:
    for name in ("b", "a", "deep/c"):
        CellFolder(tmp_path / name).begin(IDENTITY)
    assert record.cells(tmp_path) == [tmp_path / "a", tmp_path / "b", tmp_path / "deep" / "c"]
    assert record.cells(tmp_path / "a") == [tmp_path / "a"]


def test_a_folder_without_cells_is_refused(tmp_path: Path) -> None:
    assert "holds no cell" in refusal(lambda: record.cells(tmp_path))
    assert "there is no folder" in refusal(lambda: record.cells(tmp_path / "none"))


def test_what_a_killed_write_leaves_bears_the_name_of_its_target(tmp_path: Path) -> None:
    """By that name the next that locks the target finds and removes it; a name at the limit still is written."""
    from cl_graft.atomic import replacing
    from cl_graft.store.locks import locked

    class Killed(BaseException):
        pass

    target, unlink = tmp_path / "outcomes.jsonl", Path.unlink
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
        with pytest.raises(Killed), replacing(target, lambda error: error):
            raise Killed
    assert Path.unlink is unlink
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".outcomes.jsonl.") and left.suffix == ".tmp"
    with locked(target):
        assert not left.exists()
    longest = tmp_path / ("x" * 255)
    with replacing(longest, lambda error: error) as write:
        write(b"whole", 0)
    assert longest.read_bytes() == b"whole"
