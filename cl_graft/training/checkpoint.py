"""What a stage starts from and leaves: a model folder, or the folder of a PEFT adapter on it.

A model's tensors go by the names of `model.named_parameters()`, in float32, so that a small change of a bfloat16
weight is not rounded away; transformers loads such a folder like any other.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cl_graft.models import spread
from cl_graft.skillpack.folders.checkpoint import Checkpoint, write_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ADAPTER = "adapter_model.safetensors"


def is_adapted(model: nn.Module) -> bool:
    return hasattr(model, "peft_config")


def frozen(model: nn.Module) -> list[str]:
    """The parameters that a stage on the model leaves as they are, sorted; none where it trains an adapter alone."""
    if is_adapted(model):
        return []
    return sorted(name for name, p in model.named_parameters() if not p.requires_grad)


def freeze(model: nn.Module, names: Iterable[str]) -> None:
    """Leave these parameters out of training."""
    for name in names:
        model.get_parameter(name).requires_grad_(False)


def save(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    whole: Callable[[nn.Parameter], Tensor] = lambda parameter: parameter,
    writes: bool = True,
    start: Checkpoint | None = None,
) -> None:
    """Write what the stage trained: all parameters, or the adapter alone where the model is wrapped by PEFT.

    whole: gathers a parameter whose parts lie with several processes, all of which call this; one of them `writes`.
    start: where frozen parameters are read from, which a job in bfloat16 holds rounded.
    """
    named = dict(model.named_parameters())
    if is_adapted(model):
        return _save_adapter(model, folder, whole, writes)

    def fetch(name: str) -> Tensor:
        if start and not named[name].requires_grad:
            return start.read(name).float()
        return whole(named[name]).detach().to("cpu", torch.float32)

    if not writes:
        for name in named:
            fetch(name)
        return
    model.config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_weights(folder, {n: (torch.float32, _shape(p)) for n, p in named.items()}, fetch)


def _shape(parameter: Any) -> tuple[int, ...]:
    """The shape of the whole parameter, also where DeepSpeed has left a part of it here."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _save_adapter(model: Any, folder: Path, whole: Callable, writes: bool) -> None:
    state = {
        name: whole(parameter).detach().to("cpu", torch.float32)
        for name, parameter in model.named_parameters()
        if ".default." in name and "lora_" in name
    }
    if writes:
        model.save_pretrained(folder, state_dict=state, selected_adapters=["default"])
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card


def save_start(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """What a job of other processes starts from: the model, and in `adapter/` what PEFT has put on it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    plain = model
    if is_adapted(model):
        save(model, tokenizer, folder / "adapter")
        plain = model.get_base_model()
    plain.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tensors = {
        name.replace(".base_layer.", "."): (name, p)
        for name, p in plain.named_parameters()
        if ".lora_" not in name
    }
    specs = {name: (p.dtype, tuple(p.shape)) for name, (_, p) in tensors.items()}
    held = spread.offloaded(plain)

    def fetch(name: str) -> Tensor:
        own, parameter = tensors[name]
        return held.get(own, parameter).detach().to("cpu", parameter.dtype)

    write_weights(folder, specs, fetch)


def load_start(folder: Path, dtype: torch.dtype) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model in `folder` with its adapter, if it has one, ready to be trained."""
    from transformers import AutoModelForCausalLM

    from cl_graft.models.load import attention
    from cl_graft.models.tokenizer import read

    tokenizer = read(str(folder))
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=False, attn_implementation=attention(folder)
    )
    if (folder / "adapter").is_dir():
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True)
    return model, tokenizer


@torch.no_grad()
def load_into(model: Any, folder: Path) -> None:
    """Put the weights of a finished stage into the model that it started from."""
    if is_adapted(model):
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        set_peft_model_state_dict(model, load_file(folder / ADAPTER))
        return
    spread.write(model, Checkpoint(folder).read)
