"""KL to the base on a task's text: the number by hand and by brute force, what is drawn for it, and what is recalled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cl_graft.evaluation import divergence
from cl_graft.evaluation.batches import Room
from cl_graft.evaluation.divergence import MOST, Moved, both_ways, mean_per_token, measure, sample
from cl_graft.evaluation.examiner import Examiner, Group
from cl_graft.evaluation.outcomes import Outcomes
from cl_graft.models.text import encode
from cl_graft.skillpack.codecs.exact import exact
from cl_graft.skillpack.format.file import SkillPack
from cl_graft.skillpack.live.grafted import Grafted
from cl_graft.task import Example, Task, Training

TEXTS = [("1 + 1 =", "2"), ("say", "one and two and three"), ("a longer prompt: 7 * 6 =", "42")]


def task_of(texts: Sequence[tuple[str, str]], name: str = "sums") -> Task:
    return Task(name, (), tuple(Example(*pair) for pair in texts), "exact", training=Training())


def pack(model: Any, grafted: Grafted, name: str, scale: float, seed: int = 0) -> SkillPack:
    """A delta of every matrix, drawn at random."""
    rng = torch.Generator().manual_seed(seed)
    deltas = {
        n: exact(scale * torch.randn(p.shape, generator=rng))
        for n, p in model.named_parameters()
        if p.dim() == 2
    }
    return SkillPack(deltas, name, "drawn", {}, grafted.base)


@pytest.fixture
def examiner(nano: tuple[Any, Any], tmp_path: Path) -> Examiner:
    model, tokenizer = nano
    return Examiner(Grafted(model), tokenizer, Outcomes(tmp_path, "a cell"), False)


def brute(base: Any, tuned: Any, tokenizer: Any, text: tuple[str, str]) -> tuple[float, float, int]:
    """One example alone, without padding, a position and an entry of the vocabulary at a time."""
    head, tail = encode(tokenizer, *text, 512)
    with torch.no_grad():
        both = [
            m(torch.tensor([head + tail])).logits[0].double().softmax(-1) for m in (base, tuned)
        ]
    forward = reverse = 0.0
    for at in range(len(head) - 1, len(head) + len(tail) - 1):
        for p, q in zip(*(each[at].tolist() for each in both), strict=True):
            forward += p * math.log(p / q)
            reverse += q * math.log(q / p)
    return forward, reverse, len(tail)


# --- the number -------------------------------------------------------------------------------


def test_both_directions_by_hand() -> None:
    """Of (1/2, 1/2) to (1/4, 3/4): ln 2 / 2 + ln(2/3) / 2 forward, ln(1/2) / 4 + 3 ln(3/2) / 4 back; and none."""
    base = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log() + torch.tensor([[3.0], [-7.0]])
    tuned = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    forward, reverse = both_ways(base, tuned)
    assert forward.dtype == reverse.dtype == torch.float64
    by_hand = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert forward.tolist() == pytest.approx([by_hand, 0.0], abs=1e-6)
    by_hand = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert reverse.tolist() == pytest.approx([by_hand, 0.0], abs=1e-6)


@given(st.integers(0, 2**32), st.integers(2, 40), st.floats(0, 20))
def test_kl_is_never_negative_and_turns_with_the_models(seed: int, vocab: int, far: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    base, step = torch.randn(3, vocab, generator=rng), torch.randn(3, vocab, generator=rng)
    forward, reverse = both_ways(base, base + far * step)
    assert (forward >= -1e-12).all() and (reverse >= -1e-12).all()
    turned = both_ways(base + far * step, base)
    assert torch.equal(turned[0], reverse) and torch.equal(turned[1], forward)


def test_every_token_counts_alike_and_examples_are_what_is_independent() -> None:
    """1 nat over 2 tokens and 2 over 8: 0.3 a token; residuals of +0.4 and -0.4: sqrt(0.32 * 2) / 10 = 0.08."""
    told = mean_per_token([Moved(1.0, 2.0, 2), Moved(2.0, 8.0, 8)])
    assert told is not None
    assert (told["n"], told["tokens"]) == (2, 10)
    assert told["forward"] == pytest.approx({"value": 0.3, "stderr": 0.08})
    assert told["reverse"] == pytest.approx({"value": 1.0, "stderr": 0.0})


def test_what_cannot_be_told_is_unmeasured() -> None:
    assert mean_per_token([]) is None
    assert mean_per_token([Moved(math.nan, 1.0, 3), Moved(1.0, 1.0, 3)]) is None
    one = mean_per_token([Moved(1.0, 2.0, 4)])
    assert one is not None and one["forward"] == {"value": 0.25, "stderr": None}


@pytest.mark.parametrize("most", [None, Room(64, 1, 1, 1), Room(2, 1 << 20, 1 << 20, 1 << 20)])
def test_examples_against_two_models_by_brute_force(
    examiner: Examiner, most: Room | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one pass, an example at a time with the weights changed in between, and in batches."""
    if most:
        monkeypatch.setattr(divergence, "room", lambda model: most)
        monkeypatch.setattr(divergence, "HELD", 1)
        monkeypatch.setattr(divergence, "SLICE", 1)
    model, tokenizer = examiner.grafted.model, examiner.tokenizer
    before = deepcopy(model)
    group = Group([pack(model, examiner.grafted, "sums", 0.05)], range(3), 0)
    found = divergence.per_example(examiner, TEXTS, group, 512)
    for moved, text in zip(found, TEXTS, strict=True):
        assert moved == pytest.approx(brute(before, model, tokenizer, text), rel=1e-4)
        assert moved.forward > 1e-3


