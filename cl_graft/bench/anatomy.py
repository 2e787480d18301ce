"""What real deltas look like: where their energy and bytes are, what 16 bits leave of them, which parts matter."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property, partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cl_graft.bench.bf16_training import RATE, train_in_bf16
from cl_graft.bench.cells import Cells
from cl_graft.bench.deltas import CALIBRATION, STEPS, Delta, embedded_deltas, smollm2_delta
from cl_graft.bench.engines import this_engine
from cl_graft.bench.guesses import GUESSES
from cl_graft.bench.held_out import HeldOut
from cl_graft.bench.statistics import (
    Beside,
    bf16_difference,
    bits_of_codes,
    direction_energies,
    leading,
    rows_of_codes,
)
from cl_graft.models.meta_model import MetaModel, meta_model
from cl_graft.models.text import encode
from cl_graft.skillpack import codecs
from cl_graft.skillpack.compress.calibrated import Calibration
from cl_graft.skillpack.compress.create import create
from cl_graft.skillpack.compress.text import calibration_batches
from cl_graft.skillpack.folders.checkpoint import Checkpoint
from cl_graft.skillpack.format.file import SkillPack
from cl_graft.version import __version__

BUDGETS, EMBEDDED_BUDGETS = ("0.3%", "1%", "5%"), ("5%",)
SHARES = {"first direction": 0.0, "top 1% of directions": 0.01, "top 10% of directions": 0.1}
BOTH, ON_GRID = "bf16 difference, ", "bf16 difference from a bf16 base, "
LOSS_ROWS = 32  # of the test set
Figures = dict[str, float]


def anatomy(data_dir: Path | None, cells: Cells) -> dict[str, Any]:
    """{rows: [{delta, figure, measured, guess}], conditions} of SmolLM2's deltas on SST-2, and of mini's code.

    guess: what was said beforehand, None where nothing was. Raises NotFetched, DataError.
    """
    rows = []
    for steps in STEPS:
        delta = smollm2_delta(steps, data_dir, cells.say)
        found = measured(delta, BUDGETS, cells, kept=12 if steps == 12 else 0)
        guesses = {figure: told[STEPS.index(steps)] for figure, told in GUESSES.items()}
        rows += rows_of(delta.name, found, guesses)
    code = next(delta for delta in embedded_deltas(data_dir) if delta.name.endswith("code"))
    rows += rows_of(code.name, measured(code, EMBEDDED_BUDGETS, cells), {})
    return {"rows": rows, "conditions": CONDITIONS}


CONDITIONS = {
    "deltas": "AdamW in float32, 2e-5, batches of 8, loss on the label; differences of float32 folders",
    "directions": "of each matrix by its singular values, energies summed over the matrices of a role",
    "seen": "tokens of the prompts and answers that were trained on; the head is tied to the embedding",
    "bf16 difference": "both folders rounded to bfloat16, then subtracted; from a bf16 base: that is rounded first, "
    "and the delta added to it, as where training begins with published weights",
    "kept in bf16": f"weights, gradients and states of AdamW in bfloat16, constant {RATE}, the same text",
    "KL": f"KL(tuned, tuned without the delta of a role) over KL(tuned, base), all tokens of {LOSS_ROWS} test prompts "
    "and answers, float32",
    "codes": f"packs of layout small, calibrated on {CALIBRATION} training examples; bits a code by the empirical "
    "distribution of each class of rows; bits a weight of all that a role takes in the file",
}


def rows_of(delta: str, found: Figures, guesses: Mapping[str, float]) -> list[dict[str, Any]]:
    """A row for each figure."""
    return [
        {"delta": delta, "figure": figure, "measured": value, "guess": guesses.get(figure)}
        for figure, value in found.items()
    ]


def measured(delta: Delta, budgets: tuple[str, ...], cells: Cells, kept: int = 0) -> Figures:
    """All figures of a delta, each group from its cell where it was measured. kept: steps of training in bfloat16."""
    parts = Parts(HeldOut(delta))
    groups: dict[str, Callable[[], Figures]] = {
        "weights": partial(energies, parts),
        "loss": partial(losses, parts),
        **{f"codes, {budget}": partial(codes, parts, budget) for budget in budgets},
    }
    if kept:
        groups["kept in bf16"] = partial(kept_in_bf16, parts, kept)
    found: Figures = {}
    for group, measure in groups.items():
        about: dict[str, Any] = {"part": f"anatomy, {group}", "version": __version__}
        about |= {"delta": delta.name, "delta_digest": delta.digest, "rows": LOSS_ROWS}
        if group.startswith("codes"):
            about["engine_digest"] = this_engine().digest
        found |= cells.measured(about, measure)
    return found


class Parts:
    """The tensors of a delta by their roles."""

    def __init__(self, text: HeldOut):
        self.text = text
        self.before, self.after = Checkpoint(text.delta.base), Checkpoint(text.delta.tuned)

    @cached_property
    def meta(self) -> MetaModel:
        return meta_model(self.text.delta.base)

    @cached_property
    def roles(self) -> dict[str, str]:
        """{tensor: role}, of all that float."""
        return {name: str(self.meta.role_of(name)) for name in self.before.floating}

    def pairs(self) -> Iterator[tuple[str, str, Tensor, Tensor]]:
        """(name, role, base's tensor, tuned one), float32."""
        for name, role in self.roles.items():
            yield name, role, self.before.read(name).float(), self.after.read(name).float()


def energies(parts: Parts) -> Figures:
    """Shares of the squared delta: by role, by direction, by row; and the same of a difference in bfloat16."""
    whole: dict[str, float] = defaultdict(float)
    of: dict[tuple[str, str], float] = defaultdict(float)
    tops: dict[tuple[str, str, str], float] = defaultdict(float)
    beside = {kind: Beside() for kind in (BOTH, ON_GRID)}
    kept, rows = Beside(), Figures()
    for _, role, before, after in parts.pairs():
        delta, start = after - before, before.bfloat16().float()
        narrow = {
            BOTH: bf16_difference(before, after),
            ON_GRID: bf16_difference(start, start + delta),
        }
        whole[role] += float(delta.double().square().sum())
        kept.add(start - before, before)
        for kind, x in narrow.items():
            beside[kind].add(x, delta)
        if delta.ndim != 2:
            continue
        if role == "embedding":
            rows = row_energies(delta, seen_tokens(parts.text))
        for kind, x in {"": delta, **narrow}.items():
            found = direction_energies(x)
            of[kind, role] += float(found.sum())
            for what, share in SHARES.items():
                tops[kind, what, role] += leading(found, share)
    total = sum(whole.values())
    return {
        "values of the base that bf16 has": kept.zero,
        **{f"share of the weights' delta, {role}": size / total for role, size in whole.items()},
        **{f"{k}{what}, {role}": top / of[k, role] for (k, what, role), top in tops.items()},
        **rows,
        **{f"{kind}entries that are zero": found.zero for kind, found in beside.items()},
        **{f"{kind}energy over the delta's": found.energy for kind, found in beside.items()},
        **{f"{kind}projection on the delta": found.projection for kind, found in beside.items()},
    }


def seen_tokens(text: HeldOut) -> Tensor:
    """Tokens of the text that was trained on, int64, each once."""
    _, tokenizer = text.tuned
    found: set[int] = set()
    for example in text.delta.seen:
        head, tail = encode(tokenizer, example.prompt, example.completion, text.delta.max_length)
        found |= {*head, *tail}
    return torch.tensor(sorted(found), dtype=torch.int64)


def row_energies(delta: Tensor, seen: Tensor) -> Figures:
    """How many rows of an embedding are of seen tokens, what they hold, and what one of them holds over another."""
    each = delta.double().square().sum(1)
    mine = torch.zeros(len(each), dtype=torch.bool)
    mine[seen] = True
    return {
        "rows of seen tokens": float(mine.double().mean()),
        "energy in rows of seen tokens": float(each[mine].sum() / each.sum()),
        "energy a row, seen over unseen": float(each[mine].mean() / each[~mine].mean()),
    }


def losses(parts: Parts) -> Figures:
    """KL that is lost with the delta of one role, over that with all of it."""
    text = HeldOut(replace(parts.text.delta, test=parts.text.delta.test[:LOSS_ROWS]))
    whole = text.kl({})["kl"]
    found = {}
    for role in dict.fromkeys(parts.roles.values()):
        kept = {n: after - before for n, of, before, after in parts.pairs() if of != role}
        found[f"KL without the delta of {role}"] = text.kl(kept)["kl"] / whole
    return found


def codes(parts: Parts, budget: str) -> Figures:
    """Bits and bytes of a pack of the delta, by role."""
    delta = parts.text.delta
    with tempfile.TemporaryDirectory(prefix="cl-graft-bench-") as place:
        file, out = delta.calibration(Path(place) / "text.jsonl"), Path(place) / "made.pack"
        batches = calibration_batches(
            delta.tuned, file, samples=CALIBRATION, length=delta.max_length, batch=8
        )
        create(delta.base, delta.tuned, out, budget=budget, calibration=Calibration(batches))
        pack = SkillPack.load(out)
    return code_figures(
        pack, parts.roles, {n: i.shape for n, i in parts.before.tensors.items()}, budget
    )


def code_figures(
    pack: SkillPack, roles: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], budget: str
) -> Figures:
    """`codes` of a pack that there is. roles, shapes: of the base's tensors."""
    rows: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    taken: dict[str, int] = defaultdict(int)
    weights: dict[str, int] = defaultdict(int)
    for name, role in roles.items():
        weights[role] += prod(shapes[name])
        if name in pack.tensors:
            taken[role] += codecs.payload_bytes(*pack.tensors[name].spec)
            rows[role] += rows_of_codes(pack.tensors[name])
    total, found = sum(taken.values()), Figures()
    for role, size in taken.items():
        bits, count = bits_of_codes(rows[role])
        if count:
            found[f"bits a code, {role}, {budget}"] = bits / count
        found[f"bits a weight, {role}, {budget}"] = 8 * size / weights[role]
        found[f"share of bytes, {role}, {budget}"] = size / total
    return found


def kept_in_bf16(parts: Parts, steps: int) -> Figures:
    """What training does to weights that are kept in bfloat16, beside the delta of float32."""
    found = train_in_bf16(parts.text, steps)
    still = sum(int((~moved).sum()) for moved in found.moved.values())
    beside = Beside()
    for name, _, before, after in parts.pairs():
        if name in found.after:
            beside.add(found.after[name].float() - found.before[name].float(), after - before)
    return {
        "kept in bf16, weights that never move": still
        / sum(m.numel() for m in found.moved.values()),
        "kept in bf16, entries that are zero": beside.zero,
        "kept in bf16, energy over float32's": beside.energy,
        "kept in bf16, projection on float32's delta": beside.projection,
    }


def anatomy_rows(part: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of the benchmark's table: measured, and what was guessed."""
    told = [("anatomy", "measured", "; ".join(f"{k}: {v}" for k, v in part["conditions"].items()))]
    return told + [
        (
            f"{row['delta']}, {row['figure']}",
            f"{row['measured']:.3g}",
            "no guess" if row["guess"] is None else f"guessed {row['guess']:.3g}",
        )
        for row in part["rows"]
    ]
