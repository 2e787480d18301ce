"""Second moments of what each layer reads and of the loss's gradient at what it writes, from the model's own code.

Sums are float32 whatever the model computes in: float32 activations are multiplied in float32; bfloat16 and
float16 ones are widened first, which loses nothing, and on a GPU are multiplied as they are with float32
accumulation, where every product is exact as well. The model's own products are in bfloat16 where the processor
has instructions for them and the model is wide enough to gain (`bfloat16_pays`); what is added up stays in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.weak import WeakTensorKeyDictionary

Batch = Mapping[str, Tensor]
Use = Callable[[str, Tensor], None]  # what is done with a group and its second moment
BFLOAT16_FROM = (
    512  # width of a model's embeddings from which its products are large enough to gain
)


@dataclass
class Moments:
    """Per token of the calibration text, float32.

    inputs: by group, the name of the first module that reads a tensor; (in, in), X^T X / n, or for an
    embedding (vocabulary,), how often each row is read. reads: parameter name -> its group; parameters that
    read the same tensor share one. outputs: parameter name -> (out,), mean square of the loss's gradient
    with respect to each output, so that `outputs[name][i] * (squared error of output i)` is the squared
    change of the loss to first order; {} where it was not measured.
    """

    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    reads: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)

    def hessian(self, name: str) -> Tensor | None:
        """Second moment (in, in) of a parameter's input; for an embedding its diagonal (vocabulary,). None: unknown."""
        group = self.reads.get(name)
        return None if group is None else self.inputs.get(group)

    def visit(self, use: Use, wanted: Callable[[str], bool]) -> None:
        """Call `use` with each group that is wanted and its moment, in the order in which the model reads them."""
        for group, moment in self.inputs.items():
            if wanted(group):
                use(group, moment)

    def diagonal(self, name: str) -> Tensor | None:
        """float32 (1, in), mean square of what a parameter reads; for an embedding (vocabulary, 1). None: unknown."""
        moment = self.hessian(name)
        return None if moment is None else diagonal_of(moment)


def diagonal_of(moment: Tensor) -> Tensor:
    """(1, in) of a second moment (in, in); (vocabulary, 1) of how often rows are read."""
    return moment.diagonal()[None].clone() if moment.ndim == 2 else moment[:, None]


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module of everything that multiplies its input by a matrix: nn.Linear and GPT-2's Conv1D."""
    return {n: m for n, m in model.named_modules() if _is_linear(m)}


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def stored_transposed(model: nn.Module) -> set[str]:
    """Parameter names of matrices stored (in, out), as Conv1D does."""
    return {f"{n}.weight" for n, m in linear_layers(model).items() if not isinstance(m, nn.Linear)}


def moments(
    model: nn.Module,
    batches: Iterable[Batch],
    gradients: bool = True,
    wanted: Callable[[str], bool] = lambda group: True,
) -> Moments:
    """One forward (and backward) of the model's own code a batch, each with input_ids, attention_mask, labels.

    Padding is left out. The input of stacked experts is that of all tokens, wherever they are sent, and
    serves the matrices that read it; for the others there is none. The model's parameters and their
    gradients are left as they were found. Without gradients labels are not needed, nor is the head run.
    wanted: the groups that are summed up.
    """
    sums, counted = Sums(wanted=wanted), 0
    was_training, learned = model.training, [p.requires_grad for p in model.parameters()]
    model.requires_grad_(False).eval()  # gradients flow from the embeddings' outputs
    try:
        with watched(model, sums, gradients), headless(model, not gradients):
            for batch in batches:
                sums.text = text_of(batch)
                counted += sums.text.tokens
                (backward if gradients else forward)(model, batch)
    finally:
        for parameter, flag in zip(model.parameters(), learned, strict=True):
            parameter.requires_grad_(flag)
        model.train(was_training)
    n = max(1, counted)
    inputs = {name: mean(total, n) for name, total in sums.inputs.items()}
    return Moments(inputs, sums.reads, {name: x.div_(n) for name, x in sums.outputs.items()})


@torch.no_grad()
def forward(model: nn.Module, batch: Batch) -> None:
    with _products(model):
        model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False)


def backward(model: nn.Module, batch: Batch) -> None:
    """Backward pass of the summed loss, so that no token's gradient depends on how many there are in the batch."""
    with torch.enable_grad():
        with _products(model):
            loss = model(**batch, use_cache=False).loss
        (loss * (batch["labels"][:, 1:] != -100).sum()).backward()


def bfloat16_pays(model: nn.Module) -> bool:
    """Whether a model's products on the CPU are better made in bfloat16; its sums and norms stay in float32."""
    return _has_bfloat16() and model.get_input_embeddings().weight.shape[-1] >= BFLOAT16_FROM  # type: ignore[operator]


