"""Bad input: one sentence, a cure, and nothing that was finished is lost."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cl_graft.transfer import build as building
from cl_graft.transfer.read import read_examples, read_pairs
from tests.command import Call


@pytest.fixture
def words(torn: Path, questions: Path, tmp_path: Path) -> Callable[..., list[object]]:
    """The command's words, with some of them changed, added, or left out (None)."""

    def given(**changes: object) -> list[object]:
        options = {
            "source": torn,
            "prompts": questions,
            "task": "exact",
            "samples": 8,
            "max-new-tokens": 6,
            "out": tmp_path / "out",
            **{key.replace("_", "-"): value for key, value in changes.items()},
        }
        kept = {key: value for key, value in options.items() if value is not None}
        return [word for key, value in kept.items() for word in (f"--{key}", value)]

    return given


def test_a_file_without_a_column(words: Callable, call: Call, write: Callable) -> None:
    file = write([{"prompt": "a", "completion": "1"}, {"prompt": "b", "answer": "1"}], "p.jsonl")
    reason = call(*words(prompts=file)).reason
    assert (
        f"{file}, line 2 has no column 'completion'; its columns are 'prompt', 'answer'." in reason
    )


def test_a_source_that_cannot_read_the_prompts(
    words: Callable, call: Call, write: Callable, torn: Path, sure: Path, tmp_path: Path
) -> None:
    """Before anything is sampled, also from a source that could."""
    file = write(
        [{"prompt": p, "completion": "yes"} for p in ("plain", "Zürich", "日本")], "p.jsonl"
    )
    done = call(*words(prompts=file), "--source", sure)
    assert f"{sure} cannot read prompt 2 ('Zürich'): its vocabulary has no 'ü';" in done.reason
    assert not (tmp_path / "out" / "samples.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"source": "nano-gpt3"}, "did you mean nano-gpt2"),
        ({"task": "exakt"}, "did you mean exact"),
        ({"backend": "hff"}, "did you mean hf"),
        ({"min_gap": 0.1}, "need a --reward-model"),
        ({"temperature": 0}, "--samples 1"),
        ({"top_p": 0}, "top_p"),
        ({"prompts": "nowhere.jsonl"}, "there is no file nowhere.jsonl"),
        ({"max_new_tokens": 250}, "leaves no room for 250 new ones"),
        ({"reward_model": "TWO"}, "has 2 outputs and a reward model has one"),
        ({"reward_model": "nano-llama"}, "is no reward model: its config names LlamaForCausalLM"),
        ({"reward_model": "RM", "min_gap": 2, "max_gap": 1}, "no gap is at least 2 and at most 1"),
    ],
)
def test_what_cannot_be_built(
    changes: dict,
    told: str,
    words: Callable,
    call: Call,
    two_outputs: Path,
    reward_model: Path,
    tmp_path: Path,
) -> None:
    places = {"TWO": two_outputs, "RM": reward_model}
    done = call(*words(**{key: places.get(value, value) for key, value in changes.items()}))
    assert told in done.reason
    assert not (tmp_path / "out" / "build.json").exists()


def test_a_source_named_twice(words: Callable, call: Call, torn: Path) -> None:
    assert "is named twice" in call(*words(), "--source", torn).reason


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": 1}, "another seed"),
        ({"samples": 4}, "another samples"),
        ({"temperature": 0.7, "top_p": 0.5}, "another temperature and top p"),
        ({"limit": 3}, "another prompts"),
        ({"task": "number"}, "another rule and scorer"),
    ],
)
def test_a_folder_of_other_settings(
    changes: dict, told: str, words: Callable, call: Call, write: Callable, tmp_path: Path
) -> None:
    numbers = write(
        [{"prompt": f"Q: Copy {c}.\nA: ", "completion": "7"} for c in "abcd"], "n.jsonl"
    )
    changes, first = {"prompts": numbers, **changes}, words(prompts=numbers)
    call(*first)
    before = (tmp_path / "out" / "build.json").read_bytes()
    assert f"was begun with {told} than now; choose another --out" in call(*words(**changes)).reason
    assert (tmp_path / "out" / "build.json").read_bytes() == before


