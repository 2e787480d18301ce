"""The commands of a report make its cells anew: read back as a shell and the command line read them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import yaml

from cl_graft.cli.options import sweep_from
from cl_graft.config import RunConfig
from cl_graft.report.provenance import commands
from tests.report.test_tables import cell as made


def cell(**fields: Any) -> dict[str, Any]:
    fields = {"scenario": "mini", "strategy": "lora", "model": "nano-llama", **fields}
    config = RunConfig(**fields).experiment()
    return made(fields["strategy"], config=config, seed=config["seed"], reads_data_dir=False)


def asked(words: list[str], file: Path | None = None) -> set[str]:
    """The cells that this command makes."""
    assert words[:2] == ["cl-graft", "sweep"] and words.pop() == "--allow-code-execution"
    given: dict[str, Any] = {"set_": [], "train_on": []}
    options = words[3:] if file else words[2:]
    for option, value in zip(options[::2], options[1::2], strict=True):
        name = {"--set": "set_", "--train-on": "train_on"}.get(option)
        if name:
            given[name].append(value)
        else:
            given[option[2:].replace("-", "_")] = value
    return {config.cell for config in sweep_from(file, given).cells()}


def test_one_command_makes_all_cells_that_differ_in_strategy_and_seed() -> None:
    cells = [cell(strategy=name, seed=seed) for name in ("lora", "ties") for seed in (0, 1)]
    (command,) = commands(cells)
    assert asked(shlex.split(command)) == {RunConfig(**c["config"]).cell for c in cells}


def test_every_word_is_quoted_that_needs_it() -> None:
    one = cell(
        model="a model; rm -rf $HOME",
        options={"lora": {"rank": 8, "convention": "summed"}},
        train_on={"math": "my files/it's"},
    )
    (command,) = commands([one])
    assert "'a model; rm -rf $HOME'" in command
    assert asked(shlex.split(command)) == {RunConfig(**one["config"]).cell}


def test_all_that_decides_the_result_is_told() -> None:
    one = cell(threads=2, task_ids="inferred", router="my own.py", budget="5%")
    (command,) = commands([one])
    assert "--threads 2 --router 'my own.py'" in command
    assert asked(shlex.split(command)) == {RunConfig(**one["config"]).cell}


def test_names_with_commas_are_told_by_a_file(tmp_path: Path) -> None:
    fields = {"model": "a,b", "options": {"lora": {"rank": 8}}, "train_on": {"math": "built"}}
    cells = [cell(**fields, threads=2, task_ids="inferred", seed=seed) for seed in (0, 1)]
    (command,) = commands(cells)
    first, *lines, end, last = command.split("\n")
    assert (first, end) == ("cat > sweep.yaml <<'END'", "END")
    file = tmp_path / "sweep.yaml"
    file.write_text("\n".join(lines))
    assert yaml.safe_load(file.read_text())["threads"] == 2
    assert asked(shlex.split(last), file) == {RunConfig(**c["config"]).cell for c in cells}