@cache
def _has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 faster than float32, as AVX512_BF16 and AMX do."""
    can = torch.cpu.get_capabilities()
    return bool(can.get("avx512_bf16") or can.get("amx_bf16"))


def _products(model: nn.Module) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16, enabled=bfloat16_pays(model))


# What hooks collect. Also for a model that is loaded layer by layer, see stream.py.


class Text(NamedTuple):
    """The text of a batch. keep: bool (sequences * length,), what is no padding; None where there is no padding."""

    sequences: int
    tokens: int
    keep: Tensor | None


def text_of(batch: Batch) -> Text:
    keep = batch["attention_mask"].reshape(-1).bool()
    tokens = int(keep.sum())
    return Text(len(batch["input_ids"]), tokens, keep if tokens < len(keep) else None)


@dataclass
class Sums:
    """Totals over the tokens seen so far; `inputs` and `reads` as in Moments. text: of the batch at hand."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    reads: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    text: Text = Text(0, 0, None)
    wanted: Callable[[str], bool] = lambda group: True  # whether a group is to be added up
    _seen: Any = field(default_factory=WeakTensorKeyDictionary)  # tensor -> the group that it is

    def read(self, name: str, module: nn.Module, x: Tensor) -> None:
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
            counts = torch.bincount(self._kept(x.reshape(-1)), minlength=module.num_embeddings)
            self.inputs[name] = (
                self.inputs[name].add_(counts) if name in self.inputs else counts.float()
            )
        else:
            rows = self._kept(x.reshape(-1, x.shape[-1]))
            self.inputs[name] = _add_gram(self.inputs.get(name), rows)

    def _kept(self, rows: Tensor) -> Tensor:
        keep = self.text.keep
        return rows if keep is None or len(rows) != len(keep) else rows[keep]

    def wrote(self, name: str, gradient: Tensor) -> None:
        squares = gradient.detach().reshape(-1, gradient.shape[-1]).float().square().sum(0)
        self.outputs[name] = self.outputs[name].add_(squares) if name in self.outputs else squares


STRIP = 512  # rows of X^T X that are multiplied at a time, from the diagonal to the right


def mean(total: Tensor, count: int) -> Tensor:
    """A group's total over so many tokens, in place; what a Gram matrix lacks left of its diagonal is filled in."""
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


@contextmanager
def watched(model: nn.Module, sums: Sums, gradients: bool, inputs: bool = True) -> Iterator[None]:
    """Add the model's forward passes within to `sums`, and its backward passes where `gradients` is set."""
    linear, hooks = linear_layers(model), []
    tables = {n: m for n, m in model.named_modules() if _reads_tokens(m, model)}
    stacks = {n: m for n, m in model.named_modules() if _owns_matrices(m)}
    try:
        if inputs:
            hooks += [
                m.register_forward_pre_hook(_reading(n, sums), with_kwargs=True)
                for n, m in (linear | tables | stacks).items()
            ]
        if gradients:
            hooks += [
                m.register_forward_hook(_writing(n, sums)) for n, m in (linear | tables).items()
            ]
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def headless(model: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Keep the head from multiplying within: it gives logits (..., 0), for nobody reads them."""
    head = model.get_output_embeddings() if wanted else None  # type: ignore[operator]
    if head is None:
        yield
        return
    own = head.__dict__.get("forward")
    head.forward = lambda x, *args, **kwargs: x[..., :0]
    try:
        yield
    finally:
        del head.forward
        if own is not None:
            head.forward = own


def _reading(name: str, sums: Sums) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if x is not None:
            sums.read(name, module, x)

    return hook


def _writing(name: str, sums: Sums) -> Callable[..., Tensor | None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        if not output.requires_grad:  # an embedding's; a copy, because the model may work in place
            output = output.requires_grad_().clone()
        output.register_hook(lambda gradient: sums.wrote(f"{name}.weight", gradient))
        return output

    return hook


def _reads_tokens(module: nn.Module, model: nn.Module) -> bool:
    """Whether an embedding's input is its row numbers; subclasses (OPT's positions) may read something else."""
    return type(module) is nn.Embedding or module is model.get_input_embeddings()  # type: ignore[operator]


def _owns_matrices(module: nn.Module) -> bool:
    """Whether a module is no known layer and multiplies by parameters of its own: stacked experts, a router."""
    if isinstance(module, (nn.Embedding, _ConvNd)) or _is_linear(module):
        return False
    own = any(p.ndim > 1 for p in module.parameters(recurse=False))
    return own and not any(p.ndim > 1 for m in module.children() for p in m.parameters())


def _readers(module: nn.Module, width: int) -> list[str]:
    """A module's own parameters that multiply its input, of `width`.

    Of stacked experts, (experts, out, in) or (experts, in, out), those that fit the input, but never the
    last one: experts end by writing. Of other modules of their own kind a single (out, in).
    """
    if isinstance(module, nn.Embedding) or _is_linear(module):
        return ["weight"]
    own = [(n, p.shape) for n, p in module.named_parameters(recurse=False)]
    stacks = [(n, s) for n, s in own if len(s) == 3]
    if stacks:
        return [n for n, s in stacks[: max(1, len(stacks) - 1)] if width in s[1:]]
    matrices = [(n, s) for n, s in own if len(s) == 2]
    return [n for n, s in matrices if s[1] == width] if len(matrices) == 1 else []
