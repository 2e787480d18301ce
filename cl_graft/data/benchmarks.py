"""GSM8K, MATH, HumanEval and MBPP as test examples for chat models: zero-shot prompts, references, hidden tests.

Each is read from the data directory where one is given, else from the hub; the rows are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cl_graft.data import hub
from cl_graft.data.readers import records
from cl_graft.errors import UnknownName
from cl_graft.task import Example


def reasoning(problem: str) -> str:
    """How a math problem is put to a chat model."""
    return f"{problem.strip()}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."


def gsm8k(row: Mapping[str, Any]) -> Example:
    """question, answer (`#### N` last)."""
    return Example(reasoning(row["question"]), row["answer"], suite="GSM8K")


def math(row: Mapping[str, Any]) -> Example:
    """problem, solution (with the answer in `\\boxed`)."""
    return Example(reasoning(row["problem"]), row["solution"], suite="MATH")


def humaneval(row: Mapping[str, Any]) -> Example:
    """prompt, canonical_solution, test, entry_point.

    The prompt is the setup, too: what it imports and defines is there for an answer that leaves it out, and an
    answer that is only the function's body goes on from it.
    """
    start = row["prompt"]
    asked = (
        "Complete this Python function. Answer with the whole function in one ```python block.\n\n"
        f"```python\n{start.rstrip()}\n```"
    )
    tests = (f"{row['test']}\ncheck({row['entry_point']})",)
    whole = start + row["canonical_solution"]
    return Example(asked, f"```python\n{whole.strip()}\n```", tests, setup=start, suite="HumanEval")


def mbpp(row: Mapping[str, Any]) -> Example:
    """text, code, test_list, test_setup_code. All three tests are shown (Austin et al. 2021, section 3)."""
    tests = tuple(test.strip() for test in row["test_list"])
    asked = (
        f"{row['text'].strip()} Your code should pass these tests:\n\n" + "\n".join(tests) + "\n\n"
        "Answer with the program in one ```python block."
    )
    code = row["code"].replace("\r", "").replace("\t", "    ").strip()
    # the setup comes between program and tests: it builds what they ask about of the program's own classes
    built = (row["test_setup_code"],) if row["test_setup_code"] else ()
    return Example(asked, f"```python\n{code}\n```", built + tests, suite="MBPP")


class Benchmark(NamedTuple):
    """Where the test set is: a file of the data directory, or a data set of the hub."""

    example: Callable[[Mapping[str, Any]], Example]
    file: str
    place: str
    config: str | None
    columns: tuple[str, ...]


BENCHMARKS = {
    "gsm8k": Benchmark(gsm8k, "gsm8k/test.jsonl", "openai/gsm8k", "main", ("question", "answer")),
    "math": Benchmark(
        math, "math/test.jsonl", "DigitalLearningGmbH/MATH-lighteval", None, ("problem", "solution")
    ),
    "humaneval": Benchmark(
        humaneval,
        "humaneval/HumanEval.jsonl.gz",
        "openai/openai_humaneval",
        None,
        ("prompt", "canonical_solution", "test", "entry_point"),
    ),
    "mbpp": Benchmark(
        mbpp,
        "mbpp/mbpp.jsonl",
        "google-research-datasets/mbpp",
        "full",
        ("task_id", "text", "code", "test_list", "test_setup_code"),
    ),
}


def examples(name: str, data_dir: Path | None) -> list[Example]:
    """1,319 problems of GSM8K, 5,000 of MATH, 164 of HumanEval, 500 of MBPP (task ids 11-510).

    Raises UnknownName, or DataError for data that are missing or of another form.
    """
    if name not in BENCHMARKS:
        raise UnknownName("benchmark", name, BENCHMARKS)
    made = BENCHMARKS[name]
    if data_dir is None:
        return hub.rows(made.place, made.example, made.columns, config=made.config, split="test")
    problems = records(data_dir, made.file, made.columns)
    if name == "mbpp":  # its file holds all splits
        problems = [row for row in problems if 11 <= row["task_id"] <= 510]
    return [made.example(row) for row in problems]
