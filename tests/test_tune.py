"""Tuning: which trials there are, what they see, which is chosen, and what later runs make of it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml

import cl_graft
from cl_graft import plugins, presets
from cl_graft.cli.options import sweep_from
from cl_graft.config import RunConfig, Tuned
from cl_graft.errors import AuthorMistake, CLGraftError
from cl_graft.experiment import executors
from cl_graft.experiment.attempt import attempt
from cl_graft.experiment.executors import Outcome, local
from cl_graft.experiment.prepare import scenario_of
from cl_graft.experiment.rehearsal import BITS, rehearsal
from cl_graft.experiment.tune import RATES, best_of, design, edges
from cl_graft.presets import Trial
from cl_graft.ranges import NotNegative, Strength
from cl_graft.report.provenance import commands, tuning
from cl_graft.store.digests import data_fingerprint
from cl_graft.store.files import RecordError
from cl_graft.store.record import CellFolder
from cl_graft.store.result import collect
from cl_graft.task import Scenario
from tests.command import Call, assert_refused

SETS = {"tasks": "math,cipher", "steps": 1, "batch": 2, "train_size": 8, "test_size": 4}
BRIEF = [word for name, value in SETS.items() for word in ("--set", f"mini.{name}={value}")]
VALUES = (1.0, 2.0, 3.0, 4.0, 5.0)
# Keeps nothing; diverges at a high rate, or at any where a file says so.
PICKY = """
from pathlib import Path
from typing import Annotated

from cl_graft import Strategy
from cl_graft.errors import Diverged
from cl_graft.ranges import Positive, Strength


class picky(Strategy):
    def learn(self, task, context, *, force: Annotated[Positive, Strength(1.0, 2.0)] = 1.0):
        low = 0.0 if Path(__file__).with_name("never").exists() else 3e-3
        if task.training.learning_rate > low:
            raise Diverged("the loss is no number")
        return {}
"""


def words(out: Path, *strategies: str, trials: int = 2) -> list[str]:
    asked = ["tune", "--scenarios", "mini", "--strategies", ",".join(strategies), "--out", str(out)]
    asked += ["--models", "nano-llama", "--trials", str(trials), "--wandb", "off"]
    return [*asked, *BRIEF]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Cells are run in this process, one after another; the names of those that were begun."""
    begun: list[str] = []

    def run(cells: Sequence[RunConfig], report: Any) -> Iterator[tuple[RunConfig, Outcome]]:
        for config in cells:
            begun.append(config.cell)
            yield config, attempt(config, lambda *_: None, True)

    monkeypatch.setattr(executors, "executor", lambda asked, cells: run)
    monkeypatch.setattr(local, "apart", lambda task, report: task(report))
    return begun


# --- trials ---


def test_a_grid_of_two_is_tried_at_the_defaults_and_then_evenly() -> None:
    tried = design(3.0, VALUES, 8, seed=0)
    assert tried[0] == (1.0, 3.0)
    assert len(tried) == len(set(tried)) == 8
    assert design(3.0, VALUES, 4, seed=0) == tried[:4], "a smaller budget is a part of a larger"
    assert design(3.0, VALUES, 8, seed=1) != tried == design(3.0, VALUES, 8, seed=0)
    whole = design(3.0, VALUES, 99, seed=0)
    assert len(whole) == len(set(whole)) == 35
    assert len(design(None, VALUES, 99, seed=0)) == 36, "a default that is none of the values"
    assert len(design(None, VALUES[:2], 99, seed=0)) == 15


@pytest.mark.parametrize("seed", range(10))
def test_eight_trials_have_every_rate_and_every_strength(seed: int) -> None:
    tried = design(None, VALUES, 36, seed)[1:]
    for start in range(0, 35, 7):
        rates, values = zip(*tried[start : start + 7], strict=True)
        assert ({*rates}, {*values}) == ({*RATES}, {*VALUES})


def test_methods_share_their_rates() -> None:
    several = [design(None, values, 8, 0)[1:] for values in (VALUES, VALUES[:3], (7, 8, 9, 10, 11))]
    assert len({tuple(rate for rate, _ in tried) for tried in several}) == 1


def test_without_a_strength_the_rates_alone_are_tried_the_nearest_first() -> None:
    assert [rate for rate, _ in design(None, (), 8, 0)] == [1.0, 0.5, 2.0, 0.25, 4.0, 0.125, 0.0625]
    assert [rate for rate, _ in design(None, (), 3, 0)] == [1.0, 0.5, 2.0]


