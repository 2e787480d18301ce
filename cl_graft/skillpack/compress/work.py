"""What is compressed: tensors, what is known of their inputs, what their entries are worth, and where results lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from cl_graft.skillpack.codecs import Encoded, Spec
from cl_graft.skillpack.compress.directions import Directions, Known
from cl_graft.skillpack.compress.factorise import Spectrum
from cl_graft.skillpack.compress.policy import Adaptive, Kind, Policy
from cl_graft.skillpack.compress.work_store import Item, WorkStore
from cl_graft.skillpack.memory import release

PackProgress = Callable[[str, float], None]
SMALLEST_SIDE = 4  # a matrix narrower than this has nothing to factorise


class Stack(NamedTuple):
    """A tensor of a pack that holds matrices of all experts of a layer, and its shape (experts, rows, cols)."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """One tensor of a delta, or one matrix of a stack. delta: gives it, float32 and finite, when its turn comes; it is
    not written to.

    transposed: a matrix stored (in, out). head: name of the head that this embedding also serves as.
    whole: entry by entry, as vectors are. present: in the pack even where nothing of it is worth keeping.
    rows: a vector for each expert, no matrix. matrix: of a stack of matrices, gives one by its number. expert: which
    of its layer's experts a matrix belongs to. stack: the tensor that it is in, where it is none by itself.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    delta: Callable[[], Tensor]
    transposed: bool = False
    head: str | None = None
    whole: bool = False
    present: bool = False
    rows: bool = False
    matrix: Callable[[int], Tensor] | None = None
    expert: int | None = None
    stack: Stack | None = None

    @property
    def kind(self) -> Kind:
        if len(self.shape) < 2 or self.whole:
            return "vector"
        inner = self.role in ("attention", "mlp", "other") and not self.rows
        matrix = inner and len(self.shape) == 2 and min(self.shape) >= SMALLEST_SIDE
        return "matrix" if matrix else "table"

    @property
    def tensor(self) -> str:
        """The name of the tensor in the pack."""
        return self.stack.name if self.stack else self.name


def apart(pieces: Sequence[Piece], policy: Policy) -> list[Piece]:
    """The pieces with every stack as its matrices, where the policy has them factorised one by one."""
    if not isinstance(policy, Adaptive):
        return list(pieces)
    return [part for piece in pieces for part in (_matrices(piece) or [piece])]


def _matrices(piece: Piece) -> list[Piece]:
    """The matrices of a stack; none where it is no stack, or its matrices are too narrow."""
    if piece.matrix is None or len(piece.shape) != 3:
        return []
    stack = Stack(piece.name, piece.shape)
    parts = [
        Piece(
            f"{piece.name}[{i}]",
            piece.shape[1:],
            piece.role,
            partial(piece.matrix, i),
            piece.transposed,
            whole=piece.whole,
            expert=i,
            stack=stack,
        )
        for i in range(piece.shape[0])
    ]
    return parts if all(part.kind == "matrix" for part in parts) else []


@dataclass(frozen=True)
class ByteLimit:
    """What may be used: `cost` of {name: (codec, shape, meta)}, in bytes, must not exceed `bytes`."""

    cost: Callable[[Mapping[str, Spec]], int]
    bytes: int
    text: str  # as the user wrote it


@dataclass(frozen=True)
class Work:
    pieces: list[Piece]
    moments: Known
    policy: Policy
    limit: ByteLimit
    store: WorkStore
    device: torch.device
    progress: PackProgress

    def delta(self, piece: Piece) -> Tensor:
        """The delta of a matrix, float32 (out, in)."""
        delta = piece.delta().to(self.device, torch.float32)
        return delta.T.contiguous() if piece.transposed else delta

    @cached_property
    def directions(self) -> Directions:
        shapes = {p.name: p.shape for p in self.pieces if p.kind == "matrix"}
        return Directions(shapes, self.policy, self.limit.bytes, self.store, self.device)

    def under(self, hessian: Tensor | None) -> Tensor | None:
        """What directions are taken under, (in, in); None for those of the plain SVD."""
        if hessian is None or not self.policy.activation_aware:
            return None
        return self.policy.regular(hessian)


