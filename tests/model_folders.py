"""Small model folders: a base, and the same model tuned, each with its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cl_graft.skillpack.compress.create import Created, create
from cl_graft.skillpack.folders.apply import apply_pack
from cl_graft.skillpack.folders.checkpoint import Checkpoint
from cl_graft.skillpack.format.file import SkillPack


def tokenizer(end: str = "</s>", template: str | None = None) -> PreTrainedTokenizerFast:
    """Words of one letter; 29 ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz")}
    inner = Tokenizer(models.WordLevel(vocab | {"<unk>": 26}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.add_special_tokens(["</s>", "<|end|>"])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=end, unk_token="<unk>")
    made.chat_template = template
    return made


def llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """17,056 weights with its defaults."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "eos_token_id": 27}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **changes}))


def tuned(model: LlamaForCausalLM, seed: int = 1) -> LlamaForCausalLM:
    """Every weight moved a little, as training would."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def saved(model: LlamaForCausalLM, folder: Path, **more: Any) -> Path:
    """The folder of a model, with a tokenizer."""
    model.save_pretrained(folder, **more)
    tokenizer().save_pretrained(folder)
    return folder


def tensors(folder: Path, file: str = "model.safetensors") -> dict[str, Tensor]:
    return load_file(folder / file)


def rewrite(folder: Path, found: dict[str, Tensor], file: str = "model.safetensors") -> None:
    save_file(found, folder / file, {"format": "pt"})


def pack_of(base: Path, folder: Path, out: Path, budget: str = "400%") -> Created:
    """A pack with a budget that keeps all of the delta."""
    return create(base, folder, out, budget=budget)


def grafts_to(base: Path, folder: Path, wanted: dict[str, Tensor], place: Path) -> Created:
    """Make a pack of two folders, apply it, and hold the result against the tuned weights."""
    place.mkdir(exist_ok=True)
    created = pack_of(base, folder, place / "pack.safetensors")
    apply_pack(base, SkillPack.load(place / "pack.safetensors"), place / "grafted")
    found, start = Checkpoint(place / "grafted"), Checkpoint(base)
    for name, tensor in wanted.items():
        missed = float((found.read(name) - tensor).norm())
        assert missed <= 0.02 * float((start.read(name) - tensor).norm()) + 1e-6, name
    return created
