"""What sources say in words of the target, worked out by hand; which of them teaches; and the loss towards it."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cl_graft.models import embedded, mini_gpt2
from cl_graft.training.term import load, save
from cl_graft.transfer.align import texts
from cl_graft.transfer.fusion import (
    Taught,
    chosen,
    fused,
    penalty,
    rows_of,
    shares,
    tensors,
    term,
    translated,
)
from cl_graft.transfer.logits import Said

LN = math.log
INF = math.inf


def test_shares_are_of_those_with_a_word_and_the_likelier_of_two_counts() -> None:
    """Odds 8 : 4 : 2 : 1; the second has the first's word, the last none: 8 and 2 are left."""
    found = shares([5, 6, 7, 8], [LN(8), LN(4), LN(2), LN(1)], {5: 0, 6: 0, 7: 1})
    assert found == pytest.approx({0: 0.8, 1: 0.2})
    assert shares([8], [1.0], {}) == {}


SOURCE = ["41", "+", "n", "o", "<eos>"]
# at each of them two of the source's tokens, odds 3 : 1
SAID = [([1, 2], [LN(3), 0.0])] * 2 + [([1, 2], [LN(3), 0.0]), ([2, 3], [LN(3), 0.0])]
SAID.append(([9, 9], [LN(3), 0.0]))
TARGET, GOLD = ["4", "1", "+", "no", "<eos>"], [14, 11, 10, 12, 2]
BESIDE = [[0], [0], [1], [2, 3], [4]]
WORDS = {1: 10, 2: 20, 3: 30}


def test_fusellm_takes_over_what_is_said_of_the_same_token_and_else_the_answer() -> None:
    found = fused(SAID, BESIDE, SOURCE, TARGET, GOLD, WORDS)
    assert found[:2] == [{14: 1.0}, {11: 1.0}], "a part of a token"
    assert found[2] == pytest.approx({10: 0.75, 20: 0.25})
    assert found[3:] == [{12: 1.0}, {2: 1.0}], "two tokens for one; no word that the target has"


def test_fusechat_takes_parts_of_a_token_and_mixes_tokens_that_are_one() -> None:
    """`n` and `o` have lain beside `no` equally often: half of (3/4, 1/4) on 10 and 20, half of it on 20 and 30."""
    weight = {(place, gold): 5 for place in range(5) for gold in GOLD}
    found = fused(SAID, BESIDE, SOURCE, TARGET, GOLD, WORDS, weight)
    assert found[0] == found[1] == pytest.approx({10: 0.75, 20: 0.25})
    assert found[3] == pytest.approx({10: 0.375, 20: 0.5, 30: 0.125})
    weight[2, 12] = 5 + LN(3)  # softmax of counts: 3/4 and 1/4
    found = fused(SAID, BESIDE, SOURCE, TARGET, GOLD, WORDS, weight)
    assert found[3] == pytest.approx({10: 0.5625, 20: 0.375, 30: 0.0625})
    one = fused(SAID[:2], [[0, 1]], ["no", "+"], ["no"], [12], WORDS, {(0, 12): 1, (1, 12): 9})
    assert one[0] == pytest.approx({10: 0.75, 20: 0.25}), "of several that of the same text"


