"""Math, then code, on real files: MAWPS and/or GSM8K word problems, then MBPP with executed tests.

Besides exact answers every task is measured in bits per byte of the reference answer, which moves even for a
model too small to answer.
"""

from __future__ import annotations

import re
from pathlib import Path

from cl_graft.data import records, sample
from cl_graft.errors import UnknownName
from cl_graft.ranges import Count, Positive
from cl_graft.task import Example, Preference, Scenario, Scoring, Task, Training

# How GSM8K's published figures are scored, beside our own rule.
PUBLISHED = (
    Scoring("number:lm-eval", {"filter": "strict-match"}, "number:lm-eval strict-match"),
    Scoring("number:lm-eval", {"filter": "flexible-extract"}, "number:lm-eval flexible-extract"),
)


def math_then_code(
    *,
    seed: int,
    data_dir: Path | None = None,
    math: str = "mawps",
    train_size: Count = 4000,
    test_size: Count = 150,
    steps: Count = 200,
    batch: Count = 16,
    learning_rate: Positive = 3e-3,
    max_length: Count = 256,
    dpo: bool = False,
) -> Scenario:
    """math: `mawps`, `gsm8k` or `mawps+gsm8k`, one task each, before `mbpp`. `dpo`: SFT, then DPO.
    The recipe's defaults suit the embedded `text-llama`.
    """
    training = Training(
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        max_length=max_length,
        preference=Preference() if dpo else None,
    )
    sources = {"mawps": mawps, "gsm8k": gsm8k, "mbpp": mbpp}
    tasks = []
    for name in (*math.split("+"), "mbpp"):
        if name not in sources:
            raise UnknownName("math task", name, ("mawps", "gsm8k"))
        train, test = sources[name](data_dir)
        tasks.append(
            Task(
                name,
                sample(train, train_size, f"train/{seed}/{name}"),
                sample(test, test_size, f"test/{name}"),
                score="tests" if name == "mbpp" else "number",
                also=("neg_bits_per_byte", *(PUBLISHED if name == "gsm8k" else ())),
                max_new_tokens=160 if name == "mbpp" else 96,
                training=training,
            )
        )
    return Scenario("math_then_code", tuple(tasks))


def question(text: str) -> str:
    return f"Question: {' '.join(text.split())}\nAnswer:"


def mawps(data_dir: Path | None) -> tuple[list[Example], list[Example]]:
    """MAWPS's one file, split by a fixed seed: 400 problems for the test, no problem in both."""
    seen: dict[str, Example] = {}
    for row in records(data_dir, "mawps/test.jsonl", {"input": str, "target": (int, float)}):
        prompt = question(row["input"])
        seen.setdefault(prompt, Example(prompt, f" #### {row['target']:.12g}"))
    shuffled = sample(list(seen.values()), len(seen), "mawps split")
    return shuffled[400:], shuffled[:400]


def gsm8k(data_dir: Path | None) -> tuple[list[Example], list[Example]]:
    """The published split; the calculator's annotations `<<...>>` are taken out."""

    def examples(name: str) -> list[Example]:
        return [
            Example(question(row["question"]), " " + re.sub(r"<<.*?>>", "", row["answer"]))
            for row in records(data_dir, name, {"question": str, "answer": str})
        ]

    return examples("gsm8k/train.jsonl"), examples("gsm8k/test.jsonl")


def mbpp(data_dir: Path | None) -> tuple[list[Example], list[Example]]:
    """The paper's split: task ids 11-510 test, 601-974 train. The first test is shown, as it names the function."""
    fields = {"task_id": int, "text": str, "code": str, "test_list": list}
    rows = records(data_dir, "mbpp/mbpp.jsonl", fields)

    def example(row: dict) -> Example:
        tests = tuple(t.strip() for t in row["test_list"])
        prompt = f"# {row['text'].strip()}\n# {tests[0]}\n"
        code = row["code"].replace("\r", "").replace("\t", "    ")
        # the setup comes between program and tests: it builds what they ask about of the program's own classes
        setup = (row["test_setup_code"],) if row.get("test_setup_code") else ()
        return Example(prompt, code, setup + tests)

    return (
        [example(r) for r in rows if 601 <= r["task_id"] <= 974],
        [example(r) for r in rows if 11 <= r["task_id"] <= 510],
    )
