"""What a 16-bit dtype leaves of a real delta: how far base + delta, rounded, answers from the tuned model.

Base weights are first rounded to bfloat16, as published checkpoints are; the delta is that of the folders, and their
float32 sum is the tuned model. Every way of writing that sum is then run in float32, so that nothing but the rounding
of weights tells it from the tuned model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from cl_graft.errors import CLGraftError
from cl_graft.skillpack.compress.calibrate import Moments, moments
from cl_graft.skillpack.compress.text import calibration_batches
from cl_graft.skillpack.folders.checkpoint import Checkpoint
from cl_graft.skillpack.folders.pair import pair
from cl_graft.skillpack.rounding import compensated, seed_of, stochastic

# (parameter, base, delta) -> the sum as it was written
Write = Callable[[str, Tensor, Tensor], Tensor]
BF16, F16 = torch.bfloat16, torch.float16


def bench_rounding(data_dir: Path | None, samples: int = 128) -> dict[str, Any]:
    """{"deltas": figures of each tuned model}; for each way of writing it, a row.

    data_dir: holds the folder `base`, beside it folders of models tuned from it, and `text.jsonl`, rows of prompt and
    completion, of which one half of `samples` calibrates and the other half is answered. Of each row: kl, from the
    tuned model's next-token distribution to that of the rounded one, mean over the completions' tokens, and on_prompts,
    over the prompts'; lost and lost_on_prompts, these over those of the base; kept, the projection of what was added on
    the delta, over the delta. Raises CLGraftError.
    """
    needed = data_dir / "text.jsonl" if data_dir else None
    if data_dir is None or needed is None or not needed.is_file():
        raise CLGraftError(
            "the rounding of real deltas needs models; give a --data-dir with the folder base, folders of models tuned "
            "from it, and text.jsonl."
        )
    batches = calibration_batches(data_dir / "base", needed, samples=samples, length=512, batch=8)
    found = sorted(f.parent for f in data_dir.glob("*/config.json") if f.parent.name != "base")
    return {"deltas": [_delta(data_dir / "base", tuned, batches) for tuned in found]}


def rounding_rows(part: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of the benchmark's table."""
    return [
        (
            f"lost, {found['delta']}, {row['how']}",
            f"{row['lost']:.2g}",
            f"KL {row['kl']:.3g} of {found['kl_base']:.3g} over {found['tokens']} tokens; {row['lost_on_prompts']:.2g} "
            f"of it on prompts; {row['kept']:.1%} of the delta kept, which is {found['size']:.2g} of the weights",
        )
        for found in part["deltas"]
        for row in found["rows"]
    ]


def _delta(base: Path, tuned: Path, batches: list[dict[str, Tensor]]) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    pairing, parameters = pair(Checkpoint(base), Checkpoint(tuned)), dict(model.named_parameters())
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(parameter.to(BF16))
    start = {c.name: parameters[c.name].detach().clone() for c in pairing.changes}
    delta = {name: pairing.delta(name) for name in start}
    text, asked = batches[::2], batches[1::2]  # sorted by length: halves of the same lengths

    def answers(write: Write) -> tuple[list[Tensor], float, float]:
        """Logits of each batch's tokens, the projection kept, and the seconds of writing."""
        begun = perf_counter()
        along = size = 0.0
        with torch.no_grad():
            for name, before in start.items():
                parameters[name].copy_(write(name, before, delta[name]))
                added = parameters[name] - before
                along += float((added * delta[name]).sum(dtype=torch.float64))
                size += float(delta[name].square().sum(dtype=torch.float64))
        seconds = perf_counter() - begun
        return [_logits(model, batch) for batch in asked], along / size, seconds

    truth, _, _ = answers(lambda name, before, change: before + change)
    measured = moments(model, text, gradients=False)
    whole = _kl(truth, answers(lambda name, before, change: before)[0], asked)
    rows = []
    for how, write in _ways(measured).items():
        said, kept, seconds = answers(write)
        kl, on_prompts = _kl(truth, said, asked)
        rows.append(
            {
                "how": how,
                "kl": kl,
                "lost": kl / whole[0],
                "on_prompts": on_prompts,
                "lost_on_prompts": on_prompts / whole[1],
                "kept": kept,
                "seconds": seconds,
            }
        )
    squares = [sum(float(x.double().square().sum()) for x in t.values()) for t in (delta, start)]
    return {
        "delta": tuned.name,
        "size": (squares[0] / squares[1]) ** 0.5,
        "kl_base": whole[0],
        "on_prompts_base": whole[1],
        "tokens": sum(int(_asked(batch)[1].sum()) for batch in asked),
        "rows": rows,
    }


def _ways(measured: Moments) -> dict[str, Write]:
    """Each way of writing base + delta, by what it is called."""

    def seed(name: str) -> int:
        return seed_of(["bench"], name)

    def compensate(dtype: torch.dtype) -> Write:
        def write(name: str, before: Tensor, change: Tensor) -> Tensor:
            hessian = measured.hessian(name)
            if hessian is None or hessian.ndim < 2 or before.ndim != 2:
                return stochastic(before + change, dtype, seed(name))
            return compensated(before + change, dtype, hessian, seed(name))

        return write

    return {
        "bfloat16, nearest": lambda name, w, d: (w + d).to(BF16),
        "difference of bfloat16 checkpoints": lambda name, w, d: (
            w + ((w + d).to(BF16) - w.to(BF16))
        ),
        "float16, nearest": lambda name, w, d: (w + d).to(F16),
        "float16, stochastic": lambda name, w, d: stochastic(w + d, F16, seed(name)),
        "bfloat16, stochastic": lambda name, w, d: stochastic(w + d, BF16, seed(name)),
        "bfloat16, compensated": compensate(BF16),
        "attached, delta in bfloat16": lambda name, w, d: w + d.to(BF16),
    }


def _asked(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Positions that a token follows, bool (rows, length - 1), and of those, in order, whether it is a completion's."""
    followed = batch["attention_mask"][:, 1:].bool()
    return followed, (batch["labels"][:, 1:] != -100)[followed]


@torch.no_grad()
def _logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Float32 (tokens, vocabulary), of the positions that a token follows."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    states = model.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    return model.get_output_embeddings()(states[_asked(batch)[0]])


def _kl(
    truth: list[Tensor], said: list[Tensor], batches: list[dict[str, Tensor]]
) -> tuple[float, float]:
    """Mean over the completions' tokens, and over the prompts'."""
    each, of_completion = [], []
    for right, other, batch in zip(truth, said, batches, strict=True):
        p, q = (x.double().log_softmax(-1) for x in (right, other))
        each.append((p.exp() * (p - q)).sum(1))
        of_completion.append(_asked(batch)[1])
    kl, completion = torch.cat(each), torch.cat(of_completion)
    return float(kl[completion].mean()), float(kl[~completion].mean())
