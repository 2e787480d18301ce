"""Porter's stemmer (1980, An algorithm for suffix stripping, Program 14) with the extensions that are NLTK's default.

rouge-score and Tk-Instruct's evaluation stem by it, so published figures of ROUGE-L rest on its every rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache

Rule = tuple[str, str, Callable[[str], bool]]  # suffix, what takes its place, and for which stems

IRREGULAR = {
    **{"sky": "sky", "skies": "sky", "dying": "die", "lying": "lie", "tying": "tie"},
    **{"news": "news", "innings": "inning", "inning": "inning", "outings": "outing"},
    **{"outing": "outing", "cannings": "canning", "canning": "canning", "howe": "howe"},
    **{"proceed": "proceed", "exceed": "exceed", "succeed": "succeed"},
}
SECOND = {
    **{"ational": "ate", "tional": "tion", "enci": "ence", "anci": "ance", "izer": "ize"},
    **{"bli": "ble", "alli": "al", "entli": "ent", "eli": "e", "ousli": "ous", "ization": "ize"},
    **{"ation": "ate", "ator": "ate", "alism": "al", "iveness": "ive", "fulness": "ful"},
    **{"ousness": "ous", "aliti": "al", "iviti": "ive", "biliti": "ble", "fulli": "ful"},
}
THIRD = {
    **{"icate": "ic", "ative": "", "alize": "al", "iciti": "ic", "ical": "ic", "ful": ""},
    **{"ness": ""},
}
FOURTH = (
    *("al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent"),
    *("ou", "ism", "ate", "iti", "ous", "ive", "ize"),
)


@lru_cache(maxsize=65_536)
def stem(word: str) -> str:
    """Stem of a word in small letters."""
    if word in IRREGULAR or len(word) <= 2:
        return IRREGULAR.get(word, word)
    word = _first_c(_first_b(_first_a(word)))
    word = _second(word)
    word = _replaced(word, [(suffix, by, _some) for suffix, by in THIRD.items()])
    return _fifth(_replaced(word, [*((s, "", _many) for s in FOURTH[:11]), *_ION, *_LAST]))


def _consonant(word: str, place: int) -> bool:
    if word[place] == "y":
        return place == 0 or not _consonant(word, place - 1)
    return word[place] not in "aeiou"


def _measure(word: str) -> int:
    """Number of changes from a vowel to a consonant: Porter's m."""
    kinds = [_consonant(word, place) for place in range(len(word))]
    return sum(later and not sooner for sooner, later in zip(kinds, kinds[1:], strict=False))


def _some(word: str) -> bool:
    return _measure(word) > 0


def _many(word: str) -> bool:
    return _measure(word) > 1


def _vowel(word: str) -> bool:
    return not all(_consonant(word, place) for place in range(len(word)))


def _doubled(word: str) -> bool:
    return len(word) > 1 and word[-1] == word[-2] and _consonant(word, len(word) - 1)


def _short(word: str) -> bool:
    """Whether it ends in consonant, vowel, consonant other than w, x, y; NLTK's also has vowel and consonant alone."""
    kinds = [_consonant(word, place) for place in range(len(word))]
    return (kinds[-3:] == [True, False, True] and word[-1] not in "wxy") or kinds == [False, True]


def _replaced(word: str, rules: Iterable[Rule]) -> str:
    """The word by the first rule whose suffix it has; as it is where the stem is none of that rule's."""
    for suffix, by, fits in rules:
        if word.endswith(suffix):
            start = word.removesuffix(suffix)
            return start + by if fits(start) else word
    return word


_ION: list[Rule] = [("ion", "", lambda start: _many(start) and start[-1] in "st")]
_LAST: list[Rule] = [(suffix, "", _many) for suffix in FOURTH[11:]]


def _first_a(word: str) -> str:
    if word.endswith("ies") and len(word) == 4:
        return word[:-1]
    plain = [("sses", "ss"), ("ies", "i"), ("ss", "ss"), ("s", "")]
    return _replaced(word, [(suffix, by, lambda _: True) for suffix, by in plain])


def _first_b(word: str) -> str:
    if word.endswith("ied"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("eed"):
        return word[:-1] if _some(word[:-3]) else word
    start = word.removesuffix("ed") if word.endswith("ed") else word.removesuffix("ing")
    if start == word or not _vowel(start):
        return word
    if start.endswith(("at", "bl", "iz")):
        return start + "e"
    if _doubled(start):
        return start if start[-1] in "lsz" else start[:-1]
    return start + "e" if _measure(start) == 1 and _short(start) else start


def _first_c(word: str) -> str:
    mend = word.endswith("y") and len(word) > 2 and _consonant(word, len(word) - 2)
    return word[:-1] + "i" if mend else word


def _second(word: str) -> str:
    if word.endswith("alli") and _some(word[:-4]):
        return _second(word[:-2])
    if word.endswith("logi"):
        return word[:-1] if _some(word[:-3]) else word
    return _replaced(word, [(suffix, by, _some) for suffix, by in SECOND.items()])


def _fifth(word: str) -> str:
    if word.endswith("e"):
        start = word[:-1]
        if _many(start) or (_measure(start) == 1 and not _short(start)):
            word = start
    return word[:-1] if word.endswith("ll") and _many(word[:-1]) else word
