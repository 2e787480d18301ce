"""What hooks add up over the tokens of the calibration text: second moments of inputs, squares of gradients.

Rows of padding are left out. Of experts each has its own sums, over the tokens that were routed to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

STRIP = 512  # rows of X^T X that are multiplied at a time, from the diagonal to the right


class Text(NamedTuple):
    """The text of a batch. keep: bool (sequences * length,), what is no padding; None where there is no padding."""

    sequences: int
    tokens: int
    keep: Tensor | None


def text_of(batch: Mapping[str, Tensor]) -> Text:
    keep = batch["attention_mask"].reshape(-1).bool()
    tokens = int(keep.sum())
    return Text(len(batch["input_ids"]), tokens, keep if tokens < len(keep) else None)


class Expert(NamedTuple):
    """Rows of an expert: `stack` is the parameter that holds its matrix among those of `experts`, and `bias` likewise;
    token: int64 (n,), the tokens that were routed to it."""

    stack: str
    bias: str | None
    number: int
    experts: int
    token: Tensor


@dataclass
class Sums:
    """Totals over the tokens seen so far; `inputs` and `reads` as in Moments. text: of the batch at hand."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    reads: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    text: Text = Text(0, 0, None)
    wanted: Callable[[str], bool] = lambda group: True  # whether a group is to be added up
    _routed: dict[str, Tensor] = field(default_factory=dict)  # tokens that experts' outputs are of
    _seen: Any = field(default_factory=WeakTensorKeyDictionary)  # tensor -> the group that it is

    def read(self, name: str, module: nn.Module, x: Tensor) -> None:
        """Add what a module reads, where it has parameters that multiply it."""
        own = _readers(module, x.shape[-1])
        if not own:
            return
        group = self._seen.get(x)
        if group is None:
            group = self._seen[x] = name
            if self.wanted(name):
                self._add(name, module, x.detach())
        self.reads |= {f"{name}.{parameter}": group for parameter in own}

    def _add(self, name: str, module: nn.Module, x: Tensor) -> None:
        if isinstance(module, nn.Embedding):
            if len(x) == 1:  # positions, the same for every sequence of the batch
                x = x.expand(self.text.sequences, -1)
            self._count(name, self._kept(x.reshape(-1)), module.num_embeddings)
        else:
            rows = self._kept(x.reshape(-1, x.shape[-1]))
            self.inputs[name] = _add_gram(self.inputs.get(name), rows)

    def _kept(self, rows: Tensor) -> Tensor:
        keep = self._keep(rows.device)
        return rows if keep is None or len(rows) != len(keep) else rows[keep]

    def _keep(self, device: torch.device) -> Tensor | None:
        """`text.keep` where a layer runs: layers of a spread model run on several devices."""
        return None if self.text.keep is None else self.text.keep.to(device)

    def _count(self, name: str, rows: Tensor, of: int) -> None:
        counts = torch.bincount(rows, minlength=of)
        self.inputs[name] = (
            self.inputs[name].add_(counts) if name in self.inputs else counts.float()
        )

    def wrote(self, name: str, gradient: Tensor) -> None:
        """Add the gradient at what a parameter writes, (..., out)."""
        squares = gradient.detach().reshape(-1, gradient.shape[-1]).float().square().sum(0)
        self.outputs[name] = self.outputs[name].add_(squares) if name in self.outputs else squares

    # experts

    def routed(self, name: str, index: Tensor, experts: int) -> None:
        """Count the tokens of each expert of a module. index: int64 (tokens, k), the experts of each token."""
        if self.wanted(name):
            chosen = self._kept(index).reshape(-1)
            self._count(name, chosen[chosen < experts], experts)

    def read_by(self, expert: Expert, x: Tensor) -> None:
        """Add what an expert's matrix reads, (n, in)."""
        name, experts = expert.stack, expert.experts
        if self.wanted(name):
            keep = self._keep(x.device)
            x = x.detach() if keep is None else x.detach()[keep[expert.token]]
            if name not in self.inputs:
                self.inputs[name] = x.new_zeros(experts, *2 * x.shape[1:], dtype=torch.float32)
            _add_gram(self.inputs[name][expert.number], x)

    def wrote_by(self, expert: Expert, gradient: Tensor) -> None:
        """Add the gradient at what an expert writes, (n, out)."""
        name, keep = expert.stack, self._keep(gradient.device)
        tokens = len(expert.token) if keep is None else keep[expert.token].sum()
        squares = gradient.detach().float().square().sum(0)
        if name not in self.outputs:
            self.outputs[name] = squares.new_zeros(expert.experts, len(squares))
            self._routed[name] = squares.new_zeros(expert.experts, 1)
        self.outputs[name][expert.number] += squares
        self._routed[name][expert.number] += tokens
        if expert.bias:
            self.wrote(expert.bias, gradient)
            self._routed[expert.bias] = self._routed.get(expert.bias, 0) + squares.new_tensor(
                tokens
            )

    def mean_outputs(self, tokens: int) -> dict[str, Tensor]:
        """The mean of `outputs`, in place: over all tokens, or over those that were routed to an expert.

        An expert that none reached has the mean of the others.
        """
        for name, x in self.outputs.items():
            counts = self._routed.get(name)
            x.div_(tokens if counts is None else counts.clamp_min(1.0))
            if counts is not None and x.ndim == 2 and (some := counts[:, 0] > 0).any():
                x[~some] = x[some].mean(0)
        return self.outputs


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies its input by a matrix: nn.Linear and GPT-2's Conv1D."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def _readers(module: nn.Module, width: int) -> list[str]:
    """A module's own parameters that multiply its input, of `width`; of a module of its own kind a single (out, in)."""
    if isinstance(module, nn.Embedding) or is_linear(module):
        return ["weight"]
    own = [(n, p.shape) for n, p in module.named_parameters(recurse=False)]
    if any(len(s) > 2 for _, s in own):
        return []
    matrices = [(n, s) for n, s in own if len(s) == 2]
    return [n for n, s in matrices if s[1] == width] if len(matrices) == 1 else []


def mean(total: Tensor, count: int) -> Tensor:
    """A group's total over so many tokens, in place; what a Gram matrix lacks left of its diagonal is filled in."""
    if total.ndim == 3:
        for one in total:
            mean(one, count)
        return total
    if total.ndim == 2:
        for start in range(0, len(total), STRIP):
            stop = start + STRIP
            total[stop:, start:stop] = total[start:stop, stop:].T
    return total.div_(count)


def _add_gram(total: Tensor | None, rows: Tensor) -> Tensor:
    """total + rows^T rows, in place; float32 (in, in), for `mean` to complete: right of the diagonal's strips alone."""
    if rows.is_cuda and rows.dtype in (torch.bfloat16, torch.float16):
        gram = torch.mm(rows.T, rows, out_dtype=torch.float32)
        return gram if total is None else total.add_(gram)
    rows = rows.float()
    width = rows.shape[1]
    total = rows.new_zeros(width, width) if total is None else total
    for start in range(0, width, STRIP):
        stop = min(start + STRIP, width)
        total[start:stop, start:].addmm_(rows[:, start:stop].T, rows[:, start:])
    return total