def test_the_base_has_not_moved_and_is_back_bit_for_bit(examiner: Examiner) -> None:
    model, task = examiner.grafted.model, task_of(TEXTS)
    before = {name: p.clone() for name, p in model.named_parameters()}
    told = measure(examiner, task, [Group([], range(3))], 1)
    assert told is not None
    assert told["forward"] == told["reverse"] == {"value": 0.0, "stderr": 0.0}
    measure(examiner, task, [Group([pack(model, examiner.grafted, "a", 0.1)], range(3))], 1)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_each_example_is_measured_by_what_answers_it(examiner: Examiner) -> None:
    """Two packs by a router's choice: the sums are those of each pack on its own examples."""
    grafted = examiner.grafted
    one, other = (pack(grafted.model, grafted, str(k), 0.05, seed=k) for k in range(2))
    mixed = measure(examiner, task_of(TEXTS), [Group([one], [0, 2], 0), Group([other], [1], 1)], 2)
    alone = [
        divergence.per_example(examiner, [TEXTS[i] for i in at], Group([p], at), 512)
        for p, at in ((one, [0, 2]), (other, [1]))
    ]
    assert mixed == mean_per_token([*alone[0], *alone[1]])


# --- what is drawn ----------------------------------------------------------------------------


def test_at_most_so_many_of_those_with_an_answer_and_always_the_same() -> None:
    texts = [(f"{k} + 1 =", "" if k % 5 == 0 else str(k + 1)) for k in range(200)]
    drawn = sample(task_of(texts))
    assert len(set(drawn)) == MOST and drawn == sorted(drawn) == sample(task_of(texts))
    assert not any(k % 5 == 0 for k in drawn)
    assert drawn != sample(task_of(texts, "differences"))
    assert sample(task_of(texts[:10])) == [1, 2, 3, 4, 6, 7, 8, 9]


def test_a_task_without_reference_answers_is_unmeasured(examiner: Examiner) -> None:
    assert measure(examiner, task_of([("1 + 1 =", "")]), [Group([], [0])], 1) is None


# --- what is recalled -------------------------------------------------------------------------


def test_the_same_weights_are_measured_once(
    examiner: Examiner, nano: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another cell with the same cache recalls it to the last digit, and measures what is other text or weights."""
    measured: list[int] = []
    per_example = divergence.per_example

    def counted(examiner: Examiner, pairs: Any, group: Group, max_length: int) -> Any:
        measured.append(len(pairs))
        return per_example(examiner, pairs, group, max_length)

    monkeypatch.setattr(divergence, "per_example", counted)
    kept = [pack(nano[0], examiner.grafted, "sums", 0.05, seed=k) for k in range(2)]
    groups = [[Group([each], range(3), 0)] for each in kept]
    first = measure(examiner, task_of(TEXTS), groups[0], 1)
    outcomes = Outcomes(examiner.outcomes.folder, "another cell")
    other = Examiner(examiner.grafted, examiner.tokenizer, outcomes, False)
    assert measure(other, task_of(TEXTS), groups[0], 2) == first
    assert measured == [3]
    measure(other, task_of(TEXTS[:2]), [Group([kept[0]], range(2), 0)], 2)
    assert measure(other, task_of(TEXTS), groups[1], 2) != first
    assert measured == [3, 2, 3]
    (file,) = [
        f for f in outcomes.folder.glob("divergences/*.jsonl") if '"a cell"' in f.read_text()
    ]
    file.write_text("\n".join(file.read_text().splitlines()[:-1]) + "\n")
    assert measure(other, task_of(TEXTS), groups[0], 2) == first, "a torn file is made anew"
    assert measured == [3, 2, 3, 3]
