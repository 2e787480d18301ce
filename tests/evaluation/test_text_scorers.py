"""Scores of texts beside a reference: worked by hand, by brute force, and against the libraries that define them."""

from __future__ import annotations

import json
from itertools import combinations
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cl_graft.errors import CLGraftError
from cl_graft.evaluation.porter import stem
from cl_graft.evaluation.scorers import Examinee, resolved, score
from cl_graft.evaluation.scorers.sari import similarity, tokens
from cl_graft.evaluation.sequences import common
from cl_graft.task import Example, Scenario, Scoring, Task
from tests.real import DATA, needs_data


def scored(metric: str, answer: str, reference: str, prompt: str = "", **options: object) -> float:
    given = Examinee(None, None, 32, 128, given=[answer])  # type: ignore[arg-type]
    scoring = Scoring(metric, options, "it")
    return score(given, [Example(prompt, reference)], [scoring])["it"][0].score


# --- longest common subsequences ---


@given(st.text("abc", max_size=8), st.text("abc", max_size=8))
def test_common_subsequences_by_listing_them_all(a: str, b: str) -> None:
    def parts(text: str) -> set[tuple[str, ...]]:
        return {p for n in range(len(text) + 1) for p in combinations(text, n)}

    assert common(a, b) == max(len(p) for p in parts(a) & parts(b))


# --- ROUGE-L ---


def test_rouge_l_worked_by_hand() -> None:
    """Lin 2004, section 3.1: police kill the gunman has two words in order, the gunman kill police as well."""
    reference = "police killed the gunman"
    assert scored("rouge_l", "police kill the gunman", reference, stem=False) == 3 / 4
    assert scored("rouge_l", "police kill the gunman", reference) == 1  # killed is kill
    assert scored("rouge_l", "the gunman kill police", reference, stem=False) == 2 / 4
    assert scored("rouge_l", "Gunman!", reference) == pytest.approx(2 * 1 / 5)


@pytest.mark.parametrize("answer", ["", " \n", "?!", "ä ß"])
def test_an_answer_without_a_word_is_nothing(answer: str) -> None:
    assert scored("rouge_l", answer, "a word") == 0 == scored("rouge_l", "a word", answer)


@pytest.mark.parametrize(
    ("word", "root"),
    [
        ("caresses", "caress"),
        ("ponies", "poni"),
        ("dies", "die"),
        ("agreed", "agre"),
        ("hopping", "hop"),
        ("falling", "fall"),
        ("filing", "file"),
        ("happy", "happi"),
        ("enjoy", "enjoy"),
        ("relational", "relat"),
        ("electriciti", "electr"),
        ("adoption", "adopt"),
        ("communism", "commun"),
        ("controll", "control"),
        ("rate", "rate"),
        ("cease", "ceas"),
        ("skies", "sky"),
        ("as", "as"),
    ],
)
def test_stems_of_the_paper(word: str, root: str) -> None:
    """Porter's own examples, and what NLTK does otherwise: dies, enjoy, skies, words of two letters."""
    assert stem(word) == root


TEXTS = [
    "The cats were sitting on the mats, happily purring.",
    "3,000.5 species; about 95% (of them) are currently-accepted!",
    'He said: "no" & left. Über-groß, naïve 1-2 x_y',
    "a",
    "organizational operations conditionally rationalised the ponies",
]


