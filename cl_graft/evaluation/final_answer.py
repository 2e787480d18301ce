"""Where in a model's text its answer is: what it thought and what it went on to say are no part of it."""

from __future__ import annotations

import re

# A line by which a base model that never stops begins the next problem, and the tokens by which one ends a turn.
_NEXT = re.compile(
    r"^[#>*_\s]{0,6}(?:(?:next |new )?(?:question|problem|exercise)|q|human|user|### instruction)[*_]*:",
    re.IGNORECASE | re.MULTILINE,
)
_END = re.compile(r"<\|(?:im_end|endoftext|end|eot_id|end_of_text)\|>|</s>|<end_of_turn>")
# GSM8K's mark stands before a number; a heading of level 4 stands before words, or before "1." and words.
_MARK = re.compile(r"####[ \t]*(?=[-−$€£\\(*]*\.?\d)")
_HEADING = re.compile(r"^[ \t]*####[ \t]*\**\d+[.):]\**[ \t]+\S", re.MULTILINE)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(\{|[^\s{])")


def without_thinking(text: str) -> str:
    """The text without its `<think>` blocks: those that are closed, one whose start the template wrote, one cut off."""
    text = re.sub(r"(?s)<think(?:ing)?>.*?</think(?:ing)?>", "", text)
    text = re.split(r"</think(?:ing)?>", text)[-1]
    return re.split(r"<think(?:ing)?>", text, maxsplit=1)[0]


def first_answer(text: str) -> str:
    """The text up to the end of the first answer in it: without thinking, and without the next question.

    A question with no digit before it is this one, said again.
    """
    text = _END.split(without_thinking(text), maxsplit=1)[0]
    for line in _NEXT.finditer(text):
        if re.search(r"\d|\\boxed", text[: line.start()]):
            return text[: line.start()]
    return text


def last_box(text: str) -> str | None:
    """What is in the last `\\boxed{...}` whose braces are balanced; without braces it is one character."""
    for start in reversed(list(_BOX.finditer(text))):
        if start[1] != "{":
            return start[1]
        depth = 0
        for place in re.finditer(r"\\.|[{}]", text[start.end() - 1 :]):
            depth += {"{": 1, "}": -1}.get(place[0], 0)
            if not depth:
                return text[start.end() : start.end() - 1 + place.start()]
    return None


def marked(text: str) -> str | None:
    """Text of the line after GSM8K's mark `####`: the first that a number alone follows, or else the last.

    A heading of Markdown is no mark. Source: Cobbe et al. 2021, arXiv 2110.14168.
    """
    rests = [
        text[m.end() :].split("\n", 1)[0]
        for m in _MARK.finditer(text)
        if not _HEADING.match(text, text.rfind("\n", 0, m.start()) + 1)
    ]
    alone = (rest for rest in rests if not re.search(r"\d.*[^\W\d_]|####", rest))
    return next(alone, rests[-1] if rests else None)
