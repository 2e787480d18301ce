"""Rows that leave, come and share what they begin with: answers and likelihoods are what one prompt alone gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as hf

from cl_graft.evaluation import batches, generate
from cl_graft.evaluation.batches import common, families, room
from cl_graft.evaluation.generate import answers, choice_likelihoods, log_likelihoods
from cl_graft.evaluation.rows import can_read
from cl_graft.skillpack.live.attach import Attached
from tests.evaluation.test_generate import (
    FAMILIES,
    LONG,
    PROMPTS,
    SHAPE,
    SPECIAL,
    model,
    one_by_one,
    parts,
    tokenizer,
)
from tests.routing.test_selection import two_packs

SHARED = "Q: How many eggs are in the bags of Ann and "
FEW_SHOT = [SHARED + rest for rest in ("Zoe?", "Tom? A: ", "Bob?\nA: ", "x", "x")]
MOST = 12

MORE = {
    "mistral": lambda **k: hf.MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=6, **k),
    "bloom": lambda **k: hf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, **k),
    "mpt": lambda **k: hf.MptConfig(d_model=32, n_layers=2, n_heads=4, max_seq_len=LONG, **k),
    "gpt_neo": lambda **k: hf.GPTNeoConfig(
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=6,
        max_position_embeddings=LONG,
        **k,
    ),
    "mamba": lambda **k: hf.MambaConfig(
        hidden_size=32, num_hidden_layers=2, state_size=4, use_mambapy=False, **k
    ),
    "jamba": lambda **k: hf.JambaConfig(
        **SHAPE,
        num_key_value_heads=2,
        num_experts=2,
        mamba_d_state=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        use_mamba_kernels=False,
        **k,
    ),
    "llama4": lambda **k: hf.Llama4TextConfig(
        **SHAPE,
        intermediate_size_mlp=48,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        attention_chunk_size=6,
        **k,
    ),
}


@pytest.fixture(scope="module", autouse=True)
def more_families() -> Iterator[None]:
    FAMILIES.update(MORE)
    yield
    for name in MORE:
        del FAMILIES[name]


@torch.no_grad()
def by_hand(family: str, prompt: str, ends: set[int], most: int = MOST) -> list[int]:
    """The likeliest token each time, a forward pass of the whole text a token: no batch, no padding, no cache."""
    ids, said = tokenizer()(prompt)["input_ids"] or [SPECIAL["bos_token_id"]], list[int]()
    while len(said) < most and not ends & set(said):
        logits = model(family)(input_ids=torch.tensor([ids + said])).logits[0, -1]
        said.append(int(logits.argmax()))
    return said


def mixed_ends(family: str, prompts: list[str]) -> set[int]:
    """Two tokens at which answers end after as many different lengths as can be."""
    said = [by_hand(family, prompt, {SPECIAL["eos_token_id"]}) for prompt in prompts]

    def lengths(ends: set[int]) -> int:
        return len({next((k for k, t in enumerate(row) if t in ends), MOST) for row in said})

    tokens, ends = sorted({token for row in said for token in row}), {SPECIAL["eos_token_id"]}
    for _ in range(2):
        ends |= {max(tokens, key=lambda token: lengths(ends | {token}))}
    return ends


def text(said: list[int]) -> str:
    return tokenizer().decode(said, skip_special_tokens=True)


@contextmanager
def ending_at(family: str, ends: set[int]) -> Iterator[None]:
    config = model(family).generation_config
    before, config.eos_token_id = config.eos_token_id, sorted(ends)
    try:
        yield
    finally:
        config.eos_token_id = before


@contextmanager
def passes(family: str = "llama") -> Iterator[list[tuple[int, int]]]:
    """(rows, tokens) of each forward pass meanwhile."""
    seen: list[tuple[int, int]] = []

    def see(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(tuple(kwargs["input_ids"].shape))

    handle = model(family).register_forward_pre_hook(see, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt", *MORE])
def test_answers_that_end_at_different_tokens_are_those_of_each_prompt_alone(family: str) -> None:
    """Windows, biases by distance and states included, whether rows can leave or not."""
    prompts = [*PROMPTS, *FEW_SHOT]
    ends = mixed_ends(family, prompts)
    wanted = [by_hand(family, prompt, ends) for prompt in prompts]
    assert len({len(said) for said in wanted}) > 1
    with ending_at(family, ends):
        found = answers(model(family), tokenizer(), prompts, MOST)
    assert [answer.text for answer in found] == [text(said) for said in wanted]
    assert [answer.finished for answer in found] == [bool(ends & set(said)) for said in wanted]
    assert can_read(model(family)) == (family not in ("mamba", "jamba", "llama4"))


@pytest.mark.parametrize("family", list(MORE))
def test_choices_of_other_architectures_are_as_likely_as_token_by_token(family: str) -> None:
    choices = ["a", "3+4=7. #### 7", ""]
    prompts = [*PROMPTS[:3], *FEW_SHOT]
    rows = choice_likelihoods(model(family), tokenizer(), prompts, choices, LONG)
    for prompt, row in zip(prompts, rows, strict=True):
        wanted = [one_by_one(*parts(prompt, choice), family) for choice in choices]
        assert row == pytest.approx(wanted, abs=2e-4)


def test_a_row_leaves_where_its_answer_ends() -> None:
    """Every token is computed once: rows of all steps together are the answers' tokens."""
    ends = mixed_ends("llama", PROMPTS)
    wanted = [len(by_hand("llama", p, ends)) for p in PROMPTS]
    with ending_at("llama", ends), passes() as seen:
        answers(model("llama"), tokenizer(), PROMPTS, MOST)
    steps = [rows for rows, tokens in seen if tokens == 1]
    assert sum(steps) == sum(wanted) < len(PROMPTS) * max(wanted)
    assert steps == sorted(steps, reverse=True) and len(steps) == max(wanted)


