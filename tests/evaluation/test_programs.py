"""Which program an answer gives: fences, thinking, bodies and texts that run on, judged in the sandbox and beside lm-eval."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from cl_graft.evaluation.programs import Block, blocks, program_of
from cl_graft.evaluation.sandbox import run_asserts
from cl_graft.evaluation.scorers import Examinee, score
from cl_graft.task import Example
from tests.real import DATA, needs_data

GOOD = "def twice(x):\n    return 2 * x\n"
BAD = "def twice(x):\n    return x\n"
TESTS = ("assert twice(3) == 6", "assert twice(-1) == -2")

RIGHT = {
    "as it is": GOOD,
    "in a fence": f"Here it is:\n```python\n{GOOD}```\nIt doubles.",
    "a blank before the language": f"Sure!\n``` python\n{GOOD}```",
    "an attribute after the language": f'```python title="twice.py"\n{GOOD}```',
    "a language of Pandoc": f"```{{.python .numberLines}}\n{GOOD}```",
    "capitals and a version": f"```Python3\n{GOOD}```",
    "tildes": f"~~~python\n{GOOD}~~~",
    "four backticks": f"````python\n{GOOD}````",
    "no language": f"Here:\n```\n{GOOD}```",
    "after words on its line": f"Sure: ```python\n{GOOD}```",
    "closed on the last line": f"```python\n{GOOD.rstrip()}```",
    "Windows": f"```python\n{GOOD}```".replace("\n", "\r\n"),
    "in a list": "1. So:\n\n   ```python\n   def twice(x):\n       return 2 * x\n   ```\n2. Done.",
    "in a list, on its line": "- ```python\n  def twice(x):\n      return 2 * x\n  ```",
    "cut off after the block began": f"```python\n{GOOD}",
    "cut off in what follows": f"```python\n{GOOD}\nprint(twi",
    "a draft in its thoughts": f"<think>\n```python\n{BAD}```\nwrong\n</think>\n```python\n{GOOD}```",
    "thoughts that the template began": f"```python\n{BAD}```</think>{GOOD}",
    "a shell block first": f"```bash\npip install numpy\n```\n```python\n{GOOD}```",
    "a shell block of no language": f"```\npip install numpy\n```\nthen\n```\n{GOOD}```",
    "helper and function": "```python\ndef two():\n    return 2\n```\nand\n```python\ndef twice(x):\n    return two() * x\n```",
    "function, then helper": "```python\ndef twice(x):\n    return two() * x\n```\n```python\ndef two():\n    return 2\n```",
    "a constant of its own": "```python\nK = 2\n```\n```python\ndef twice(x):\n    return K * x\n```",
    "a mended version": f"```python\n{BAD}```\nNo:\n```python\n{GOOD}```",
    "an example of its use": f"```python\n{GOOD}```\nUse:\n```python\nn = int(input())\nprint(twice(n))\n```",
    "tests of its own": f"```python\n{GOOD}```\n```python\nimport pytest\ndef test(): assert twice(1) == 2\n```",
    "output": f"```python\n{GOOD}```\n```\n>>> twice(2)\n4\n```",
    "runs on, cut off": GOOD + "\n# Sum a list.\ndef total(xs):\n    s = 0\n    for x in x",
    "runs on with a wrong assert": GOOD + "\nassert twice(2) == 5\n\ndef other(): pass",
    "runs on and asks for input": GOOD + "\nprint(twice(int(input())))\n",
    "prose before and after": f"Here it is:\n\n{GOOD}\nThis takes a number.",
    "backticks after it": GOOD + "```\n",
    "backticks and prose after it": GOOD + "```\nThis doubles.",
    "MBPP's end": GOOD + "[DONE]\nYou are an expert, and here is your task",
    "a main part": GOOD + "\nif __name__ == '__main__':\n    print(twice(int(input())))\n",
    "imports first": f"I import:\nimport math\n\n{GOOD}",
    "a field called user": "class Q:\n    user: int = 3\n\n" + GOOD,
}
WRONG = {
    "wrong": f"```python\n{BAD}```",
    "a worse version": f"```python\n{GOOD}```\nor\n```python\n{BAD}```",
    "only thoughts": f"<think>\n{GOOD}",
    "another name": GOOD.replace("twice", "double"),
    "another language": "```cpp\nint twice(int x) { return 2 * x; }\n```",
    "prose": "It doubles the number.",
    "nothing": "",
}


def judged(answers: dict[str, str]) -> dict[str, float]:
    examinee = Examinee(None, None, 8, 8, allow_code=True, given=list(answers.values()))  # type: ignore[arg-type]
    found = score(examinee, [Example("p", GOOD, tests=TESTS)] * len(answers), ["tests"])["tests"]
    return {what: scored.score for what, scored in zip(answers, found, strict=True)}


def test_right_programs_pass_however_they_are_given() -> None:
    assert [what for what, passed in judged(RIGHT).items() if not passed] == []


def test_wrong_ones_do_not() -> None:
    assert [what for what, passed in judged(WRONG).items() if passed] == []


def test_blocks() -> None:
    text = "a\n```py x\n1\n```\n  ~~~\n  2\n    3\n  ~~~\nx = '```'\n```\n4"
    assert blocks(text) == [Block("py", "1\n"), Block("", "2\n  3\n"), Block("", "4")]


START = 'import math\n\n\ndef root(x):\n    """The root."""\n'
CHECK = ("def check(candidate):\n    assert candidate(9) == 3\ncheck(root)",)


@pytest.mark.parametrize(
    ("answer", "program"),
    [
        ("    return math.sqrt(x)\n", START + "    return math.sqrt(x)\n"),
        (
            "    return math.sqrt(x)\n\n\ndef other(y):\n    retu",
            START + "    return math.sqrt(x)\n\n",
        ),
        ("    return math.sqrt(x)\nprint(root(9))", START + "    return math.sqrt(x)"),
        ("    y = x\n# next\n    return y", START + "    y = x"),
        ("    return math.sqrt(x)\n```\nIt is the root.", START + "    return math.sqrt(x)"),
        ("    if x:\n        return math.sq", START + "    if x:\n        return math.sq"),
        ("```python\n    return math.sqrt(x)\n```", START + "    return math.sqrt(x)\n"),
        ("```python\ndef root(x):\n    return x ** .5\n```", "def root(x):\n    return x ** .5\n"),
    ],
)
def test_a_body_ends_at_the_benchmark_s_stop_strings(answer: str, program: str) -> None:
    assert program_of(answer, START, CHECK) == program


def test_what_is_in_the_setup_is_not_asked_of_the_answer() -> None:
    """MBPP's setup defines what tests need; only the function itself has to be in the answer."""
    tests = ("root = Node(1)", "assert twice(root.x) == K")
    setup = "class Node:\n    x = 3\nK = 6\n"
    assert program_of(f"{GOOD}\nprose here", setup, tests) == GOOD


