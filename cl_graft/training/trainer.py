"""TRL's trainers as a stage uses them: rows in a given order, and a method's terms in the loss and the gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cl_graft.errors import CLGraftError, Diverged
from cl_graft.training.acting import Terms
from cl_graft.training.flat import Lay, inner_of
from cl_graft.training.loss import FEW, fused, plain, unfused
from cl_graft.training.term import Term
from cl_graft.training.tokens import ROWS


class Output(NamedTuple):
    """What a penalty is given of the forward pass."""

    logits: Tensor | None  # (batch, length, vocabulary), if some term asks for them


def trainer_class(
    base: type, indices: list[int], terms: Sequence[Term], lay: Lay | None = None
) -> type:
    """TRL's trainer, reading exactly these rows in this order, whatever the number of processes, with these terms.

    lay: how the model is called, in the place of a padded batch's own way.

    `loss_is_scaled_for_ga` says to transformers that our `compute_loss` divides by the micro-batches of a step
    itself: what is left to the library divides a penalty in some settings and not in others.
    """

    class Trainer(base):  # type: ignore[misc]
        loss_is_scaled_for_ga = True
        data_collator: Any

        def __init__(self, **given: Any):
            super().__init__(**given)
            self.data_collator = _Numbered(self.data_collator)
            self.terms = Terms(terms, self.args.device)
            self.loss: Tensor | float = 0.0  # of the step under way

        def _get_train_sampler(self, *_: Any) -> list[int]:
            return indices

        def get_batch_samples(self, *given: Any) -> tuple[list[Any], Any]:
            samples, items = super().get_batch_samples(*given)
            if self.terms.penalties and samples:
                here = torch.stack([_answers(x)[:, 1:].sum() for x in samples]).sum()
                self.tokens = self.accelerator.reduce(here.float(), "mean") / len(samples)
            return samples, items

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            rows, steps = inputs.pop(ROWS), self.current_gradient_accumulation_steps
            batch = {**inputs}
            loss, logits = self._loss(model, inputs, num_items_in_batch)
            if num_items_in_batch is None:  # else the loss is a share of the whole step's
                loss = loss / steps
            if self.terms.penalties:
                batch["labels"] = batch["input_ids"].where(_answers(batch), -100)
                batch[ROWS] = rows.repeat(len(batch["input_ids"]) // len(rows))
                batch["tokens"] = self.tokens
                given = (self.accelerator.unwrap_model(model), batch, Output(logits))
                loss = loss + self.terms.penalty(*given, self.state.global_step) / steps
            self.loss = self.loss + loss.detach()
            return loss

        def _loss(self, model: Any, inputs: Any, items: Any) -> tuple[Tensor, Tensor | None]:
            """TRL's own loss of a micro-batch, and the logits if they are wanted."""
            if not self.terms.logits:
                return super().compute_loss(partial(lay, model) if lay else model, inputs), None
            outputs = []

            def forward(**given: Any) -> Any:
                outputs.append(unfused(model, **given))
                return outputs[-1]

            return super().compute_loss(forward, inputs), outputs[0].logits

        def _prepare_for_training(self, *given: Any, **named: Any) -> Any:
            """DeepSpeed's engine clips and steps at the end of its backward pass: what projects comes just before."""
            prepared = super()._prepare_for_training(*given, **named)
            if self.is_deepspeed_enabled and self.terms.projections:
                step = self.deepspeed.step

                def projected(*given: Any, **named: Any) -> Any:
                    self._project()
                    return step(*given, **named)

                self.deepspeed.step = projected
            return prepared

        def _clip_grad_norm(self, model: Any) -> Any:
            if self.terms.projections and not self.is_deepspeed_enabled:
                self._project()
            return super()._clip_grad_norm(model)

        def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
            """Look, once a step, whether loss and gradients are finite; DeepSpeed says -1 of a norm that is none."""
            norm = super()._get_grad_norm(model, grad_norm=grad_norm)
            loss, self.loss = float(self.loss), 0.0
            if not (math.isfinite(loss) and 0 <= float(norm) < math.inf):
                gradients = "not finite" if float(norm) < 0 else f"{float(norm):g}"
                raise Diverged(
                    f"it diverged in step {self.state.global_step + 1} of {self.args.max_steps} (loss {loss:g}, "
                    f"gradient norm {gradients}) at a learning rate of {self.args.learning_rate:g}, so the stage is "
                    "not kept; lower the learning rate."
                )
            return norm

        def follow(self) -> None:
            """Tell the terms that the optimizer has stepped."""
            if self.terms.followers:
                inner = self.accelerator.unwrap_model(self.model)
                self.terms.follow(inner, self.state.global_step)

        def _project(self) -> None:
            inner = self.accelerator.unwrap_model(self.model)
            with _gradients(inner, self.is_deepspeed_enabled) as gradients:
                self.terms.project(inner, gradients, self.state.global_step)

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            means = self.terms.means(self.accelerator.gather)
            for name in means.keys() & {*logs, *self._metrics["train"]}:
                raise CLGraftError(
                    f"a term is called {name!r}, as a column of the log is; rename its file."
                )
            super().log(logs | means, start_time)

    return Trainer


