"""How a pack's bytes are shared out: the paper's fixed policy, and one price of a byte for all tensors.

Both answer for one number that only ever makes the pack smaller as it rises, so that one bisection meets any
budget: `Plan = policy.plan(profiles, knob)`.
"""

from __future__ import annotations

import json
import math
import tomllib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from cl_graft.errors import CLGraftError, UnknownName
from cl_graft.skillpack.codecs.quant import BITS
from cl_graft.skillpack.compress.factorise import Counts, allocate, rank_for_energy

Kind = Literal["matrix", "table", "vector"]
BINS = 4096  # of a table's histogram, over DECADES powers of ten of squared loss an entry is worth
DECADES = (-40.0, 10.0)
SOLVERS = ("cl-graft", "auto-gptq")
ENTRY_BYTES = 2.5  # of a kept entry, its position included, when it is weighed against its worth


@dataclass(frozen=True)
class Profile:
    """What a policy knows of a tensor; small, whatever the tensor's size.

    worth: for a matrix float64 (r,), falling: squared loss that dropping each rank costs. For a table int64
    (BINS,): entries by worth, the most valuable first (`bins`).
    """

    kind: Kind
    role: str
    shape: tuple[int, ...]
    worth: Tensor


@dataclass
class Plan:
    """counts: {matrix: {bits: ranks}}. least: {table: worth above which an entry is kept, or None}, and
    top: {table: entries kept by magnitude}, of which a table has one."""

    counts: dict[str, Counts] = field(default_factory=dict)
    least: dict[str, float] = field(default_factory=dict)
    top: dict[str, int] = field(default_factory=dict)


class BadPolicy(CLGraftError):
    """An option of a policy that does not exist, or a value that makes no sense."""


@dataclass(frozen=True)
class Policy(ABC):
    """Options common to both policies.

    alpha: share of the entries of embeddings and head that are kept, by magnitude. beta: share of the energy
    that an MLP matrix's ranks keep. rank: most ranks of an attention matrix. None lets the budget decide.
    group_size: neighbours that share a scale and a zero. damping: share of the mean diagonal added to H.
    act_order: GPTQ takes the columns by falling diagonal of H. activation_aware: directions of D L with
    H = L L^T instead of the plain SVD of D. refit: least-squares refit of the left factors.
    """

    alpha: float | None = None
    beta: float | None = None
    rank: int | None = None
    group_size: int = 128
    damping: float = 0.01
    act_order: bool = False
    activation_aware: bool = True
    refit: bool = True

    start: ClassVar[tuple[float, float]]  # the knob, from the largest pack to the smallest
    solver: ClassVar[str] = "cl-graft"

    def __post_init__(self) -> None:
        _require(self.alpha is None or 0 <= self.alpha <= 1, "alpha", self.alpha, "0 to 1")
        _require(self.beta is None or 0 < self.beta <= 1, "beta", self.beta, "above 0, up to 1")
        _require(self.rank is None or self.rank >= 1, "rank", self.rank, "1 or more")
        _require(self.group_size >= 1, "group_size", self.group_size, "1 or more")
        _require(0 <= self.damping < math.inf, "damping", self.damping, "0 or more")

    @abstractmethod
    def plan(self, profiles: Mapping[str, Profile], knob: float) -> Plan:
        """What is kept of every tensor; the pack only gets smaller as the knob rises."""

    def may_grow(self, profiles: Mapping[str, Profile]) -> list[str]:
        """Matrices that may have what is left over, the smallest first; none for a fixed policy."""
        return []


@dataclass(frozen=True)
class Adaptive(Policy):
    """Bits go where they buy the most: one price of a byte, shared by all tensors, decides for each rank between
    8, 6, 5, 4, 3, 2 bits and none, and for each entry of a table whether it is kept."""

    start: ClassVar[tuple[float, float]] = (
        -30.0,
        10.0,
    )  # log10 of the price: squared loss for a byte

    def plan(self, profiles: Mapping[str, Profile], knob: float) -> Plan:
        price, plan = 10.0**knob, Plan()
        for name, p in profiles.items():
            if p.kind == "matrix":
                plan.counts[name] = allocate(
                    self._limited(p), (p.shape[0], p.shape[1]), price, self.group_size
                )
            elif p.kind == "table" and self.alpha is None:
                plan.least[name] = price * ENTRY_BYTES
            elif p.kind == "table":
                plan.top[name] = int((self.alpha or 0) * math.prod(p.shape))
        return plan

    def may_grow(self, profiles: Mapping[str, Profile]) -> list[str]:
        free = [n for n, p in profiles.items() if p.kind == "matrix" and p.worth.sum() > 0]
        return sorted(free, key=lambda name: math.prod(profiles[name].shape))

    def _limited(self, p: Profile) -> Tensor:
        """Beyond the limits a rank counts as worthless, so that no bits are spent there."""
        keep = rank_for_energy(p.worth, (self.beta or 1.0) if p.role == "mlp" else 1.0)
        keep = min(keep, self.rank or keep) if p.role == "attention" else keep
        return torch.where(torch.arange(len(p.worth)) < keep, p.worth, 0.0)


