"""Several packs for a prompt, prompts that go to the base, and whose answers are taken from where."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from cl_graft import plugins
from cl_graft.errors import CLGraftError
from cl_graft.evaluation.divergence import per_example
from cl_graft.evaluation.examiner import Examiner, Group
from cl_graft.evaluation.generate import choice_likelihoods, generate, log_likelihoods
from cl_graft.experiment.cell import run
from cl_graft.models.load import load
from cl_graft.models.text import encode
from cl_graft.report.protocols import protocol
from cl_graft.report.tables import costs
from cl_graft.routing.base import Choice, Selection
from cl_graft.skillpack.codecs import dense, low_rank
from cl_graft.skillpack.format.file import SkillPack, fingerprint
from cl_graft.skillpack.live.composed import blend
from cl_graft.skillpack.live.ensemble import Ensemble
from cl_graft.skillpack.live.grafted import Grafted
from cl_graft.stream import benchmark
from tests.routing.test_routers import built, config, router

SCORES = torch.tensor([[0.0, 3.0, 1.0], [2.0, 2.0, -9.0]])


def test_the_likeliest_tasks_come_first_and_the_earliest_of_equals() -> None:
    assert Selection().choose(SCORES) == [Choice((1,), (1.0,)), Choice((0,), (1.0,))]
    assert Selection(top_k=2).choose(SCORES) == [
        Choice((1, 2), (0.5, 0.5)),
        Choice((0, 1), (0.5, 0.5)),
    ]
    every = Selection(top_k=9).choose(SCORES)[0]
    assert every.tasks == (1, 2, 0) and sum(every.weights) == pytest.approx(1)


def test_a_merge_is_weighted_by_a_softmax_in_tenths() -> None:
    """exp(3), exp(1): 0.88 and 0.12; of scores 11 apart the second has nothing and is left out."""
    merge = Selection(top_k=2, combine="merge")
    assert merge.choose(SCORES)[0] == Choice((1, 2), (0.9, 0.1))
    assert merge.choose(SCORES / 2, temperature=0.5)[0] == Choice((1, 2), (0.9, 0.1))
    assert merge.choose(torch.tensor([[11.0, 0.0]])) == [Choice((0,), (1.0,))]
    thirds = Selection(top_k=3, combine="merge").choose(torch.zeros(1, 3))[0]
    assert thirds.weights == pytest.approx((1 / 3, 1 / 3, 1 / 3))


def test_below_the_quantile_of_the_tasks_own_prompts_the_base_answers() -> None:
    own = torch.arange(101.0)[:, None] * torch.tensor([[1.0, 0.5]])
    selection = Selection(reject=0.05)
    at = selection.threshold(own)
    assert at == 5.0
    scores = torch.tensor([[4.9, 0.0], [0.0, 5.1]])
    assert selection.choose(scores, 1.0, at) == [Choice(), Choice((1,), (1.0,))]


# --- packs together ---


def two_packs(model: Any) -> list[SkillPack]:
    """Low-rank deltas and a dense norm, large enough to change answers."""
    torch.manual_seed(0)
    base, packs = fingerprint(model.named_parameters()), []
    for number in range(2):
        tensors = {}
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "proj" in name:
                rows, columns = parameter.shape
                left, right = torch.randn(rows, 2), torch.randn(2, columns)
                tensors[name] = low_rank(0.1 * left, 0.1 * right)
            elif parameter.ndim == 1:
                tensors[name] = dense(0.1 * torch.randn(parameter.shape))
        packs.append(SkillPack(tensors, f"task {number}", "test", {}, base))
    return packs


@torch.no_grad()
def next_probabilities(model: Any, packs: list[SkillPack], ids: list[int]) -> torch.Tensor:
    grafted = Grafted(model)
    grafted.activate(packs)
    logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
    grafted.unload()
    return logits.softmax(-1)


def test_an_ensemble_is_the_mean_of_its_members_probabilities(nano: Any) -> None:
    """Likelihoods and greedy answers, against one pack at a time, a token at a time."""
    model, tokenizer = nano
    packs, pairs = two_packs(model), [("Q: Zoe has 5 bags", " 12"), ("def f(x):", " return x")]
    before = fingerprint(model.named_parameters())
    with Ensemble(model, [[pack] for pack in packs]):
        told = log_likelihoods(model, tokenizer, pairs, 64)
        chosen = choice_likelihoods(model, tokenizer, [pairs[0][0]], [" 12", " 7 9"], 64)[0]
        said = generate(model, tokenizer, [pairs[0][0]], 6)
    assert fingerprint(model.named_parameters()) == before and "forward" not in vars(model)

    def mean(ids: list[int]) -> torch.Tensor:
        return sum(next_probabilities(model, [pack], ids) for pack in packs) / 2

    def by_hand(prompt: str, completion: str) -> float:
        ids = tokenizer(prompt)["input_ids"]
        tail = tokenizer(completion, add_special_tokens=False)["input_ids"]
        total = 0.0
        for token in [*tail, tokenizer.eos_token_id]:
            total += math.log(mean(ids)[token])
            ids = [*ids, token]
        return total

    assert told == pytest.approx([by_hand(*pair) for pair in pairs], rel=1e-4)
    assert chosen == pytest.approx([by_hand(pairs[0][0], c) for c in (" 12", " 7 9")], rel=1e-4)
    ids = tokenizer(pairs[0][0])["input_ids"]
    start = len(ids)
    while len(ids) < start + 6 and ids[-1] != tokenizer.eos_token_id:
        ids = [*ids, int(mean(ids).argmax())]
    assert said == [tokenizer.decode(ids[start:], skip_special_tokens=True)]


def test_an_ensemble_of_one_pack_twice_is_the_pack(nano: Any) -> None:
    model, tokenizer = nano
    pack, pairs = two_packs(model)[0], [("Q: Zoe has 5 bags", " 12")]
    with Ensemble(model, [[pack], [pack]]):
        twice = log_likelihoods(model, tokenizer, pairs, 64)
    grafted = Grafted(model)
    grafted.activate([pack])
    assert twice == pytest.approx(log_likelihoods(model, tokenizer, pairs, 64), rel=1e-5)


def test_a_blend_is_the_weighted_sum_of_deltas(nano: Any) -> None:
    model, _ = nano
    one, two = two_packs(model)
    mixed = blend([[one], [two]], [0.75, 0.25])
    name = next(iter(one.tensors))
    torch.testing.assert_close(mixed.delta(name), 0.75 * one.delta(name) + 0.25 * two.delta(name))
    assert mixed.digest != blend([[one], [two]], [0.25, 0.75]).digest


# --- in a strategy ---


def trained(nano: Any, scenario: Any, **more: Any) -> Any:
    strategy = built(nano, scenario, **more)
    for experience in benchmark(scenario).train_stream:
        strategy.train(experience, eval_streams=[])
    return strategy


@pytest.mark.parametrize("combine", ["ensemble", "merge"])
def test_two_packs_answer_where_two_are_asked_for(nano, tiny_scenario, combine) -> None:
    """Every task's prompts, and what is recalled is what was measured; the base is the base again."""
    made = router("centroids")
    made.temperature, made.selection = 1.0, Selection(top_k=2, combine=combine)
    strategy = trained(nano, tiny_scenario, router=made)
    task = tiny_scenario.tasks[0]
    outcomes = strategy.measure(task, 0)
    assert len(outcomes[task.score]) == len(task.test)
    told = strategy.answered[task.name]
    assert told.counts == {"math": 16}, "the likeliest of the two"
    assert all(bool(group.members) == (combine == "ensemble") for group in told.groups)
    assert strategy.measure(task, 0) is outcomes
    assert fingerprint(strategy.model.named_parameters()) == strategy.grafted.base