@pytest.mark.parametrize("name", plugins.names("strategy"))
def test_strengths_are_options_whose_values_are_in_their_ranges(name: str) -> None:
    kind = plugins.load("strategy", name)
    option, values = plugins.strength(kind) or ("", ())
    for value in values:
        plugins.check_options("strategy", name, kind, {option: value})
    if values:
        assert list(values) == sorted(set(values)) and len(values) == 5
        assert plugins.options(kind)[option] in (*values, None)


def test_which_strengths_are_declared() -> None:
    """Also where a signature is read without importing it, for the options of a sweep."""
    known = {
        name: plugins.strength(plugins.load("strategy", name)) for name in ("ewc", "lora", "ties")
    }
    assert known["ewc"] == ("weight", (1e2, 1e3, 1e4, 1e5, 1e6))
    assert known["ties"] == ("density", (0.05, 0.1, 0.2, 0.4, 0.8))
    assert known["lora"] is None
    declared = plugins.declared("strategy", "ewc")
    assert declared and plugins.strength(declared) == known["ewc"]


def test_a_method_has_one_strength() -> None:
    def two(
        *, a: Annotated[NotNegative, Strength(1, 2)] = 1, b: Annotated[float, Strength(1, 2)] = 1
    ) -> None: ...

    with pytest.raises(AuthorMistake, match="marks a and b as its strength; mark one of them"):
        plugins.strength(two)


# --- what a trial sees ---


def test_a_trial_sees_the_first_tasks_and_their_validation_in_the_place_of_tests() -> None:
    config = RunConfig(scenario="mini", strategy="lora", options={"mini": {"train_size": 40}})
    whole = scenario_of(config)
    seen = scenario_of(config.model_copy(update={"tuned": Tuned(first=2)}))
    assert seen.task_names == ("math", "code") and seen.general is None
    for task, before in zip(seen.tasks, whole.tasks, strict=False):
        assert (task.train, task.test) == (before.train, before.validation)
        assert not {e.prompt for e in task.test} & {e.prompt for e in (*before.test, *before.train)}
        assert task.metrics == (before.metrics[0], BITS)


def test_what_comes_tuned_was_tuned_on_the_data_of_today() -> None:
    """A digest of data that changes with the code, and not with the data, would refuse all finished cells, too."""
    (file,) = (Path(cl_graft.__file__).parent / "tuned").glob("*.json")
    tuned_on = {preset["about"]["data"] for preset in json.loads(file.read_text())["presets"]}
    config = RunConfig(scenario="mini", strategy="lora", tuned=Tuned(first=2))
    assert data_fingerprint(scenario_of(config)) in tuned_on


def changed(scenario: Scenario, **changes: Any) -> Scenario:
    return replace(scenario, tasks=tuple(replace(task, **changes) for task in scenario.tasks))


def test_bits_score_both_tasks_where_one_cannot_be_scored(tiny_scenario: Scenario) -> None:
    """A mean of a share and of bits would say nothing."""
    first, second = tiny_scenario.tasks
    without = replace(first, score="tests")  # whose examples have none
    seen = rehearsal(replace(tiny_scenario, tasks=(without, second)), 2)
    assert [task.metrics for task in seen.tasks] == [(BITS,), (BITS,)]
    assert rehearsal(changed(tiny_scenario, score=BITS), 2).tasks[0].metrics == (BITS,)


def test_a_task_without_validation_cannot_be_tuned_on(tiny_scenario: Scenario) -> None:
    few = changed(tiny_scenario, train=tiny_scenario.tasks[0].train[:8], validation=())
    with pytest.raises(CLGraftError, match="'math' has no validation examples to tune on"):
        rehearsal(few, 2)


# --- what is chosen ---


def trial(rate: float, score: float | None, bits: float | None = 1.0, **options: float) -> Trial:
    return Trial(
        options=options,
        learning_rate_scale=rate,
        score=score,
        bits=bits,
        failed="" if score else "x",
    )


def test_the_highest_score_is_chosen_then_the_fewest_bits_then_the_earliest() -> None:
    low, more, fewer, again = (
        trial(1, 0.5, 0.1),
        trial(2, 0.6, 2.0),
        trial(4, 0.6, 1.5),
        trial(0.5, 0.6, 1.5),
    )
    assert best_of([low, more, fewer, again]) is fewer
    assert best_of([low, more, again, fewer]) is again
    assert best_of([trial(1, None, None), low]) is low


