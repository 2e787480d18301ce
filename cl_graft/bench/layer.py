"""One decoder layer compressed by the engine and by the textbook, in one run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cl_graft.bench import textbook
from cl_graft.skillpack.codecs import decode, payload_bytes
from cl_graft.skillpack.compress.calibrate import Moments, linear_layers, moments
from cl_graft.skillpack.compress.compress import compress
from cl_graft.skillpack.compress.policy import Adaptive
from cl_graft.skillpack.compress.work import ByteLimit, Piece, fetch
from cl_graft.skillpack.compress.work_store import Item

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BUDGET = 0.10  # of the matrices in bf16
VOCABULARY = 1024


def one_layer(hidden: int, inner: int) -> PreTrainedModel:
    """A randomly initialised Llama of one decoder layer, float32, and a small vocabulary.

    Its embeddings' channels differ in size by an order of magnitude and are correlated, as activations are.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=1,
        num_attention_heads=hidden // 64,
    )
    model = LlamaForCausalLM(config).eval()
    channels = torch.logspace(0, -1, hidden)[torch.randperm(hidden)]
    mix = torch.randn(hidden, hidden // 8) @ torch.randn(hidden // 8, hidden) / hidden
    with torch.no_grad():
        x = torch.randn(VOCABULARY, hidden)
        model.model.embed_tokens.weight.copy_((x + x @ mix) * channels)
        model.model.layers[0].input_layernorm.weight.copy_(channels)
    return model


def _shape(module: nn.Module) -> tuple[int, int]:
    rows, cols = module.weight.shape  # type: ignore[union-attr, misc]
    return int(rows), int(cols)


def falling_delta(shape: tuple[int, int], seed: int) -> Tensor:
    """float32 of the shape, whose singular values fall as those of fine-tuning deltas do, i^-0.7 or so."""
    g = torch.Generator().manual_seed(seed)
    (rows, cols), side = shape, min(shape)
    left = torch.randn(rows, side, generator=g) / rows**0.5
    right = torch.randn(side, cols, generator=g) / cols**0.5
    return 1e-2 * (left * torch.arange(1, side + 1) ** -0.7) @ right


def bench_layer(
    hidden: int = 2048,
    inner: int = 5632,
    samples: int = 64,
    length: int = 128,
    seed: int = 0,
    previous: Path | None = None,
) -> dict[str, Any]:
    """Seconds and held-out output error of both, for seven matrices at the same bytes, calibration counted.

    One budget for the layer: the same share of every matrix for the textbook, one price of a byte for ours.
    previous: a checkout of an earlier commit, whose engine is timed as well (`over_previous`).
    """
    torch.manual_seed(seed)
    model = one_layer(hidden, inner)
    modules = {n: m for n, m in linear_layers(model).items() if n != "lm_head"}
    deltas = {n: falling_delta(_shape(m), i) for i, (n, m) in enumerate(modules.items())}
    text = torch.randint(0, VOCABULARY, (samples + samples // 4, length))
    calibration, held_out = text[:samples], text[samples:]

    begun = perf_counter()
    sums = textbook.calibrate(model, calibration.split(1), [*deltas], len(textbook.SPLIT))
    calibrated = perf_counter()
    plain = {
        n: textbook.compress(
            d, sums[n], textbook.ranks_within(_shape(modules[n]), BUDGET * 2 * d.numel())
        )
        for n, d in deltas.items()
    }
    textbook_seconds = calibrated - begun, perf_counter() - calibrated

    begun = perf_counter()
    batches = [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in calibration.split(8)]
    measured = moments(model, batches, gradients=False)
    calibrated = perf_counter()
    ours = within_budget(deltas, measured)
    ours_seconds = calibrated - begun, perf_counter() - calibrated
    inputs = inputs_of(model, {"input_ids": held_out}, [*deltas])
    errors = {
        kind: [relative(inputs[n], d, measured[n]) for n, d in deltas.items()]
        for kind, measured in (("textbook", plain), ("ours", ours))
    }
    sizes = hidden, inner, samples, length, seed
    return {
        **({} if previous is None else over_previous(previous, *sizes)),
        "time_ratio": sum(textbook_seconds) / sum(ours_seconds),
        "time_ratio_without_calibration": textbook_seconds[1] / ours_seconds[1],
        "textbook_seconds": {"calibration": textbook_seconds[0], "rest": textbook_seconds[1]},
        "ours_seconds": {"calibration": ours_seconds[0], "rest": ours_seconds[1]},
        "mean_error": {kind: sum(e) / len(e) for kind, e in errors.items()},
        "conditions": {
            "matrices": f"4 of {hidden}x{hidden}, 3 of {hidden}x{inner}",
            "budget": "10% of their bf16 bytes, the same for both",
            "calibration": f"{samples} samples of {length} tokens",
            "dtype": "float32",
            "threads": torch.get_num_threads(),
        },
    }


def over_previous(previous: Path, *sizes: int) -> dict[str, Any]:
    """Seconds for the layer over those of an earlier engine, each in a process of its own, and both errors.

    sizes: hidden, inner, samples, length, seed.
    """
    here = Path(__file__).parents[2]
    earlier, now = (_engine(folder, *sizes) for folder in (previous, here))
    seconds = [run["calibration"] + run["rest"] for run in (earlier, now)]
    return {
        "layer_time_over_previous": seconds[1] / seconds[0],
        "error_over_previous": now["error"] / earlier["error"],
        "engines": {"previous": earlier, "now": now},
    }


def _engine(checkout: Path, *sizes: int) -> dict[str, float]:
    words = [sys.executable, "-P", str(Path(__file__).with_name("engine.py"))]
    words += map(str, (*sizes, torch.get_num_threads()))
    environment = {**os.environ, "PYTHONPATH": str(checkout.absolute())}
    done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def within_budget(deltas: Mapping[str, Tensor], measured: Moments) -> dict[str, Tensor]:
    """The deltas of linear layers as the engine keeps them, at BUDGET of their bf16 bytes together."""
    allowed = int(sum(BUDGET * 2 * d.numel() for d in deltas.values()))
    limit = ByteLimit(lambda specs: sum(payload_bytes(*s) for s in specs.values()), allowed, "10%")
    store: dict[str, Item] = {}
    pieces = [
        Piece(f"{n}.weight", tuple(d.shape), "other", partial(d.clone)) for n, d in deltas.items()
    ]
    compress(pieces, measured, Adaptive(), limit, store)
    return {n: decode(fetch(store, f"{n}.weight")) for n in deltas}


def inputs_of(model: nn.Module, batch: Mapping[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """What each named linear layer reads, (sequences * length, in), when the model reads a batch."""
    inputs_by_name: dict[str, Tensor] = {}
    modules = dict(model.named_modules())

    def hook_for(name: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            inputs_by_name[name] = inputs[0].flatten(0, -2)

        return hook

    hooks = [modules[n].register_forward_hook(hook_for(n)) for n in names]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return inputs_by_name


def relative(x: Tensor, delta: Tensor, rebuilt: Tensor) -> float:
    return float((x @ (delta - rebuilt).T).norm() / (x @ delta.T).norm())
