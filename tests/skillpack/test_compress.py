"""One budget for all tensors: met from below, spent where it buys the most, the same after a kill."""

from __future__ import annotations

import pytest
import torch

from cl_graft.errors import OverBudget
from cl_graft.skillpack.codecs import decode, payload_bytes
from cl_graft.skillpack.compress.calibrate import Moments
from cl_graft.skillpack.compress.compress import compress
from cl_graft.skillpack.compress.policy import Adaptive, Paper
from cl_graft.skillpack.compress.work import ByteLimit, Piece, fetch, foreseen

SHAPES = {
    "embed.weight": ((96, 32), "embedding"),
    "q.weight": ((32, 32), "attention"),
    "k.weight": ((16, 32), "attention"),
    "up.weight": ((64, 32), "mlp"),
    "down.weight": ((32, 64), "mlp"),
    "experts": ((4, 16, 32), "mlp"),
    "norm.weight": ((32,), "norm"),
    "head.weight": ((96, 32), "head"),
}
READS = {"q.weight": "x", "k.weight": "x", "up.weight": "y", "down.weight": "z"}


def deltas(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        n: torch.randn(shape, generator=g) * torch.logspace(0, -1.5, shape[-1]) * 1e-2
        for n, (shape, _) in SHAPES.items()
    }


def pieces(found):
    return [
        Piece(
            n,
            tuple(x.shape),
            SHAPES[n][1],
            x.clone,
            matrix=(lambda i, x=x: x[i].clone()) if x.ndim == 3 else None,
        )
        for n, x in found.items()
    ]


def moments(gradients=True):
    g = torch.Generator().manual_seed(1)
    inputs = {}
    for name, width in (("x", 32), ("y", 32), ("z", 64), ("h", 32)):
        x = torch.randn(256, width, generator=g) * torch.logspace(0, -1, width)
        inputs[name] = x.T @ x / len(x)
    inputs["tokens"] = torch.rand(96, generator=g) / 96
    inputs["routed"] = torch.stack([n * inputs["x"] for n in (0.6, 0.3, 0.0, 0.1)])
    reads = {**READS, "head.weight": "h", "embed.weight": "tokens", "experts": "routed"}
    outputs = {}
    if gradients:
        outputs = {n: torch.full((SHAPES[n][0][0],), 1e-3) for n in READS}
        outputs |= {"head.weight": torch.full((96,), 1e-4), "embed.weight": torch.full((32,), 1e-3)}
        outputs["experts"] = torch.full((4, 16), 1e-3)
    return Moments(inputs, reads, outputs)


def within(limit):
    return ByteLimit(
        lambda specs: sum(payload_bytes(*s) for s in specs.values()), limit, f"{limit}B"
    )


WHOLE = 2 * sum(x.numel() for x in deltas().values())


@pytest.mark.parametrize(
    "policy", [Adaptive(), Paper(), Adaptive(layout="fast"), Adaptive(damping=0.3)]
)
@pytest.mark.parametrize("known", ["nothing", "inputs", "gradients"])
@pytest.mark.parametrize("share", [0.08, 0.3])
def test_the_budget_is_met_from_below(policy, known, share):
    known = {"nothing": Moments(), "inputs": moments(False), "gradients": moments()}[known]
    limit, store = int(share * WHOLE), {}
    specs = compress(pieces(deltas()), known, policy, within(limit), store)
    used = sum(payload_bytes(*fetch(store, name).spec) for name in specs)
    assert used <= limit
    if isinstance(policy, Adaptive):
        assert used >= (0.99 if policy.layout == "small" else 0.97) * limit
    assert list(specs) == [name for name in SHAPES if name in specs]  # in the order given
    assert specs["experts"][0] == ("sparse" if policy == Paper() else "coded_low_rank_stack")
    assert specs["norm.weight"][0] == ("dense" if policy == Paper() else "coded")