def test_defaults_stay_unless_a_trial_beats_them_by_more_than_its_error() -> None:
    defaults = trial(1, 0.5)
    near, far, nearer = (
        trial(2, 0.53).model_copy(update={"stderr": 0.04}),
        trial(4, 0.56).model_copy(update={"stderr": 0.04}),
        trial(4, 0.4, 0.1),
    )
    assert best_of([defaults, near, nearer]) is defaults
    assert best_of([defaults, near, far]) is far
    assert best_of([trial(1, None), near, nearer]) is near, "defaults that fail are no choice"


def test_what_is_at_an_end_of_what_was_tried_is_told() -> None:
    tried = [trial(1, 0.5, weight=3.0), trial(2, 0.6, weight=2.0), trial(0.5, 0.7, weight=1.0)]
    assert list(edges(tried[0], tried)) == ["weight"]
    assert list(edges(tried[2], tried)) == ["learning_rate_scale", "weight"]
    assert list(edges(tried[0], tried[:1])) == [], "one value has no range"


# --- the command ---


def presets_of(out: Path) -> dict[str, dict[str, Any]]:
    held = json.loads((out / "mini__nano-llama.json").read_text())
    return {preset["strategy"]: preset for preset in held["presets"]}


def test_methods_are_tuned_alike_resumed_and_run_as_tuned(
    call: Call, here: list[str], tmp_path: Path
) -> None:
    out, asked = tmp_path / "tuning", ("lora", "ewc", "sequential", "graftllm")
    done = call(*words(out, *asked))
    assert done.code == 0, done
    assert len(here) == 8 and done.out.count("chosen") >= 4
    found = presets_of(out)
    assert sorted(found) == sorted(asked)
    assert found["lora"]["budget"] == "10%" and found["ewc"]["budget"] is None
    assert found["ewc"]["trials"][0]["options"] == {"weight": 1e4}, "the author's default"
    for preset in found.values():
        scores = [t["score"] for t in preset["trials"]]
        best = next(t for t in preset["trials"] if t["score"] == max(scores))
        assert len(scores) == 2 and None not in scores
        if scores[0] != scores[1]:
            assert preset["learning_rate_scale"] == best["learning_rate_scale"]
        assert preset["about"]["scored_by"] == {"math": "number", "cipher": "exact"}
    cells = [collect(path) for path in (out / "trials").glob("mini__*")]
    assert {tuple(cell["n"][-1]) for cell in cells} == {(64, 64)}, "the validation of mini"
    asks = (out / "trials" / "data").glob("*.jsonl")
    prompts = {json.loads(line)["prompt"] for file in asks for line in file.open()}
    made = scenario_of(RunConfig(scenario="mini", strategy="lora", options={"mini": SETS}))
    assert prompts == {e.prompt for task in made.tasks for e in task.validation}

    # one trial is lost: the same command makes it again, and nothing else
    before = (out / "mini__nano-llama.json").read_bytes()
    lost = found["ewc"]["trials"][1]["cell"]
    (out / "trials" / lost / "result.json").unlink()
    (out / "mini__nano-llama.json").unlink()
    assert call(*words(out, *asked)).code == 0
    assert here[8:] == [lost] and (out / "mini__nano-llama.json").read_bytes() == before

    # what was chosen is what is run, and told
    flags = ["--model", "nano-llama", "--preset", str(out), "--out", str(tmp_path / "run"), *BRIEF]
    one = ["run", "--scenario", "mini", "--wandb", "off", *flags, "--strategy"]
    assert call(*one, "ewc").code == 0
    (path,) = (tmp_path / "run").glob("mini__*")
    told, chosen = collect(path), found["ewc"]
    assert told["label"] == "ewc(preset=tuning)"
    assert told["options"]["weight"] == chosen["options"]["weight"]
    rate = told["config"]["tuned"]["learning_rate_scale"]
    assert rate == chosen["learning_rate_scale"]
    assert_refused(call(*one, "graftllm", "--budget", "50%"), "no preset of graftllm", "under 50%")


def picked(tmp_path: Path) -> Path:
    (tmp_path / "picky.py").write_text(PICKY)
    return tmp_path / "picky.py"


