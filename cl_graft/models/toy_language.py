"""The embedded world: a small procedural language of questions and answers.

The `mini` scenario draws its tasks from here and the embedded models their pre-training text, so both
exist on any machine with no download. Every generator maps a `random.Random` to one item. A question belongs to one
part of the world, `part`: what is tested is asked nowhere else, whoever draws it, in whatever order and number.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal

Part = Literal["training", "validation", "test"]
PARTS: tuple[Part, ...] = ("test", "test", "validation") + ("training",) * 7

NAMES = ("Tom", "Ann", "Sam", "Mia", "Leo", "Eva", "Max", "Zoe")
THINGS = ("apples", "books", "coins", "cards", "pens", "eggs", "nuts", "cups")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Item:
    """A question, its full answer, and what a scorer needs: hidden `(call, expected)` tests."""

    question: str
    answer: str
    tests: tuple[tuple[str, str], ...] = ()


def math(rng: Random) -> Item:
    """A word problem with a worked answer that ends in `#### number`."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    a, b, c, d = rng.randint(2, 10), rng.randint(2, 9), rng.randint(2, 5), rng.randint(2, 9)
    kind = rng.randrange(5)
    if kind == 0:
        question = f"{name} has {a} {thing} and buys {b} more. How many {thing}?"
        answer = f"{a}+{b}={a + b}. #### {a + b}"
    elif kind == 1:
        question = f"{name} has {a + b} {thing} and gives away {b}. How many {thing} are left?"
        answer = f"{a + b}-{b}={a}. #### {a}"
    elif kind == 2:
        question = f"{name} has {c} bags with {d} {thing} each. How many {thing}?"
        answer = f"{c}*{d}={c * d}. #### {c * d}"
    elif kind == 3:
        question = (
            f"{name} has {c} bags with {d} {thing} each and finds {b} more. How many {thing}?"
        )
        answer = f"{c}*{d}={c * d}. {c * d}+{b}={c * d + b}. #### {c * d + b}"
    else:
        question = (
            f"{name} has {a} {thing}, buys {b} more and loses {c}. How many {thing} are left?"
        )
        answer = f"{a}+{b}={a + b}. {a + b}-{c}={a + b - c}. #### {a + b - c}"
    return Item(question, answer)


def code(rng: Random) -> Item:
    """A Python function asked for in a sentence, with hidden unit tests."""
    k, j = rng.randint(2, 99), rng.randint(2, 9)
    sentence, body, function = rng.choice(
        (
            (f"adds {k} to x", f"x+{k}", lambda x: x + k),
            (f"subtracts {k} from x", f"x-{k}", lambda x: x - k),
            (f"multiplies x by {k}", f"x*{k}", lambda x: x * k),
            (f"adds {k} to x and then multiplies by {j}", f"(x+{k})*{j}", lambda x: (x + k) * j),
            (f"multiplies x by {j} and then subtracts {k}", f"x*{j}-{k}", lambda x: x * j - k),
            (
                f"gives {k} if x is above {j} and else x",
                f"{k} if x>{j} else x",
                lambda x: k if x > j else x,
            ),
            (f"gives the bigger of x and {k}", f"max(x,{k})", lambda x: max(x, k)),
            (f"tells whether x is a multiple of {k}", f"x%{k}==0", lambda x: x % k == 0),
        )
    )
    inputs = sorted({0, 1, j, j + 1, k, rng.randint(21, 99), -rng.randint(1, 20)})
    tests = tuple((f"f({x})", repr(function(x))) for x in inputs)
    return Item(f"Write f that {sentence}.", f"def f(x): return {body}", tests)


def word(rng: Random) -> str:
    return "".join(rng.choice(LETTERS) for _ in range(rng.randint(2, 4)))


def cipher(rng: Random) -> Item:
    """A word to be shifted by one letter (z to a)."""
    text = word(rng)
    shifted = "".join(LETTERS[(LETTERS.index(c) + 1) % 26] for c in text)
    return Item(f"Shift {text} by one.", shifted)


def general(rng: Random) -> Item:
    """What the base model can do and nobody trains later: the general-ability set."""
    text, a, b = word(rng), rng.randint(0, 9), rng.randint(0, 9)
    return rng.choice(
        (
            Item(f"Copy {text}.", text),
            Item(f"First letter of {text}.", text[0]),
            Item(f"Last letter of {text}.", text[-1]),
            Item(f"Upper {text}.", text.upper()),
            Item(f"Bigger of {a} and {b}.", str(max(a, b))),
            Item(f"Smaller of {a} and {b}.", str(min(a, b))),
        )
    )


Source = Callable[[Random], Item]


def part(question: str) -> Part:
    """The part of the world that a question is of, by its digest: a fifth is for tests, a tenth for validation."""
    digest = hashlib.blake2b(question.encode(), digest_size=8).digest()
    return PARTS[int.from_bytes(digest) % len(PARTS)]


def training(source: Source, rng: Random) -> Item:
    """The source's next item whose question is neither for tests nor for validation."""
    while part((item := source(rng)).question) != "training":
        pass
    return item


def pretraining(rng: Random) -> Item:
    """The mixture the embedded model is pre-trained on: mostly general, a little of each task, nothing tested."""
    (source,) = rng.choices((general, math, code, cipher), weights=(62, 28, 4, 6))
    return training(source, rng)


def prompt(question: str) -> str:
    return f"Q: {question}\nA: "


def vocabulary() -> list[str]:
    """Every word of the world's fixed phrases, sorted; other text falls back to characters."""
    rng, words = Random(0), set[str]()
    for source in (math, code):
        for _ in range(400):
            item = source(rng)
            words.update(re.findall("[A-Za-z]{2,}", item.question + " " + item.answer))
    phrases = "Shift by one. Copy First Last letter of Upper Bigger Smaller and"
    return sorted(words | set(re.findall("[A-Za-z]{2,}", phrases)))
