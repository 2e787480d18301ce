"""Stacked experts beside an earlier commit of the engine: three mixtures that are trained here, at equal bytes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from cl_graft import plugins
from cl_graft.bench.deltas import CALIBRATION, Delta
from cl_graft.bench.engines import Engine, this_engine
from cl_graft.bench.held_out import ERROR_ROWS, KL_ROWS, HeldOut
from cl_graft.models.experts import stacked, transposed_stacks
from cl_graft.models.load import load_tokenizer, locate
from cl_graft.models.text import encode_all
from cl_graft.skillpack.compress.text import padded
from cl_graft.task import Example

BUDGET = "5%"
TOKENIZER = "nano-llama"  # whose vocabulary is that of all tasks of mini
SHAPE = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 256,
}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 256},
    "qwen3_moe": {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 64},
    "gpt_oss": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 128},
}
BASE_STEPS, STEPS, BATCH = 300, 60, 16
BASE_RATE, RATE = 3e-3, 1e-3


def experts_over_previous(previous: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Held-out output error of experts' matrices with this engine's pack over that with the previous one's: the mean,
    and a row for each mixture, with the KL divergence to the tuned model."""
    mini, rows = plugins.load("scenario", "mini")(seed=0), []
    first, second = mini.tasks[:2]
    for kind in MIXTURES:
        say(kind)
        with tempfile.TemporaryDirectory(prefix="cl-graft-bench-") as folder:
            text = HeldOut(mixture(kind, Path(folder), first.train, second.train, second.test))
            row: dict[str, Any] = {"delta": text.delta.name, "budget": BUDGET}
            for name, engine in (
                ("previous", Engine("previous", previous)),
                ("this", this_engine()),
            ):
                made = engine.make(text.delta, BUDGET, Path(folder))
                row[name] = made.about | {"error": expert_error(text, made.deltas)}
                row[name] |= text.kl(made.deltas)
        row["experts_over_previous"] = row["this"]["error"] / row["previous"]["error"]
        rows.append(row)
    ratios = [row["experts_over_previous"] for row in rows]
    how = "error of each expert's output, mean over the matrices of all experts"
    return {
        "experts_over_previous": sum(ratios) / len(ratios),
        "rows": rows,
        "conditions": {
            "previous": Engine("previous", previous).digest[:12],
            "this": this_engine().digest[:12],
            "calibration": f"{CALIBRATION} training examples",
            "held out": f"{ERROR_ROWS} test examples, each expert on the tokens that are routed to it; "
            f"KL on {KL_ROWS}",
            "how": f"{how}; random weights, {BASE_STEPS} steps of AdamW at {BASE_RATE:g} on one task of mini, then the "
            f"delta, {STEPS} at {RATE:g} on another",
        },
    }


def mixture(
    kind: str,
    folder: Path,
    before: Sequence[Example],
    train: Sequence[Example],
    test: Sequence[Example],
) -> Delta:
    """A mixture of random weights trained on `before`, and what `train` makes of it; experts are stacked in both."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = load_tokenizer(TOKENIZER, locate(TOKENIZER))
    special = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("pad", "bos", "eos")}
    sizes = {"intermediate_size": 128, **SHAPE, **MIXTURES[kind], **special}
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    for name, rows, steps, rate in (
        ("base", before, BASE_STEPS, BASE_RATE),
        ("tuned", train, STEPS, RATE),
    ):
        tune(model, tokenizer, rows, steps, rate)
        model.save_pretrained(folder / name, save_original_format=False)
        tokenizer.save_pretrained(folder / name)
    chosen = Random(0).sample(list(train), CALIBRATION)
    name = f"{kind}, {config.num_local_experts} experts"
    return Delta(name, folder / "base", folder / "tuned", chosen, list(test), 128)


def tune(model: Any, tokenizer: Any, rows: Sequence[Example], steps: int, rate: float) -> None:
    """AdamW along a cosine, on batches drawn by a fixed seed; loss on the answers."""
    texts = encode_all(tokenizer, ((e.prompt, (e.completion,)) for e in rows), 128)
    encoded = [(head + tail, len(head)) for head, (tail,) in texts]
    optimizer, draw = torch.optim.AdamW(model.parameters(), rate), Random(0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(steps):
        batch = padded(draw.sample(encoded, min(BATCH, len(encoded))), tokenizer.pad_token_id)
        optimizer.zero_grad()
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


def expert_error(text: HeldOut, deltas: Mapping[str, Tensor]) -> float:
    """Mean over all experts' matrices of ||x (D - D')|| / ||x D||, x being what is routed to the expert."""
    model, errors = text.tuned[0], []
    turned = transposed_stacks(model)
    for name, what in stacked(model).items():
        moment = text.inputs.hessian(name)
        if what == "matrices" and moment is not None:
            delta = text.change(name)
            missed = delta - deltas[name] if name in deltas else delta
            sizes = [squared(x.mT if name in turned else x, moment) for x in (missed, delta)]
            errors += [(m / d) ** 0.5 for m, d in zip(*sizes, strict=True) if d > 0]
    return sum(errors) / len(errors)


def squared(delta: Tensor, moment: Tensor) -> list[float]:
    """||x D^T||^2 a token, of each expert. delta: (experts, out, in); moment: (experts, in, in)."""
    return ((delta @ moment).double() * delta).sum((1, 2)).tolist()