def dpo_class(
    base: type, indices: list[int], terms: Sequence[Term], lay: Lay | None = None
) -> type:
    """TRL's DPO trainer on pairs that are tokens already.

    Its own preparation (1.16) makes tokens of prompt and answer together, other than those a prompt has alone where
    it ends in a space, and drops a pair in silence whose prompt fills `max_length`.
    """

    left = [term for term in terms if term.kind != "loss"]  # which are of SFT

    class Paired(trainer_class(base, indices, left, lay)):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
            return super().compute_ref_log_probs(partial(lay, model) if lay else model, inputs)

    return Paired


def sft_class(
    base: type,
    indices: list[int],
    terms: Sequence[Term],
    examples: list[dict],
    lay: Lay | None = None,
) -> type:
    """TRL's SFT trainer on these examples, lists of numbers, with its loss by the head that suits the size.

    What TRL reads off the device after every micro-batch for its metrics is summed there and read once a line.
    """

    class Lean(trainer_class(base, indices, terms, lay)):  # type: ignore[misc]
        def __init__(self, **given: Any):
            super().__init__(**given)
            self.train_dataset = examples
            inner = inner_of(self.accelerator.unwrap_model(self.model))
            self.vocabulary = inner.config.get_text_config().vocab_size
            self.data_collator = _Padded(self.processing_class.pad_token_id)
            self.sums: dict[str, Tensor] = {}

        def _loss(self, model: Any, inputs: Any, items: Any) -> tuple[Tensor, Tensor | None]:
            labels, instead = inputs.pop("labels"), self.terms.instead
            if instead and not self.terms.logits:
                return torch.zeros((), device=labels.device), None
            inputs["use_cache"] = False
            if self.aux_loss_enabled:
                inputs["output_router_logits"] = True
            if lay and not self.terms.logits:
                output = lay(model, labels=labels, fused_lm_head=True, **inputs)
                told = fused(output)
            elif self.terms.logits or labels.numel() * self.vocabulary <= FEW:
                output = model(**inputs)
                told = plain(output.logits.detach() if instead else output.logits, labels)
            else:
                output = model(**inputs, labels=labels, fused_lm_head=True)
                told = fused(output)
            for name, value in (*told._asdict().items(), ("read", inputs["attention_mask"].sum())):
                self.sums[name] = self.sums.get(name, 0) + value.detach()
            processes = self.accelerator.num_processes if items is not None else 1
            loss = told.nll / (told.answers if items is None else items).clamp(min=1) * processes
            if instead:
                loss = torch.zeros_like(loss)
            if self.aux_loss_enabled:
                steps = self.current_gradient_accumulation_steps if items is not None else 1
                loss = loss + self.router_aux_loss_coef * output.aux_loss / steps
            return loss, output.logits if self.terms.logits else None

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            if self.sums:
                gather = self.accelerator.gather
                x = {name: gather(value[None]).sum().item() for name, value in self.sums.items()}
                count = max(1, x["answers"])
                self._total_train_tokens += x["read"]
                self._metrics["train"] |= {
                    "entropy": [x["entropy"] / count],
                    "mean_token_accuracy": [x["right"] / count],
                    "num_tokens": [self._total_train_tokens],
                }
                self.sums = {}
            super().log(logs, start_time)

    return Lean


class _Numbered:
    """TRL's collator, which would leave the numbers of the rows out."""

    def __init__(self, collate: Callable[[list[dict]], dict[str, Tensor]]):
        self.collate = collate

    def __call__(self, examples: list[dict]) -> dict[str, Any]:
        return {**self.collate(examples), ROWS: torch.tensor([e[ROWS] for e in examples])}


class _Padded:
    """What TRL's collator gives for SFT, without a tensor for each row, and the numbers of the rows."""

    def __init__(self, pad: int):
        self.pad = pad

    def __call__(self, examples: list[dict]) -> dict[str, Any]:
        sizes = [len(e["input_ids"]) for e in examples]
        longest = max(sizes)

        def padded(column: str, value: int) -> Tensor:
            rows = [e[column] + [value] * (longest - len(e[column])) for e in examples]
            return torch.tensor(rows)

        return {
            "input_ids": padded("input_ids", self.pad),
            "labels": padded("labels", -100),
            "attention_mask": (torch.arange(longest) < torch.tensor(sizes)[:, None]).long(),
            ROWS: torch.tensor([e[ROWS] for e in examples]),
        }


def _answers(batch: Mapping[str, Tensor]) -> Tensor:
    """Which tokens are an answer's, bool (batch, length): SFT marks them by labels, DPO by a mask."""
    return batch["labels"] != -100 if "labels" in batch else batch["completion_mask"] == 1


@contextmanager
def _gradients(model: Any, sharded: bool) -> Iterator[dict[str, Tensor]]:
    """{name: gradient} to change in place; under ZeRO-2 the shares are gathered, and put back in the end."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not sharded:
        yield {name: p.grad for name, p in named.items() if p.grad is not None}
        return
    from deepspeed.utils import safe_get_full_grad, safe_set_full_grad

    whole = {name: safe_get_full_grad(p) for name, p in named.items()}
    gradients = {name: gradient for name, gradient in whole.items() if gradient is not None}
    yield dict(gradients)
    for name, gradient in gradients.items():
        safe_set_full_grad(named[name], gradient)