def test_the_next_prompt_takes_the_place_of_one_that_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "BATCH", 2)
    ends = mixed_ends("llama", PROMPTS)
    wanted = [by_hand("llama", p, ends) for p in PROMPTS]
    with ending_at("llama", ends), passes() as seen:
        found = answers(model("llama"), tokenizer(), PROMPTS, MOST)
    assert [answer.text for answer in found] == [text(said) for said in wanted]
    # with a step for each token of the longest answer of each two, there would be more
    steps = [rows for rows, tokens in seen if tokens == 1]
    lengths = [
        len(wanted[i])
        for i in sorted(range(len(PROMPTS)), key=lambda i: len(parts(PROMPTS[i], "")[0]))
    ]
    assert max(steps) == 2 and len(steps) < sum(map(max, lengths[::2], lengths[1::2]))


def test_answers_that_outgrow_the_room_are_read_again_and_go_on(monkeypatch) -> None:
    """Room for 180 slots, where six rows with their answers take 300."""
    wanted = [by_hand("llama", p, {2}, 40) for p in PROMPTS]
    slot = 2 * 2 * 2 * 8 * 4  # keys and values of two layers with two heads of eight float32
    small = batches.Room(64, 180 * slot, 64, 64)
    monkeypatch.setattr(generate.decode, "room", lambda model: small)
    held, plain = list[int](), generate.decode.Decoding._make_room

    def spied(self: Any) -> None:
        plain(self)
        held.append(self._rows.width * len(self._numbers))
        assert not self._numbers or self._rows.slot == slot

    monkeypatch.setattr(generate.decode.Decoding, "_make_room", spied)
    with passes() as seen:
        found = answers(model("llama"), tokenizer(), PROMPTS, 40)
    assert [answer.text for answer in found] == [text(said) for said in wanted]
    assert 150 < max(held) <= 180
    assert sum(rows for rows, tokens in seen if tokens > 1) > len(PROMPTS), "some are read again"


def test_what_prompts_begin_with_is_read_once() -> None:
    shared = common([tokenizer()(p)["input_ids"] for p in FEW_SHOT])
    assert shared >= 20
    alone = sum(len(tokenizer()(p)["input_ids"]) for p in FEW_SHOT)
    with passes() as seen:
        answers(model("llama"), tokenizer(), FEW_SHOT, 1)
    assert seen[0] == (1, shared)
    assert sum(rows * tokens for rows, tokens in seen) < alone / 2
    with passes() as seen:
        choice_likelihoods(model("llama"), tokenizer(), FEW_SHOT, ["a", "b", "12"], LONG)
    assert seen[0] == (1, shared) and len(seen) == 3, "the prefix, the prompts, the choices"


def test_texts_are_sorted_by_what_they_begin_with() -> None:
    head, other = list(range(9)), list(range(20, 30))
    texts = [[7], head + [5, 1], head + [5], other, head + [5, 2], head + [6, 1, 1], other]
    (alike, rest) = families(texts)
    assert (alike.members, alike.prefix) == ([2, 1, 4, 5], 9)
    assert (rest.members, rest.prefix) == ([0, 3, 6], 0), "two are too few"
    assert [family.prefix for family in families(texts, alike=False)] == [0]
    assert common([[1, 2, 3], [1, 2, 3]]) == 2, "a token is left to be read"
    assert families([]) == []


