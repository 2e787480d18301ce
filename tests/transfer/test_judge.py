"""Rules and reward models: what an answer is worth."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from cl_graft.task import Example, Scoring
from cl_graft.transfer.judge import JudgeError, check_reward_model, reward_judge, rule_judge
from cl_graft.transfer.sources import SourceError


def test_rules_find_right_and_wrong() -> None:
    sum_ = Example("2+3?", "#### 5")
    assert rule_judge(Scoring("number"), False)(sum_, ["so 5", "4", "5.0", ""]) == [1, 0, 1, 0]
    assert rule_judge(Scoring("exact"), False)(Example("q", "yes"), ["yes\n", "Yes"]) == [1, 0]


def test_tests_run_in_the_sandbox() -> None:
    example = Example("q", "", tests=("assert f(2) == 4", "assert f(3) == 9"))
    answers = ["def f(x): return x*x", "def f(x): return 2*x", "def f("]
    assert rule_judge(Scoring("tests"), True)(example, answers) == [1, 0, 0]


def test_a_rule_that_fails_names_the_prompt() -> None:
    example = Example("Sort it.", "", tests=("assert f() == sorted([1, 'a'])",))
    with pytest.raises(JudgeError, match="'tests' fails on answers to prompt 'Sort it.'"):
        rule_judge(Scoring("tests"), True)(example, ["def f(): pass"])


def test_a_reward_is_the_models_one_output_for_prompt_and_answer(reward_model: Path) -> None:
    """Against one forward pass for each answer by itself, without padding."""
    answers = ["yes", "no, never", "a much longer answer than the others"] * 7
    found = reward_judge(str(reward_model), None, chat=False)(Example("Q?", ""), answers)
    model = AutoModelForSequenceClassification.from_pretrained(reward_model).eval()
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    with torch.no_grad():
        alone = [
            model(**tokenizer(f"Q?{a}</s>", return_tensors="pt")).logits.item() for a in answers[:3]
        ]
    assert found == pytest.approx(alone * 7, abs=1e-5)
    assert len(set(found[:3])) == 3


def test_an_input_too_long_loses_its_start(reward_model: Path) -> None:
    judge = reward_judge(str(reward_model), None, chat=False)
    assert judge(Example("x" * 200, ""), ["answer"]) == judge(Example("x" * 150, ""), ["answer"])


def test_a_conversation_is_put_into_the_template(reward_model: Path, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(reward_model, tmp_path / "chat"))
    with pytest.raises(SourceError, match="no chat template"):
        reward_judge(str(folder), None, chat=True)(Example("hi", ""), ["ho"])
    (folder / "chat_template.jinja").write_text(
        "<s>{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}{% endfor %}"
    )
    found = reward_judge(str(folder), None, chat=True)(Example("hi", ""), ["ho"])
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    inputs = AutoTokenizer.from_pretrained(folder)("[u]hi[a]ho", return_tensors="pt")
    with torch.no_grad():
        assert found == pytest.approx([model(**inputs).logits.item()], abs=1e-5)


def test_what_is_no_reward_model(
    two_outputs: Path, torn: Path, reward_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match="has 2 outputs and a reward model has one"):
        check_reward_model(str(two_outputs), None)
    with pytest.raises(SourceError, match="is no reward model: its config names GPT2LMHeadModel"):
        check_reward_model(str(torn), None)
    import shutil

    folder = Path(shutil.copytree(torn, tmp_path / "headless"))
    shutil.copy(reward_model / "config.json", folder)
    config = (folder / "config.json").read_text().replace('"n_positions": 64', '"n_positions": 256')
    (folder / "config.json").write_text(config.replace('"n_inner": null', '"n_inner": 64'))
    with pytest.raises(SourceError, match=r"lacks weights \(score.weight\)"):
        reward_judge(str(folder), None, chat=False)
