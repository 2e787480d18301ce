"""Model Grafting: a sparse mask over the delta, optimised to keep the task (Panigrahi et al. 2023, arXiv 2302.06600).

The mask starts from the largest entries, g0, and follows the gradient of the task's loss: g = g0 (1 - sigmoid(S)) +
(1 - g0) sigmoid(S), where S starts at U[0, 1) - 10. A step of plain gradient descent an epoch, on the mean gradient as
it is: it is tiny, and the rates are large. Embeddings and head are frozen while the task tunes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from operator import itemgetter
from typing import Literal

import torch
from torch import Tensor

from cl_graft.models.spread import require_whole
from cl_graft.ranges import Count, Positive
from cl_graft.skillpack.codecs import Encoded
from cl_graft.skillpack.rounding import seed_of, summed
from cl_graft.strategy import Context, compressor

BIAS = 10.0
RATES = (1e6, 1e7, 1e8, 1e9, 1e10)  # the released code's 1e7, and what other gradients need
Tensors = dict[str, Tensor]


def check(context: Context) -> None:
    """Refuse a model of which the weights are not there to be masked."""
    require_whole(context.model, "model_grafting")


@compressor(
    check=check,
    keeps={"each": "per_task", "summed": "sum"},
    touches=("attention", "mlp", "norm", "other"),
)
def model_grafting(
    delta: Mapping[str, Tensor],
    context: Context,
    *,
    convention: Literal["each", "summed"] = "each",
    epochs: Count = 36,
    batches: Count = 8,
    batch_size: Count = 32,
    rate: Positive | None = None,
) -> dict[str, Encoded]:
    """convention: `each` grafts every task on the base, and its own graft answers for it, as in the paper; `summed`
    tunes each from the model so far, and all grafts together are one model.
    epochs: steps of the mask, each on so many batches of training rows. rate: of a step; None tries 1e6 to 1e10 for an
    eighth of the epochs on a quarter of the batches, goes to the end with the two that lose least on the task's
    validation, and takes the better one.
    The mask with the least validation loss is kept, the starting one included, of as many entries as the budget holds.
    """
    graft = Graft(context, dict(delta.items()), batch_size)
    rates, tried, few = [rate] if rate else list(RATES), max(1, epochs // 8), max(1, batches // 4)
    if len(rates) > 1:
        early = {each: graft.optimised(each, tried, few)[0] for each in rates}
        rates = sorted(rates, key=early.__getitem__)[:2]
    found = []
    for each in rates:
        found.append(graft.optimised(each, epochs, batches))
        context.progress(len(found) / len(rates))
    _, scores = min(found, key=itemgetter(0))
    return context.keep(graft.delta, context.masks(scores, at_most=graft.count))


class Graft:
    """Masks over a task's delta, and what the model loses under them.

    delta: parameter name -> float32 tensor. size: of its batches.
    """

    def __init__(self, context: Context, delta: Tensors, size: int):
        self.context, self.delta, self.size = context, delta, size
        self.validation = context.validation(size)
        self.parameters = dict(context.model.named_parameters())
        self.start = context.masks({n: d.abs() for n, d in delta.items()})
        self.count = sum(int(mask.sum()) for mask in self.start.values())

    def optimised(self, rate: float, epochs: int, batches: int) -> tuple[float, Tensors]:
        """The least validation loss, of the starting mask or an epoch's, and that mask as scores of the entries.

        batches: of training rows, that the step of an epoch looks at.
        """
        generator = torch.Generator().manual_seed(self.context.seed)
        logits = {
            n: (torch.rand(d.shape, generator=generator) - BIAS).to(d.device)
            for n, d in self.delta.items()
        }
        training = self.context.batches(self.size, seed=3)
        best, scores = self.loss(self.start), self._scores(logits)
        for _ in range(epochs):
            self.step(logits, rate, list(islice(training, batches)))
            now = self._scores(logits)
            if (loss := self.loss(self.top(now))) < best:
                best, scores = loss, now
        return best, scores

    def step(self, logits: Tensors, rate: float, batches: Sequence[Tensors]) -> None:
        """Move S, in place, against the mean gradient of the loss at start + g * delta."""
        gates = {n: x.sigmoid() for n, x in logits.items()}
        gradient = self._gradient(gates, batches)
        for n, gate in gates.items():
            sign = torch.where(self.start[n], -1.0, 1.0)
            logits[n] -= rate * gradient[n] * self.delta[n] * sign * gate * (1 - gate)

    @torch.no_grad()
    def loss(self, mask: Tensors) -> float:
        """Mean loss of a token of the validation answers."""
        self._set(mask)
        total, tokens = 0.0, 0
        for batch in self.validation:
            answers = int((batch["labels"] != -100).sum())
            total += self.context.model(**batch).loss.item() * answers
            tokens += answers
        return total / tokens

    def top(self, scores: Tensors) -> Tensors:
        """The mask of the `count` best-scored entries; what it costs in bytes is left for the mask that is kept."""
        flat = torch.cat([s.flatten() for s in scores.values()])
        least = flat.kthvalue(flat.numel() - self.count + 1).values
        return {n: s >= least for n, s in scores.items()}

    def _scores(self, logits: Tensors) -> Tensors:
        """What orders entries as g does, also where the sigmoid is 0 or 1 to the last digit."""
        return {n: torch.where(self.start[n], -x, x) for n, x in logits.items()}

    def _gradient(self, gates: Tensors, batches: Sequence[Tensors]) -> Tensors:
        """Mean gradient of the loss with respect to the weights."""
        self._set({n: torch.where(self.start[n], 1 - gate, gate) for n, gate in gates.items()})
        self.context.model.zero_grad(set_to_none=True)
        for batch in batches:
            (self.context.model(**batch).loss / len(batches)).backward()
        gradient = {n: self._of(n) for n in self.delta}
        self.context.model.zero_grad(set_to_none=True)
        return gradient

    def _of(self, name: str) -> Tensor:
        gradient = self.parameters[name].grad
        return torch.zeros_like(self.delta[name]) if gradient is None else gradient.float()

    def _set(self, mask: Tensors) -> None:
        with torch.no_grad():
            for name, delta in self.delta.items():
                start = self.context.start[name]
                weights, seed = start + mask[name] * delta, seed_of([], name)
                self.parameters[name].copy_(summed(weights, start.dtype, seed))