def test_a_trial_that_fails_is_told_and_never_chosen(
    call: Call, here: list[str], tmp_path: Path
) -> None:
    file, out = picked(tmp_path), tmp_path / "out"
    done = call(*words(out, str(file), trials=8))
    assert done.code == 0 and "the loss is no number" in done.out
    preset = presets_of(out)["picky"]
    failed = {t["learning_rate_scale"] for t in preset["trials"] if t["failed"]}
    assert (len(preset["trials"]), failed) == (8, {2.0, 4.0}), "mini trains at 2e-3"
    assert (preset["learning_rate_scale"], preset["options"]) == (1.0, {"force": 1.0})
    (tmp_path / "never").touch()
    done = call(*words(tmp_path / "other", str(file)))
    assert done.code == 1 and "no preset of picky: mend the causes" in done.err
    assert not (tmp_path / "other" / "mini__nano-llama.json").exists()
    (tmp_path / "never").unlink()
    again = words(tmp_path / "other", str(file))
    assert call(*again).code == 1, "a failed one is run again when that is asked for"
    assert call(*again, "--retry-failed").code == 0


def test_a_missing_preset_is_made_by_the_command_that_the_error_names(
    call: Call, here: list[str], tmp_path: Path
) -> None:
    file, out = picked(tmp_path), tmp_path / "mine"
    out.mkdir()
    asked = ["--scenarios", "mini", "--strategies", str(file), "--models", "nano-llama", *BRIEF]
    flags = [*asked, "--preset", str(out)]
    cells = ["sweep", *flags, "--wandb", "off", "--out", str(tmp_path / "run")]
    refused = call(*cells)
    assert_refused(refused, "no preset of picky on mini(batch=2", "from nano-llama under 10%")
    command = re.search(r"`cl-graft (.*)`", refused.err)
    assert command
    tune = [str(out) if word == "FOLDER" else word for word in shlex.split(command[1])]
    assert call(*tune, "--trials", "1", "--wandb", "off").code == 0
    assert call(*cells).code == 0
    assert_refused(call(*cells, "--set", "mini.steps=2"), "no preset of picky on mini")
    assert_refused(call(*cells, "--set", "picky.force=2.0"), "no preset of picky(force=2.0) on")
    assert_refused(call(*cells, "--models", "mini-llama"), "mini__mini-llama.json")


def test_an_option_that_is_given_is_not_tuned(call: Call, here: list[str], tmp_path: Path) -> None:
    file, out = picked(tmp_path), tmp_path / "out"
    both = ["--set", "picky.force=[1.0,2.0]"]
    assert call(*words(out, str(file), trials=2), *both).code == 0
    held = json.loads((out / "mini__nano-llama.json").read_text())["presets"]
    assert [p["given"] for p in held] == [{"force": 1.0}, {"force": 2.0}]
    assert [t["options"] for p in held for t in p["trials"]] == [{}] * 4


def test_bad_words_are_refused(call: Call, tmp_path: Path) -> None:
    assert_refused(call(*words(tmp_path, "ewc", trials=0)), "trials=0 is not 1 or more")
    assert_refused(call(*words(tmp_path, "ewk")), "did you mean ewc")
    run = ["run", "--scenario", "mini", "--strategy", "ewc", "--preset", "tund"]
    assert_refused(call(*run), "there is no preset 'tund'; give tuned, or the folder")


# --- presets ---


