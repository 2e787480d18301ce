"""What a model says and how likely it finds a text: batches and caches must change nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers as hf

from cl_graft.evaluation import batches
from cl_graft.evaluation.generate import answers, choice_likelihoods, generate, log_likelihoods
from cl_graft.models.embedded import toy_tokenizer

PROMPTS = [
    "Q: Tom has 3 apples",
    "Q",
    "Q: Write f that adds 3 to x.\nA: ",
    "A: 1234567890 abcdefghijklmnopqrstuvwxyz",
    "Q: Ann has 3 bags with 4 eggs each. How many eggs?\nA: ",
    "",
]
COMPLETIONS = ["3+4=7. #### 7", "a", "def f(x): return x+3", "zz", "", "12"]
LONG = 512

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": LONG,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES: dict[str, Callable[..., Any]] = {
    "llama": lambda **k: hf.LlamaConfig(**SHAPE, num_key_value_heads=2, **k),
    "gemma2": lambda **k: hf.Gemma2Config(
        **SHAPE, num_key_value_heads=2, head_dim=8, sliding_window=6, **k
    ),
    "gpt2": lambda **k: hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=LONG, **k),
    "opt": lambda **k: hf.OPTConfig(
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        max_position_embeddings=LONG,
        **k,
    ),
}


@cache
def tokenizer() -> Any:
    return toy_tokenizer()


@cache
def model(family: str = "llama") -> Any:
    """Random, with weights large enough that its opinions are strong and depend on what it read."""
    torch.manual_seed(0)
    config = FAMILIES[family](vocab_size=len(tokenizer()), **SPECIAL)
    made = hf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    return made


@torch.no_grad()
def next_log_probabilities(family: str, ids: list[int]) -> torch.Tensor:
    return model(family)(input_ids=torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)


def one_by_one(head: list[int], tail: list[int], family: str = "llama") -> float:
    """The log-probability of `tail` after `head`, a forward pass a token, no padding, no cache."""
    return sum(
        next_log_probabilities(family, head + tail[:i])[token].item()
        for i, token in enumerate(tail)
    )


def parts(prompt: str, completion: str) -> tuple[list[int], list[int]]:
    tail = tokenizer()(completion, add_special_tokens=False)["input_ids"]
    return tokenizer()(prompt)["input_ids"], [*tail, tokenizer().eos_token_id]


# --- generate ---


@pytest.mark.parametrize("family", FAMILIES)
def test_batching_and_padding_do_not_change_greedy_answers(family: str) -> None:
    together = generate(model(family), tokenizer(), PROMPTS, 10)
    alone = [generate(model(family), tokenizer(), [prompt], 10)[0] for prompt in PROMPTS]
    assert together == alone
    assert len(set(together)) > 2 and any(together)


def test_greedy_takes_the_most_likely_token_each_time() -> None:
    for prompt in PROMPTS[:3]:
        ids = tokenizer()(prompt)["input_ids"]
        said: list[int] = []
        for _ in range(8):
            said.append(int(next_log_probabilities("llama", ids + said).argmax()))
            if said[-1] == tokenizer().eos_token_id:
                break
        wanted = tokenizer().decode(said, skip_special_tokens=True)
        assert generate(model(), tokenizer(), [prompt], 8) == [wanted]


def test_more_prompts_than_one_batch_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = generate(model(), tokenizer(), PROMPTS, 6)
    pairs = list(zip(PROMPTS, COMPLETIONS, strict=True))
    likely = log_likelihoods(model(), tokenizer(), pairs, LONG)
    chosen = choice_likelihoods(model(), tokenizer(), PROMPTS, ["a", "12"], LONG)
    monkeypatch.setattr(batches, "BATCH", 2)
    assert generate(model(), tokenizer(), PROMPTS, 6) == whole
    again = log_likelihoods(model(), tokenizer(), pairs, LONG)
    assert again == pytest.approx(likely, abs=1e-4)
    rows = choice_likelihoods(model(), tokenizer(), PROMPTS, ["a", "12"], LONG)
    assert sum(rows, []) == pytest.approx(sum(chosen, []), abs=1e-4)


def test_nothing_asked_is_nothing_answered() -> None:
    assert generate(model(), tokenizer(), [], 5) == []
    assert log_likelihoods(model(), tokenizer(), [], LONG) == []
    assert choice_likelihoods(model(), tokenizer(), [], ["a"], LONG) == []


def test_answers_stop_at_their_length() -> None:
    lengths = [generate(model(), tokenizer(), PROMPTS, n) for n in (1, 5, 12)]
    for short, longer, longest in zip(*lengths, strict=True):
        assert longest.startswith(longer) and longer.startswith(short)
    assert len(set(map(tuple, lengths))) == 3


def test_answers_stop_at_the_end_of_sequence() -> None:
    """Make a sign that the model says the mark of the end: no answer goes beyond it."""
    whole = generate(model(), tokenizer(), PROMPTS, 12)
    sign = next(c for c in "".join(whole) if c not in "".join(PROMPTS) and not c.isalpha())
    ending = toy_tokenizer()
    ending.eos_token = sign
    cut = generate(model(), ending, PROMPTS, 12)
    said = tokenizer().get_vocab()[sign]
    for prompt, answer, before in zip(PROMPTS, cut, whole, strict=True):
        ids = tokenizer()(prompt)["input_ids"]
        tokens: list[int] = []
        while len(tokens) < 12 and said not in tokens:
            tokens.append(int(next_log_probabilities("llama", ids + tokens).argmax()))
        assert answer == tokenizer().decode(tokens, skip_special_tokens=True)
        assert before.startswith(answer)
    assert cut != whole


def test_answers_stop_at_the_models_own_end_of_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chat model may end its turn by another token than the tokenizer's end-of-sequence (Gemma does)."""
    ids = tokenizer()(PROMPTS[0], return_tensors="pt")["input_ids"]
    first = int(model()(input_ids=ids).logits[0, -1].argmax())
    assert len(generate(model(), tokenizer(), PROMPTS[:1], 12)[0]) > len(tokenizer().decode(first))
    monkeypatch.setattr(model().generation_config, "eos_token_id", [2, first])
    assert generate(model(), tokenizer(), PROMPTS[:1], 12) == [tokenizer().decode(first)]


