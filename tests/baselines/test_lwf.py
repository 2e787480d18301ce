"""LwF: no penalty where nothing has changed, the KL of by-hand logits where it has, and the last model as it was."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from cl_graft.errors import CLGraftError
from cl_graft.strategy.memory import tokens
from cl_graft.task import Pair, Preference
from tests.baselines.methods import learn, module, spied

ROWS = [{"prompt": f"Q: Copy {w}.\nA: ", "completion": w} for w in ("ab", "abcdef")]


def penalty(model, batch, state, weight=1.0, temperature=2.0):
    output = model(**{k: batch[k] for k in ("input_ids", "attention_mask")})
    given = {**batch, "tokens": (batch["labels"][:, 1:] != -100).sum().float()}
    return module("lwf").penalty(
        model, given, output, state, weight=weight, temperature=temperature
    )


class Bias(torch.nn.Module):
    """A model whose next-token logits are its one parameter, whatever it reads."""

    def __init__(self, logits):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.tensor(logits))

    def forward(self, input_ids, attention_mask, use_cache=False):
        return SimpleNamespace(logits=self.bias.expand(*input_ids.shape, -1))


def test_the_penalty_is_the_kl_worked_out_by_hand():
    """Over three tokens, old (1/2, 1/4, 1/4) and new (1/4, 1/4, 1/2) at T = 2: KL(old || new) = ln 2 / 4."""
    old, new = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    model = Bias((2 * new.log()).tolist())
    batch = {"input_ids": torch.zeros(2, 4).long(), "attention_mask": torch.ones(2, 4).long()}
    batch["labels"] = torch.tensor([[-100, -100, 1, 2], [-100, 0, -100, -100]])
    found = penalty(model, batch, {"bias": 2 * old.log()}, weight=3.0)
    assert found.item() == pytest.approx(3 * 2**2 * torch.tensor(2.0).log().item() / 4, rel=1e-5)
    found.backward()  # d/dlogits of T^2 KL is T (new - old)
    torch.testing.assert_close(model.bias.grad, 3 * 2 * (new - old))


def test_the_penalty_is_zero_at_the_start_and_only_the_new_model_learns_from_it(nano):
    model, tokenizer = nano
    batch = tokens(tokenizer, ROWS, 64)
    state = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.train()
    assert abs(penalty(model, batch, state).item()) < 1e-6
    assert model.training, "as it was"
    with torch.no_grad():
        model.get_parameter("model.norm.weight").mul_(1.5)
    after = penalty(model, batch, state)
    after.backward()
    assert after.item() > 1e-3 and model.get_parameter("model.norm.weight").grad.abs().max() > 0
    assert all(x.grad is None for x in state.values())


def test_the_old_model_is_the_one_that_the_task_starts_from_in_sft_and_dpo(build, tiny_scenario):
    half = Preference(steps=2, batch=4, learning_rate=1e-3)

    def recipe(task):
        pairs = [Pair(e.prompt, e.completion, "no") for e in task.train[:8]]
        return replace(task, pairs=pairs, training=replace(task.training, preference=half))

    scenario = replace(tiny_scenario, tasks=tuple(map(recipe, tiny_scenario.tasks)))
    strategy = build("lwf", scenario=scenario)
    asked = spied(strategy)
    learn(strategy, scenario)
    assert [len(a["terms"]) for a in asked] == [0, 0, 1, 1]
    assert asked[2]["terms"][0].digest == asked[3]["terms"][0].digest
    assert asked[2]["terms"][0].options == {"weight": 1.0, "temperature": 2.0}
    delta = strategy.packs[0].decode()
    for n, old in asked[2]["terms"][0].state.items():
        assert torch.equal(old, strategy.base[n] + delta[n]), n
    first, *_, last = asked[2]["log"].losses
    assert abs(first["lwf"]) < 1e-5 < last["lwf"], "the same model, then another"
    assert asked[3]["log"].losses[-1]["lwf"] > 1e-5
    assert not strategy.shared, "nothing but the weights is kept"


def test_a_heavy_penalty_keeps_the_answers_of_the_old_model(build, tiny_scenario):
    packs, folders, ends = [], [], []
    for name, options in (("sequential", {}), ("lwf", {}), ("lwf", {"alpha": 0.99})):
        strategy = build(name, **options)
        asked = spied(strategy)
        packs.append(learn(strategy, tiny_scenario).packs[1].decode())
        folders += [a["folder"].name for a in asked]
        ends.append(asked[1]["log"].losses[-1].get("lwf"))
    assert len(set(folders)) == 6
    plain, held, _ = packs
    assert any((plain[n] - held[n]).abs().max() > 1e-4 for n in plain)
    assert ends[2] / 99 < 0.7 * ends[1], "the KL itself"


def test_options_that_make_no_loss_are_refused(build, tiny_scenario):
    with pytest.raises(
        CLGraftError,
        match=r"lwf\.alpha=1.0 is not a number from 0, below 1; give one such as 0.5",
    ):
        learn(build("lwf", alpha=1.0), tiny_scenario, 1)
