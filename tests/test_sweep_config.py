"""A sweep as a user writes it: what its cells are, and what is said of a mistake in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from cl_graft.errors import CLGraftError
from cl_graft.sweep_config import Sweep, read, sweep_of, with_options

SMALL: dict[str, Any] = {"scenarios": ["mini"], "strategies": ["graftllm"]}


def labels(**fields: Any) -> list[str]:
    return [f"{c.label} {c.seed} {c.budget}" for c in sweep_of(SMALL | fields, "here").cells()]


def refusal(**fields: Any) -> str:
    with pytest.raises(CLGraftError) as caught:
        sweep_of(SMALL | fields, "here").cells()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- cells -------------------------------------------------------------------------------------


def test_every_combination_once_seeds_outermost() -> None:
    assert labels(strategies=["lora", "graftllm", "lora"], seeds=[1, 0], budgets=["5%", "10%"]) == [
        *("lora 1 5%", "graftllm 1 5%", "lora 1 10%", "graftllm 1 10%"),
        *("lora 0 5%", "graftllm 0 5%", "lora 0 10%", "graftllm 0 10%"),
    ]


def test_a_list_where_the_option_takes_none_is_a_grid() -> None:
    found = labels(strategies=["graftllm", {"lora": {"rank": [8, 32], "convention": "summed"}}])
    assert found == [
        "graftllm 0 10%",
        "lora(convention=summed, rank=8) 0 10%",
        "lora(convention=summed, rank=32) 0 10%",
    ]
    assert (
        len(labels(strategies=[{"lora": {"rank": [1, 2], "learning_rate_scale": [1.0, 3.0]}}])) == 4
    )


def test_a_list_where_the_option_takes_one_is_its_value(tmp_path: Path) -> None:
    file = tmp_path / "listed.py"
    file.write_text(
        "from cl_graft.strategy import compressor\n\n\n@compressor()\n"
        "def listed(delta, context, *, ranks: list[int] = [1]):\n    return {}\n"
    )
    (config,) = sweep_of(SMALL | {"strategies": [{str(file): {"ranks": [8, 32]}}]}, "").cells()
    assert config.options == {"listed": {"ranks": [8, 32]}}


def test_scenarios_have_grids_too_and_options_stay_with_their_owner() -> None:
    found = sweep_of(
        {
            "scenarios": [{"mini": {"steps": [5, 6]}}],
            "strategies": ["graftllm", {"lora": {"rank": 4}}],
        },
        "",
    ).cells()
    assert [c.options for c in found] == [
        {"mini": {"steps": 5}},
        {"mini": {"steps": 5}, "lora": {"rank": 4}},
        {"mini": {"steps": 6}},
        {"mini": {"steps": 6}, "lora": {"rank": 4}},
    ]


def test_one_value_needs_no_list_and_a_number_is_a_budget() -> None:
    made = sweep_of({"scenarios": "mini", "strategies": "lora", "seeds": 3, "budgets": 1000}, "")
    assert (made.seeds, made.budgets) == ([3], ["1000"])
    with pytest.raises(CLGraftError, match="budget '1000' is not a size"):
        made.cells()


def test_other_fields_are_those_of_every_cell(tmp_path: Path) -> None:
    fields = {"out": tmp_path, "launch": {"processes": 2}, "threads": 2, "wandb": "off"}
    (config,) = sweep_of(SMALL | fields, "").cells()
    assert (config.out, config.launch.processes, config.threads) == (tmp_path, 2, 2)


def test_a_saved_sweep_is_read_as_the_same_cells(tmp_path: Path) -> None:
    fields = {
        "strategies": ["graftllm", {"lora": {"rank": [8, 32]}}],
        "seeds": [0, 1],
        "launch": {"processes": 2},
        "train_on": {"math": tmp_path},
        "out": tmp_path,
    }
    asked = sweep_of(SMALL | fields, "")
    asked.save(tmp_path)
    again = sweep_of(read(tmp_path / "sweep.yaml") | {"out": tmp_path}, "")
    assert again.cells() == asked.cells() and len(again.cells()) == 6


def test_an_option_on_the_command_line_goes_into_every_entry_of_its_owner() -> None:
    fields = {"scenarios": "mini", "strategies": ["graftllm", {"lora": {"rank": 8}}, "lora"]}
    found = with_options(fields, [("lora", "rank", 16), ("mini", "steps", 4)])
    assert found["strategies"] == ["graftllm", {"lora": {"rank": 16}}, {"lora": {"rank": 16}}]
    assert found["scenarios"] == [{"mini": {"steps": 4}}]
    with pytest.raises(CLGraftError, match="named 'svd'; known: graftllm, lora, mini"):
        with_options(fields, [("svd", "rank", 16)])


# --- mistakes ----------------------------------------------------------------------------------


def test_a_wrong_field_is_answered_with_the_nearest() -> None:
    assert "no field of a sweep (here) named 'seed'; did you mean seeds" in refusal(seed=3)
    assert "named 'processs'; did you mean processes" in refusal(launch={"processs": 3})
    assert "did you mean gpus" in refusal(ray={"gpu": 3})


def test_a_field_without_a_value_is_not_set() -> None:
    """As YAML reads `models:` alone."""
    assert labels(models=None, budgets=None, launch=None) == labels()


def test_off_is_off() -> None:
    """YAML reads `wandb: off` as false."""
    assert sweep_of(SMALL | yaml.safe_load("wandb: off"), "").wandb == "off"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"strategies": ["graftlm"]}, "did you mean graftllm"),
        ({"strategies": [{"lora": {"rnk": 8}}]}, "did you mean rank"),
        ({"strategies": [{"lora": {"rank": [8, "big"]}}]}, "lora.rank='big' should be int"),
        ({"strategies": [{"lora": {"rank": []}}]}, "grid of no value"),
        ({"strategies": [{"lora": {"rank": 8}, "svd": {}}]}, "neither a name nor one name"),
        ({"strategies": []}, "names no strategies"),
        ({"seeds": []}, "seeds: List should have at least 1 item"),
        ({"seeds": ["one"]}, "seeds.0: Input should be a valid integer"),
        ({"strategies": [{"lora": 5}]}, "5 is no option of lora; write `- lora: {rank: 8}`"),
        ({"strategies": [{"lora": "rank"}]}, "'rank' is no option of lora"),
        ({"wandb": "ofline"}, "there is no W&B mode (here) named 'ofline'; did you mean offline"),
        ({"executor": "rai"}, "there is no executor (here) named 'rai'; did you mean ray"),
        ({"launch": 3}, "launch is 3; write its settings: processes, zero"),
        ({"launch": "auto"}, "launch is 'auto'; write its settings"),
        ({"ray": True}, "ray is True; write its settings: address"),
        ({"workers": -1}, "workers: Input should be greater than or equal to 0"),
        ({"launch": {"zero": 1}}, "launch.zero"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(fields: dict[str, Any], words: str) -> None:
    assert words in refusal(**fields)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("scenarios: [mini\nstrategies: lora\n", "line 2 is not YAML"),
        ("- mini\n", "sets no fields"),
        ("", "sets no fields"),
        ("!!python/object/apply:os.system ['true']", "is not YAML"),
        ("seeds: 2024-99-99", "is not YAML"),
        ("[" * 5000, "is not YAML"),
    ],
)
def test_a_file_that_is_none(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(text)
    with pytest.raises(CLGraftError, match=words):
        read(file)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CLGraftError, match="No such file.*cl-graft init"):
        read(tmp_path / "sweep.yaml")


def test_every_field_can_be_written_as_yaml() -> None:
    said = Sweep(**SMALL).model_dump(mode="json")
    assert Sweep(**yaml.safe_load(yaml.safe_dump(said))) == Sweep(**SMALL)