def test_answers_are_taken_from_where_the_whole_task_is_answered_anyway(nano, tiny_scenario):
    """Most examples by the pack of their own task, two by the base: one is left to be answered."""
    strategy = trained(nano, tiny_scenario)
    task, scored = tiny_scenario.tasks[0], []
    strategy.measure(task, 0)
    strategy.measure(task, None)
    examiner, plain = strategy.examiner, strategy.examiner._score
    examiner._score = lambda some, *base: (
        scored.append(len(some.test)),
        plain(some, *base),
    )[1]
    own, other = ([pack] for pack in strategy.packs)
    groups = [Group(own, range(13), 0), Group(other, [13], 1), Group([], [14, 15])]
    mixed = examiner.measure(task, groups, 2)
    assert scored == [1]
    whole = [examiner.measured[(task.name, *names)] for names in ([own[0].digest], [])]
    assert mixed[task.score][:13] == whole[0][task.score][:13]
    assert mixed[task.score][14:] == whole[1][task.score][14:]


def test_prompts_unlike_all_tasks_go_to_the_base(nano, tiny_scenario) -> None:
    made = router("mahalanobis")
    made.selection = Selection(reject=0.05)
    strategy = trained(nano, tiny_scenario, router=made)
    own = [e.prompt for task in tiny_scenario.tasks for e in task.validation]
    kept = [bool(choice.tasks) for choice in strategy.route(own, None)]
    assert sum(kept) / len(kept) == pytest.approx(0.95, abs=0.01), "as calibrated"
    assert strategy.route(["zzz ### 999 !!! ((( " * 3], None) == [Choice()]
    task = tiny_scenario.tasks[0]
    strategy.measure(task, 0)
    assert sum(strategy.answered[task.name].counts.values()) == len(task.test)