@pytest.mark.parametrize("share", [0.05, 0.1, 0.2, 0.4])
def test_a_matrix_alone_meets_it_within_a_hundredth(share):
    delta = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    limit, store = int(share * 2 * delta.numel()), {}
    specs = compress(
        [Piece("w", (256, 256), "mlp", delta.clone)], Moments(), Adaptive(), within(limit), store
    )
    assert 0.99 * limit <= payload_bytes(*specs["w"]) <= limit


def test_the_deltas_are_left_as_they_are():
    found, before = deltas(), deltas()
    own = [
        Piece(
            n,
            tuple(x.shape),
            SHAPES[n][1],
            lambda x=x: x,
            matrix=x.__getitem__ if x.ndim == 3 else None,
        )
        for n, x in found.items()
    ]
    for policy in (Adaptive(), Paper()):
        compress(own, moments(), policy, within(int(0.2 * WHOLE)), {})
    assert all(torch.equal(found[n], before[n]) for n in before)


def test_entries_of_embedding_and_head_are_kept_where_they_are_worth_it():
    known = moments()
    for name in ("embed.weight", "head.weight"):
        known.outputs[name] = 100 * known.outputs[name]
    store = {}
    compress(pieces(deltas()), known, Adaptive(), within(int(0.2 * WHOLE)), store)
    for name in ("embed.weight", "head.weight"):
        assert decode(fetch(store, name)).count_nonzero() > 100


def test_more_bytes_less_error():
    found, errors = deltas(), []
    for share in (0.05, 0.1, 0.2, 0.4):
        store = {}
        specs = compress(pieces(found), Moments(), Adaptive(), within(int(share * WHOLE)), store)
        rebuilt = {n: decode(fetch(store, n)) if n in specs else 0 * x for n, x in found.items()}
        errors.append(sum((found[n] - rebuilt[n]).square().sum().item() for n in found))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.2 * errors[0]


def test_bytes_go_to_the_matrix_whose_output_matters_more():
    first, last = moments(), moments()
    last.outputs["down.weight"] = 100 * last.outputs["down.weight"]
    used = []
    for known in (first, last):
        specs = compress(pieces(deltas()), known, Adaptive(), within(int(0.15 * WHOLE)), {})
        used.append(payload_bytes(*specs["down.weight"]))
    assert used[1] > used[0]


def test_a_budget_that_holds_nothing_is_refused():
    with pytest.raises(OverBudget, match="10B"):
        compress(pieces(deltas()), moments(), Adaptive(), within(10), {})
    with pytest.raises(OverBudget, match="lower the policy's"):
        compress(pieces(deltas()), moments(), Paper(rank=16, beta=1.0), within(2000), {})


class Mortal(dict):
    """A work store that dies after so many items."""

    def __init__(self, lives):
        super().__init__()
        self.lives = self.given = lives

    @property
    def used(self):
        return self.given - self.lives

    def __setitem__(self, key, item):
        if self.lives == 0:
            raise KeyboardInterrupt
        self.lives -= 1
        super().__setitem__(key, item)


@pytest.mark.parametrize("policy", [Adaptive(), Paper()])
def test_a_kill_at_any_point_changes_no_byte_and_finished_work_is_not_done_again(policy):
    whole = Mortal(1000)
    specs = compress(pieces(deltas()), moments(), policy, within(int(0.12 * WHOLE)), whole)
    for lives in [*range(0, whole.used, 2), whole.used - 1]:
        store = Mortal(lives)
        with pytest.raises(KeyboardInterrupt):
            compress(pieces(deltas()), moments(), policy, within(int(0.12 * WHOLE)), store)
        store.lives = whole.used
        again = compress(pieces(deltas()), moments(), policy, within(int(0.12 * WHOLE)), store)
        assert again == specs
        for name in specs:
            one, other = fetch(whole, name).parts, fetch(store, name).parts
            assert all(torch.equal(one[part], other[part]) for part in one)
    touched = []
    watched = [
        Piece(
            p.name,
            p.shape,
            p.role,
            lambda p=p: touched.append(p.name) or p.delta(),
            matrix=p.matrix and (lambda i, p=p: touched.append(p.name) or p.matrix(i)),
        )
        for p in pieces(deltas())
    ]
    compress(watched, moments(), policy, within(int(0.12 * WHOLE)), whole)
    assert not touched