def fetch(store: WorkStore, name: str) -> Encoded:
    """An encoded tensor, from the work store."""
    tensors, about = store[f"encoded/{name}"]
    return Encoded(about["codec"], tuple(about["shape"]), about["meta"], tensors)


def kept(work: Work, piece: Piece, make: Callable[[], Encoded]) -> Spec:
    """The spec of an encoded tensor, from the work store or made now."""
    if f"encoded/{piece.name}" in work.store:
        return fetch(work.store, piece.name).spec
    return put(work.store, piece.name, make())


def put(store: WorkStore, name: str, encoded: Encoded) -> Spec:
    about = {"codec": encoded.codec, "shape": list(encoded.shape), "meta": encoded.meta}
    store[f"encoded/{name}"] = Item(encoded.parts, about)
    return encoded.spec


class Read(NamedTuple):
    """Matrices that read one input, and its second moment (in, in), float32; None where nothing is known of it."""

    pieces: list[Piece]
    hessian: Tensor | None


def visit(
    work: Work, use: Callable[[list[Read]], None], wanted: Callable[[list[Piece]], bool]
) -> None:
    """Call `use` with the matrices that read one input and its moment, input by input, in the order of the model; then
    with each matrix of whose input nothing is known. Matrices that are not wanted are passed over.

    Those of a layer's experts come together, with a moment for each expert.
    """
    reads, left = work.moments.reads, {p.name: p for p in work.pieces if p.kind == "matrix"}

    def groups() -> dict[str, list[Piece]]:
        found: dict[str, list[Piece]] = {}
        for piece in left.values():
            found.setdefault(reads.get(piece.tensor, ""), []).append(piece)
        return found

    def reached(name: str, moment: Tensor) -> None:
        found = _reads(groups().get(name, []), moment, work.device)
        if found:
            use(found)
        for read in found:
            for piece in read.pieces:
                del left[piece.name]

    # what an earlier visit has not seen is wanted: nobody knows yet who reads it
    known = {name: bool(wanted(pieces)) for name, pieces in groups().items()}
    known |= {name: False for name in set(reads.values()) - known.keys()}
    work.moments.visit(reached, lambda name: known.get(name, True))
    unknown: dict[str, list[Piece]] = {}
    for piece in left.values():
        unknown.setdefault(piece.tensor, []).append(piece)
    for pieces in unknown.values():
        if wanted(pieces):
            use([Read([piece], None) for piece in pieces])


def _reads(pieces: list[Piece], moment: Tensor, device: torch.device) -> list[Read]:
    """The pieces by what they read of a group's moment.

    An expert that no token reached is taken to read all inputs alike, as much as the layer's experts do on average: its
    directions are those of the plain SVD.
    """
    if moment.ndim == 1 or not pieces:
        return []
    if moment.ndim == 2:
        return [Read(pieces, moment.to(device, torch.float32))]
    size = moment.diagonal(dim1=1, dim2=2).mean()
    found: dict[int, list[Piece]] = {}
    for piece in pieces:
        width = piece.shape[0 if piece.transposed else 1]
        if piece.expert is not None and width == moment.shape[-1]:
            found.setdefault(piece.expert, []).append(piece)
    return [
        Read(mine, _of_expert(moment[number], size).to(device, torch.float32))
        for number, mine in sorted(found.items())
    ]


def _of_expert(moment: Tensor, size: Tensor) -> Tensor:
    return moment if moment.diagonal().any() else size * torch.eye(len(moment)).to(moment)


