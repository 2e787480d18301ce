"""Prompts as a user's turn in the chat template of a tokenizer."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from cl_graft.errors import CLGraftError
from cl_graft.task import Example, Pair, Scenario, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Templates of the Llama 3 family tell the model a date: that of today in Llama 3.2's, so that a run which is
# continued tomorrow would see other prompts. This is what they themselves say where there is no clock.
DATE = "26 Jul 2024"


class NoChatTemplate(CLGraftError):
    """A scenario asks for chat prompts, and the tokenizer cannot write one."""


def render(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The prompt as `user_turn` words it, so that `tokenizer(rendered)["input_ids"]` are the ids of
    `apply_chat_template(..., tokenize=True)`.

    Raises NoChatTemplate where the tokenizer has no template, or the two cannot be brought to agree.
    """
    owner = tokenizer.name_or_path or "this model"
    if not tokenizer.chat_template:
        raise NoChatTemplate(
            f"the tokenizer of {owner} has no chat template and the scenario's prompts are a user's turn; choose an "
            "instruction-tuned model."
        )
    whole, bare = user_turn(tokenizer, prompt)
    if tokenizer(bare)["input_ids"] != tokenizer(whole, add_special_tokens=False)["input_ids"]:
        raise NoChatTemplate(
            f"the tokenizer of {owner} adds tokens to a text that its chat template does not begin with; set "
            "add_bos_token and add_eos_token in its tokenizer_config.json to false."
        )
    return bare


def user_turn(tokenizer: PreTrainedTokenizerBase, prompt: str) -> tuple[str, str]:
    """The prompt as a user's turn, up to where the assistant's answer begins: as the template, which must be there,
    writes it, and without what `tokenizer(...)` puts before a text by itself (the beginning-of-sequence token)."""
    turn = [{"role": "user", "content": prompt}]
    whole = tokenizer.apply_chat_template(
        turn, tokenize=False, add_generation_prompt=True, date_string=DATE
    )
    added = tokenizer.decode(tokenizer("")["input_ids"])
    return whole, whole.removeprefix(added)


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

    def example(item: Example) -> Example:
        return replace(
            item,
            prompt=render(tokenizer, item.prompt),
            completion=_unspaced(item.completion),
            choices=tuple(map(_unspaced, item.choices)),
        )

    def pair(item: Pair) -> Pair:
        return replace(
            item,
            prompt=render(tokenizer, item.prompt),
            chosen=_unspaced(item.chosen),
            rejected=_unspaced(item.rejected),
        )

    def of(task: Task) -> Task:
        return replace(
            task,
            train=[example(e) for e in task.train],
            test=[example(e) for e in task.test],
            pairs=[pair(p) for p in task.pairs],
            validation=[example(e) for e in task.validation],
        )

    general = of(scenario.general) if scenario.general else None
    return replace(scenario, tasks=tuple(map(of, scenario.tasks)), general=general, chat=False)


def _unspaced(answer: str) -> str:
    """The answer without a single space at its start; more than one are an indentation, and stay."""
    return answer[1:] if answer[:1] == " " and answer[1:2].strip() else answer
