"""BitDelta: a sign an entry and a scale a matrix, or a row or column, distilled (arXiv 2402.10193, 2512.19720).

Delta D becomes scale * sign(D), the scale first the mean of |D|, then trained so that the logits on the task's text are
the tuned model's: mean squared error, Adam under a cosine, all scales together. The released code (FasterDecoding/
BitDelta) takes 200 steps of 4 texts of C4 at a rate of 1e-4; here the text is the task's, and rates are relative, for
the scales of a small model are as small as that. It keeps embeddings, head and norms whole and does not count them;
here every matrix is signs, and vectors are kept in 16 bit. One bit an entry is a sixteenth of the base: more than that
is never used, and where the budget is less, the matrices whose signs tell most a byte, numel * mean(|D|)^2, have them
and the others are left out.
"""

from math import prod
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch.func import functional_call

from cl_graft.budget import largest_within
from cl_graft.models.spread import require_whole
from cl_graft.ranges import Count, Positive
from cl_graft.skillpack.codecs import (
    dense,
    dense_spec,
    sign_scale,
    sign_scale_spec,
    sign_scales,
    sign_scales_spec,
)
from cl_graft.skillpack.compress.calibrate import moments, stored_transposed
from cl_graft.strategy import compressor

ONE = "one matrix's signs and the vectors"


def least(context, *, scales: str, steps: int):
    """Refuse a budget that holds no matrix's signs beside the vectors, and to distil a model that is spread."""
    if steps:
        require_whole(context.model, "bitdelta's distillation (steps over 0)")
    shapes = context.shapes
    first = min((n for n in shapes if len(shapes[n]) > 1), key=lambda n: prod(shapes[n]))
    specs = {n: _spec(s, scales) for n, s in shapes.items() if len(s) < 2 or n == first}
    largest_within(context.budget, lambda count: context.cost_of(specs), 1, ONE)


@compressor(keeps="per_task", check=least)
def bitdelta(
    delta,
    context,
    *,
    scales: Literal["matrix", "axis"] = "matrix",
    steps: Annotated[int, Field(ge=0)] = 50,
    batch: Count = 4,
    learning_rate: Positive = 0.01,
):
    """scales: one a matrix, or (`axis`) one a row or one a column, whichever misses less of the layer's output on the
    validation text; the paper trains both for each layer and compares. steps: of the distillation, 0 for none; the
    released code takes 200. batch: texts of a step. learning_rate: of the factors on the first scales.
    """
    changes = _held(dict(delta.items()), context, scales)
    axes = dict.fromkeys(changes)
    if scales == "axis":
        axes = _axes(changes, context)
    sizes = {n: _magnitude(x, axes[n]) for n, x in changes.items() if x.ndim > 1}
    if steps:
        sizes = distilled(context, changes, sizes, steps, batch, learning_rate)

    def encoded(name, x):
        if x.ndim < 2:
            return dense(x)
        if axes[name] is None:
            return sign_scale(x, float(sizes[name]))
        return sign_scales(x, axes[name], sizes[name].flatten())

    return {name: encoded(name, x) for name, x in changes.items()}


def _held(changes, context, scales):
    """The vectors, and of the matrices those whose signs tell most a byte, as many as the budget holds."""
    vectors = {n: x for n, x in changes.items() if x.ndim < 2}
    matrices = [n for n, x in changes.items() if x.ndim > 1]
    matrices.sort(key=lambda n: float(changes[n].abs().mean()), reverse=True)

    def kept(count):
        return vectors | {n: changes[n] for n in matrices[:count]}

    def cost(count):
        return context.cost_of({n: _spec(x.shape, scales) for n, x in kept(count).items()})

    return kept(largest_within(context.budget, cost, len(matrices), ONE))


def distilled(context, changes, sizes, steps, batch, learning_rate):
    """Scales whose logits are nearer to those of the tuned model, which `context.model` holds.

    changes: {parameter: delta}. sizes: {matrix: its scales, broadcastable to it}.
    """
    model, texts = context.model, context.batches(batch, seed=4)
    training = model.training
    model.eval()
    rest = {n: x + changes.get(n, 0.0) for n, x in context.start.items() if n not in sizes}
    signs = {n: torch.where(changes[n] > 0, 1.0, -1.0) * size for n, size in sizes.items()}
    factors = {n: torch.ones_like(size, requires_grad=True) for n, size in sizes.items()}
    optimizer = torch.optim.Adam(factors.values(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        text = {k: v for k, v in next(texts).items() if k != "labels"}
        with torch.no_grad():
            wanted = model(**text, use_cache=False).logits
        weights = {n: context.start[n] + factors[n] * x for n, x in signs.items()}
        found = functional_call(model, {**rest, **weights}, kwargs={**text, "use_cache": False})
        missed = (found.logits - wanted)[text["attention_mask"].bool()]
        optimizer.zero_grad()
        missed.float().square().mean().backward()
        optimizer.step()
        schedule.step()
        context.progress((step + 1) / steps)
    model.train(training)
    return {n: (size * factors[n]).detach() for n, size in sizes.items()}


def _axes(changes, context):
    """{parameter: 0 for a scale a row, 1 for one a column, None where it is no matrix}."""
    measured = moments(context.model, context.validation(32), gradients=False)
    transposed = stored_transposed(context.model)

    def missed(name, x, axis):
        left = x - torch.where(x > 0, 1.0, -1.0) * _magnitude(x, axis)
        seen = measured.hessian(name)
        if seen is None:
            return left.square().sum()
        if seen.ndim == 1:
            return left.square().sum(1) @ seen.to(x)
        left = left.T if name in transposed else left
        return ((left @ seen.to(x)) * left).sum()

    return {
        name: min((0, 1), key=lambda axis: float(missed(name, x, axis))) if x.ndim == 2 else None  # noqa: B023
        for name, x in changes.items()
    }


def _magnitude(x, axis):
    """Mean magnitudes, of the shape that is multiplied by the signs."""
    return x.abs().mean() if axis is None else x.abs().mean(1 - axis, keepdim=True)


def _spec(shape, scales):
    shape = tuple(shape)
    if len(shape) < 2:
        return dense_spec(shape)
    if scales == "matrix" or len(shape) != 2:
        return sign_scale_spec(shape)
    return sign_scales_spec(shape, 0 if shape[0] > shape[1] else 1)