def test_a_router_that_takes_all_of_the_budget_is_refused_before_anything_is_computed(call):
    """And both cures of the sentence are ones."""
    cell = {"scenarios": "mini", "strategies": "magnitude", "models": "nano-llama"}

    def plan(budget, router):
        words = {**cell, "budgets": budget, "task-ids": "inferred", "router": router}
        return call("plan", *(word for k, v in words.items() for word in (f"--{k}", v)))

    done = plan("3%", "ridge")
    assert done.code and "the router 'ridge' keeps" in done.err and "centroids" in done.err
    assert not plan("30%", "ridge").code and not plan("3%", "centroids").code


@pytest.mark.parametrize("name", plugins.names("router"))
def test_a_router_that_has_seen_no_task_says_so(nano, tiny_scenario, name) -> None:
    strategy = built(nano, tiny_scenario, router=router(name), budget="100%")
    assert strategy.route(["Q:"], 0) == [Choice()], "a method answers as the base"
    from cl_graft.strategy.route import choices

    with pytest.raises(CLGraftError, match=f"the router {name} has seen no task"):
        choices(strategy, strategy.router, ["Q:"])


def test_forward_passes_are_told_as_the_papers_table_has_them(tmp_path: Path) -> None:
    """Two members answer each prompt after one pass that routes it: 2 and one over the mean length of an answer."""
    two = config(tmp_path, task_ids="inferred", router="centroids", router_top_k=2)
    result = run(two)
    assert result["overhead"][0] is None
    folder = tmp_path / two.cell / "experiences"
    _, tokenizer = load("nano-llama")

    def lengths(experience: str, tasks: tuple[str, ...]) -> list[int]:
        lines = map(json.loads, (folder / experience / "examples.jsonl").read_text().splitlines())
        said = [x["answer"] for x in lines if x["task"] in tasks]
        return [len(tokenizer(s, add_special_tokens=False)["input_ids"]) + 1 for s in said]

    first, last = lengths("01", ("math",)), lengths("02", ("math", "cipher"))
    assert result["overhead"][1] == pytest.approx(1 + len(first) / sum(first))
    assert result["overhead"][2] == pytest.approx(2 + len(last) / sum(last))
    (told,) = costs([result])
    assert (
        dict(zip(told.columns, told.rows[0], strict=True))["Passes"]
        == f"{result['overhead'][2]:.2f}"
    )
    assert protocol(result) == "inferred (centroids, ensemble of 2)"
    given = run(config(tmp_path))
    assert given["overhead"] == [None] * 3 and "Passes" not in costs([given])[0].columns


def test_both_protocols_together_answer_few_more_prompts_than_one(tmp_path, monkeypatch) -> None:
    """Where packs are the same and routing is right, nearly all is recalled: at most 1.15 times the examples."""
    scored: list[int] = []
    plain = Examiner._score
    monkeypatch.setattr(
        Examiner,
        "_score",
        lambda self, task, *base: (scored.append(len(task.test)), plain(self, task, *base))[1],
    )
    given = config(tmp_path).model_copy(update={"strategy": "individual"})
    run(given)
    one = sum(scored)
    routed = {"task_ids": "inferred", "router": "mahalanobis", "router_reject": 0.05}
    result = run(given.model_copy(update=routed))
    assert result["routing_accuracy"][-1] > 0.8
    assert one <= sum(scored) <= 1.15 * one
    again = run(given.model_copy(update=routed | {"router": "likelihood", "router_reject": 0.0}))
    assert again["shared_bytes"] == {} and again["complete"]


def test_an_ensemble_has_moved_from_the_base_as_its_mean_has(nano, tiny_scenario) -> None:
    """KL(base || ensemble) of one answer's tokens, a token at a time."""
    strategy = trained(nano, tiny_scenario)
    model, tokenizer = nano
    example = tiny_scenario.tasks[0].test[0]
    group = Group((), [0], 0, [[pack] for pack in strategy.packs], of_one=False)
    pair = (example.prompt, example.completion)
    (found,) = per_example(strategy.examiner, [pair], group, 64)
    strategy.restore_base()
    head, tail = encode(tokenizer, *pair, 64)
    wanted = 0.0
    for count in range(len(tail)):
        ids = head + tail[:count]
        base = next_probabilities(model, [], ids).double()
        mean = sum(next_probabilities(model, [p], ids).double() for p in strategy.packs) / 2
        wanted += (base * (base / mean).log()).sum().item()
    assert found.forward == pytest.approx(wanted, rel=1e-3) and wanted > 0
