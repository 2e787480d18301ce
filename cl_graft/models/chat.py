"""Prompts as a user's turn in the chat template of a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from cl_graft.errors import CLGraftError
from cl_graft.task import Example, Pair, Scenario, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Templates of the Llama 3 family tell the model a date: that of today in Llama 3.2's, so that a run which is
# continued tomorrow would see other prompts. This is what they themselves say where there is no clock.
DATE = "26 Jul 2024"


Asking = TypeVar("Asking", Example, Pair)


class NoChatTemplate(CLGraftError):
    """A scenario asks for chat prompts, and the tokenizer cannot write one."""


def render(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[str]:
    """The prompts as `user_turn` words them, so that `tokenizer(rendered)["input_ids"]` are the ids of
    `apply_chat_template(..., tokenize=True)`.

    Raises NoChatTemplate where the tokenizer has no template, or the two cannot be brought to agree.
    """
    owner = tokenizer.name_or_path or "this model"
    if not tokenizer.chat_template:
        raise NoChatTemplate(
            f"the tokenizer of {owner} has no chat template and the scenario's prompts are a user's turn; choose an "
            "instruction-tuned model."
        )
    own = tokenizer("")["input_ids"]
    begin = tokenizer.decode(own)
    turns = [_user_turn(tokenizer, prompt, begin) for prompt in prompts]
    whole, bare = [turn for turn, _ in turns], [text for _, text in turns]
    if own and turns:  # else the two are one text, to which nothing is added
        ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
        if tokenizer(bare)["input_ids"] != ids:
            raise NoChatTemplate(
                f"the tokenizer of {owner} adds tokens to a text that its chat template does not begin with; set "
                "add_bos_token and add_eos_token in its tokenizer_config.json to false."
            )
    return bare


def user_turn(tokenizer: PreTrainedTokenizerBase, prompt: str) -> tuple[str, str]:
    """The prompt as a user's turn, up to where the assistant's answer begins: as the template, which must be there,
    writes it, and without what `tokenizer(...)` puts before a text by itself (the beginning-of-sequence token)."""
    return _user_turn(tokenizer, prompt, tokenizer.decode(tokenizer("")["input_ids"]))


def _user_turn(tokenizer: PreTrainedTokenizerBase, prompt: str, begin: str) -> tuple[str, str]:
    turn = [{"role": "user", "content": prompt}]
    whole = tokenizer.apply_chat_template(
        turn, tokenize=False, add_generation_prompt=True, date_string=DATE
    )
    return whole, whole.removeprefix(begin)


def added(tokenizer: PreTrainedTokenizerBase, prompt: str, text: str) -> str:
    """The prompt with more text behind it: within the user's turn where the prompt is one that `render` made."""
    if tokenizer.chat_template:
        words = "words"
        end = user_turn(tokenizer, words)[1].rpartition(words)[2]
        if end and prompt.endswith(end):
            return prompt.removesuffix(end) + text + end
    return prompt + text


def is_chat(tokenizer: PreTrainedTokenizerBase, chat: bool | None) -> bool:
    """Whether prompts are a user's turn to this tokenizer's model. chat: what was said of it; None: by its template."""
    return bool(tokenizer.chat_template) if chat is None else chat


def end_turns(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the token that ends an assistant's turn in the chat template the tokenizer's end of sequence.

    Answers are closed by it where they are trained and where they are read, and generation stops there. It is the
    first special token behind the answer: with Gemma's instruction-tuned models another than what their tokenizers
    call the end of sequence, which they then never learn to stop by (axolotl's issue 3754).
    """
    words = "words"
    turns = [{"role": "user", "content": words}, {"role": "assistant", "content": words}]
    text = str(tokenizer.apply_chat_template(turns, tokenize=False, date_string=DATE))
    ids = tokenizer(text.rpartition(words)[2], add_special_tokens=False)["input_ids"]
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    end = next((number for number in ids if number in special), None)
    if end is not None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)


def told(tokenizer: PreTrainedTokenizerBase) -> str:
    """A sentence that says what the chat template puts around a prompt, its system prompt with it."""
    before, after = user_turn(tokenizer, "PROMPT")[1].split("PROMPT")
    return (
        f"prompts are a user's turn in the model's chat template: {before!r}, the prompt, {after!r}"
    )


def rendered(scenario: Scenario, tokenizer: PreTrainedTokenizerBase) -> Scenario:
    """The scenario with every prompt rendered, where `is_chat`; else as it is.

    A space that an answer begins with, as behind `Answer:`, is left out: it begins a turn of its own.
    """
    if not is_chat(tokenizer, scenario.chat):
        return scenario

    def turns(items: Sequence[Asking], answers: Callable[[Asking], dict[str, Any]]) -> list[Asking]:
        prompts = render(tokenizer, [item.prompt for item in items])
        return [
            replace(item, prompt=prompt, **answers(item))
            for item, prompt in zip(items, prompts, strict=True)
        ]

    def examples(items: Sequence[Example]) -> list[Example]:
        return turns(
            items,
            lambda e: {
                "completion": _unspaced(e.completion),
                "choices": tuple(map(_unspaced, e.choices)),
            },
        )

    def pairs(items: Sequence[Pair]) -> list[Pair]:
        return turns(
            items, lambda p: {"chosen": _unspaced(p.chosen), "rejected": _unspaced(p.rejected)}
        )

    def of(task: Task) -> Task:
        return replace(
            task,
            train=examples(task.train),
            test=examples(task.test),
            pairs=pairs(task.pairs),
            validation=examples(task.validation),
        )

    general = of(scenario.general) if scenario.general else None
    return replace(scenario, tasks=tuple(map(of, scenario.tasks)), general=general, chat=False)


def _unspaced(answer: str) -> str:
    """The answer without a single space at its start; more than one are an indentation, and stay."""
    return answer[1:] if answer[:1] == " " and answer[1:2].strip() else answer
