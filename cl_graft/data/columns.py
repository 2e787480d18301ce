"""What columns of training data hold: text, or messages in the forms of TRL and of ultrafeedback_binarized.

TRL's conversational rows have messages in every column, or in all but the prompt, which is then in them; those of
ultrafeedback_binarized have the prompt as text besides. A list of messages in a text's place would be trained on as
brackets and quotes, and a number or a null as its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cl_graft.task import Example, Pair

ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's words

Columns = Mapping[str, Any]
Turn = tuple[str, str]  # role and text


class Misread(ValueError):
    """A row that is none: how it goes on after the words "line 3 of FILE"."""


def example(row: Columns) -> Example:
    """`prompt` and `completion`. Raises Misread."""
    before, answer = _answer(row, "completion")
    return Example(_asked(row, {"completion": before}), answer)


def pair(row: Columns) -> Pair:
    """`chosen` and `rejected`, and `prompt` where it is not in them. Raises Misread."""
    begun, chosen = _answer(row, "chosen")
    again, rejected = _answer(row, "rejected")
    return Pair(_asked(row, {"chosen": begun, "rejected": again}), chosen, rejected)


def _asked(row: Columns, before: Mapping[str, str | None]) -> str:
    """The one question: the column `prompt`, and what answers' columns hold before the answer."""
    told = {column: asked for column, asked in before.items() if asked is not None}
    if "prompt" in row or len(told) < len(before):
        told["prompt"] = _question(row)
    prompt = told.get("prompt", next(iter(told.values())))
    for column, asked in told.items():
        if asked.strip() != prompt.strip():
            raise Misread(
                f"asks {asked[:60]!r} in column {column!r} and {prompt[:60]!r} elsewhere; write the same question."
            )
    return prompt


def _question(row: Columns) -> str:
    value = _value(row, "prompt")
    return value if isinstance(value, str) else _only_user(value, "prompt")


def _answer(row: Columns, column: str) -> tuple[str | None, str]:
    """What was asked, if that is in the column, too, and the answer: the last assistant's turn."""
    value = _value(row, column)
    if isinstance(value, str):
        return None, value
    *before, (role, answer) = value
    if role != "assistant":
        raise Misread(
            f"ends in a turn of {role!r} in column {column!r}; the last turn there is the assistant's answer."
        )
    return _only_user(before, column) if before else None, answer


def _only_user(turns: list[Turn], column: str) -> str:
    if [role for role, _ in turns] != ["user"]:
        roles = ", ".join(role for role, _ in turns) or "no turn"
        raise Misread(
            f"asks by turns of {roles} in column {column!r}; a prompt is one turn of the user: join or cut them."
        )
    return turns[0][1]


def _value(row: Columns, column: str) -> str | list[Turn]:
    """The text of a column, or its messages."""
    if column not in row:
        raise Misread(f"has no column {column!r}; its columns are {', '.join(row)}.")
    value = row[column]
    if isinstance(value, list) and value:
        return [_turn(message, column) for message in value]
    return _text(value, column)


def _turn(message: Any, column: str) -> Turn:
    if isinstance(message, Mapping):
        role = message.get("role") or message.get("from")
        if isinstance(role, str):
            content = message["content"] if "content" in message else message.get("value")
            return ROLES.get(role, role), _text(content, column)
    raise Misread(
        f"has a list of {type(message).__name__} in column {column!r}; write text there, or messages with role and "
        "content."
    )


def _text(value: Any, column: str) -> str:
    if value is None or isinstance(value, str) and not value.strip() or value == []:
        raise Misread(f"has nothing in column {column!r}; fill it or remove the row.")
    if not isinstance(value, str):
        raise Misread(f"has {type(value).__name__} in column {column!r}; write text there.")
    return value
