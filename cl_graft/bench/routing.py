"""Batches that mix packs: one forward for all of them beside the model, or a group a pack merged into its weights."""

from __future__ import annotations

from statistics import median
from time import process_time
from typing import Any

import torch

from cl_graft.evaluation.generate import generate
from cl_graft.models.load import load
from cl_graft.models.roles import roles
from cl_graft.skillpack.codecs import dense, low_rank, sparse_top
from cl_graft.skillpack.format.file import SkillPack, fingerprint
from cl_graft.skillpack.live.attach import Attached
from cl_graft.skillpack.live.grafted import Grafted

PACKS, PROMPTS, TOKENS, ROUNDS = 3, 192, 24, 3
LARGE = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
}


def bench_routing() -> dict[str, Any]:
    """{model: processor seconds of answering `prompts` prompts, each by one of `packs` packs, in either way}.

    The packs have low-rank deltas on every matrix of the layers and sparse ones on embeddings and head, as GraftLLM's
    do; prompts of all packs come mixed. Medians over rounds in which both ways take turns, on one thread.
    """
    torch.set_num_threads(1)
    small, tokenizer = load("mini-llama")
    return {
        "mini-llama": _measured(small, tokenizer, PROMPTS, TOKENS),
        "llama-100m": _measured(_large(len(tokenizer)), tokenizer, 32, 4),
    }


def _large(vocabulary: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=max(vocabulary, 16_000), **LARGE)).eval()


def _measured(model: Any, tokenizer: Any, prompts: int, tokens: int) -> dict[str, Any]:
    asked = [f"Q: Zoe has {k} bags with {k % 7} coins each. How many?" for k in range(prompts)]
    choice = [k % PACKS for k in range(prompts)]
    packs = [_pack(model, seed) for seed in range(PACKS)]

    def grouped() -> None:
        grafted = Grafted(model)
        for number, pack in enumerate(packs):
            grafted.activate([pack])
            some = [p for p, c in zip(asked, choice, strict=True) if c == number]
            generate(model, tokenizer, some, tokens)
        grafted.unload()

    def attached() -> None:
        with Attached(model, packs) as beside:
            generate(
                model,
                tokenizer,
                asked,
                tokens,
                told=lambda rows: beside.choose([choice[k] for k in rows]),
            )

    spent: dict[str, list[float]] = {"grouped": [], "attached": []}
    for _ in range(ROUNDS):
        for name, way in (("grouped", grouped), ("attached", attached)):
            begun = process_time()
            way()
            spent[name].append(process_time() - begun)
    seconds = {name: median(each) for name, each in spent.items()}
    ratio = seconds["attached"] / seconds["grouped"]
    about = {"prompts": prompts, "packs": PACKS, "new_tokens": tokens}
    return {**seconds, "attached_over_grouped": ratio, **about}


def _pack(model: Any, seed: int) -> SkillPack:
    torch.manual_seed(seed)
    tensors = {}
    for name, parameter in model.named_parameters():
        role, shape = roles(model)[name], tuple(parameter.shape)
        if role in ("attention", "mlp"):
            rank = max(1, min(shape) // 16)
            left, right = torch.randn(shape[0], rank), torch.randn(rank, shape[1])
            tensors[name] = low_rank(0.01 * left, 0.01 * right)
        elif role in ("embedding", "head"):
            tensors[name] = sparse_top(0.01 * torch.randn(shape), parameter.numel() // 20)
        else:
            tensors[name] = dense(0.01 * torch.randn(shape))
    return SkillPack(tensors, f"task {seed}", "bench", {}, fingerprint(model.named_parameters()))
