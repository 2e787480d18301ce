"""What an approximation of a delta costs on text that it was not made with: output error, and KL to the tuned model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from cl_graft.bench.deltas import Delta
from cl_graft.models.load import load
from cl_graft.models.text import encode_all
from cl_graft.skillpack.compress.calibrate import Moments, linear_layers, moments
from cl_graft.skillpack.compress.text import padded
from cl_graft.skillpack.folders.checkpoint import Checkpoint
from cl_graft.task import Example

ERROR_ROWS, KL_ROWS = 128, 64  # of the test set
BATCH = 8


@dataclass(frozen=True)
class HeldOut:
    """The test examples of a delta, and what its two models make of them; each is computed when it is first needed."""

    delta: Delta

    @cached_property
    def tuned(self) -> tuple[Any, Any]:
        """The tuned model, in float32, and its tokenizer."""
        return load(str(self.delta.tuned))

    @cached_property
    def decoder(self) -> list[str]:
        """Names of the decoder's matrices: all linear layers but the head."""
        model, _ = self.tuned
        head = model.get_output_embeddings()
        return [f"{n}.weight" for n, m in linear_layers(model).items() if m is not head]

    @cached_property
    def inputs(self) -> Moments:
        """Second moments of what each matrix of the tuned model reads, over the first ERROR_ROWS test examples."""
        return self.moments(self.delta.test[:ERROR_ROWS])

    def moments(self, rows: Sequence[Example]) -> Moments:
        """Second moments of what each matrix of the tuned model reads on these rows."""
        return moments(self.tuned[0], list(self.batches(rows)), gradients=False)

    @cached_property
    def sizes(self) -> dict[str, float]:
        """{matrix: squared norm of what its delta adds to the outputs}, without those that did not change."""
        found = {name: self._squared(name, self.change(name)) for name in self.decoder}
        return {name: size for name, size in found.items() if size > 0}

    def change(self, name: str) -> Tensor:
        """The delta itself of one tensor, float32."""
        before, after = Checkpoint(self.delta.base), Checkpoint(self.delta.tuned)
        return after.read(name).float() - before.read(name).float()

    def error(self, deltas: Mapping[str, Tensor]) -> float:
        """Mean over the decoder's matrices of ||x (D - D')|| / ||x D||; a matrix that is not in `deltas` counts 1."""
        errors = []
        for name, size in self.sizes.items():
            missed = self.change(name) - deltas[name] if name in deltas else None
            errors.append(1.0 if missed is None else (self._squared(name, missed) / size) ** 0.5)
        return sum(errors) / len(errors)

    def _squared(self, name: str, weight: Tensor) -> float:
        """||x W^T||^2 a token, from the moments of x."""
        hessian = self.inputs.hessian(name)
        assert hessian is not None
        return float(((weight @ hessian).double() * weight).sum())

    def batches(self, rows: Sequence[Example]) -> Iterator[dict[str, Tensor]]:
        """input_ids, attention_mask and labels of BATCH rows at a time, padded on the right."""
        _, tokenizer = self.tuned
        texts = ((e.prompt, (e.completion,)) for e in rows)
        encoded = [
            (head + tail, len(head))
            for head, (tail,) in encode_all(tokenizer, texts, self.delta.max_length)
        ]
        for start in range(0, len(encoded), BATCH):
            yield padded(encoded[start : start + BATCH], tokenizer.pad_token_id)

    # KL divergence

    @cached_property
    def wanted(self) -> list[Tensor]:
        """Log-probabilities of the tuned model, (tokens, vocabulary) a batch, over the first KL_ROWS test examples."""
        return [log_probabilities(self.tuned[0], batch) for batch in self._texts]

    @cached_property
    def _texts(self) -> list[dict[str, Tensor]]:
        return list(self.batches(self.delta.test[:KL_ROWS]))

    @cached_property
    def _base(self) -> nn.Module:
        return load(str(self.delta.base))[0]

    @torch.no_grad()
    def kl(self, deltas: Mapping[str, Tensor]) -> dict[str, float]:
        """KL(tuned, base + deltas), nats a token: `kl` over all tokens, `kl_answers` where the answer is predicted.

        Weights and logits are float32, the sums float64.
        """
        start = Checkpoint(self.delta.base)
        for name, parameter in self._base.named_parameters():
            weight = start.read(name).float()
            parameter.copy_(weight + deltas[name] if name in deltas else weight)
        found = (log_probabilities(self._base, batch) for batch in self._texts)
        return divergence(self.wanted, found, self._texts)


def divergence(
    wanted: Iterable[Tensor], found: Iterable[Tensor], batches: Sequence[Mapping[str, Tensor]]
) -> dict[str, float]:
    """KL(wanted, found), nats a token: `kl` over all tokens, `kl_answers` where an answer is predicted.

    wanted, found: of each batch, what `log_probabilities` gives.
    """
    each, of_answer = [], []
    for right, other, batch in zip(wanted, found, batches, strict=True):
        each.append((right.exp() * (right - other)).sum(-1).double())
        of_answer.append(predicts_answer(batch))
    kl, answers = torch.cat(each), torch.cat(of_answer)
    return {"kl": float(kl.mean()), "kl_answers": float(kl[answers].mean())}


@torch.no_grad()
def log_probabilities(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Log-probabilities after each token that is no padding, float32 (tokens, vocabulary)."""
    keep = batch["attention_mask"].bool()
    told = {key: batch[key] for key in ("input_ids", "attention_mask")}
    return model(**told, use_cache=False).logits[keep].float().log_softmax(-1)


def predicts_answer(batch: Mapping[str, Tensor]) -> Tensor:
    """Whether the next token is one of the answer's, for each token that is no padding."""
    labels = batch["labels"]
    following = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)
    return (following != -100)[batch["attention_mask"].bool()]