@pytest.mark.parametrize("known", [moments(), Moments()], ids=["calibrated", "data-free"])
def test_a_budget_beyond_all_use_keeps_what_there_is_and_hardly_more(known):
    """Two ranks, as of an adapter, at as many bytes as nobody needs: the steps end where codes say everything."""
    g = torch.Generator().manual_seed(2)
    found = {
        name: torch.randn(rows, 2, generator=g) @ torch.randn(2, cols, generator=g)
        for name, ((rows, cols), _) in ((n, SHAPES[n]) for n in READS)
    }
    store = {}
    specs = compress(pieces(found), known, Adaptive(), within(10**6), store)
    for name, x in found.items():
        assert specs[name][2]["rank"] in (
            2,
            3,
        )  # the Gram matrix is float32, whose own noise may be a third
        assert (decode(fetch(store, name)) - x).norm() < 0.01 * x.norm()


def test_rows_that_were_not_read_are_foreseen_as_those_read_once():
    """Counts 8, 1, 1 and two rows of none: a fifth of all reading is of rows read once, and so of the other two."""
    few = torch.tensor([8.0, 1, 1, *[0] * 20])[:, None] / 10
    found = foreseen(few)[:, 0]
    assert torch.allclose(found, torch.tensor([0.64, 0.08, 0.08, *[0.01] * 20]))
    # never more often than what was read once
    two = foreseen(torch.tensor([8.0, 1, 1, 0, 0])[:, None] / 10)[:, 0]
    assert torch.allclose(two, torch.tensor([8.0, 1, 1, 1, 1]) / 12)
    alike = foreseen(torch.tensor([1.0, 1, 0, 0])[:, None] / 2)[:, 0]
    assert torch.allclose(alike, torch.full((4,), 0.25))
    assert torch.equal(foreseen(few[:3]), few[:3])
    assert torch.equal(foreseen(0 * few), 0 * few)


def test_a_row_that_calibration_did_not_read_is_kept_where_its_delta_is_large():
    """Half of the tokens of other text are new to the calibration text: what is added to them counts, too."""
    g = torch.Generator().manual_seed(4)
    delta = 1e-3 * torch.randn(400, 16, generator=g)
    delta[300:] *= 30
    read = torch.zeros(400)
    read[:40] = 1 / 40  # each once
    known = Moments({"e": read}, {"e": "e"}, {"e": torch.ones(16)})
    piece = Piece("e", (400, 16), "embedding", lambda: delta)
    store = {}
    compress([piece], known, Adaptive(), within(2000), store)
    kept = decode(fetch(store, "e"))
    assert (kept - delta).norm() < 0.5 * delta.norm()


def test_rows_of_a_head_that_are_never_the_answer_keep_what_they_share():
    """Tuning pushes all words down that it never wants to hear, along one direction: softmax feels them all."""
    g = torch.Generator().manual_seed(5)
    shared = torch.randn(1, 16, generator=g)
    delta = 0.3 * shared.expand(400, 16) + 0.01 * torch.randn(400, 16, generator=g)
    squares = torch.full((400,), 1e-12)
    squares[:8] = 0.1  # of the words that were to be said
    known = Moments({"x": torch.eye(16)}, {"h": "x"}, {"h": squares})
    store = {}
    compress([Piece("h", (400, 16), "head", lambda: delta)], known, Adaptive(), within(800), store)
    kept = decode(fetch(store, "h"))
    assert (kept - delta)[8:].norm() < 0.2 * delta[8:].norm()
