"""What the forward and backward pass of one micro-batch hold, from the model's own code, without allocating it.

The model is built and run under torch's FakeTensorMode: shapes flow through transformers' layers, the head that
the loss runs, autograd and activation checkpointing as in training, and no tensor has contents. A storage counts
from the operation that makes it until Python frees it, so the peak is the one that an allocator would see, except
for what a kernel takes for itself.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cl_graft.training import flat
from cl_graft.training.checkpoint import freeze
from cl_graft.training.loss import FEW, plain

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# What TRL 1.16 asks its fused LM head for (SFTTrainer and DPOTrainer, at `add_fused_lm_head`).
OUTPUTS = {
    "sft": ("log_probs", "entropy", "is_top1"),
    "dpo": ("log_probs", "entropy", "mean_logits", "is_top1"),
}


class Shape(NamedTuple):
    """A parameter's number of elements, and whether it is trained."""

    numel: int
    trained: bool


@dataclass(frozen=True)
class Trace:
    """shapes: of every parameter, tied ones once. buffers: bytes of the model's buffers.

    peak: bytes beyond parameters, buffers, and gradients that were there before.
    """

    shapes: tuple[Shape, ...]
    buffers: int
    peak: int


def trace(
    config: PreTrainedConfig,
    kind: str,
    sequences: int,
    length: int,
    *,
    gradients: Literal["new", "kept", "freed"] = "new",
    lora: Any = None,
    frozen: Iterable[str] = (),
    dtype: torch.dtype = torch.float32,
    autocast: bool = False,
    checkpointing: bool = False,
    triton: bool = False,
    counts: tuple[int, int] | None = None,
) -> Trace:
    """Trace a forward and a backward pass over `sequences` rows of `length` tokens; DPO's pairs are two rows each.

    gradients: `new` where there are none before, so that they count as they arise; `kept` where they are there
    from an earlier micro-batch and are added to; `freed` where each is taken away as soon as it is whole, as
    ZeRO does. lora: a PEFT configuration. frozen: parameters that are not trained. dtype: of the parameters.
    autocast: whether bfloat16 is computed in, from parameters of another dtype. triton: whether TRL's head works in
    place, as its kernels on a GPU do. counts: tokens and labels, where the rows are laid end to end without padding.
    """
    with torch.device("meta"):
        model = _model(config, kind, lora, dtype, checkpointing)
        freeze(model, frozen)
    with FakeTensorMode(), _in_place(triton):
        _give_memory(model)
        shapes = tuple(Shape(p.numel(), p.requires_grad) for p in model.parameters())
        for p in model.parameters():
            if p.requires_grad and gradients == "kept":
                p.grad = torch.empty_like(p)
            elif p.requires_grad and gradients == "freed":
                p.register_post_accumulate_grad_hook(_drop)
        rows = torch.ones(sequences, length, dtype=torch.long)
        meter = Meter()
        with meter, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = (
                _loss(kind, model, rows)
                if counts is None
                else _flat(kind, model, rows, counts, triton)
            )
        with meter:
            loss.backward()
        buffers = sum(b.untyped_storage().nbytes() for b in model.buffers())
    return Trace(shapes, buffers, meter.peak)


def _model(config: PreTrainedConfig, kind: str, lora: Any, dtype: Any, checkpointing: bool) -> Any:
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    model: Any = AutoModelForCausalLM.from_config(
        deepcopy(config), trust_remote_code=False, dtype=dtype
    )
    add_fused_lm_head(model, outputs=OUTPUTS[kind])
    if lora is not None:
        from peft import get_peft_model

        model = get_peft_model(model, deepcopy(lora))
    if checkpointing:
        model.gradient_checkpointing_enable()
        if (
            lora is not None
        ):  # as the trainers do: a checkpointed layer needs an input with a gradient
            model.enable_input_require_grads()
    return model.train()


def _give_memory(model: Any) -> None:
    """Fake tensors on the CPU for those on the meta device, which autograd's engine and kernels' rules follow."""
    made: dict[int, Any] = {}
    for name, old in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        if id(old) not in made:
            new = torch.empty(old.shape, dtype=old.dtype, device="cpu")
            is_parameter = isinstance(old, torch.nn.Parameter)
            made[id(old)] = torch.nn.Parameter(new, old.requires_grad) if is_parameter else new
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, made[id(old)])


def _loss(kind: str, model: Any, rows: Tensor) -> Tensor:
    """The loss as the trainers take it; what else the model gives is let go before the backward pass, as there."""
    given = {"input_ids": rows, "attention_mask": rows, "use_cache": False}
    vocabulary = model.config.get_text_config().vocab_size
    if kind == "sft" and rows.numel() * vocabulary <= FEW:
        return plain(model(**given).logits, rows).nll
    return _of_output(kind, model(**given, labels=rows, fused_lm_head=True))


def _flat(kind: str, model: Any, rows: Tensor, counts: tuple[int, int], on_gpu: bool) -> Tensor:
    """The loss where the rows are laid end to end, of so many tokens and labels."""
    flat.attend_flat(flat.inner_of(model).config)
    texts, longest = rows.shape
    laid = flat.blank(texts, longest, *counts)
    return _of_output(kind, flat.called(flat.most(model, on_gpu), model, laid, fused_lm_head=True))


def _of_output(kind: str, output: Any) -> Tensor:
    if kind == "sft":
        return -output.log_probs.sum()
    chosen, rejected = output.log_probs.sum(1).chunk(2)
    return -torch.nn.functional.logsigmoid(chosen - rejected).mean()


def _drop(parameter: Any) -> None:
    parameter.grad = None


@contextlib.contextmanager
def _in_place(triton: bool) -> Iterator[None]:
    """Let TRL's kernels fold tiles of logits without temporaries, as on a GPU; torch code for a CPU has several."""
    if not triton:
        yield
        return
    from trl.kernels import chunked_logprob as kernels

    def fold(*args: Any, **kwargs: Any) -> None:
        return None

    with (
        patch.object(kernels, "_forward_tile", fold),
        patch.object(kernels, "_backward_tile", fold),
    ):
        yield


class Meter(TorchDispatchMode):
    """`peak`: the most bytes that storages made under it have held together."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.known.update(_storages((args, kwargs)))  # made before: a view of one is nothing new
        grouped = func is torch.ops.aten._grouped_mm.default
        out = (_grouped if grouped else func)(*args, **(kwargs or {}))
        for storage in _storages(out):
            if storage not in self.known:
                self.known.add(storage)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes()).atexit = False
        return out

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


def _grouped(rows: Tensor, stack: Tensor, offs: Tensor | None = None, **kwargs: Any) -> Tensor:
    """The product of rows (tokens, in), sorted by expert, and a stack of experts (experts, in, out), without contents;
    of two matrices that of each expert's rows, the gradient of a stack.

    Torch 2.13 computes it in every dtype and has shapes for fake tensors in bfloat16 alone.
    """
    if stack.ndim == 2:
        assert offs is not None
        return rows.new_empty(len(offs), rows.shape[0], stack.shape[1])
    return rows.new_empty(*rows.shape[:-1], stack.shape[-1])


def _storages(tree: Any) -> list[Any]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