@dataclass(frozen=True)
class Paper(Policy):
    """The policy of arXiv 2505.18502: embeddings and head pruned at alpha, MLP ranks by an energy threshold beta,
    attention at a fixed rank, and a fixed split of the ranks between precisions.

    split: {bits: share of the ranks} (released code: 20/180/800 of 1000 ranks at 8/4/2 bits). The paper does not
    give alpha, beta and rank: where they are None one scale for all three is lowered until the pack fits.
    solver: what quantises the factors, ours or the class of auto-gptq 0.7.1 (auto_gptq.py).
    """

    split: Mapping[int, float] = field(default_factory=lambda: {8: 0.02, 4: 0.18, 2: 0.80})
    activation_aware: bool = False
    refit: bool = False
    act_order: bool = True
    solver: str = "cl-graft"  # type: ignore[misc]

    start: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        split = {int(bits): share for bits, share in sorted(self.split.items(), reverse=True)}
        whole = abs(sum(split.values()) - 1) < 1e-6 and min(split.values(), default=-1) >= 0
        known = set(split) <= set(BITS)
        _require(whole and known, "split", self.split, f"shares of {BITS} bits that add up to 1")
        _require(self.solver in SOLVERS, "solver", self.solver, " or ".join(SOLVERS))
        if self.solver != "cl-graft":
            plain = not (self.activation_aware or self.refit)
            _require(
                plain, "solver", self.solver, "cl-graft, or leave out activation_aware and refit"
            )
        object.__setattr__(self, "split", split)

    def plan(self, profiles: Mapping[str, Profile], knob: float) -> Plan:
        scale, plan = 1.0 - knob, Plan()
        for name, p in profiles.items():
            if p.kind == "matrix":
                plan.counts[name] = self._divided(self._ranks(p, scale))
            elif p.kind == "table":
                alpha = 0.2 * scale if self.alpha is None else self.alpha  # as dear as the ranks
                plan.top[name] = int(alpha * math.prod(p.shape))
        return plan

    def _ranks(self, p: Profile, scale: float) -> int:
        full = min(p.shape)
        if p.role == "attention":
            return min(full, self.rank or round(scale * full))
        if self.beta is not None:
            return rank_for_energy(p.worth, self.beta)
        return min(
            full, round(1.4 * scale * full)
        )  # released code: 1,400 ranks to attention's 1,000

    def _divided(self, ranks: int) -> Counts:
        ends = torch.tensor(list(self.split.values())).cumsum(0).mul(ranks).round().int().tolist()
        ends = [max(end, min(1, ranks)) for end in ends]  # the first is never one of the cheapest
        counts = {b: max(0, e - s) for b, s, e in zip(self.split, [0, *ends], ends, strict=False)}
        return {b: k for b, k in counts.items() if k}


def _require(right: bool, name: str, value: object, wanted: str) -> None:
    if not right:
        raise BadPolicy(f"{name} is {value!r}; give {wanted}.")


METHODS: dict[str, type[Policy]] = {"graftllm_adaptive": Adaptive, "graftllm": Paper}


def finer(counts: Counts) -> Counts:
    """The first of the least precise ranks raised to the next precision; the same where there is none to raise."""
    for bits in sorted(counts):
        above = min((b for b in BITS if b > bits), default=None)
        if above is not None:
            changed = {**counts, bits: counts[bits] - 1, above: counts.get(above, 0) + 1}
            return {b: k for b, k in sorted(changed.items(), reverse=True) if k}
    return counts or {min(BITS): 1}


def bins(worth: Tensor) -> Tensor:
    """int64 (BINS,): how many entries are worth how much, on a logarithmic scale, the most valuable first."""
    low, high = DECADES
    where = (worth.clamp_min(1e-45).log10() - low) * (BINS / (high - low))
    counts = torch.bincount(where.long().clamp_(0, BINS - 1).flatten(), minlength=BINS)
    return counts.flip(0)


def kept_above(histogram: Tensor, least: float) -> int:
    """About how many entries are worth more than `least`."""
    low, high = DECADES
    place = (math.log10(max(least, 1e-45)) - low) * (BINS / (high - low))
    above = max(0, min(BINS, BINS - math.ceil(place)))
    return int(histogram[:above].sum())


def sparse_bytes(kept: int, numel: int) -> int:
    """About what `kept` of `numel` entries take: bf16 values, and positions by gaps or a bitmap."""
    if not kept:
        return 0
    positions = min(numel, kept * (math.log2(numel / kept) + 1.9))
    return math.ceil(2 * kept + positions / 8)


def read_policy(method: str, file: Path | None = None) -> Policy:
    """The policy of a method with the options of a JSON or TOML file, or its defaults.

    Raises UnknownName for a method or an option that does not exist, BadPolicy for a file or a value that makes no
    sense.
    """
    if method not in METHODS:
        raise UnknownName("method", method, METHODS)
    given: dict[str, Any] = {}
    if file is not None:
        try:
            text = file.read_text("utf-8")
            given = tomllib.loads(text) if file.suffix == ".toml" else json.loads(text)
        except (OSError, ValueError) as error:
            raise BadPolicy(f"{file} cannot be read as a policy ({error}).") from error
    known = [option.name for option in fields(METHODS[method])]
    for name in given if isinstance(given, dict) else [str(given)]:
        if name not in known:
            raise UnknownName(f"option of {method}", name, known)
    try:
        return METHODS[method](**given)
    except (TypeError, ValueError) as error:
        raise BadPolicy(f"{file}: a value has the wrong type ({error}).") from error


def solved_by(policy: Policy, solver: str) -> Policy:
    """The policy with another solver. Raises UnknownName, and CLGraftError for a policy that has ours alone."""
    if solver not in SOLVERS:
        raise UnknownName("solver", solver, SOLVERS)
    if solver == policy.solver or solver == "cl-graft":
        return policy
    if not isinstance(policy, Paper):
        raise CLGraftError(f"the solver {solver} is the paper's; add --method graftllm.")
    return replace(policy, solver=solver)
