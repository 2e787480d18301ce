"""What a stage computes, how long it takes, and what it leaves on disk: counted, or probed by a few real steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

from cl_graft.errors import CLGraftError
from cl_graft.training.fit import Progress

UTILISATION = 0.4  # of a device's dense peak; published runs of 7-65 B parameters reach 0.3 to 0.5


def train_flops(
    parameters: int,
    tokens: int,
    *,
    trained: int | None = None,
    checkpointing: bool = False,
    reference_tokens: int = 0,
) -> int:
    """Floating-point operations of training on `tokens` tokens, padding included, over all devices.

    A token costs 2N forward, 2N back to the activations, and 2 for each trained parameter: 6N where all are
    (Kaplan et al. 2020, section 2.1, and Hoffmann et al. 2022, appendix F). Checkpointing runs the forward
    pass again: 2N. reference_tokens: what DPO's reference log-probabilities are computed on, 2N each; with
    them precomputed, every pair's tokens once, however many epochs follow. Attention's products of activations,
    12 x layers x width x length for each token, are left out: below a tenth while length < 0.6 x width.

    parameters: those that are multiplied by, so without the embedding table where it is not the head, too.
    """
    learned = parameters if trained is None else trained
    per_token = (6 if checkpointing else 4) * parameters + 2 * learned
    return per_token * tokens + 2 * parameters * reference_tokens


def train_seconds(
    flops: int, peak: float, devices: int = 1, utilisation: float = UTILISATION
) -> float:
    """Seconds on devices of `peak` floating-point operations a second each, a share `utilisation` of which is reached.

    Raises CLGraftError for a peak that is none, and for a utilisation outside (0, 1].
    """
    if not 0 < peak < float("inf"):
        raise CLGraftError(f"a peak of {peak:g} operations a second is none; give one as 989e12.")
    if not 0 < utilisation <= 1:
        raise CLGraftError(
            f"utilisation {utilisation} is no share of the peak; give one above 0, at most 1."
        )
    return flops / (peak * devices * utilisation)


def probe(train: Callable[[Progress], Any]) -> float:
    """Seconds per optimizer step of a stage that is really run, from the end of its first step to the last's.

    train: runs a stage of two steps or more (three are enough) and reports to the progress that it is given,
    such as `lambda progress: fit(copy, tokenizer, rows, job, launch, folder, progress=progress)`.
    Set-up and the first step are left out. Raises CLGraftError for a stage of fewer steps.
    """
    ends: list[float] = []
    train(lambda done, at: ends.append(time.perf_counter()))
    if len(ends) < 2:
        raise CLGraftError(
            f"a stage of {len(ends)} steps tells no time per step; probe with two steps or more."
        )
    return (ends[-1] - ends[0]) / (len(ends) - 1)


def stage_bytes(parameters: int) -> int:
    """Bytes of the weights that a stage leaves, in fp32."""
    return 4 * parameters


def step_bytes(
    parameters: int,
    *,
    trained: int | None = None,
    adapter: bool = False,
    stage: Literal[0, 2, 3] = 0,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> int:
    """Bytes of a checkpoint to resume from, all processes' files together; trained: None where all parameters are.

    The Trainer's own: weights (an adapter's alone, if there is one) and AdamW's two moments, 12 N where all is
    trained. DeepSpeed's: the weights as computed with, the master weights and moments (12 for each trained
    parameter), and in stage 2 the module's states once more.
    """
    learned = parameters if trained is None else trained
    size = 2 if stage and precision == "bf16" else 4
    written = size * (learned if adapter else parameters)
    if not stage:
        return written + 8 * learned
    again = size * parameters if stage == 2 else 0
    return written + 12 * learned + again
