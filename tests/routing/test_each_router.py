"""Each router against its definition, worked by hand or by brute force."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from cl_graft.routing.base import PackRouter, View
from cl_graft.skillpack.codecs import low_rank
from cl_graft.skillpack.format.file import SkillPack, fingerprint
from cl_graft.skillpack.live.grafted import Grafted
from tests.routing.test_routers import apart, learned, router
from tests.routing.test_selection import trained

PROMPTS = ["Q: Zoe has 5 bags", "def f(x):", "Q:"]


def test_mahalanobis_is_the_distance_under_the_mean_of_the_tasks_covariances() -> None:
    made, tasks = router("mahalanobis", shrinkage=0.05), apart(6, 3, gap=1.0)
    scores = made.scores(learned(made, tasks), tasks[1])
    covariance = sum(torch.cov(x.double().T, correction=0) for x in tasks) / 3
    inverse = torch.linalg.inv(
        covariance + 0.05 * covariance.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    )
    for number, features in enumerate(tasks):
        away = tasks[1].double() - features.double().mean(0)
        wanted = -0.5 * torch.einsum("ni,ij,nj->n", away, inverse, away)
        torch.testing.assert_close(scores[:, number], wanted, rtol=1e-4, atol=1e-4)


def test_mahalanobis_keeps_half_of_a_matrix_and_a_mean_a_task_however_many_prompts() -> None:
    made = router("mahalanobis", projection=5)
    for rows in (10, 90):
        state = learned(made, apart(6, 3, rows))
        assert {n: tuple(x.shape) for n, x in state.items()} == {"means": (3, 5), "within": (15,)}


def test_mahalanobis_tells_tasks_apart_of_which_a_prompt_is_all_there_is() -> None:
    made, tasks = router("mahalanobis"), [torch.eye(4)[:1], torch.eye(4)[1:2]]
    assert made.scores(learned(made, tasks), torch.eye(4)[:2]).argmax(1).tolist() == [0, 1]


def test_the_classifier_keeps_a_bounded_sample_and_knows_the_first_task_after_the_last() -> None:
    made, tasks = router("classifier", kept=16), apart(12, 6, gap=4.0)
    state = learned(made, tasks)
    assert torch.bincount(state["owners"]).tolist() == [16] * 6
    assert state["features"].dtype == torch.bfloat16 and len(state["features"]) == 96
    assert torch.equal(state["features"][:16], tasks[0][:16].bfloat16())
    right = made.scores(state, tasks[0][16:]).argmax(1) == 0
    assert right.double().mean() > 0.95


def test_the_classifier_takes_features_as_they_come() -> None:
    """Trained on features of mean 0 and variance 1: their scale and origin change little."""
    made, tasks = router("classifier"), apart(12, 3, gap=2.0)
    plain = made.scores(learned(made, tasks), tasks[1])
    moved = [64 * x for x in tasks]
    torch.testing.assert_close(
        made.scores(learned(made, moved), moved[1]), plain, rtol=1e-3, atol=1e-3
    )


# --- by packs ---


def view(nano: Any, packs: list[SkillPack]) -> View:
    model, tokenizer = nano
    return View(Grafted(model), tokenizer, None, [[pack] for pack in packs])  # type: ignore[arg-type]


def rank_one(model: Any, tensors: dict[str, float], seed: int) -> tuple[SkillPack, dict[str, Any]]:
    """A pack of u v^T for each name, of that Frobenius norm; and the unit vectors v."""
    torch.manual_seed(seed)
    named, kept, directions = dict(model.named_parameters()), {}, {}
    for name, size in tensors.items():
        rows, columns = named[name].shape
        left, right = normalize(torch.randn(rows, 1), dim=0), normalize(torch.randn(1, columns))
        kept[name], directions[name] = low_rank(size * left, right), right[0]
    pack = SkillPack(kept, f"task {seed}", "test", {}, fingerprint(model.named_parameters()))
    return pack, directions


def test_arrow_is_the_mean_cosine_with_the_first_singular_vector(nano: Any) -> None:
    """And with the full spectrum a delta of rank one counts by its norm, over the mean norm."""
    model, tokenizer = nano
    names = [f"model.layers.{k}.self_attn.q_proj" for k in (0, 1)]
    (one, of_one), (two, of_two) = (
        rank_one(model, {f"{name}.weight": size for name in names}, seed)
        for seed, size in ((0, 1.0), (1, 3.0))
    )
    wanted = torch.zeros(len(PROMPTS), 2)
    for row, prompt in enumerate(PROMPTS):
        seen: dict[str, torch.Tensor] = {}
        hooks = [
            model.get_submodule(n).register_forward_pre_hook(
                lambda module, given, n=n, seen=seen: seen.update({n: given[0][0]})
            )
            for n in names
        ]
        model(input_ids=torch.tensor([tokenizer(prompt)["input_ids"]]))
        for hook in hooks:
            hook.remove()
        for task, directions in enumerate((of_one, of_two)):
            parts = [normalize(seen[n], dim=-1) @ directions[f"{n}.weight"] for n in names]
            wanted[row, task] = sum(x.abs().mean() for x in parts) / 2
    top = router("arrow", spectrum="top").judge({}, PROMPTS, view(nano, [one, two]))
    torch.testing.assert_close(top, wanted, rtol=1e-3, atol=1e-4)
    full = router("arrow", spectrum="full").judge({}, PROMPTS, view(nano, [one, two]))
    torch.testing.assert_close(full, wanted * torch.tensor([0.5, 1.5]), rtol=1e-3, atol=1e-4)
    scaled = router("arrow", spectrum="scaled").judge({}, PROMPTS, view(nano, [one, two]))
    torch.testing.assert_close(scaled, wanted, rtol=1e-3, atol=1e-4)


def test_a_layer_that_a_pack_does_not_touch_says_nothing_for_it(nano: Any) -> None:
    model, _ = nano
    names = [f"model.layers.{k}.self_attn.q_proj.weight" for k in (0, 1)]
    one, two = (rank_one(model, {name: 1.0}, k)[0] for k, name in enumerate(names))
    for spectrum in ("top", "full", "scaled"):
        found = router("arrow", spectrum=spectrum).judge({}, PROMPTS, view(nano, [one, two]))
        assert found.shape == (3, 2) and (found > 0).all() and (found < 1).all()


def test_likelihood_is_what_the_prompts_tokens_gain_by_a_pack(nano: Any) -> None:
    model, tokenizer = nano
    pack, _ = rank_one(model, {"model.layers.0.mlp.down_proj.weight": 2.0}, 0)
    asked = view(nano, [pack])

    @torch.no_grad()
    def told(prompt: str) -> float:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        found = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        picked = found.gather(1, ids[0, 1:, None])
        return picked.mean().item() if picked.numel() else 0.0

    before = [told(prompt) for prompt in PROMPTS]
    asked.grafted.activate([pack])
    wanted = [told(prompt) - was for prompt, was in zip(PROMPTS, before, strict=True)]
    found = router("likelihood").judge({}, PROMPTS, asked)
    assert found[:, 0].tolist() == pytest.approx(wanted, abs=1e-5) and any(wanted)
    assert not asked.grafted.active and router("likelihood").passes(5) == 6


@pytest.mark.parametrize("name", ["arrow", "likelihood"])
def test_a_router_by_packs_keeps_nothing_and_leaves_the_base(nano, tiny_scenario, name) -> None:
    made = router(name)
    assert isinstance(made, PackRouter)
    strategy = trained(nano, tiny_scenario, router=made)
    assert not strategy.shared
    chosen = strategy.route([e.prompt for e in tiny_scenario.tasks[0].test], 0)
    assert {choice.tasks for choice in chosen} <= {(0,), (1,)}
    assert fingerprint(strategy.model.named_parameters()) == strategy.grafted.base
