"""A task of the stream that must go: its pack is taken off, or a method says how it unlearns, or it is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from cl_graft import plugins
from cl_graft.errors import CLGraftError
from cl_graft.experiment import general
from cl_graft.skillpack.codecs import decode
from cl_graft.task import Scenario
from tests.baselines.methods import learn, module, spied

SMALL = {
    "facts": 8,
    "train_size": 32,
    "test_size": 8,
    "steps": 3,
    "facts_steps": 3,
    "unlearning_steps": 2,
    "batch": 4,
}


@pytest.fixture(scope="module")
def scenario() -> Scenario:
    return plugins.load("scenario", "unlearning")(seed=0, **SMALL)


def test_the_stream_asks_for_each_fact_as_it_was_unlearned_otherwise_and_anew(scenario):
    math, facts, unlearn = scenario.tasks
    assert scenario.task_names == ("math", "facts", "unlearn") and unlearn.unlearns == "facts"
    wordings = {suite: [e for e in facts.test if e.suite == suite] for suite in facts.suites}
    assert {name: len(those) for name, those in wordings.items()} == {"given": 8, "otherwise": 8}
    trained = {e.prompt for e in facts.train}
    assert trained == {e.prompt for e in facts.test} and len(trained) == 16
    assert {e.prompt for e in unlearn.train} == {e.prompt for e in wordings["given"]}
    assert not {e.prompt for e in unlearn.test} & trained
    answers = {e.completion for e in facts.train}
    assert {e.completion for e in unlearn.test} == answers and len(answers) == 8


def test_only_a_task_that_was_taught_before_can_be_unlearned(scenario):
    math, facts, unlearn = scenario.tasks
    for tasks in (
        (unlearn, facts),
        (math, unlearn),
        (facts, unlearn, replace(unlearn, name="again", unlearns="unlearn")),
    ):
        with pytest.raises(
            CLGraftError,
            match=r"unlearns '(facts|unlearn)', which no task before it teaches; name one",
        ):
            Scenario("s", tasks)


@pytest.mark.parametrize(
    ("name", "options"),
    [("individual", {}), ("graftllm", {}), ("lora", {"convention": "each", "rank": 2})],
)
def test_a_pack_taken_off_leaves_the_base_bit_for_bit_and_every_other_task_as_it_was(
    build, scenario, name, options
):
    strategy = learn(build(name, "200%", scenario, **options), scenario)
    math, facts, unlearn = scenario.tasks
    untrained = build(name, "200%", scenario, **options).measure(facts, 1)
    before, kept = strategy.measure(math, 0), sum(p.nbytes for p in strategy.alive)
    assert strategy.measure(facts, 1) != untrained
    learn_last(strategy, scenario)
    assert strategy.measure(facts, 1) == untrained and strategy.measure(math, 0) == before
    strategy.grafted.activate(strategy.compose(1))
    assert all(p.equal(strategy.base[n]) for n, p in strategy.model.named_parameters())
    assert [pack.task for pack in strategy.held] == ["math"]
    assert sum(p.nbytes for p in strategy.alive) < kept
    assert strategy.seconds["train"] < 60 and {*general.measure(strategy)} == {"math"}


def learn_last(strategy, scenario):
    """Let a strategy that learned all tasks but the last have its turn with this one."""
    from cl_graft.stream import benchmark

    strategy.train(list(benchmark(scenario).train_stream)[-1], eval_streams=[])


def test_of_a_sum_one_summand_goes_and_of_a_merger_one_delta(build, scenario):
    """What is left of two tasks is the other one alone: the very pack, for every task."""
    for name, options in (("lora", {"convention": "summed", "rank": 2}), ("task_arithmetic", {})):
        strategy = learn(build(name, "200%", scenario, **options), scenario, 3)
        assert strategy.compose(0) == strategy.compose(1) == strategy.compose(None)
        assert list(strategy.compose(0)) == strategy.packs[:1]


def test_a_method_that_cannot_tell_the_task_apart_is_refused_before_anything_is_trained(
    build, scenario
):
    for name, options in (("sequential", {}), ("emr", {}), ("lora", {"rank": 2})):
        with pytest.raises(
            CLGraftError, match=f"{name} cannot unlearn task 'facts'.*gradient_ascent"
        ):
            build(name, "200%", scenario, **options).require_possible()
    for name in ("individual", "ties", "gradient_ascent", "negation"):
        build(name, "200%", scenario).require_possible()


def test_the_ascended_loss_is_minus_the_loss():
    """Two answer tokens of probability 1/2 and 1/4: SFT's loss is 3/2 ln 2."""
    logits = torch.tensor([0.5, 0.25, 0.25]).log().expand(1, 3, 3).clone().requires_grad_()
    batch = {"labels": torch.tensor([[-100, 0, 2]]), "tokens": torch.tensor(2.0)}
    found = module("gradient_ascent").loss(None, batch, SimpleNamespace(logits=logits), {})
    assert found.item() == pytest.approx(-1.5 * torch.tensor(2.0).log().item())
    loss = torch.nn.functional.cross_entropy(logits[0, :2], batch["labels"][0, 1:])
    (rising,) = torch.autograd.grad(found, logits, retain_graph=True)
    (falling,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(rising, -falling)


def test_ascent_makes_the_facts_less_likely(build, scenario):
    strategy = learn(build("gradient_ascent", scenario=scenario), scenario)
    facts = scenario.tasks[1]
    before = strategy.measure(facts, 1)["neg_bits_per_byte"]
    learn_last(strategy, scenario)
    after = strategy.measure(facts, 1)["neg_bits_per_byte"]
    assert sum(o.score for o in after) < sum(o.score for o in before)
    assert len(strategy.alive) == 1, "one whole delta is kept, as before"


def test_negation_takes_the_vector_of_the_facts_off(build, scenario):
    """D is what tuning the base on the rows to forget changes, by the recipe that taught them; bf16 as all deltas."""
    strategy = learn(build("negation", scenario=scenario, scale=0.5), scenario)
    asked, before = spied(strategy), strategy.packs[-1]
    learn_last(strategy, scenario)
    (stage,) = asked
    assert stage["job"].steps == SMALL["facts_steps"] and len(stage["rows"]) == SMALL["facts"]
    twin = build("negation", scenario=scenario)
    twin.stages = strategy.stages
    context = twin.context(scenario.tasks[1])
    vector = context.delta(stage["folder"])
    for name, kept in strategy.packs[-1].tensors.items():
        wanted = before.delta(name) - 0.5 * vector[name].bfloat16().float()
        torch.testing.assert_close(decode(kept), wanted, rtol=2**-8, atol=0)


def test_the_scale_is_the_largest_that_the_other_tasks_bear(build, scenario):
    strategy = learn(build("negation", scenario=scenario), scenario)
    lost = {}
    of = module("negation")

    def loss(self, packs, task):
        return lost[round(-packs[1].delta("model.norm.weight").sum().item(), 1)]

    context = strategy.context(scenario.tasks[2])
    (size,) = strategy.base["model.norm.weight"].shape
    vector = context.dense({"model.norm.weight": torch.full((size,), 1.0 / size)})
    lost = {x: 1.0 + 0.1 * x for x in (0.0, *of.GRID)}
    original, of.validation_loss = of.validation_loss, loss
    try:
        assert strategy._largest(scenario.tasks[2], vector) == 0.5
        lost = dict.fromkeys(lost, 2.0) | {0.0: 1.0}
        assert strategy._largest(scenario.tasks[2], vector) == 0.1, (
            "the least, where none is so small"
        )
    finally:
        of.validation_loss = original


def test_the_command_reports_what_went_and_what_else_was_lost(call, tmp_path):
    """Real runs; the pack's experience takes no training, its facts are the base's, and a killed run ends the same."""
    words = [
        "--scenarios",
        "unlearning",
        "--strategies",
        "graftllm,gradient_ascent",
        "--models",
        "nano-llama",
    ]
    words += ["--budgets", "30%", "--wandb", "off", "--out", tmp_path]
    for name, value in SMALL.items():
        words += ["--set", f"unlearning.{name}={value}"]
    assert call("sweep", *words).code == 0
    (folder,) = tmp_path.glob("unlearning__graftllm__*")
    result = json.loads((folder / "result.json").read_text())
    (turn,) = result["unlearning"]
    assert turn["of"] == "facts" and turn["base"] and turn["seconds"] < 5
    bits = result["extra_matrices"]["neg_bits_per_byte"]
    assert (
        bits[3][1] == bits[0][1] != bits[2][1] and result["matrix"][3][0] == result["matrix"][2][0]
    )
    assert call("report", tmp_path).code == 0
    (table,) = tmp_path.glob("report/*-unlearn.md")
    text = table.read_text()
    assert "| graftllm | given | 30% |" in text and "| yes |" in text and "| no |" in text
    page = (tmp_path / "report" / "index.html").read_text().replace("<wbr>", "")
    assert "Unlearning facts" in page
    before = (folder / "result.json").read_text()
    for part in ("result.json", "experience-3"):
        for path in folder.glob(part):
            _remove(path)
    assert call("sweep", *words).code == 0
    again, first = json.loads((folder / "result.json").read_text()), json.loads(before)
    assert [again[k] for k in ("matrix", "extra_matrices", "alive_bytes", "general")] == [
        first[k] for k in ("matrix", "extra_matrices", "alive_bytes", "general")
    ]


def _remove(path):
    import shutil

    shutil.rmtree(path) if path.is_dir() else path.unlink()
