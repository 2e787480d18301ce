"""What a sweep will do, told before it is done, and borne out by doing it."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace

import pytest

from cl_graft import plugins
from cl_graft.config import Launch, RunConfig
from cl_graft.errors import CLGraftError
from cl_graft.experiment import cell
from cl_graft.models.embedded import toy_tokenizer
from cl_graft.planning.plan import plan
from cl_graft.store.files import read_lines, write_lines
from cl_graft.store.record import CellFolder
from cl_graft.sweep_config import Sweep
from cl_graft.training.config import order, sft_job
from cl_graft.training.tokens import lengths, tokens
from tests.command import Call, assert_refused
from tests.models.test_roles import FAMILIES

SMALL = {"steps": 6, "batch": 8, "train_size": 48, "test_size": 8, "tasks": "math,cipher"}


def cells(tmp_path, strategies=("individual", "graftllm", "sequential"), dpo=False, **common):
    asked = Sweep(
        scenarios=[{"mini": {**SMALL, "dpo": dpo}}],
        strategies=list(strategies),
        models=["nano-llama"],
        out=tmp_path,
        wandb="off",
        **common,
    )
    return asked.cells()


def told(found):
    return [(s.task, s.kind, s.start, s.state, len(s.cells)) for s in found.stages]


def test_a_stage_that_cells_share_is_one(tmp_path):
    """individual and graftllm train the same; sequential shares the first task with them."""
    found = plan(cells(tmp_path))
    assert told(found) == [
        ("math", "sft", "base", "to run", 3),
        ("cipher", "sft", "base", "to run", 2),
        ("cipher", "sft", "after math", "to run", 1),
    ]
    first = found.stages[0]
    assert first.trained == first.parameters == 63_216
    assert (first.micro_batch, first.accumulation, first.processes) == (8, 1, 1)
    assert first.rows == 48 and first.config.steps == 12
    assert list(c["pack_bytes"] for c in found.cells.values())[1] == 12_643


def test_methods_that_mask_a_shared_vector_train_what_individual_trains(tmp_path):
    found = plan(cells(tmp_path, ["individual", "tall_mask", "emr", "o_lora"]))
    assert told(found) == [
        ("math", "sft", "base", "to run", 3),
        ("cipher", "sft", "base", "to run", 3),
        ("math", "sft", "base", "to run", 1),
        ("cipher", "sft", "after math", "to run", 1),
    ]
    assert found.stages[0].trained == found.stages[0].parameters > found.stages[2].trained


def test_what_was_planned_is_what_is_run(tmp_path):
    """Keys of the plan are the folders that the run makes, and then they are told to be cached."""
    first, *_ = wanted = cells(tmp_path)
    before = plan(wanted)
    cell.run(first)
    made = {p.parent.name for p in tmp_path.glob("cache/stages/*/stage.json")}
    assert len(made) == 2
    after = plan(wanted)
    assert told(after) == [
        ("math", "sft", "base", "cached", 2),
        ("cipher", "sft", "base", "cached", 1),
        ("cipher", "sft", "after math", "to run", 1),
    ]
    assert after.cells[first.cell]["finished"] and after.disk < before.disk
    for stage in (tmp_path / "cache" / "stages").glob("*/stage.json"):
        about = json.loads(stage.read_text())
        (match,) = [
            s
            for s in before.stages
            if s.config.steps == about["config"]["steps"]
            and s.start == "base"
            and s.tokens == round(about["tokens"])
        ]
        assert match.rows == about["rows"]


@pytest.mark.parametrize("method", ["individual", "sequential", "ties", "emr"])
def test_what_will_be_measured_is_what_is_measured(tmp_path, method):
    """A told pack is measured once; one model, and masks of a vector that moves, after every task; the base once."""
    (wanted,) = cells(tmp_path, [method])
    found = plan([wanted]).evaluations
    counted = {
        "individual": {"math": 2, "cipher": 2, "general": 3},
        "sequential": {"math": 3, "cipher": 3, "general": 3},
        "ties": {"math": 3, "cipher": 3, "general": 3},
        "emr": {"math": 3, "cipher": 2, "general": 4},
    }[method]
    assert Counter(e.task for e in found if e.kind == "scores") == counted
    assert all(e.state == "to run" and e.cells == [wanted.cell] for e in found)
    cell.run(wanted)
    kept = {"scores": "evaluations", "kl": "divergences"}
    for kind, folder in kept.items():
        files = [read_lines(f)[0] for f in tmp_path.glob(f"cache/{folder}/*.jsonl")]
        assert Counter(f["task"] for f in files) == Counter(e.task for e in found if e.kind == kind)
    assert not plan([wanted]).evaluations
    (other,) = cells(tmp_path, ["graftllm"])
    base = [e for e in plan([other]).evaluations if e.by is None]
    assert [e.state for e in base] == ["cached"] * 3


def test_where_tasks_are_inferred_evaluations_are_those_of_a_router_that_is_right(tmp_path):
    """The first pack takes prompts of both tasks while it is alone; the second then takes its own."""
    (wanted,) = cells(tmp_path, ["individual"], task_ids=["inferred"])
    by = [(e.task, e.by) for e in plan([wanted]).evaluations if e.kind == "scores"]
    assert [task for task, by in by if by == "math"] == ["math", "cipher", "general"]
    assert [task for task, by in by if by == "cipher"] == ["cipher", "general"]


def test_a_cell_that_was_stopped_has_the_evaluations_of_the_tasks_that_are_left(tmp_path):
    (wanted,) = cells(tmp_path, ["sequential"])
    cell.run(wanted)
    folder = CellFolder(tmp_path / wanted.cell)
    folder.mark("running")
    (folder.path / "result.json").unlink()
    shutil.rmtree(folder.experience_path(2))
    assert {e.by for e in plan([wanted]).evaluations} == {"cipher"}


def test_evaluation_is_timed_by_the_base_without_running_code(tmp_path, monkeypatch):
    """Every measurement of a task takes what the base took for it, in proportion to its examples."""
    ran = []
    monkeypatch.setattr("cl_graft.evaluation.sandbox.run_cases", lambda *a, **k: ran.append(a))
    asked = Sweep(
        scenarios=[{"mini": {**SMALL, "tasks": "math,code", "test_size": 70}}],
        strategies=["sequential"],
        models=["nano-llama"],
        out=tmp_path,
        wandb="off",
    ).cells()
    assert plan(asked).evaluation_seconds is None
    found = plan(asked, probe=True)
    each = {(e.task, e.kind): e.seconds for e in found.evaluations}
    assert min(each.values()) > 0 and not ran
    assert all(e.seconds == each[e.task, e.kind] for e in found.evaluations)
    assert found.evaluation_seconds == pytest.approx(
        sum(3 * s if kind == "scores" else s for (_, kind), s in each.items())
    )


def test_a_preference_half_follows_its_sft_and_adapters_train_little(tmp_path):
    found = plan(cells(tmp_path, ["individual", "lora"], dpo=True))
    kinds = [(s.task, s.kind, s.start) for s in found.stages]
    assert kinds[:4] == [
        ("math", "sft", "base"),
        ("math", "dpo", "after sft of math"),
        ("cipher", "sft", "base"),
        ("cipher", "dpo", "after sft of cipher"),
    ]
    assert kinds[4:] == [
        ("math", "sft", "base"),
        ("math", "dpo", "after sft of math"),
        ("cipher", "sft", "after math"),
        ("cipher", "dpo", "after sft of cipher"),
    ]
    full, adapter = found.stages[0], found.stages[4]
    assert full.trained == full.parameters and adapter.trained < 0.2 * adapter.parameters
    assert adapter.memory.optimizer == 8 * adapter.trained
    assert found.stages[1].memory.device > full.memory.device, "both answers of a pair run together"


def test_a_model_that_was_found_to_prefer_nothing_has_no_preference_half(tmp_path):
    first, shares = cells(tmp_path, ["individual", "graftllm"], dpo=True)
    cell.run(first)
    sampled = list(tmp_path.glob("cache/pairs/*.jsonl"))
    assert len(sampled) == 2
    for file in sampled:
        write_lines(file, {}, [])
    assert told(plan([shares])) == [
        ("math", "sft", "base", "cached", 1),
        ("cipher", "sft", "base", "cached", 1),
    ]


def test_time_is_probed_or_follows_from_operations(tmp_path):
    wanted = cells(tmp_path, ["individual"])
    assert plan(wanted).seconds is None
    by_peak = plan(wanted, peak=1e9, utilisation=0.5)
    stage = by_peak.stages[0]
    embedding = 224 * 48
    assert stage.seconds == pytest.approx(6 * (63_216 - embedding) * stage.tokens / 0.5e9, rel=0.01)
    assert plan(wanted, probe=True).seconds > 0


def test_a_probe_tells_the_seconds_of_a_token(tmp_path, monkeypatch):
    """Two seconds a step, of which the second and third of three count, over the tokens that these hold."""
    monkeypatch.setattr("cl_graft.planning.cost.probe", lambda train: 2.0)
    (wanted,) = cells(tmp_path, ["individual"])
    task = plugins.load("scenario", "mini")(seed=wanted.seed, **SMALL).tasks[0]
    rows, job = sft_job(task, 0)
    counts = lengths(tokens(toy_tokenizer(), rows[:24], job))
    read = sum(counts[i] for i in order(24, replace(job, steps=3))[8:])
    stage = plan([wanted], probe=True).stages[0]
    assert stage.seconds == pytest.approx(2 * 2.0 / read * stage.tokens)


def test_processes_share_what_zero_shares(tmp_path):
    def first(**launch):
        (wanted,) = cells(tmp_path, ["individual"], launch=Launch(**launch))
        return plan([wanted], gpu=True).stages[0]

    two, three = first(processes=4, zero=2), first(processes=4, zero=3, offload=True)
    assert (two.micro_batch, two.accumulation, two.processes) == (2, 1, 4)
    assert two.memory.optimizer == 12 * -(-two.parameters // 4)
    assert three.memory.optimizer == 0 and three.memory.host == 16 * -(-two.parameters // 4)
    with pytest.raises(CLGraftError, match="cannot make a batch of 8"):
        first(processes=3)


def test_the_command_prints_stages_disk_and_packs_and_starts_nothing(call: Call, tmp_path):
    base = ["plan", "--scenarios", "mini", "--models", "nano-llama", "--out", tmp_path / "out"]
    sets = [x for k, v in SMALL.items() for x in ("--set", f"mini.{k}={v}")]
    found = call(*base, "--strategies", "individual,lora", *sets, "--peak", "1e12")
    assert found.code == 0, found
    assert "12 x 8 (8x1x1)" in found.out and "2 packs of at most 12.6 kB" in found.out
    assert "stages: 4 to run" in found.out and not (tmp_path / "out").exists()
    listed = json.loads(call(*base, "--strategies", "individual", *sets, "--json").out)
    assert [s["task"] for s in listed["stages"]] == ["math", "cipher"]
    assert_refused(call(*base, "--strategies", "individal"), "individual")
    assert_refused(call(*base, "--strategies", "individual", "--launch", "proceses=8"), "processes")


def test_a_model_whose_weights_are_not_there_is_planned_from_its_configuration(tmp_path, nano):
    model, tokenizer = nano
    model.config.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    options = {"mini": SMALL}
    config = RunConfig(
        scenario="mini",
        strategy="individual",
        model=str(tmp_path / "model"),
        options=options,
        out=tmp_path,
    )
    found = plan([config])
    assert [s.parameters for s in found.stages] == [63_216] * 2
    same = plan(cells(tmp_path / "other", ["individual"]))
    assert [s.memory for s in found.stages] == [s.memory for s in same.stages]


def test_what_a_method_will_share_is_in_the_plan_of_its_next_task(tmp_path):
    """Of 63,216 weights and 224 tokens: replay's rows, and what each method's terms hold on the device."""
    names = ["sequential", "replay", "ewc", "lwf", "agem", "gem", "i_lora"]
    wanted = cells(tmp_path, names, dpo=True)
    found = plan(wanted)
    of = {c.strategy: [s for s in found.stages if c.cell in s.cells] for c in wanted}
    assert all([s.kind for s in stages] == ["sft", "dpo"] * 2 for stages in of.values())
    assert all(len(s.cells) == 1 for s in found.stages), "no stage is another method's"
    starts = ["base", "after sft of math", "after math", "after sft of cipher"]
    assert all([s.start for s in stages] == starts for stages in of.values())
    assert [s.rows for s in of["replay"]] == [48, 48, 69, 69] and of["replay"][2].config.steps == 12
    assert [s.rows for s in of["sequential"]] == [48, 48, 48, 48]
    held = {name: [s.memory.terms for s in stages] for name, stages in of.items()}
    assert held["sequential"] == held["replay"] == [0] * 4
    assert held["ewc"] == [0, 0, 2 * 4 * 63_216, 2 * 4 * 63_216]
    logits = held["lwf"][2] - 4 * 63_216
    assert (
        logits % (4 * 4 * 8 * 224) == 0
        and held["lwf"][3] > held["lwf"][2] > 4 * 63_216 + logits / 2
    )
    tokens = held["agem"][2] - 4 * 63_216
    assert tokens % (3 * 8 * 48) == 0 and held["agem"][:2] == [0, 0] and tokens > 0
    tokens = held["gem"][2] - 4 * 63_216
    assert tokens % (3 * 8 * 32) == 0 and held["gem"][:2] == [0, 0] and tokens > 0
    assert len({*held["i_lora"]}) == 1 and held["i_lora"][0] == 4 * of["i_lora"][0].trained
    assert [s.rows for s in of["i_lora"]] == [48, 48, 96, 96]
    plain, with_it = of["sequential"][2].memory, of["ewc"][2].memory
    assert with_it.device == plain.device + with_it.terms, "the rest is that of the same rows"


def test_a_plan_draws_no_answers_and_counts_what_terms_hold(tmp_path, nano, monkeypatch):
    """sdft's teacher and prompts, lamol's rows (of three int64 tensors) without those it will write; on meta, too."""
    monkeypatch.setattr("cl_graft.evaluation.generate.answers", None)
    names = ["dft", "sdft", "lamol"]
    wanted = cells(tmp_path, names)
    found = plan(wanted)
    of = {c.strategy: [s for s in found.stages if c.cell in s.cells] for c in wanted}
    assert all([s.rows for s in stages] == [48, 48] for stages in of.values())
    held = {name: [s.memory.terms for s in stages] for name, stages in of.items()}
    assert all(x > 0 and x % (4 * 4 * 8 * 224) == 0 for x in held["dft"]), "logits"
    tokens = [x - 4 * 63_216 for x in held["sdft"]]
    assert all(x > 0 and x % (4 * 48) == 0 for x in tokens)
    assert all(x > 0 and x % (3 * 8 * 48) == 0 for x in held["lamol"])
    nano[0].config.save_pretrained(tmp_path / "model")
    nano[1].save_pretrained(tmp_path / "model")
    bare = [c.model_copy(update={"model": str(tmp_path / "model")}) for c in wanted]
    assert [(s.rows, s.memory) for s in plan(bare).stages] == [
        (s.rows, s.memory) for s in found.stages
    ]


def test_a_planned_memory_holds_what_the_run_remembers(tmp_path):
    (wanted,) = cells(tmp_path, ["replay"])
    (_, before) = plan([wanted]).stages
    cell.run(wanted)
    told = [json.loads(p.read_text()) for p in tmp_path.glob("cache/stages/*/stage.json")]
    assert sorted(a["rows"] for a in told) == [48, before.rows]
    assert before.tokens in [round(a["tokens"]) for a in told], "of the very same rows"


def test_separate_anchors_grow_with_the_tasks(tmp_path):
    found = plan(cells(tmp_path, [{"ewc": {"variant": "separate"}}]))
    assert [s.memory.terms for s in found.stages] == [0, 2 * 4 * 63_216]


def test_what_is_shared_is_planned_without_weights_too(tmp_path, nano):
    """States of the meta device have sizes, and no values that a key could be made of."""
    model, tokenizer = nano
    model.config.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")

    def both(names):
        given = cells(tmp_path, names)
        bare = [c.model_copy(update={"model": str(tmp_path / "model")}) for c in given]
        return plan(bare).stages, plan(given).stages

    def seen(stages):
        return [(s.task, s.start, s.rows, s.memory) for s in stages]

    bare, given = both(["replay", "ewc", "lwf", "agem", "gem", "osf", "slao", "i_lora"])
    assert seen(bare) == seen(given)
    bare, given = both(["sure", {"replay": {"select": "surprise"}}])
    told = [[(s.task, s.rows, s.trained, s.memory.terms) for s in found] for found in (bare, given)]
    assert told[0] == told[1], "as many rows; which ones surprise is not known without weights"


@pytest.mark.parametrize("family", ["gpt-oss", "mamba", "falcon-h1", "mixtral"])
@pytest.mark.parametrize("method", ["individual", "lora", "o_lora"])
def test_every_family_has_figures_or_one_sentence(tmp_path, nano, family, method):
    """PEFT 0.21 refuses to adapt the state spaces of Mamba and Falcon-H1, whatever the method."""
    config = FAMILIES[family][0]()
    config.vocab_size = len(nano[1])
    config.save_pretrained(tmp_path / "model")
    nano[1].save_pretrained(tmp_path / "model")
    wanted = [{method: {"dropout": 0}} if method == "o_lora" else method]
    asked = cells(tmp_path, wanted, budgets=["90%"])
    bare = [c.model_copy(update={"model": str(tmp_path / "model")}) for c in asked]
    if method != "individual" and family in ("mamba", "falcon-h1"):
        with pytest.raises(CLGraftError, match="choose a method without adapters"):
            plan(bare)
        return
    stages = plan(bare).stages
    assert [s.task for s in stages] == ["math", "cipher"]
    whole = method == "individual"
    assert all((s.trained == s.parameters) == whole and s.trained > 0 for s in stages)


def test_a_method_that_fails_before_it_trains_is_told_in_a_sentence(tmp_path):
    (tmp_path / "broken.py").write_text(
        "from cl_graft.strategy import Strategy\n\n\n"
        "class broken(Strategy):\n"
        "    def learn(self, task, context, **options):\n"
        "        return self.teach(self.model.encoder, task)\n"
    )
    with pytest.raises(CLGraftError, match="broken cannot learn the first task, 'math': .*encoder"):
        plan(cells(tmp_path, [str(tmp_path / "broken.py")]))