def test_a_sources_words_in_the_targets_vocabulary() -> None:
    """A source of bytes that is sure of `41` after `4`: the target, of the same digits, is taught its very odds."""
    gpt2, llama = mini_gpt2.tokenizer(), embedded.toy_tokenizer()
    tokens = [*gpt2("41", add_special_tokens=False)["input_ids"], gpt2.eos_token_id]
    spelt, mine = texts(gpt2), texts(llama)
    five, tom = spelt.index("5"), spelt.index("Tom")
    ids = torch.tensor([[tokens[0], five], [tokens[1], tom], [tokens[2], five]]).int()
    values = torch.tensor([[LN(3), 0.0]] * 3)
    rows = {"starts": torch.tensor([0, 3, 3]), "tokens": torch.tensor(tokens).int()}
    lost = torch.tensor([0.5, INF]).double()
    said = Said(**rows, ids=ids, logits=values, nll=lost, texts=dict(enumerate(spelt)))
    answers = [[*llama("41", add_special_tokens=False)["input_ids"], 2], [7, 2]]
    for statistics in (False, True):
        taught = translated(said, answers, mine, statistics)
        first, unread = taught.rows
        wanted = [[answers[0][0], mine.index("5")], [answers[0][1], mine.index("Tom")]]
        assert first[0][:2].tolist() == wanted
        torch.testing.assert_close(first[1], torch.tensor([[0.75, 0.25]] * 3))
        assert unread[0].tolist() == [[7], [2]] and taught.nll == [0.5, INF]


def taught(name: str, nll: list[float], token: int) -> Taught:
    return Taught(name, [tensors([{token: 1.0}])] * len(nll), nll)


def test_the_teacher_of_a_row_is_the_one_that_finds_it_likeliest() -> None:
    every = [taught("itself", [1.0, 2.0, 1.0, INF], 0), taught("other", [1.0, 0.5, INF, INF], 1)]
    assert chosen(every) == [0, 1, 0, 0], "of equal ones the first"
    assert [ids.item() for ids, _ in rows_of(every)] == [0, 1, 0, 0]


class Bias(torch.nn.Module):
    """A model whose next-token logits are its one parameter, whatever it reads."""

    def __init__(self, shares: list[float]):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.tensor(shares).log())


def batch(model: Bias, labels: list[list[int]], rows: list[int], tokens: int) -> tuple[Any, Any]:
    output = SimpleNamespace(logits=model.bias.expand(len(labels), len(labels[0]), -1))
    given = {"labels": torch.tensor(labels), "rows": torch.tensor(rows)}
    return {**given, "tokens": torch.tensor(float(tokens))}, output


def test_the_loss_is_nine_tenths_of_the_answers_and_one_of_the_fused() -> None:
    """The model says (1/2, 1/4, 1/4). Row 1 answers 1 and is taught (3/4, 1/4, 0); row 0 answers 0, 2 and is taught
    itself there: CE(answer) = (2 + 1 + 2) ln 2 / 3, CE(fused) = (3/4 1 + 1/4 2 + 1 + 2) ln 2 / 3."""
    made = term([tensors([{0: 1.0}, {2: 1.0}]), tensors([{0: 0.75, 1: 0.25}])], 0.1)
    model = Bias([0.5, 0.25, 0.25])
    given, output = batch(model, [[-100, -100, 1], [-100, 0, 2]], [1, 0], 3)
    found = penalty(model, given, output, dict(made.state), **made.options)
    plain = 5 * LN(2) / 3
    assert found["ce"].item() == pytest.approx(4.25 * LN(2) / 3) and not found["ce"].requires_grad
    whole = plain + found["pull"].item()
    assert whole == pytest.approx(0.9 * plain + 0.1 * 4.25 * LN(2) / 3)
    found["pull"].backward()  # of CE(fused) - CE(answer) by the logits: answer - fused
    torch.testing.assert_close(model.bias.grad, 0.1 * torch.tensor([-0.75, 0.75, 0.0]) / 3)


def test_a_pair_of_dpo_is_left_alone_and_the_term_is_found_again_by_name(tmp_path: Any) -> None:
    made = term([tensors([{0: 1.0}])], 0.1)
    model = Bias([0.5, 0.5])
    given, output = batch(model, [[-100, 1], [-100, 0]], [0, 0], 2)
    mask = torch.ones(2, 2)
    found = penalty(model, {**given, "completion_mask": mask}, output, dict(made.state), weight=0.1)
    assert found.item() == 0 and not found.requires_grad
    save([made], tmp_path / "terms")
    (back,) = load(tmp_path / "terms")
    assert back.digest == made.digest and made.name == "fusion"