def test_a_folder_of_somebody_else(words: Callable, call: Call, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    assert "holds thesis.tex and no build.json" in call(*words()).reason
    assert {p.name for p in (tmp_path / "out").iterdir()} <= {"thesis.tex", ".lock"}


def test_answers_that_were_changed(words: Callable, call: Call, tmp_path: Path) -> None:
    assert call(*words()).code == 0
    samples = tmp_path / "out" / "samples.jsonl"
    samples.write_text(samples.read_text().replace('"no"', '"yes"'))
    assert "samples.jsonl is not as the build left it" in call(*words()).reason


def test_no_pair_keeps_the_bounds(
    words: Callable, call: Call, reward_model: Path, tmp_path: Path
) -> None:
    """The SFT set is whole and stays; other bounds select again from the same answers."""
    ranked = {"task": None, "reward_model": reward_model}
    done = call(*words(**ranked, min_gap=1000))
    assert re.search(r"no pair is left \(.*\d+ gap below the minimum\); the SFT", done.reason)
    assert len(read_examples(tmp_path / "out")) == 24
    assert read_pairs(tmp_path / "out") == ()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "config_name: sft" in card and "config_name: dpo" not in card
    assert call(*words(**ranked, min_gap=0.001)).code == 0
    assert read_pairs(tmp_path / "out")


def test_no_pair_where_none_was_demanded_is_no_error(
    words: Callable, call: Call, sure: Path
) -> None:
    done = call(*words(source=sure))
    assert done.code == 0 and "24 SFT rows, 0 DPO pairs" in done.out
    found = json.loads(call(*words(source=sure), "--json").out)
    assert (found["sft"], found["dpo"]) == (24, 0)


def test_a_verifier_that_fails(
    words: Callable, call: Call, write: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answers stay; when the row is mended, the same command judges them and samples nothing."""
    rows = [{"prompt": "Q: Copy a.\nA: ", "tests": ["assert f() == sorted([1, 'a'])"]}]
    given = words(prompts=write(rows, "p.jsonl"), task="tests")
    done = call(*given, "--allow-code-execution")
    assert "the rule 'tests' fails on answers to prompt 'Q: Copy a." in done.reason
    samples = (tmp_path / "out" / "samples.jsonl").read_bytes()
    write([{**rows[0], "tests": ["assert f() == sorted([1, 2])"]}], "p.jsonl")
    monkeypatch.delitem(building.SAMPLERS, "hf")
    done = call(*given, "--allow-code-execution")
    assert "is right" in done.reason  # judged: no answer is a program
    assert (tmp_path / "out" / "samples.jsonl").read_bytes() == samples
    assert "files" in json.loads((tmp_path / "out" / "build.json").read_text())


SMALL_DISK = """
import resource, signal, sys
from cl_graft.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
main()
"""


@pytest.mark.slow
def test_a_disk_that_fills_while_sampling(words: Callable, call: Call, tmp_path: Path) -> None:
    """The system's own refusal in the middle of an append, by a limit on the size of files."""
    whole = tmp_path / "whole"
    assert call(*words(out=whole)).code == 0
    third = (
        (whole / "samples.jsonl").read_bytes().split(b"\n")[:12]
    )  # 8 prompts a chunk: in the second
    limit = len(b"\n".join(third))
    given = [sys.executable, "-W", "ignore", "-c", SMALL_DISK, str(limit), "transfer", "build"]
    done = subprocess.run(
        [*given, *map(str, words())], capture_output=True, text=True, env={**os.environ}
    )
    assert done.returncode == 1
    (reason,) = (line for line in done.stderr.split("\n") if line.startswith("error: "))
    assert "samples.jsonl cannot be written (File too large); free space, then run" in reason
    assert (tmp_path / "out" / "samples.jsonl").read_bytes().count(b"\n") == 8
    assert call(*words()).code == 0
    for name in ("samples.jsonl", "sft.jsonl", "dpo.jsonl", "build.json"):
        assert (tmp_path / "out" / name).read_bytes() == (whole / name).read_bytes()
