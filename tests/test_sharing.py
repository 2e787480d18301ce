"""Train once, graft many: what a further method costs, and what a finished sweep costs when it is run again."""

from __future__ import annotations

import time

import pytest

from cl_graft.config import RunConfig
from cl_graft.experiment import cell

FIRST = ("individual", "graftllm", "svd", "model_tailor")


def config(strategy, out, **sizes):
    sizes = {
        "steps": 6,
        "batch": 8,
        "train_size": 48,
        "test_size": 16,
        "tasks": "math,cipher",
    } | sizes
    return RunConfig(
        scenario="mini",
        strategy=strategy,
        model="nano-llama",
        options={"mini": sizes},
        out=out,
        wandb="off",
    )


def made(out, kind):
    return {p.name for p in (out / "cache" / kind).glob("*") if p.suffix not in (".lock", ".used")}


def test_a_further_delta_method_trains_nothing_and_measures_only_its_own_packs(tmp_path):
    for strategy in ("individual", "graftllm"):
        cell.run(config(strategy, tmp_path))
    stages, evaluations = made(tmp_path, "stages"), made(tmp_path, "evaluations")
    result = cell.run(config("magnitude", tmp_path))
    assert made(tmp_path, "stages") == stages and len(stages) == 2
    new = made(tmp_path, "evaluations") - evaluations
    assert len(new) == 4, "its pack of each task, on that task and on general ability"
    assert result["identical"] == [[True, True], [False, True], [True, False]]


def test_the_matrix_is_the_same_whoever_measured_it(tmp_path):
    """A cell that recalls and one that is alone in its folder: same scores; only who measured differs."""
    cell.run(config("individual", tmp_path / "shared"))
    recalled = cell.run(config("graftllm", tmp_path / "shared"))
    alone = cell.run(config("graftllm", tmp_path / "alone"))
    for part in ("matrix", "n", "stderr", "general", "general_packs", "pack_bytes", "metrics"):
        assert recalled[part] == alone[part]
    assert alone["identical"] == [[False, False], [False, True], [True, False]]
    assert recalled["identical"][0] == [True, True]


def test_a_cell_says_what_it_spent_and_what_the_harness_took(tmp_path):
    begun = time.perf_counter()
    result = cell.run(config("individual", tmp_path))
    wall = time.perf_counter() - begun
    parts = result["seconds"]
    assert set(parts) == {"train", "compress", "evaluate", "harness"}
    assert 0 < parts["harness"] < result["spent"] <= wall
    again = cell.run(config("magnitude", tmp_path))
    assert again["seconds"]["train"] == pytest.approx(parts["train"]), (
        "what it costs, shared or not"
    )


@pytest.mark.slow
def test_a_further_delta_method_in_a_sweep_trains_nothing_and_a_finished_sweep_does_nothing(
    call, tmp_path
):
    """What it costs is compressing and measuring its own packs; the table of costs of a report has the seconds."""
    sizes = ["mini.steps=8", "mini.test_size=8", "mini.tasks=math,cipher"]
    base = ["sweep", "--scenarios", "mini", "--models", "nano-llama", "--workers", 1]
    base += ["--wandb", "off", "--out", tmp_path]
    base += [part for size in sizes for part in ("--set", size)]

    def sweep(*strategies):
        done = call(*base, "--strategies", ",".join(strategies))
        assert done.code == 0, done
        return done

    sweep(*FIRST)
    stages = made(tmp_path, "stages")
    further = ("magnitude", "svd_quant")
    sweep(*FIRST, *further)
    assert made(tmp_path, "stages") == stages
    report = {p: p.stat().st_mtime_ns for p in (tmp_path / "report").iterdir()}
    assert "finished already" in sweep(*FIRST, *further).out
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "report").iterdir()} == report


HALVED = '''
from cl_graft.strategy import Strategy


class halved(Strategy):
    """Starts as `sequential` does; every gradient is changed on its way."""

    keeps = "latest"
    budgeted = False

    def learn(self, task, context, *, factor: float = 0.5):
        hooks = [p.register_hook(lambda g: factor * g) for p in self.model.parameters()]
        try:
            return context.dense(self.fine_tune(task, context))
        finally:
            [hook.remove() for hook in hooks]
'''


def test_methods_that_start_alike_and_train_differently_never_share_a_stage(tmp_path):
    """Their weights, rows and recipe are the same at the start: what they do to training is in their own `learn`."""
    (tmp_path / "halved.py").write_text(HALVED)
    own = str(tmp_path / "halved.py")
    out = tmp_path / "out"
    packs = {}
    for strategy, factor in (("sequential", None), (own, 0.5), (own, 0.25)):
        asked = config(strategy, out, tasks="math", steps=2)
        if factor:
            asked = asked.model_copy(
                update={"options": {**asked.options, "halved": {"factor": factor}}}
            )
        before = made(out, "stages")
        cell.run(asked)
        assert len(made(out, "stages") - before) == 1, f"{strategy} {factor} trained by itself"
        packs[strategy, factor] = (out / asked.cell / "packs" / "01-math.safetensors").read_bytes()
    assert len(set(packs.values())) == 3
    (tmp_path / "halved.py").write_text(HALVED.replace("factor * g", "-factor * g"))
    before = made(out, "stages")
    cell.run(
        config(own, tmp_path / "edited", tasks="math", steps=2).model_copy(
            update={"cache": out / "cache"}
        )
    )
    assert len(made(out, "stages") - before) == 1, "and so does an edited one"


def test_methods_in_the_short_forms_share_what_they_start_from(tmp_path):
    for strategy in ("individual", "magnitude", "task_arithmetic"):
        cell.run(config(strategy, tmp_path, tasks="math", steps=2))
    assert len(made(tmp_path, "stages")) == 1
