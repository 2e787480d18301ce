"""How a pack's bytes are shared out: the paper's fixed policy, and our own, of one step for all tensors (rate.py)."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from cl_graft.errors import CLGraftError, UnknownName
from cl_graft.skillpack.codecs import CodeLayout
from cl_graft.skillpack.codecs.coded_rows import LAYOUTS
from cl_graft.skillpack.codecs.quant import BITS
from cl_graft.skillpack.compress.factorise import Counts, damped, rank_for_energy

Kind = Literal["matrix", "table", "vector"]
SOLVERS = ("cl-graft", "auto-gptq")


@dataclass(frozen=True)
class Profile:
    """What the paper's policy knows of a tensor. energy: of a matrix, float64 (r,), falling: squared error of the
    output that dropping each rank costs."""

    kind: Kind
    role: str
    shape: tuple[int, ...]
    energy: Tensor | None


@dataclass
class Plan:
    """counts: {matrix: {bits: ranks}}. top: {table: entries kept, by magnitude}."""

    counts: dict[str, Counts] = field(default_factory=dict)
    top: dict[str, int] = field(default_factory=dict)


class BadPolicy(CLGraftError):
    """An option of a policy that does not exist, or a value that makes no sense."""


@dataclass(frozen=True)
class Shared:
    """What all policies share. damping: share of the mean diagonal added to H.

    activation_aware: directions of D L with H = L L^T instead of the plain SVD of D.
    """

    damping: float = 0.01

    activation_aware: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _require(0 <= self.damping < math.inf, "damping", self.damping, "0 or more")

    def regular(self, hessian: Tensor) -> Tensor:
        """The second moment of inputs (in, in), made positive definite."""
        return damped(hessian, self.damping)


@dataclass(frozen=True)
class Adaptive(Shared):
    """Our own: one step for all tensors (rate.py), so that a byte buys the same wherever it is spent.

    layout: of the codes, entropy-coded ("small") or at aligned widths ("fast"); the budget is of the file as it is.
    """

    damping: float = 0.03
    layout: CodeLayout = "small"

    def regular(self, hessian: Tensor) -> Tensor:
        """Every input's own moment raised by `damping`, and none below that share of the median.

        A share of the mean, which a few massive activations rule, would drown what all other inputs say.
        """
        diagonal = hessian.diagonal()
        least = self.damping * diagonal.median().clamp_min(1e-12)
        return hessian + torch.diag(self.damping * diagonal + least)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.layout in LAYOUTS, "layout", self.layout, " or ".join(LAYOUTS))


@dataclass(frozen=True)
class Paper(Shared):
    """The policy of arXiv 2505.18502: embeddings and head pruned at alpha, MLP ranks by an energy threshold beta,
    attention at a fixed rank, and a fixed split of the ranks between precisions.

    alpha: share of the entries of embeddings and head that are kept, by magnitude. beta: share of the energy
    that an MLP matrix's ranks keep. rank: most ranks of an attention matrix. The paper does not give the three: where
    they are None one scale for all is lowered until the pack fits. group_size: neighbours that share a scale and a
    zero. act_order: GPTQ takes the columns by falling diagonal of H. refit: least-squares refit of the left factors.
    split: {bits: share of the ranks} (released code: 20/180/800 of 1000 ranks at 8/4/2 bits). solver: what quantises
    the factors, ours or the class of auto-gptq 0.7.1 (auto_gptq.py).
    """

    alpha: float | None = None
    beta: float | None = None
    rank: int | None = None
    group_size: int = 128
    act_order: bool = True
    activation_aware: bool = False  # type: ignore[misc]
    refit: bool = False
    split: Mapping[int, float] = field(default_factory=lambda: {8: 0.02, 4: 0.18, 2: 0.80})
    solver: str = "cl-graft"

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.alpha is None or 0 <= self.alpha <= 1, "alpha", self.alpha, "0 to 1")
        _require(self.beta is None or 0 < self.beta <= 1, "beta", self.beta, "above 0, up to 1")
        _require(self.rank is None or self.rank >= 1, "rank", self.rank, "1 or more")
        _require(self.group_size >= 1, "group_size", self.group_size, "1 or more")
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
        """What is kept of every tensor; the pack only gets smaller as the knob rises from 0 to 1."""
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
        if self.beta is not None and p.energy is not None:
            return rank_for_energy(p.energy, self.beta)
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


Policy = Adaptive | Paper
METHODS: dict[str, type[Policy]] = {"graftllm_adaptive": Adaptive, "graftllm": Paper}


def sparse_bytes(kept: int, numel: int) -> int:
    """About what `kept` of `numel` entries take: bf16 values, and positions by gaps or a bitmap."""
    if not kept:
        return 0
    positions = min(numel, kept * (math.log2(numel / kept) + 1.9))
    return math.ceil(2 * kept + positions / 8)


def read_policy(method: str, file: Path | None = None, layout: str | None = None) -> Policy:
    """The policy of a method with the options of a JSON or TOML file, or its defaults; layout: in place of the file's.

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
    if layout is not None and isinstance(given, dict):
        given = {**given, "layout": layout}
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
    if solver == "cl-graft":
        return policy
    if not isinstance(policy, Paper):
        raise CLGraftError(f"the solver {solver} is the paper's; add --method graftllm.")
    return replace(policy, solver=solver)
