"""What a refusal looks like: one sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cl_graft.errors import CLGraftError


def one_sentence(
    action: Callable[[], Any],
    kind: type[CLGraftError] = CLGraftError,
    ends: str | tuple[str, ...] = (".", "?"),
) -> str:
    """The sentence with which `action` is refused."""
    with pytest.raises(kind) as refused:
        action()
    message = str(refused.value)
    assert "\n" not in message and message.endswith(ends)
    return message


def refusal(kind: type[CLGraftError], action: Callable[[], Any], *words: str) -> None:
    """`action` is refused with exactly this class, in one sentence that has these words."""
    with pytest.raises(CLGraftError) as caught:
        action()
    assert type(caught.value) is kind
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message
    assert all(word in message for word in words), message