# --- beside lm-eval on the same answers ---


@pytest.fixture
def lm_eval(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package, with its programs judged by our sandbox: only how it reads answers is compared."""
    package = pytest.importorskip(
        "lm_eval", reason="lm-eval is not installed: pip install lm-eval==0.4.13"
    )
    import evaluate

    class Unused:
        def compute(self, **given: Any) -> None: ...

    monkeypatch.setattr(evaluate, "load", lambda name: Unused())
    return package


def stops(package: Any, task: str) -> list[str]:
    """`until` of a task's file."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)
    file = Path(package.__file__).parent / "tasks" / task
    return yaml.load(file.read_text("utf-8"), Loader)["generation_kwargs"]["until"]


def until(answer: str, stops: list[str]) -> str:
    for stop in stops:
        answer = answer.split(stop, 1)[0]
    return answer


@needs_data("humaneval")
def test_humaneval_s_completions_are_judged_as_lm_eval_does(lm_eval: Any) -> None:
    """lm-eval 0.4.13, humaneval: bodies that stop, run on, or are wrong."""
    from lm_eval.tasks.humaneval.utils import build_predictions

    lines = (
        gzip.decompress((DATA / "humaneval/HumanEval.jsonl.gz").read_bytes()).decode().split("\n")
    )
    rows = Random(0).sample([json.loads(line) for line in lines if line], 12)
    tails = ("", "\n\ndef next_one(x):\n    return", "\nprint(1/0)", "\n# more\nfoo(")
    limits = stops(lm_eval, "humaneval/humaneval.yaml")
    for k, row in enumerate(rows):
        body = row["canonical_solution"].rstrip() if k % 4 else "    return None"
        answer = body + tails[k % len(tails)]
        tests = (f"{row['test']}\ncheck({row['entry_point']})",)
        ((theirs,),) = build_predictions([[until(answer, limits)]], [row])
        verdicts = [
            run_asserts(program, tests, row["prompt"]).passed
            for program in (program_of(answer, row["prompt"], tests), theirs)
        ]
        assert verdicts == [bool(k % 4)] * 2, (row["task_id"], verdicts)


@needs_data("mbpp")
def test_mbpp_s_answers_are_judged_as_lm_eval_does_but_where_it_loses_the_first_word(
    lm_eval: Any,
) -> None:
    """lm-eval 0.4.13, mbpp and mbpp_instruct (its pull request 3769 mends the lost word)."""
    from lm_eval.tasks.mbpp.utils import extract_code_blocks

    lines = (DATA / "mbpp/mbpp.jsonl").read_text("utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line][10:18]
    limits = stops(lm_eval, "mbpp/mbpp.yaml")
    for row in rows:
        code, tests = row["code"].replace("\r", ""), tuple(row["test_list"])

        def passes(program: str, tests: tuple[str, ...] = tests) -> bool:
            return run_asserts(program, tests).passed

        run_on = f"{code}\n[DONE]\nYou are an expert Python programmer"
        assert passes(program_of(run_on, tests=tests)) is passes(until(run_on, limits)) is True
        fenced = f"\n{code}\n```\nThis is it."
        assert (
            passes(program_of(fenced, tests=tests)) is passes(extract_code_blocks(fenced)) is True
        )
        bare = f"{code}\n```\n"
        assert passes(program_of(bare, tests=tests)) and not passes(extract_code_blocks(bare))
