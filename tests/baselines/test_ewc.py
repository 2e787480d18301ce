"""EWC: Fisher by brute force, the penalty of a quadratic by hand, and what is kept of each task."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from cl_graft.skillpack.codecs.exact import original
from cl_graft.strategy.fisher import fisher
from cl_graft.strategy.memory import some, tokens
from tests.baselines.methods import learn, module, spied

ROWS = [{"prompt": f"Q: Copy {w}.\nA: ", "completion": w} for w in ("ab", "cd", "abcdef")]


def test_fisher_is_the_mean_of_each_examples_squared_gradient(nano):
    """By autograd's own backward, one example at a time; the square of the mean gradient is another thing."""
    model, tokenizer = nano
    batch = tokens(tokenizer, ROWS, 64)
    model.train()
    found = fisher(model, batch)
    assert model.training and all(p.grad is None for p in model.parameters())
    squares = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    means = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for row in ROWS:
        model.zero_grad()
        one = tokens(tokenizer, [row], 64)
        logits = model(**{k: one[k] for k in ("input_ids", "attention_mask")}).logits
        answer = one["labels"][0, 1:]
        asked = answer != -100
        torch.nn.functional.cross_entropy(logits[0, :-1][asked], answer[asked]).backward()
        for n, p in model.named_parameters():
            squares[n] += p.grad**2 / 3
            means[n] += p.grad / 3
    for n, f in found.items():
        torch.testing.assert_close(f, squares[n], rtol=1e-4, atol=1e-9)
        assert f.dtype == torch.float32 and (f >= 0).all()
    assert any(not torch.allclose(f, means[n] ** 2, rtol=0.1) for n, f in found.items())
    torch.testing.assert_close(
        fisher(model, some(batch, [2]))["model.norm.weight"],
        3 * found["model.norm.weight"]
        - 2 * fisher(model, some(batch, [0, 1]))["model.norm.weight"],
    )


def test_the_penalty_and_its_gradient_on_a_quadratic_by_hand():
    """4/2 * (1 * (3 - 1)^2 + 0.5 * (2 - 4)^2 + 2 * (3 - 0)^2) = 48; d/dp = 4 * F * (p - a), summed over tasks."""
    layer = torch.nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[3.0, 2.0]])
    state = {
        "fisher-0/weight": torch.tensor([[1.0, 0.5]]),
        "anchor-0/weight": torch.tensor([[1.0, 4.0]]),
        "fisher-1/weight": torch.tensor([[2.0, 0.0]]),
        "anchor-1/weight": torch.tensor([[0.0, 9.0]]),
    }
    found = module("ewc").penalty(layer, {}, SimpleNamespace(), state, weight=4.0)
    assert found.item() == 48
    found.backward()
    assert layer.weight.grad.tolist() == [[4 * (1 * 2 + 2 * 3), 4 * 0.5 * -2]]


def values(pack):
    return {n: original(e) for n, e in pack.tensors.items()}


def snapshots(build, scenario, **options):
    """The strategy, what its stages were, and its artefacts after each task."""
    strategy, found = build("ewc", samples=4, **options), []
    asked = spied(strategy)
    train = strategy._train_exp
    strategy._train_exp = lambda *a, **k: (train(*a, **k), found.append(dict(strategy.shared)))
    return learn(strategy, scenario), asked, found


def test_online_keeps_one_running_fisher_and_starts_at_a_penalty_of_zero(build, tiny_scenario):
    """F after two tasks is gamma F_1 + F_2, F_2 being what `separate` keeps of the same model."""
    strategy, asked, (first, second) = snapshots(build, tiny_scenario, gamma=0.25, weight=0.0)
    assert set(first) == set(second) == {"fisher-0"}
    (term,) = asked[1]["terms"]
    other, _, _ = snapshots(build, tiny_scenario, variant="separate", weight=0.0)
    ours, before = values(second["fisher-0"]), values(first["fisher-0"])
    for n, theirs in values(other.shared["fisher-1"]).items():
        torch.testing.assert_close(ours[n], 0.25 * before[n] + theirs, rtol=1e-3, atol=1e-10)
    strategy.grafted.activate([strategy.packs[0]])
    zero = module("ewc").penalty(strategy.model, {}, None, dict(term.state), weight=1e4)
    assert zero.item() == 0, "theta* is the model that the second task starts from"
    with torch.no_grad():
        strategy.model.get_parameter("model.norm.weight").add_(1.0)
    moved = module("ewc").penalty(strategy.model, {}, None, dict(term.state), weight=1e4)
    expected = 0.5e4 * before["model.norm.weight"].sum()
    assert moved.item() == pytest.approx(expected.item(), rel=1e-4), "no anchor moves along"


def test_separate_keeps_both_of_every_task_and_counts_them(build, tiny_scenario):
    strategy, asked, (first, second) = snapshots(build, tiny_scenario, variant="separate")
    assert set(first) == {"fisher-0", "anchor-0"}
    assert set(second) == {*first, "fisher-1", "anchor-1"}
    assert second["anchor-0"].digest == first["anchor-0"].digest
    tuned = strategy.packs[1].decode()
    for n, anchor in values(second["anchor-1"]).items():
        assert torch.allclose(anchor, strategy.base[n] + tuned[n], rtol=0, atol=1e-3), n
    alive = sum(p.nbytes for p in strategy.alive)
    weights = sum(p.numel() for p in strategy.model.parameters())
    assert alive > 2 * weights + 4 * (4 + 4) * weights / 2
    assert len(asked[1]["terms"][0].state) == 2 * len(tuned)


def test_a_heavy_penalty_holds_the_weights_that_a_light_one_lets_go(build, tiny_scenario):
    """The distance that F measures from the first task's weights falls with the weight; stages are its own."""
    apart, folders = {}, {}
    for name, options in (("sequential", {}), ("ewc", {"weight": 1e2}), ("ewc", {"weight": 1e6})):
        strategy = build(name, **options)
        asked = spied(strategy)
        learn(strategy, tiny_scenario)
        first, last = (p.decode() for p in strategy.packs)
        if name == "ewc" and not apart.get("F"):
            apart["F"] = values(strategy.shared["fisher-0"])
        apart[str(options)] = first, last
        folders[str(options)] = {a["folder"].name for a in asked}
    f = apart.pop("F")
    far = {
        k: sum((f[n] * (b[n] - a[n]) ** 2).sum().item() for n in f) for k, (a, b) in apart.items()
    }
    assert far["{'weight': 1000000.0}"] < 0.5 * far["{'weight': 100.0}"] < far["{}"]
    assert not set.intersection(*folders.values()) and len(set.union(*folders.values())) == 6
    assert asked[1]["log"].losses[-1]["ewc"] > 0
