"""GraftLLM: one compressed SkillPack per task, on a base that is never touched (arXiv 2505.18502, ICLR 2026).

Every task is tuned from the base in full; its delta is compressed module by module: embeddings and head
pruned by magnitude, MLP by SVD to an energy threshold, attention by low-rank SVD, the factors quantised
by GPTQ at a precision that follows the singular values, norms and biases kept. One pack a task is
appended, and the pack of the task at hand is the one that is active.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .context import Context, OverBudget
from .skillpack.calibrate import Moments, linear_layers, stored_transposed
from .skillpack.codecs import Encoded, Spec, dense, sparse
from .skillpack.factorise import Spectrum, allocate, encode, rank_for_energy, spec_of, spectrum
from .strategy import compressor


@compressor(keeps="per_task")
def graftllm(
    delta: Mapping[str, Tensor],
    context: Context,
    *,
    alpha: float | None = None,
    beta: float = 1.0,
    rank: int | None = None,
    group_size: int = 128,
    damping: float = 0.01,
    act_order: bool = False,
    activation_aware: bool = True,
    refit: bool = True,
    calibration_batches: int = 8,
) -> dict[str, Encoded]:
    """alpha: share of embedding and head entries kept; None lets the budget decide. beta: energy threshold of
    the MLP's ranks. rank: most ranks of an attention matrix; None for no limit. activation_aware: factors of
    D L with H = L L^T instead of the plain SVD. refit: least-squares refit of the left factors.

    Within those limits bits go where they buy the most: one price of a byte, shared by all tensors, decides
    for each rank between 8, 4, 3, 2 bits and none, and is set so that the pack just fits the budget.
    """
    moments = context.moments(calibration_batches)
    matrices = _matrices(delta, context)
    spectra = {
        n: _limited(
            spectrum(d, moments.inputs[n] if activation_aware else None, damping),
            rank if context.roles[n] == "attention" else None,
            beta if context.roles[n] == "mlp" else 1.0,
            moments.outputs[n].mean(),
        )
        for n, d in matrices.items()
    }
    tables = {n: d for n, d in delta.items() if n not in matrices and d.ndim >= 2}
    importance = {n: _importance(n, context, moments) for n in tables}
    kept = {n: dense(d) for n, d in delta.items() if d.ndim < 2}

    def plan(price: float) -> tuple[dict[str, dict[int, int]], dict[str, Encoded]]:
        ranks = {
            n: counts
            for n, s in spectra.items()
            if (counts := allocate(s.energy, s.shape, price, group_size))
        }
        masks = {n: _prune(tables[n], importance[n], alpha, price) for n in tables}
        pruned = {n: sparse(tables[n], mask) for n, mask in masks.items() if mask.any()}
        return ranks, pruned

    def fits(price: float) -> bool:
        ranks, pruned = plan(price)
        specs: dict[str, Spec] = {n: e.spec for n, e in {**kept, **pruned}.items()}
        specs |= {n: spec_of(c, spectra[n].shape, group_size) for n, c in ranks.items()}
        return context.cost_of(specs) <= context.budget.bytes

    ranks, pruned = plan(_cheapest(fits, context))
    transposed, encoded = stored_transposed(context.model), {}
    for done, (name, counts) in enumerate(ranks.items()):
        encoded[name] = encode(
            spectra[name],
            counts,
            group_size=group_size,
            damping=damping,
            act_order=act_order,
            refit=refit,
            transposed=name in transposed,
        )
        context.progress((done + 1) / len(ranks))
    return {
        n: (kept | pruned | encoded)[n] for n in delta if n in kept or n in pruned or n in encoded
    }


def _matrices(delta: Mapping[str, Tensor], context: Context) -> dict[str, Tensor]:
    """The deltas of the decoder's linear layers, as (out, in)."""
    transposed = stored_transposed(context.model)
    names = [f"{n}.weight" for n in linear_layers(context.model)]
    return {
        n: delta[n].T if n in transposed else delta[n]
        for n in names
        if context.roles.get(n) in ("attention", "mlp")
    }


def _limited(found: Spectrum, rank: int | None, share: float, weight: Tensor) -> Spectrum:
    """Energy in units of the loss; beyond the limits it counts as nothing, so that no bits are spent there."""
    keep = min(rank or len(found.energy), rank_for_energy(found.energy, share))
    energy = found.energy * weight.double()
    energy[keep:] = 0.0
    return Spectrum(found.delta, found.hessian, energy, found.left, found.right)


def _importance(name: str, context: Context, moments: Moments) -> Tensor:
    """What a squared unit of an entry costs in squared loss, broadcastable to the tensor.

    For a head the second moment of each input; for an embedding how often its token is read; both times the
    mean square of the gradient at the output. For what is neither (the stacked matrices of experts, say) the
    average over the layers that are.
    """
    if name not in moments.inputs:
        known = [n for n in moments.inputs if moments.inputs[n].ndim == 2]
        each = [moments.inputs[n].diagonal().mean() * moments.outputs[n].mean() for n in known]
        return torch.stack(each).mean()
    inputs, outputs = moments.inputs[name], moments.outputs[name]
    if inputs.ndim == 1:  # an embedding: (tokens, width)
        return inputs[:, None] * outputs[None, :] + _as_head(name, context, moments)
    if name in stored_transposed(context.model):
        return inputs.diagonal()[:, None] * outputs[None, :]
    return outputs[:, None] * inputs.diagonal()[None, :]


def _as_head(name: str, context: Context, moments: Moments) -> Tensor | float:
    """What a tied embedding's entries cost where they are used as the head; 0 where they are not tied."""
    head = context.model.get_output_embeddings()
    if head is None or head.weight is not dict(context.model.named_parameters())[name]:
        return 0.0
    used = next(f"{n}.weight" for n, module in context.model.named_modules() if module is head)
    return moments.outputs[used][:, None] * moments.inputs[used].diagonal()[None, :]


def _prune(delta: Tensor, importance: Tensor, alpha: float | None, price: float) -> Tensor:
    """Mask of the entries worth their bytes (about 2.5 each with the position), or of the top alpha by magnitude."""
    if alpha is None:
        return delta.double() ** 2 * importance.double() > price * 2.5
    keep = int(alpha * delta.numel())
    order = delta.abs().flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(delta.numel(), dtype=torch.bool, device=delta.device)
    mask[order[:keep]] = True
    return mask.view_as(delta)


def _cheapest(fits, context: Context) -> float:
    """The lowest price of a byte at which the pack fits, to a tenth of a per cent."""
    low, high = -30.0, 10.0  # powers of ten
    if not fits(10**high):
        raise OverBudget(
            f"the budget {context.budget.text} ({context.budget.bytes} bytes) holds not even the norms "
            "and the header of a pack; raise it."
        )
    if fits(10**low):
        return 10**low
    while high - low > math.log10(1.001):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(10**middle) else (middle, high)
    return 10**high