def importance(piece: Piece, delta: Tensor, moments: Known) -> Callable[[slice], Tensor]:
    """What a squared unit of a table's entry costs in squared loss: a function of rows, broadcastable to them.

    For a head the second moment of each input; for an embedding how often its token is read; both times the mean
    square of the gradient at the output. For what is neither (the stacked matrices of experts, say) the average
    gradient of the layers that are. Without gradients every tensor's delta counts the same, and without any data
    every entry of every delta.
    """
    if not moments.outputs:
        one = torch.ones((), device=delta.device)
        squared = torch.linalg.vector_norm(delta, dtype=torch.float64).square()
        each = alike(squared[None]).to(delta) if moments.reads else one
        return lambda rows: each
    read, written = moments.diagonal(piece.name), moments.outputs.get(piece.name)
    if read is None or written is None or len(piece.shape) != 2:
        reads = torch.tensor(1.0) if read is None or len(read) > 1 else read.mean()
        slope = slope_of(moments, piece)
        scale = (reads.cpu() * (1.0 if slope is None else slope)).to(delta)
        return lambda rows: scale
    read, written = read.to(delta), written.to(delta)
    if len(read) > 1:
        read = foreseen(read)
    if len(read) == 1 and not piece.transposed:  # (out, in)
        return lambda rows: written[rows, None] * read
    by_row = read.T if len(read) == 1 else read
    head = moments.diagonal(piece.head) if piece.head else None
    if len(read) == 1 or head is None or piece.head is None:
        return lambda rows: by_row[rows] * written
    as_head, seen = moments.outputs[piece.head].to(delta), head.to(delta)
    return lambda rows: by_row[rows] * written + as_head[rows, None] * seen


def foreseen(frequencies: Tensor) -> Tensor:
    """How often rows are read by other text, those too that this text did not read.

    Rows that were not read are together read as often as those that were read once (Good 1953, after Turing), and each
    alike; the others so much less often. frequencies: (rows, 1), counts over their sum, of which the least is one.
    """
    seen = frequencies > 0
    if seen.all() or not seen.any():
        return frequencies
    once, unread = frequencies[seen].min(), int((~seen).sum())
    missing = once * (frequencies[seen] < 1.5 * once).sum() / frequencies.sum()
    # none of them more often than one that was read
    share = once * unread / frequencies.sum()
    missing = missing.minimum(share / (1 + share))
    others = missing * frequencies.sum() / unread
    return torch.where(seen, frequencies * (1 - missing), others)


def alike(energy: Tensor) -> Tensor:
    """The factor that makes the sum of these one."""
    return (1 / energy.sum(dtype=torch.float64).clamp_min(1e-300)).to(energy)


def slope_of(moments: Known, piece: Piece) -> Tensor | None:
    """Mean squared gradient at a tensor's output, float64; of one that is not known, the average of all."""
    if not moments.outputs:
        return None
    known = moments.outputs.get(piece.tensor)
    if known is None:
        return torch.stack([g.double().mean().cpu() for g in moments.outputs.values()]).mean()
    if known.ndim == 2 and piece.expert is not None:
        known = known[piece.expert]
    return known.double().mean().cpu()


Measured = Callable[[Piece, Spectrum, Tensor, Tensor | None], None]


def measure(work: Work, known: Callable[[str], bool], use: Measured) -> None:
    """Find the directions of every matrix, and call `use` with each, its delta (out, in) and what they are under.

    known: whether an earlier run has measured a matrix, which is then passed over.
    """
    matrices = [p for p in work.pieces if p.kind == "matrix"]
    total, done = sum(prod(p.shape) for p in matrices) or 1, 0

    def group(reads: list[Read]) -> None:
        nonlocal done
        for pieces, hessian in reads:
            under = work.under(hessian)
            for piece in pieces:
                if not known(piece.name):
                    delta = work.delta(piece)
                    use(piece, work.directions.find(piece.name, delta, under), delta, under)
            done += sum(prod(piece.shape) for piece in pieces)
        release()
        work.progress("measuring", done / total)

    visit(work, group, lambda pieces: not all(known(p.name) for p in pieces))
