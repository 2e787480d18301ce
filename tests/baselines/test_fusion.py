"""FuseLLM and FuseChat: who teaches which row, what each trains on, and what is merged of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cl_graft import plugins
from cl_graft.config import RunConfig
from cl_graft.errors import OverBudget
from cl_graft.experiment import cell
from cl_graft.experiment.identity import inputs
from cl_graft.models import embedded, mini_gpt2
from cl_graft.skillpack.codecs import decode, dense
from cl_graft.task import Pair, Preference
from cl_graft.training.delta import Delta
from cl_graft.transfer import folder, logits
from cl_graft.transfer.fusion import itself, rows_of, sources, term
from cl_graft.transfer.read import read_examples, read_logits
from tests.baselines.methods import learn, spied


def stored(out: Path, rows: Sequence[dict[str, str]], seeds: Sequence[int]) -> Path:
    """A finished build with these SFT rows, read by GPT-2s with random weights."""
    out.mkdir()
    folder.begin(out, {part: {} for part in folder.PARTS})
    for name in folder.FILES:
        lines = rows if name == folder.SFT else []
        (out / name).write_text("".join(json.dumps(row) + "\n" for row in lines))
    tokenizer = mini_gpt2.tokenizer()
    for number, seed in enumerate(seeds):
        torch.manual_seed(seed)
        model = mini_gpt2.new_gpt2(embedded.SPECS["nano-gpt2"], len(tokenizer))
        said = logits.say(model, tokenizer, [(r["prompt"], r["completion"]) for r in rows], 4)
        # a model with random weights would teach nothing: each is sure of every other row
        sure = torch.arange(len(rows)) % 2 == seed % 2
        said = replace(said, nll=torch.where(sure, 0.01, 9.0).double())
        logits.write(folder.file_of(out, number), said, f"random-{seed}", str(seed))
    folder.finish(out, len(seeds))
    return out


def rows_in(task: Any) -> list[dict[str, str]]:
    return [{"prompt": e.prompt, "completion": e.completion} for e in task.train]


@pytest.fixture
def scenario(tiny_scenario: Any, tmp_path: Path) -> Any:
    """The tiny scenario, its first task taught by two sources and its second by one."""
    tasks = []
    for task, seeds in zip(tiny_scenario.tasks, ((1, 2), (3,)), strict=True):
        out = stored(tmp_path / task.name, rows_in(task), seeds)
        tasks.append(replace(task, train=read_examples(out), logits=read_logits(out)))
    return replace(tiny_scenario, tasks=tuple(tasks))


def test_fusellm_trains_on_all_rows_so_far_towards_the_likeliest_teacher(build, scenario):
    strategy = build("fusellm", scenario=scenario)
    asked = spied(strategy)
    learn(strategy, scenario)
    first, second = scenario.tasks
    assert [len(a["rows"]) for a in asked] == [len(first.train), len(first.train + second.train)]
    assert [a["job"].steps for a in asked] == [
        t.training.steps * n for n, t in ((1, first), (2, second))
    ]
    wanted = []
    for task in scenario.tasks:
        of_task = [itself(strategy.model, strategy.tokenizer, task)]
        of_task += sources(strategy.tokenizer, task)
        wanted += rows_of(of_task)
    state = asked[1]["terms"][0].state
    assert state["starts"].diff().tolist() == [len(ids) for ids, _ in wanted]
    flat = [x for ids, kept in wanted for x in zip(ids.tolist(), kept.tolist(), strict=True)]
    for n, (ids, kept) in enumerate(flat):
        assert state["ids"][n, : len(ids)].tolist() == ids
        assert state["shares"][n, : len(ids)].tolist() == pytest.approx(kept)
    torch.testing.assert_close(state["shares"].sum(1), torch.ones(len(flat)))
    first_of_math = sources(strategy.tokenizer, first)
    assert torch.equal(wanted[1][0], first_of_math[0].rows[1][0]), "the one that is sure of it"
    assert torch.equal(wanted[0][0], first_of_math[1].rows[0][0])
    assert {"fusellm", "fusion.pull", "fusion.ce"} - {*asked[1]["log"].losses[-1]} == {"fusellm"}
    assert not strategy.notes and not strategy.budgeted


def test_without_a_weight_fusellm_is_joint_training(build, scenario):
    packs = [
        learn(build(name, scenario=scenario, **options), scenario).packs[1].decode()
        for name, options in (("joint", {}), ("fusellm", {"weight": 0.0}), ("fusellm", {}))
    ]
    joint, none, some = packs
    for name in joint:
        # a term is trained on padded batches, and a pack rounds to bfloat16: a step of that at most
        torch.testing.assert_close(none[name], joint[name], rtol=2**-7, atol=1e-6)
    assert any((some[name] - joint[name]).abs().max() > 1e-4 for name in joint)


def test_fusechat_merges_a_student_of_each_source_and_then_the_tasks(build, scenario):
    strategy = build("fusechat", scenario=scenario)
    asked = spied(strategy)
    learn(strategy, scenario)
    assert len(asked) == 3, "two students and one"
    own = itself(strategy.model, strategy.tokenizer, scenario.tasks[0])
    others = sources(strategy.tokenizer, scenario.tasks[0], True)
    wanted = [term(rows_of([own, other]), 0.1).digest for other in others]
    assert [a["terms"][0].digest for a in asked[:2]] == wanted and wanted[0] != wanted[1]
    sce = plugins.load("strategy", "sce").function
    deltas = [Delta(a["folder"], strategy.base, "cpu") for a in asked]
    (merged,) = strategy.compose(None)
    for name in strategy.base:
        pair = decode(dense(sce([d[name] for d in deltas[:2]], density=0.1)))
        single = decode(dense(deltas[2][name]))
        assert torch.equal(strategy.packs[0].delta(name), pair)
        assert torch.equal(strategy.packs[1].delta(name), single)
        assert torch.equal(merged.delta(name), sce([pair, single], density=0.1))


def test_rows_without_logits_are_taught_by_the_base_with_a_note(build, tiny_scenario):
    for name in ("fusellm", "fusechat"):
        strategy = build(name)
        asked = spied(strategy)
        learn(strategy, tiny_scenario)
        assert len(asked) == 2 and all(len(a["terms"]) == 1 for a in asked)
        told = [note for note in strategy.notes if "no source teaches task" in note]
        assert len(told) == len(strategy.notes) == 2


@pytest.mark.parametrize("name", ["fusellm", "fusechat"])
def test_a_pack_in_place_of_the_whole_delta_keeps_the_budget(build, scenario, name):
    strategy = build(name, scenario=scenario, budget="40%", pack=True)
    learn(strategy, scenario)
    assert strategy.budgeted and strategy.origin == build(name, scenario=scenario).origin
    assert all(0 < pack.nbytes <= strategy.budget.bytes for pack in strategy.packs)
    with pytest.raises(OverBudget, match="holds not even what the policy must keep"):
        build(name, budget="1000B", pack=True).require_possible()


def test_dpo_follows_without_a_teacher(build, scenario):
    half = Preference(steps=2, batch=4, learning_rate=1e-3)

    def with_pairs(task):
        pairs = [Pair(e.prompt, e.completion, "no") for e in task.train[:8]]
        return replace(task, pairs=pairs, training=replace(task.training, preference=half))

    scenario = replace(scenario, tasks=tuple(map(with_pairs, scenario.tasks)))
    strategy = build("fusellm", scenario=scenario)
    asked = spied(strategy)
    learn(strategy, scenario)
    assert [(a["job"].kind, a["job"].steps) for a in asked[2:]] == [("sft", 24), ("dpo", 4)]
    assert len(asked[3]["rows"]) == 16
    plain = asked[3]["log"].losses[-1]
    assert plain.get("fusion", 0) == 0 and "fusion.pull" not in plain


def test_a_cell_is_taught_by_the_folder_it_trains_on_and_by_no_other(tmp_path, tiny_scenario):
    rows = rows_in(tiny_scenario.tasks[0])[:24]
    for name, seed in (("one", 1), ("two", 2)):
        stored(tmp_path / name, rows, [seed])

    def config(name: str) -> RunConfig:
        return RunConfig(
            scenario="mini",
            strategy="fusellm",
            model="nano-llama",
            options={"mini": {"steps": 2, "batch": 4, "test_size": 4, "tasks": "math"}},
            out=tmp_path / "out",
            wandb="off",
            train_on={"math": tmp_path / name},
        )

    one, two = config("one"), config("two")
    assert inputs(one)["data"] != inputs(two)["data"], "the same rows, other logits"
    cell.run(one)
    result = json.loads((one.out / one.cell / "result.json").read_text())
    assert not result.get("notes") and result["budgeted"] is False
