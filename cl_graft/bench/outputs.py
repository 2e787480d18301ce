"""What 16-bit outputs leave of a real delta: how much of its effect comes through, in the weights and beside them.

Base weights and what every matrix of the decoder gives are rounded to bfloat16, all else is run in float32. A delta
beside the weights is added to an output that is on bfloat16's grid already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cl_graft.bench.cells import Cells
from cl_graft.bench.held_out import HeldOut, log_probabilities, predicts_answer
from cl_graft.bench.rounding import BF16, of_deltas
from cl_graft.models.load import load
from cl_graft.skillpack.rounding import dithered, seed_of, stochastic

ROWS = 32  # of the test set
OURS = "beside, by a hash of the sum"
# (matrix, input, its float32 product) -> what it gives
Output = Callable[[str, Tensor, Tensor], Tensor]


def bf16_outputs_kept(data_dir: Path | None, cells: Cells) -> dict[str, Any]:
    """How much of the shift of log-likelihoods comes through bfloat16 outputs, for SmolLM2's two deltas.

    `bf16_outputs_kept` is that of `Attached`, the farthest from 1 over the deltas. Of each row of `deltas`: kept and
    kept_answers, the projection of the shift on that of float32, over the latter, for tokens of the prompts and of the
    answers; error, the norm of what differs over that of float32's shift. Raises NotFetched, DataError.
    """
    deltas = of_deltas("bf16_outputs_kept", _delta, data_dir, cells, rows=ROWS)
    ours = [row for found in deltas for row in found["rows"] if row["how"] == OURS]
    kept = [row[key] for row in ours for key in ("kept", "kept_answers")]
    return {
        "bf16_outputs_kept": max(kept, key=lambda share: abs(share - 1)),
        "deltas": deltas,
        "conditions": {"rounded": "weights and outputs of the decoder's matrices", "rows": ROWS},
    }


def outputs_rows(part: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of the benchmark's table."""
    return [
        (
            f"shift kept, {found['delta']}, {row['how']}",
            f"{row['kept']:.2f}",
            f"off by {row['error']:.2f} of the shift on prompts; {row['kept_answers']:.2f} kept on answers",
        )
        for found in part["deltas"]
        for row in found["rows"]
    ]


def _delta(text: HeldOut) -> dict[str, Any]:
    model = load(str(text.delta.base))[0]
    matrices = {name: model.get_submodule(name.removesuffix(".weight")) for name in text.decoder}
    start = {name: m.weight.detach().to(BF16).float() for name, m in matrices.items()}
    delta = {name: text.change(name) for name in matrices}
    batches = list(text.batches(text.delta.test[:ROWS]))
    answers = torch.cat([predicts_answer(batch)[_followed(batch)] for batch in batches])

    def likelihoods(weight: Callable[[str], Tensor], output: Output | None = None) -> Tensor:
        """Log-likelihood of each token after the first, float32, under these weights and outputs."""
        with torch.no_grad():
            for name, matrix in matrices.items():
                matrix.weight.copy_(weight(name))
        with _giving(matrices, output):
            return torch.cat([_of_next(model, batch) for batch in batches])

    def nearest(name: str, x: Tensor, y: Tensor) -> Tensor:
        return _near(y)

    base = start.__getitem__
    exact = likelihoods(lambda name: start[name] + delta[name]) - likelihoods(base)
    before, rows = likelihoods(base, nearest), []
    ways: dict[str, tuple[Callable[[str], Tensor], Output]] = {
        "in the weights, nearest": (lambda n: _near(start[n] + delta[n]), nearest),
        "in the weights, stochastic": (
            lambda n: stochastic(start[n] + delta[n], BF16, seed_of(["bench"], n)).float(),
            nearest,
        ),
        "beside, sum to nearest": (base, lambda n, x, y: _near(_near(y) + _added(x, delta[n]))),
        OURS: (
            base,
            lambda n, x, y: dithered(_near(y) + _added(x, delta[n]), BF16).float(),
        ),
    }
    for how, (weight, output) in ways.items():
        shift = likelihoods(weight, output) - before
        row = {"how": how, "kept": _along(shift[~answers], exact[~answers])}
        row["kept_answers"] = _along(shift[answers], exact[answers])
        off = (shift - exact)[~answers].norm() / exact[~answers].norm()
        rows.append(row | {"error": float(off)})
    return {"delta": text.delta.name, "rows": rows}


@contextmanager
def _giving(matrices: dict[str, Any], output: Output | None) -> Iterator[None]:
    """Have every matrix give what `output` makes of its product, within."""

    def hook(name: str, module: nn.Module, args: Any, y: Tensor) -> Tensor | None:
        return output(name, args[0], y) if output else None

    handles = [m.register_forward_hook(partial(hook, name)) for name, m in matrices.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _of_next(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Log-likelihoods of the tokens that have one before them; padding is on the right."""
    keep = batch["attention_mask"].bool()
    following = batch["input_ids"].roll(-1, 1)[keep]
    found = log_probabilities(model, batch).gather(-1, following[:, None])[:, 0]
    return found[_followed(batch)]


def _followed(batch: dict[str, Tensor]) -> Tensor:
    """Whether a token has one behind it, for each token that is no padding."""
    mask = batch["attention_mask"].bool()
    behind = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)
    return behind[mask]


def _near(x: Tensor) -> Tensor:
    return x.to(BF16).float()


def _added(x: Tensor, delta: Tensor) -> Tensor:
    """What a delta beside a matrix adds to its output, as a product in bfloat16 gives it."""
    return _near(_near(x) @ delta.T)


def _along(shift: Tensor, exact: Tensor) -> float:
    return float((shift * exact).sum() / exact.square().sum())