def pairs() -> list[tuple[str, str]]:
    texts = list(TEXTS)
    rng = Random(0)
    for text in TEXTS:
        words = text.split()
        rng.shuffle(words)
        texts += [" ".join(words), text[: len(text) // 2 + 1]]
    return [(a, b) for a in texts for b in texts]


def test_rouge_score_says_the_same() -> None:
    """rouge-score 0.1.2, with and without stems."""
    peer = pytest.importorskip("rouge_score.rouge_scorer")
    for stems in (True, False):
        theirs = peer.RougeScorer(["rougeL"], use_stemmer=stems)
        for answer, reference in pairs():
            wanted = theirs.score(reference, answer)["rougeL"].fmeasure
            assert scored("rouge_l", answer, reference, stem=stems) == pytest.approx(wanted)


@needs_data("superni")
def test_nltk_stems_the_words_of_real_texts_alike() -> None:
    peer = pytest.importorskip("nltk.stem.porter").PorterStemmer()
    texts = (file.read_text("utf-8").lower() for file in (DATA / "superni").glob("*/test.json"))
    for word in {word for text in texts for word in text.split() if word.isalnum()}:
        assert stem(word) == peer.stem(word)


# --- edit similarity ---


def test_edit_similarity_worked_by_hand() -> None:
    """`return x` and `return y` have 7 characters of 8 and 8 in common."""
    assert scored("edit_similarity", "return x", "return y") == 14 / 16
    assert scored("edit_similarity", "abcd", "bcda") == 6 / 8
    assert scored("edit_similarity", "", "x") == 0
    assert scored("edit_similarity", " x = 1\n", "x = 1") == 1


def test_literals_of_py150_are_written_out() -> None:
    reference = "open ( <STR_LIT:data> , <NUM_LIT> , <STR_LIT> )"
    assert scored("edit_similarity", "open ( data , 0 ,  )", reference) == 1


def test_difflib_is_another_similarity() -> None:
    """It takes the longest block first, and so misses what a longest common subsequence has."""
    answer, reference = "xyza1b2c3d4", "a_b_c_d_xyz"
    found = {r: scored("edit_similarity", answer, reference, ratio=r) for r in ("indel", "difflib")}
    assert found == {"indel": 8 / 22, "difflib": 6 / 22}


def test_difflib_begins_no_match_with_common_characters_of_long_references() -> None:
    """From 200 characters on: what fuzzywuzzy 0.18.0 without python-Levenshtein rounds to 77 and 57, with it to 77 and 77."""
    for lines, difflib in ((6, 77), (7, 57)):
        reference = "".join(f"    total_{i} = values[{i}] * rate\n" for i in range(lines))
        answer = reference.replace("total", "sum").replace("rate", "factor")
        for ratio, wanted in (("indel", 77), ("difflib", difflib)):
            found = scored("edit_similarity", answer, reference, ratio=ratio)
            assert found == pytest.approx(wanted / 100, abs=0.01), (lines, ratio)


def test_rapidfuzz_says_the_same() -> None:
    peer = pytest.importorskip("rapidfuzz.fuzz")
    for answer, reference in pairs():
        wanted = peer.ratio(answer.strip(), reference.strip()) / 100
        assert scored("edit_similarity", answer, reference) == pytest.approx(wanted)


# --- SARI ---


def test_sari_worked_by_hand() -> None:
    """Source `a b`, reference `a c`; triples are keep, delete, add.

    The reference itself is all right. A copy: words 2/3 (half of what it kept, all that was to be kept), 1, 0; pairs
    0, 1, 0; longer ones, of which there are none, 1, 1, 1 twice: 26/3 of 12.
    """
    assert scored("sari", "a c", "a c", prompt="a b") == 1
    assert scored("sari", "a b", "a c", prompt="a b") == pytest.approx(26 / 36)


def test_sari_of_the_published_example() -> None:
    """The card of the metric in Hugging Face's evaluate has 26.953601953601954 for it."""
    found = similarity(
        "About 95 species are currently accepted .",
        "About 95 you now get in .",
        [
            "About 95 species are currently known .",
            "About 95 species are now accepted .",
            "95 species are now accepted .",
        ],
    )
    assert 100 * found == pytest.approx(26.953601953601954, rel=1e-12)


def test_an_empty_answer_has_a_sari() -> None:
    """It has deleted all: the words that were to go, and none that was to stay."""
    assert 0 < scored("sari", "", "a c", prompt="a b") < scored("sari", "a", "a c", prompt="a b")


@pytest.mark.parametrize(
    "text", [*TEXTS, "&quot;A&amp;B&quot; &lt;x&gt;", "line-\nbreak\nhere", ""]
)
def test_sacrebleu_parts_words_alike(text: str) -> None:
    peer = pytest.importorskip("sacrebleu.tokenizers.tokenizer_13a").Tokenizer13a()
    assert " ".join(tokens(text)) == peer(text.lower())


# --- the first character ---


def test_the_first_character_is_the_answer_of_scienceqa() -> None:
    reference = "B\nBecause iron is magnetic."
    assert scored("first_character", " B\nI do not know why.", reference) == 1
    for wrong in ("A\nBecause iron is magnetic.", "", "\n", "The answer is B"):
        assert scored("first_character", wrong, reference) == 0


def test_a_reference_without_a_character_is_refused() -> None:
    task = Task("t", [Example("q", "a")], [Example("q2", " ")], "first_character")
    with pytest.raises(CLGraftError, match="test example 0 .* has an empty reference"):
        resolved(Scenario("mini", (task,)), "mini", {})


def test_all_are_plug_ins_whose_scores_go_from_0_to_1() -> None:
    for name in ("rouge_l", "edit_similarity", "sari", "first_character"):
        assert scored(name, "same text", "same text", prompt="a text") == 1
        assert json.dumps(scored(name, "x", "same text", prompt="a text")) != "NaN"
        assert 0 <= scored(name, "x", "same text", prompt="a text") < 1