def test_a_sweep_file_names_a_preset(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(
        yaml.safe_dump({"scenarios": ["mini"], "strategies": ["ewc"], "preset": str(tmp_path)})
    )
    (tmp_path / "mini__mini-llama.json").write_text(
        json.dumps({"format": 1, "presets": [made().model_dump(mode="json")]})
    )
    (cell,) = sweep_from(file, {}).cells()
    assert cell.tuned and cell.tuned.values == {"learning_rate_scale": 0.5, "weight": 7.0}
    assert RunConfig(**cell.experiment()).cell == cell.cell
    plain = cell.model_copy(update={"preset": None, "tuned": None})
    assert plain.cell == "mini__ewc__mini-llama__10pct__seed0" != cell.cell
    assert cell.label == f"ewc(preset={tmp_path.name})"


def made(**changes: Any) -> presets.Preset:
    values: dict[str, Any] = {"strategy": "ewc", "scenario": "mini", "model": "mini-llama"}
    values |= {"tasks": ["math", "code"], "seed": 0, "options": {"weight": 7.0}}
    values |= {"learning_rate_scale": 0.5, "trials": [trial(0.5, 0.9, weight=7.0)]}
    return presets.Preset(**(values | changes))


def test_a_preset_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    presets.keep([made(), made(strategy="lora", budget="10%")], tmp_path)
    (file,) = presets.keep([made(learning_rate_scale=2.0), made(given={"gamma": 0.5})], tmp_path)
    found = [(p.strategy, p.given, p.learning_rate_scale) for p in presets.read(file)]
    assert found == [("ewc", {"gamma": 0.5}, 0.5), ("ewc", {}, 2.0), ("lora", {}, 0.5)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[", "cannot be read"),
        ("[]", "holds no presets"),
        ('{"format": 1, "presets": [{"strategy": "ewc"}]}', "holds no presets"),
        ('{"format": 9, "presets": []}', "of format 9, not 1; tune again into another folder"),
    ],
)
def test_a_file_that_holds_no_presets_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(RecordError, match=said) as error:
        presets.read(tmp_path / "bad.json")
    assert "\n" not in str(error.value)


def test_published_presets_are_whole() -> None:
    """Each is read by this code, and is of strategies and options that there are."""
    for file in presets.folder_of("tuned").glob("*.json"):
        for preset in presets.read(file):
            kind = plugins.load("strategy", preset.strategy)
            plugins.check_options("strategy", preset.strategy, kind, preset.options)
            assert presets.file_of(file.parent, preset.scenario, preset.model) == file


# --- a tuned rate ---


@pytest.mark.parametrize("name", ["sequential", "lora"])
def test_a_scale_of_two_is_a_recipe_of_twice_the_rate(
    name: str, build: Callable[..., Any], tiny_scenario: Scenario
) -> None:
    from cl_graft.stream import benchmark

    packs = []
    for scale, times in ((2.0, 1), (1.0, 2)):
        faster = tiny_scenario.with_training(learning_rate=times * 3e-3)
        strategy = build(name, scenario=faster)
        strategy.learning_rate_scale = scale
        strategy.train(benchmark(faster).train_stream[0], eval_streams=[])
        packs.append({n: e.parts for n, e in strategy.packs[0].tensors.items()})
    assert str(packs[0]) == str(packs[1])


# --- provenance ---


def cell(**fields: Any) -> dict[str, Any]:
    config = RunConfig(scenario="mini", strategy="ewc", **fields)
    about = {"scenario": config.scenario_label, "label": config.label, "model": config.model}
    about |= {"budget": config.budget, "seed": config.seed, "reads_data_dir": False}
    return about | {"config": config.experiment()}


def test_a_report_tells_what_was_tuned_and_what_was_not() -> None:
    tuned = cell(preset="tuned", tuned=made().tuned)
    lines = tuning([tuned, tuned | {"seed": 1}, cell()])
    assert lines == [
        "- mini · ewc(preset=tuned) · mini-llama · 10%: learning_rate_scale=0.5, weight=7.0; 1 trial of "
        "learning_rate_scale and weight, by the mean score on the validation of math and code, seed 0",
        "- Not tuned, but for what their names say: ewc",
    ]
    assert "--preset tuned" in commands([tuned])[0]


def test_the_command_of_trials_is_that_of_tuning() -> None:
    trials = [cell(tuned=Tuned(options={"weight": w}, first=2), seed=3) for w in (1.0, 2.0)]
    (command,) = commands(trials)
    assert command.startswith(
        "cl-graft tune --trials 2 --first 2 --seed 3 --scenarios mini --strategies ewc"
    )
    assert trials[0]["scenario"] == "mini, validation of the first 2"
    assert trials[0]["label"] == "ewc(learning_rate_scale=1.0, weight=1.0)"
    assert not any(c in command for c in ("--seeds", "--task-ids"))


def test_a_trial_s_folder_is_its_own() -> None:
    plain = RunConfig(scenario="mini", strategy="ewc")
    tried = plain.model_copy(update={"tuned": Tuned(options={"weight": 5.0}, first=2)})
    names = {plain.cell, tried.cell, plain.model_copy(update={"tuned": Tuned(first=2)}).cell}
    assert len(names) == 3 and "weight-5.0" in tried.cell
    assert CellFolder(Path(tried.cell)).path.name == tried.cell
