"""Peak memory of `pack create` on a large checkpoint of random weights, calibration off."""

from __future__ import annotations

import json
import multiprocessing
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cl_graft.skillpack.folders.checkpoint import Checkpoint, write_tensors

HIDDEN, INNER, VOCABULARY = 2048, 5632, 32000
LAYER = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


def bench_memory(layers: tuple[int, ...] = (2, 8), budget: str = "2%") -> dict[str, Any]:
    """Peak resident memory of `create` beyond the interpreter's with its libraries, MB, by number of layers.

    A Llama checkpoint in bf16, 2048 wide, weights drawn at random, base and tuned written to a temporary folder.
    `peak_extra_mb` is of the deepest, less the largest tensor (float32).
    """
    peaks = []
    for count in layers:
        with tempfile.TemporaryDirectory(prefix="cl-graft-bench-") as folder:
            here = Path(folder)
            size = write_random(here / "base", count, seed=0)
            write_random(here / "tuned", count, seed=1)
            context = multiprocessing.get_context("spawn")
            with context.Pool(1) as pool:
                extra, seconds = pool.apply(_create, (here, budget))
            peaks.append({"layers": count, "checkpoint_mb": size, "extra_mb": extra, "s": seconds})
    largest = 4 * HIDDEN * VOCABULARY / 1e6
    return {
        "peak_extra_mb": peaks[-1]["extra_mb"] - largest,
        "largest_tensor_mb": largest,
        "growth": peaks[-1]["extra_mb"] / peaks[0]["extra_mb"],
        "runs": peaks,
        "conditions": {"budget": budget, "calibration": "off", "dtype": "bfloat16"},
    }


def write_random(folder: Path, layers: int, seed: int) -> float:
    """A checkpoint of random weights; returns its megabytes."""
    folder.mkdir()
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for i in range(layers):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in LAYER.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{i}.{norm}.weight"] = (HIDDEN,)
    shapes["lm_head.weight"] = (VOCABULARY, HIDDEN)

    def draw(name: str) -> Tensor:
        g = torch.Generator().manual_seed(_seed_of(name))
        x = torch.randn(shapes[name], generator=g) * 0.02
        if seed:
            g.manual_seed(_seed_of(name) + seed)
            x += torch.randn(shapes[name], generator=g) * 0.002
        return x.bfloat16()

    specs = {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
    write_tensors(folder / "model.safetensors", specs, draw)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HIDDEN // 64,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return sum(info.nbytes for info in Checkpoint(folder).tensors.values()) / 1e6


def _seed_of(name: str) -> int:
    return int.from_bytes(name.encode()[-6:], "little")


def _create(folder: Path, budget: str) -> tuple[float, float]:
    """(megabytes beyond what the process held before, seconds), in a process of its own."""
    from time import perf_counter

    import transformers.models.llama.modeling_llama  # noqa: F401  so that it counts before

    from cl_graft.skillpack.compress.create import create
    from cl_graft.store.digests import resident_bytes

    torch.linalg.eigh(torch.eye(64))
    before, begun = resident_bytes("VmRSS"), perf_counter()
    create(folder / "base", folder / "tuned", folder / "pack.safetensors", budget=budget)
    return (resident_bytes("VmHWM") - before) / 1e6, perf_counter() - begun
