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
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from cl_graft.models.experts import routed, transposed_stacks
from cl_graft.models.spread import rereading
from cl_graft.skillpack.compress.routed import experts_apart
from cl_graft.skillpack.compress.sums import Sums, is_linear, mean, text_of

Batch = Mapping[str, Tensor]
Use = Callable[[str, Tensor], None]  # what is done with a group and its second moment
BFLOAT16_FROM = (
    512  # width of a model's embeddings from which its products are large enough to gain
)


@dataclass
class Moments:
    """Per token of the calibration text, float32.

    inputs: by group, the name of the first module that reads a tensor; (in, in), X^T X / n, or for an
    embedding (vocabulary,), how often each row is read. A stack of experts' matrices is a group of its own,
    (experts, in, in): for each expert the sum over the tokens routed to it, over n as all others. Their biases are
    read as the rows of an embedding are, (experts,). reads: parameter name -> its group; parameters that
    read the same tensor share one. outputs: parameter name -> (out,), mean square of the loss's gradient
    with respect to each output, so that `outputs[name][i] * (squared error of output i)` is the squared
    change of the loss to first order; of a stack (experts, out), each over the tokens routed to it, and of one that
    none reached the mean of the others; {} where it was not measured.
    """

    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    reads: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)

    def hessian(self, name: str) -> Tensor | None:
        """Second moment (in, in) of a parameter's input; for an embedding its diagonal (vocabulary,), for a stack of
        experts (experts, in, in). None: unknown."""
        group = self.reads.get(name)
        return None if group is None else self.inputs.get(group)

    def visit(self, use: Use, wanted: Callable[[str], bool]) -> None:
        """Call `use` with each group that is wanted and its moment, in the order in which the model reads them."""
        for group, moment in self.inputs.items():
            if wanted(group):
                use(group, moment)

    def diagonal(self, name: str) -> Tensor | None:
        """float32 (1, in), mean square of what a parameter reads; for an embedding (vocabulary, 1), for stacked experts
        (experts, in). None: unknown."""
        moment = self.hessian(name)
        return None if moment is None else diagonal_of(moment)


def diagonal_of(moment: Tensor) -> Tensor:
    """(1, in) of a second moment (in, in), (experts, in) of one each; (vocabulary, 1) of how often rows are read."""
    if moment.ndim == 1:
        return moment[:, None]
    return moment.diagonal(dim1=-2, dim2=-1).reshape(-1, moment.shape[-1]).clone()


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module of everything that multiplies its input by a matrix: nn.Linear and GPT-2's Conv1D."""
    return {n: m for n, m in model.named_modules() if is_linear(m)}


def stored_transposed(model: nn.Module) -> set[str]:
    """Parameter names of matrices stored (in, out), as Conv1D does, and of stacks of such."""
    linear = {n for n, m in linear_layers(model).items() if not isinstance(m, nn.Linear)}
    return {f"{name}.weight" for name in linear} | transposed_stacks(model)


def moments(
    model: nn.Module,
    batches: Iterable[Batch],
    gradients: bool = True,
    wanted: Callable[[str], bool] = lambda group: True,
) -> Moments:
    """One forward (and backward) of the model's own code a batch, each with input_ids, attention_mask, labels.

    Padding is left out. Stacked experts whose module is none of transformers' own kind (models/experts.py) have no
    moments. The model's parameters and their gradients are left as they were found. Without gradients labels are not
    needed, nor is the head run. wanted: the groups that are summed up.
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
    return Moments(inputs, sums.reads, sums.mean_outputs(n))


@torch.no_grad()
def forward(model: nn.Module, batch: Batch) -> None:
    with _products(model):
        model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False)


def backward(model: nn.Module, batch: Batch) -> None:
    """Backward pass of the summed loss, so that no token's gradient depends on how many there are in the batch."""
    with torch.enable_grad():
        with _products(model), rereading(model):
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


# hooks that collect, also for a model that is loaded layer by layer, see stream.py


@contextmanager
def watched(model: nn.Module, sums: Sums, gradients: bool, inputs: bool = True) -> Iterator[None]:
    """Add the model's forward passes within to `sums`, and its backward passes where `gradients` is set."""
    linear, experts, hooks = linear_layers(model), routed(model), []
    tables = {n: m for n, m in model.named_modules() if _reads_tokens(m, model)}
    routers = {n: m for n, m in model.named_modules() if _owns_matrix(m) and n not in experts}
    try:
        if inputs:
            hooks += [
                m.register_forward_pre_hook(_reading(n, sums), with_kwargs=True)
                for n, m in (linear | tables | routers).items()
            ]
        if gradients:
            hooks += [
                m.register_forward_hook(_writing(n, sums)) for n, m in (linear | tables).items()
            ]
        with experts_apart(model, sums, inputs, gradients):
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


def _owns_matrix(module: nn.Module) -> bool:
    """Whether a module is no known layer and multiplies by parameters of its own: a router."""
    if isinstance(module, (nn.Embedding, _ConvNd)) or is_linear(module):
        return False
    own = any(p.ndim == 2 for p in module.parameters(recurse=False))
    return own and not any(p.ndim > 1 for m in module.children() for p in m.parameters())