def test_sampling_is_reproducible_for_a_seed() -> None:
    def sampled(seed: int, temperature: float = 1.5) -> list[str]:
        return generate(model(), tokenizer(), PROMPTS * 4, 8, temperature, seed)

    first = sampled(3)
    torch.rand(7)  # whatever else drew in between
    assert sampled(3) == first
    assert sampled(4) != first
    assert len(set(first)) > len(PROMPTS)
    assert sampled(3, 1e-4) == generate(model(), tokenizer(), PROMPTS * 4, 8)


def test_sampling_follows_the_models_probabilities() -> None:
    """No hidden top-k or top-p: 4000 draws of one token, each frequency within 5 standard errors."""
    prompt = PROMPTS[0]
    drawn = generate(model(), tokenizer(), [prompt] * 4000, 1, temperature=4.0, seed=0)
    ids = tokenizer()(prompt)["input_ids"]
    likely = (next_log_probabilities("llama", ids) / 4.0).softmax(-1)
    for token in likely.topk(5).indices.tolist() + likely.topk(80).indices[60:].tolist():
        text, p = tokenizer().decode([token], skip_special_tokens=True), likely[token].item()
        if text:
            assert abs(drawn.count(text) / 4000 - p) < 5 * (p * (1 - p) / 4000) ** 0.5 + 1e-3


def test_generating_leaves_training_switches_to_the_trainer() -> None:
    """Dropout must be off while it answers, also right after training."""
    fresh = model().train()
    assert generate(fresh, tokenizer(), PROMPTS, 4) == generate(model(), tokenizer(), PROMPTS, 4)
    assert not fresh.training


# --- log_likelihoods ---


@pytest.mark.parametrize("family", FAMILIES)
def test_log_likelihoods_equal_a_token_by_token_loop(family: str) -> None:
    pairs = list(zip(PROMPTS, COMPLETIONS, strict=True))
    wanted = [one_by_one(*parts(*pair), family) for pair in pairs]
    assert log_likelihoods(model(family), tokenizer(), pairs, LONG) == pytest.approx(
        wanted, abs=1e-4
    )
    assert max(wanted) - min(wanted) > 10


