"""What `cl-graft transfer build` refuses, and the same command after the cure that it prints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cl_graft.transfer.read import read_examples, read_pairs
from tests.command import Call
from tests.refusals import one_sentence


@pytest.fixture
def words(torn: Path, questions: Path, tmp_path: Path) -> Callable[..., list[object]]:
    """The command's words, with some of them changed, added, or left out (None)."""

    def given(**changes: object) -> list[object]:
        options = {
            "source": torn,
            "prompts": questions,
            "task": "exact",
            "samples": 2,
            "max-new-tokens": 6,
            "out": tmp_path / "out",
            **{key.replace("_", "-"): value for key, value in changes.items()},
        }
        kept = {key: value for key, value in options.items() if value is not None}
        return [w for k, v in kept.items() for w in ([f"--{k}"] if v is True else [f"--{k}", v])]

    return given


@pytest.mark.parametrize(
    ("wrong", "cure", "right"),
    [
        ({"temperature": 0}, "give --samples 1 or a higher", {"temperature": 0, "samples": 1}),
        ({"temperature": 0}, "or a higher temperature", {"temperature": 0.5}),
        ({"min_gap": 0.1}, "need a --reward-model", {"min_gap": 0.1, "reward_model": "RM", "task": None}),
        ({"reward_model": "RM", "task": None, "min_gap": 2, "max_gap": 1}, "give a --min-gap below --max-gap", {"reward_model": "RM", "task": None, "min_gap": 0.001, "max_gap": 100}),
        ({"task": None}, "give --task", {}),
        ({"task": None}, "or a --reward-model", {"task": None, "reward_model": "RM"}),
        ({"max_new_tokens": 250}, "lower --max-new-tokens", {"max_new_tokens": 8}),
        ({"task": "neg_bits_per_byte"}, "give a --task that judges answers", {}),
        ({"task": "neg_bits_per_byte"}, "or a --reward-model alone", {"task": None, "reward_model": "RM"}),
        ({"chat": True}, "leave out --chat", {}),
    ],
)  # fmt: skip
def test_options(
    wrong: dict, cure: str, right: dict, words: Callable, call: Call, reward_model: Path
) -> None:
    def given(changes: dict) -> list[object]:
        return words(**{k: reward_model if v == "RM" else v for k, v in changes.items()})

    assert cure in call(*given(wrong)).reason
    assert call(*given(right)).code == 0


def test_a_row_that_the_rule_cannot_judge(
    words: Callable, call: Call, write: Callable, reward_model: Path
) -> None:
    """Filled, taken out, or ranked."""
    rows = [{"prompt": "Q: Copy a.\nA: ", "completion": "yes"}, {"prompt": "Q: Copy b.\nA: "}]
    rows[1]["completion"] = ""
    said = call(*words(prompts=write(rows, "a.jsonl"))).reason
    assert "fill it, remove the row, or give a --reward-model" in said
    filled = [rows[0], rows[1] | {"completion": "no"}]
    for number, found in enumerate((filled, rows[:1])):
        file = write(found, f"{number}.jsonl")
        assert call(*words(prompts=file, out=file.with_suffix(""), samples=8)).code == 0
    ranked = {"prompts": file.parent / "a.jsonl", "reward_model": reward_model, "samples": 8}
    assert call(*words(**ranked, out=file.parent / "ranked")).code == 0


def test_another_folder_or_none(words: Callable, call: Call, tmp_path: Path) -> None:
    """A folder of other settings, of somebody else, of another version, and one that was changed."""
    out = tmp_path / "out"
    assert call(*words()).code == 0
    assert "choose another --out or delete the folder" in call(*words(seed=1)).reason
    assert call(*words(seed=1, out=tmp_path / "other")).code == 0
    shutil.rmtree(out)
    assert call(*words(seed=1)).code == 0
    about = (out / "build.json").read_text()
    (out / "build.json").write_text("{}")
    assert "choose another --out, or delete the folder" in call(*words(seed=1)).reason
    (out / "build.json").write_text(about)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    said = call(*words(out=tmp_path / "mine")).reason
    assert "choose an empty folder as --out" in said
    (tmp_path / "empty").mkdir()
    assert call(*words(out=tmp_path / "empty")).code == 0


def test_other_sources(words: Callable, call: Call, torn: Path, sure: Path, tmp_path: Path) -> None:
    """The folder's own first, further ones behind them; or others into another folder."""
    assert call(*words()).code == 0
    said = call(*words(source=sure)).reason
    assert f"was begun with the sources {torn}; give these as they were, in this order" in said
    assert call(*words(), "--source", sure).code == 0
    assert call(*words(source=sure, out=tmp_path / "other")).code == 0


def test_what_is_read_back(words: Callable, call: Call, tmp_path: Path) -> None:
    out = tmp_path / "out"
    told = one_sentence(lambda: read_examples(out))
    assert f"with `cl-graft transfer build --out {out}`" in told
    assert call(*words()).code == 0
    assert read_examples(out)
    with open(out / "dpo.jsonl", "a") as file:
        file.write(json.dumps({"prompt": "p", "chosen": "c", "rejected": "r"}) + "\n")
    assert "build the data again into another --out" in one_sentence(lambda: read_pairs(out))
    assert call(*words(out=tmp_path / "again")).code == 0
    read_pairs(tmp_path / "again")


@pytest.mark.parametrize("damage", [b"{", b'{"source": "another", "index": 0}'])
def test_answers_that_cannot_be_continued(
    damage: bytes, words: Callable, call: Call, tmp_path: Path
) -> None:
    """In a build that was stopped; the file is deleted, and its part is done anew, to the same bytes."""
    assert call(*words()).code == 0
    marker, samples = tmp_path / "out" / "build.json", tmp_path / "out" / "samples.jsonl"
    about = json.loads(marker.read_text())
    marker.write_text(json.dumps({key: value for key, value in about.items() if key != "files"}))
    whole = samples.read_bytes()
    samples.write_bytes(damage + whole[whole.index(b"\n") :])
    assert "delete it to do its part of the build anew" in call(*words()).reason
    samples.unlink()
    assert call(*words()).code == 0
    assert samples.read_bytes() == whole


def test_a_source_by_another_backend(words: Callable, call: Call) -> None:
    try:
        import vllm  # noqa: F401
    except ImportError:
        assert "or use --backend hf" in call(*words(backend="vllm")).reason
    assert call(*words(backend="hf")).code == 0
