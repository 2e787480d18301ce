"""What names an experiment: the same folder for the same experiment, and never one folder for two."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cl_graft.config import RunConfig

BASE = {"scenario": "mini", "strategy": "lora"}


def config(**fields: Any) -> RunConfig:
    return RunConfig(**{**BASE, **fields})


def test_the_folder_of_a_plain_experiment_can_be_read() -> None:
    assert config(seed=3).cell == "mini__lora__mini-llama__10pct__seed3"
    assert config(budget="2.5%:weights").cell == "mini__lora__mini-llama__2.5pctweights__seed0"
    assert config(strategy="model_tailor", budget="800MB").cell == (
        "mini__model_tailor__mini-llama__800MB__seed0"
    )


def test_options_and_odd_names_add_a_digest() -> None:
    digest = "[0-9a-f]{8}"
    for changed, pattern in (
        (
            {"options": {"lora": {"rank": 8}}},
            f"mini__lora__rank-8-{digest}__mini-llama__10pct__seed0",
        ),
        ({"task_ids": "inferred"}, f"mini__lora__inferred-{digest}__mini-llama__10pct__seed0"),
        ({"options": {"lora": {"x": "a" * 99}}}, f"mini__lora__x-a{{38}}-{digest}__mini-.*"),
        ({"options": {"lora": {"": "/__"}}}, f"mini__lora__{digest}__mini-llama__10pct__seed0"),
        ({"threads": 2}, f"mini__lora__{digest}__mini-llama__10pct__seed0"),
        ({"model": "org/some_model"}, f"mini__lora__{digest}__org-some-model__10pct__seed0"),
        ({"strategy": "my/own.py"}, f"mini__own__{digest}__mini-llama__10pct__seed0"),
    ):
        assert re.fullmatch(pattern, config(**changed).cell), changed


# --- equal iff the experiment is ---

NAMES = st.sampled_from(
    ["a", "b", "a_b", "a__b", "a_", "_a", "a.py", "x/a.py", "y/a.py", "./a.py", "a-b", "a b", "é"]
)
MODELS = st.sampled_from(
    ["mini-llama", "o/m", "o-m", "o/m_x", "o/m-x", "/f/m", "/f-m", "./m", "m", "-m", "m.", "a__b"]
)
BUDGETS = st.sampled_from(["10%", "10%:weights", "1%", "2.5%", "25%", "10MB", "10B", "1GB"])
VALUES = st.one_of(st.none(), st.booleans(), st.integers(-2, 9), st.sampled_from(["", "a", "1"]))
OPTIONS = st.dictionaries(
    st.sampled_from(["a", "b", "other"]),
    st.dictionaries(st.sampled_from(["x", "y"]), VALUES, max_size=2),
    max_size=2,
)
EXPERIMENTS = st.fixed_dictionaries(
    {
        "scenario": NAMES,
        "strategy": NAMES,
        "model": MODELS,
        "seed": st.integers(-3, 30),
        "budget": BUDGETS,
        "options": OPTIONS,
        "threads": st.integers(1, 3),
    }
)


def experiment(c: RunConfig) -> tuple[Any, ...]:
    """All that can change a result, in a form to compare; options of other plugins cannot."""
    involved = (Path(c.scenario).stem if c.scenario.endswith(".py") else c.scenario,)
    involved += (Path(c.strategy).stem if c.strategy.endswith(".py") else c.strategy,)
    chosen = {
        (owner, option, type(value).__name__, value)
        for owner in involved
        for option, value in c.options.get(owner, {}).items()
    }
    return c.scenario, c.strategy, c.model, c.seed, c.budget, c.threads, frozenset(chosen)


@settings(deadline=None)
@given(EXPERIMENTS, EXPERIMENTS, st.sets(st.sampled_from(["model", "seed", "budget", "options"])))
@example({**BASE, "model": "o/m_x"}, {**BASE, "model": "o/m-x"}, set())
@example({**BASE, "strategy": "x/a.py"}, {**BASE, "strategy": "y/a.py"}, set())
@example({"scenario": "a__b", "strategy": "c"}, {"scenario": "a", "strategy": "b__c"}, set())
@example({**BASE, "model": "a"}, {**BASE, "model": "a", "options": {"lora": {}}}, set())
@example({**BASE, "options": {"lora": {"x": True}}}, {**BASE, "options": {"lora": {"x": 1}}}, set())
def test_cells_are_equal_iff_the_experiments_are(
    one: dict[str, Any], two: dict[str, Any], shared: set[str]
) -> None:
    first, second = RunConfig(**one), RunConfig(**{**two, **{k: one[k] for k in shared}})
    assert (first.cell == second.cell) == (experiment(first) == experiment(second))


@settings(deadline=None)
@given(EXPERIMENTS, st.sampled_from(["off", "online"]), st.booleans())
def test_where_and_how_a_cell_is_run_does_not_rename_it(
    fields: dict[str, Any], wandb: Any, consent: bool
) -> None:
    elsewhere = {"data_dir": Path("/d"), "out": Path("/o"), "wandb": wandb, "track": ["csv"]}
    there = RunConfig(**fields, **elsewhere, allow_code_execution=consent)
    assert there.cell == RunConfig(**fields).cell


@settings(deadline=None)
@given(EXPERIMENTS)
def test_a_cell_is_the_name_of_one_folder(fields: dict[str, Any]) -> None:
    """A model's or a plugin's name must not lead out of the results folder."""
    assert re.fullmatch(r"[A-Za-z0-9._-]+", RunConfig(**fields).cell)


def test_the_order_in_which_options_were_set_does_not_matter() -> None:
    one = config(options={"lora": {"rank": 8, "dropout": 0.1}, "mini": {"steps": 3}})
    two = config(options={"mini": {"steps": 3}, "lora": {"dropout": 0.1, "rank": 8}})
    assert one.cell == two.cell and one.label == two.label


# --- labels ---


@pytest.mark.parametrize(
    ("fields", "label", "scenario_label"),
    [
        ({}, "lora", "mini"),
        ({"options": {"ties": {"density": 0.5}}}, "lora", "mini"),
        ({"options": {"lora": {"rank": 8}}}, "lora(rank=8)", "mini"),
        ({"options": {"mini": {"dpo": True}}}, "lora", "mini(dpo=True)"),
        (
            {"options": {"lora": {"rank": 8, "convention": "summed"}}},
            "lora(convention=summed, rank=8)",
            "mini",
        ),
        ({"strategy": "x/own.py", "options": {"own": {"k": 1}}}, "own(k=1)", "mini"),
        ({"scenario": "x/stream.py"}, "lora", "stream"),
        ({"threads": 2}, "lora(threads=2)", "mini"),
        (
            {"train_on": {"math": "built/a"}, "options": {"lora": {"rank": 8}}},
            "lora(rank=8, train_on.math=built/a)",
            "mini",
        ),
        (
            {"train_on": {"math": "made/math-{seed}", "code": "made/code-{seed}", "cipher": "c"}},
            "lora(train_on.cipher=c, train_on.math+code=made/{task}-{seed})",
            "mini",
        ),
    ],
)
def test_labels(fields: dict[str, Any], label: str, scenario_label: str) -> None:
    assert config(**fields).label == label
    assert config(**fields).scenario_label == scenario_label


# --- a frozen, closed, serialisable record ---


def test_fields_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValidationError, match="stratgy"):
        config(stratgy="lora")


@pytest.mark.parametrize(
    "wrong",
    [
        {"seed": "zero"},
        {"seed": 1.5},
        {"wandb": "sometimes"},
        {"options": {"lora": 3}},
        {"options": [1]},
        {"threads": "all"},
        {"model": None},
    ],
)
def test_values_of_the_wrong_type_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        config(**wrong)


def test_scenario_and_strategy_must_be_given() -> None:
    for field in BASE:
        with pytest.raises(ValidationError, match=field):
            RunConfig(**{k: v for k, v in BASE.items() if k != field})


def test_a_config_is_frozen() -> None:
    made = config()
    with pytest.raises(ValidationError, match="frozen"):
        made.seed = 1  # type: ignore[misc]
    assert made.seed == 0


def test_defaults_are_not_shared() -> None:
    config().options["lora"] = {"rank": 8}
    assert config().options == {}


@settings(deadline=None)
@given(EXPERIMENTS)
def test_a_config_survives_json(fields: dict[str, Any]) -> None:
    made = RunConfig(**fields, data_dir=Path("d"), wandb="off", allow_code_execution=True)
    assert RunConfig.model_validate_json(made.model_dump_json()) == made