def test_a_long_prompt_loses_its_start() -> None:
    pairs = [(prompt, "12") for prompt in PROMPTS]
    wanted = []
    for pair in pairs:
        head, tail = parts(*pair)
        wanted.append(one_by_one(head[-(9 - len(tail)) :], tail))
    assert log_likelihoods(model(), tokenizer(), pairs, 9) == pytest.approx(wanted, abs=1e-4)


def test_a_long_completion_loses_its_end() -> None:
    head, tail = parts("Q: x", "abcdefghij")
    (found,) = log_likelihoods(model(), tokenizer(), [("Q: x", "abcdefghij")], 6)
    assert found == pytest.approx(one_by_one(head[-1:], tail[:5]), abs=1e-4)


# --- choice_likelihoods ---

CHOICES = ["a", "abc", "3+4=7. #### 7", ""]


@pytest.mark.parametrize("family", FAMILIES)
def test_choices_are_as_likely_as_completions(family: str) -> None:
    rows = choice_likelihoods(model(family), tokenizer(), PROMPTS, CHOICES, LONG)
    assert [len(row) for row in rows] == [len(CHOICES)] * len(PROMPTS)
    pairs = [(prompt, choice) for prompt in PROMPTS for choice in CHOICES]
    flat = log_likelihoods(model(family), tokenizer(), pairs, LONG)
    assert sum(rows, []) == pytest.approx(flat, abs=1e-4)


def test_choices_of_one_length_are_cut_like_completions() -> None:
    choices = ["ab", "12", "zz"]
    rows = choice_likelihoods(model(), tokenizer(), PROMPTS, choices, 8)
    pairs = [(prompt, choice) for prompt in PROMPTS for choice in choices]
    flat = log_likelihoods(model(), tokenizer(), pairs, 8)
    assert sum(rows, []) == pytest.approx(flat, abs=1e-4)


@pytest.mark.parametrize("max_length", [4, 6, 12])
def test_choices_of_different_lengths_follow_the_same_words(max_length: int) -> None:
    """The room that the longest choice needs is taken from the prompt for all, so that they compare."""
    choices = ["a", "abc", "abcdefgh"]
    rows = choice_likelihoods(model(), tokenizer(), PROMPTS, choices, max_length)
    for prompt, row in zip(PROMPTS, rows, strict=True):
        tails = [parts(prompt, choice)[1][: max_length - 1] for choice in choices]
        head = parts(prompt, "")[0][-(max_length - max(map(len, tails))) :]
        assert row == pytest.approx([one_by_one(head, tail) for tail in tails], abs=1e-4)


def test_one_choice_does_not_colour_the_next() -> None:
    """Each continues from the prompt, not from the choice before it."""
    forward = choice_likelihoods(model(), tokenizer(), PROMPTS, CHOICES, LONG)
    backward = choice_likelihoods(model(), tokenizer(), PROMPTS, CHOICES[::-1], LONG)
    for one, two in zip(forward, backward, strict=True):
        assert one == pytest.approx(two[::-1], abs=1e-5)


def test_top_p_keeps_the_likeliest_tokens() -> None:
    """By default nothing is cut; a share that one token alone makes up is greedy."""
    greedy = generate(model(), tokenizer(), PROMPTS, 6)
    assert generate(model(), tokenizer(), PROMPTS, 6, 1.0, seed=3, top_p=1e-6) == greedy
    free = generate(model(), tokenizer(), PROMPTS, 6, 1.0, seed=3)
    assert generate(model(), tokenizer(), PROMPTS, 6, 1.0, seed=3, top_p=1.0) == free != greedy


def test_answers_tell_their_tokens_and_whether_they_ended() -> None:
    """Against generation one prompt at a time."""
    found = answers(model(), tokenizer(), PROMPTS, 12)
    assert [a.text for a in found] == generate(model(), tokenizer(), PROMPTS, 12)
    for prompt, answer in zip(PROMPTS, found, strict=True):
        ids = tokenizer()(prompt, return_tensors="pt")
        said = model().generate(**ids, max_new_tokens=12, do_sample=False, eos_token_id=2)
        new = said[0, ids["input_ids"].shape[1] :].tolist()
        assert answer.finished == (2 in new)
        assert answer.tokens == len(new) - (2 in new)
