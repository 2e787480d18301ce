"""What cannot be is refused before anything is computed, in one sentence, by every command that reads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cl_graft.errors import CLGraftError
from cl_graft.task import Preference, Task, Training
from tests.command import Call

SMALL = {"steps": 2, "train_size": 32, "test_size": 4, "tasks": "math"}
COMMANDS = ("run", "sweep", "validate", "plan")
WRONG = {
    "a rank above the budget": ("lora", "rank", 8, "lora.rank=8 takes 252", "fits is 3."),
    "a rank above the matrices": (
        "lora",
        "rank",
        25,
        "is more than the 24 that there are",
        "is 3.",
    ),
    "no convention": ("lora", "convention", "pertask", "no convention of lora named 'pertask'", ""),
    "no rank": ("o_lora", "rank", 0, "o_lora.rank=0 is not 1 or more; the nearest is 1.", ""),
    "steps below none": (
        "mini",
        "steps",
        -3,
        "mini.steps=-3 is not 1 or more; the nearest is 1.",
        "",
    ),
    "a share above one": (
        "graftllm",
        "alpha",
        1.5,
        "alpha=1.5 is not a number from 0, up to 1",
        "",
    ),
    "a share above the budget": (
        "graftllm",
        "alpha",
        0.9,
        "takes more than the budget",
        "is 0.213.",
    ),
}


def words(command: str, strategy: str, options: dict[str, Any]) -> list[str]:
    """The command line of one cell with these options of its strategy; `validate` reads a file."""
    scenario = {**SMALL, **options.pop("mini", {})}
    if command == "validate":
        said = {
            "scenarios": [{"mini": scenario}],
            "strategies": [{strategy: options}],
            "models": ["nano-llama"],
        }
        Path("sweep.yaml").write_text(yaml.safe_dump(said))
        return ["validate", "sweep.yaml"]
    told = [("mini", scenario), (strategy, options)]
    sets = [f"{owner}.{k}={v}" for owner, of in told for k, v in of.items()]
    plural = {"scenario": "mini", "strategy": strategy, "model": "nano-llama"}
    if command != "run":
        plural = {"scenarios": "mini", "strategies": strategy, "models": "nano-llama"}
    named = [word for name, value in plural.items() for word in (f"--{name}", value)]
    return [command, *named, "--out", "out", *(word for s in sets for word in ("--set", s))]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_is_refused_before_anything_is_computed(
    what: str, command: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    owner, option, value, sentence, end = WRONG[what]
    strategy = "lora" if owner == "mini" else owner
    given = {"mini": {option: value}} if owner == "mini" else {option: value}
    done = call(*words(command, strategy, given))
    assert done.code == 1
    said = done.err.strip().splitlines()[-1]
    assert said.startswith("error: ") and sentence in said and said.endswith(end or said)
    assert not list(tmp_path.glob("out/*/cell.json")) and not list(tmp_path.glob("out/cache/*"))


def test_the_largest_rank_told_is_accepted_and_one_more_is_not(build: Callable[..., Any]) -> None:
    for name in ("lora", "o_lora", "svd", "svd_quant"):
        with pytest.raises(CLGraftError) as refused:
            build(name, rank=24).require_possible()
        nearest = int(str(refused.value).rstrip(".").split()[-1])
        build(name, rank=nearest).require_possible()
        with pytest.raises(CLGraftError, match=f"largest that fits is {nearest}"):
            build(name, rank=nearest + 1).require_possible()


def test_every_strategy_that_is_possible_says_so(build: Callable[..., Any]) -> None:
    from cl_graft import plugins

    for name in plugins.names("strategy"):
        build(name).require_possible()
        if plugins.load("strategy", name).budgeted:
            with pytest.raises(CLGraftError, match=r"the budget 300B \(300 bytes\)"):
                build(name, budget="300B").require_possible()


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        (lambda: Training(steps=-1), "training.steps=-1 is not 1 or more; the nearest is 1."),
        (lambda: Training(batch=0), "training.batch=0 is not 1 or more"),
        (lambda: Training(learning_rate=0.0), "training.learning_rate=0.0 is not a number above 0"),
        (lambda: Training(warmup=1.5), "training.warmup=1.5 is not a number from 0, up to 1"),
        (lambda: Training(max_length=0), "training.max_length=0 is not 1 or more"),
        (lambda: Training(epochs=-1.0), "training.epochs=-1.0 is not a number above 0; give one."),
        (lambda: Preference(samples=1), "preference.samples=1 is not 2 or more; the nearest is 2."),
        (lambda: Preference(beta=0.0), "preference.beta=0.0 is not a number above 0"),
        (lambda: Task("t", (), (), "exact", max_new_tokens=0), "max_new_tokens=0 is not 1 or more"),
    ],
)
def test_a_recipe_that_trains_nothing_is_refused(recipe: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(CLGraftError) as refused:
        recipe()
    assert sentence in str(refused.value)


def test_the_file_that_init_writes_is_valid_and_fits_its_budget(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("init").code == 0
    done = call("validate", "sweep.yaml")
    assert done.code == 0 and done.out.endswith("sweep.yaml is valid: 21 cells.\n")