def test_rows_take_their_packs_along() -> None:
    """Prompts of three kinds mixed, some of whose answers end early, against one kind at a time."""
    made = model("llama")
    packs, prompts = two_packs(made), PROMPTS + FEW_SHOT
    choice = [(None, 0, 1)[i % 3] for i in range(len(prompts))]
    ends = mixed_ends("llama", prompts)
    pairs, wanted, likely = [(p, "3+4") for p in prompts], {}, {}
    with Attached(made, packs) as attached, ending_at("llama", ends):
        for kind in (None, 0, 1):
            attached.choose(kind)
            for i in (i for i, c in enumerate(choice) if c == kind):
                wanted[i] = answers(made, tokenizer(), [prompts[i]], MOST)[0]
                likely[i] = log_likelihoods(made, tokenizer(), [pairs[i]], LONG)[0]

        def told(rows: list[int]) -> None:
            attached.choose([choice[i] for i in rows])

        found = answers(made, tokenizer(), prompts, MOST, told=told)
        scores = log_likelihoods(made, tokenizer(), pairs, LONG, told=told)
    assert found == [wanted[i] for i in range(len(prompts))]
    assert len({answer.tokens for answer in found}) > 2
    assert scores == pytest.approx([likely[i] for i in range(len(prompts))], abs=1e-4)


def test_what_is_drawn_for_a_prompt_does_not_depend_on_the_others(monkeypatch) -> None:
    """Nor on the size of the batch; the same prompt twice is drawn for twice."""
    prompts = [PROMPTS[0]] * 3 + PROMPTS
    whole = answers(model("llama"), tokenizer(), prompts, 8, 1.5, seed=5)
    assert answers(model("llama"), tokenizer(), prompts[:4], 8, 1.5, seed=5) == whole[:4]
    assert len({answer.text for answer in whole[:3]}) == 3
    monkeypatch.setattr(batches, "BATCH", 2)
    assert answers(model("llama"), tokenizer(), prompts, 8, 1.5, seed=5) == whole


def test_a_share_of_no_probability_is_never_drawn() -> None:
    """Of logits whose third is -inf, at the ends of what may be drawn."""
    pick = generate.decode.drawn(2, 1, 0)
    scores = torch.tensor([[0.0, 0.0, -torch.inf], [-torch.inf, 0.0, -torch.inf]])
    for at, wanted in ((0.0, [0, 1]), (0.49, [0, 1]), (0.51, [1, 1]), (1.0, [1, 1])):
        pick.__closure__[0].cell_contents.fill_(at)  # type: ignore[index]
        assert pick(scores, [0, 1], [0, 0]).tolist() == wanted


def test_the_models_own_settings_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """A penalty on what was said, row by row; and beams, which are transformers' own."""
    config, ids = model("llama").generation_config, tokenizer()(PROMPTS[2], return_tensors="pt")
    plain = answers(model("llama"), tokenizer(), PROMPTS, MOST)
    for name, value in (("repetition_penalty", 3.0), ("num_beams", 3)):
        with monkeypatch.context() as patch:
            patch.setattr(config, name, value)
            found = answers(model("llama"), tokenizer(), PROMPTS, MOST)
            said = model("llama").generate(**ids, max_new_tokens=MOST, do_sample=False)
        assert found[2].text == text(said[0, ids["input_ids"].shape[1] :].tolist())
        assert found != plain


def test_the_head_is_taken_at_the_tokens_in_question_alone() -> None:
    """Of pairs with answers of one length: as many rows of logits as tokens, and one of each batch that is read."""
    pairs, seen = [(prompt, "abc") for prompt in PROMPTS], list[int]()
    handle = model("llama").lm_head.register_forward_hook(
        lambda module, args, output: seen.append(output.shape[0] * output.shape[1])
    )
    log_likelihoods(model("llama"), tokenizer(), pairs, LONG)
    handle.remove()
    assert seen == [len(PROMPTS), len(PROMPTS) * len(parts("", "abc")[1])]


def test_room_is_half_the_weights_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "FLOOR", 0)
    made = model("llama")
    weights, config = sum(p.nbytes for p in made.parameters()), made.config
    most = room(made)
    logits = most.logits * config.vocab_size * 4
    computed = most.tokens * batches.ACTIVE * config.hidden_size * 4
    assert 0.4 * weights < most.cache + logits + computed <= 0.5 * weights
    assert most.rows == batches.BATCH
