"""Math, then code, as in GraftLLM's continual-learning experiment (arXiv 2505.18502): chat models of 7 to 9 B.

Each task is SFT, then DPO on answers of stronger models (the data of FuseChat-3.0, arXiv 2412.03187). Math is tested
on GSM8K and MATH, code on HumanEval and MBPP; a task's score is the mean of its two. The paper's two targets at its
two budgets:

    cl-graft sweep --scenarios math_code --strategies graftllm,lora,model_grafting,model_tailor,sequential,individual \\
      --models meta-llama/Llama-3.1-8B-Instruct --budgets 5%,10% --allow-code-execution \\
      --launch processes=8,zero=3,micro_batch=4,checkpointing=true
    cl-graft sweep --scenarios math_code --strategies graftllm,lora,model_grafting,model_tailor,sequential,individual \\
      --models Qwen/Qwen2.5-7B-Instruct --budgets 5%,10% --allow-code-execution \\
      --launch processes=8,zero=3,micro_batch=4,checkpointing=true --set math_code.recipe=qwen2.5-7b
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cl_graft.data import columns, hub, sample
from cl_graft.data.benchmarks import examples, reasoning
from cl_graft.errors import UnknownName
from cl_graft.ranges import Count
from cl_graft.task import Example, Pair, Preference, Scenario, Task, Training


class Recipe(NamedTuple):
    """What differs between target models: FuseChat-3.0's README, on which GraftLLM's rests."""

    sft_rate: float
    dpo_rate: float
    beta: float
    length_normalised: bool


RECIPES = {
    "llama-3.1-8b": Recipe(5e-6, 8e-7, 10.0, True),
    "qwen2.5-7b": Recipe(2e-6, 3e-7, 0.01, False),
    "gemma-2-9b": Recipe(2e-6, 5e-7, 0.01, False),
    "llama-3.2": Recipe(5e-6, 1e-6, 10.0, True),  # 1B and 3B
}


def math_code(
    *,
    seed: int,
    data_dir: Path | None = None,
    recipe: str = "llama-3.1-8b",
    math_sft: str = "fusechat",
    math_dpo: str = "fusechat",
    code_sft: str = "fusechat",
    code_dpo: str = "fusechat",
    train_size: Count | None = None,
    test_size: Count | None = None,
    max_new_tokens: Count = 1024,
) -> Scenario:
    """recipe: llama-3.1-8b, qwen2.5-7b, gemma-2-9b or llama-3.2. The data of a task: `fusechat`; for SFT also
    `openmathinstruct-2`, `leetcode`, `self-oss-instruct-sc2`, joined by `+`; for DPO also `none`; or a folder made by
    `cl-graft transfer build`, or of your own (`prompt` and `completion`, or `prompt`, `chosen` and `rejected`: text or
    messages). train_size: of SFT rows and of pairs; test_size: of each benchmark. --data-dir: the test sets, instead
    of the hub's.
    """
    if recipe not in RECIPES:
        raise UnknownName("recipe of math_code", recipe, RECIPES)

    def task(name: str, score: str, suites: Sequence[str], sft: str, dpo: str) -> Task:
        test = []
        for suite in suites:
            problems = examples(suite, data_dir)
            test += problems if test_size is None else sample(problems, test_size, f"test/{suite}")
        asked = {question(example.prompt) for example in test}

        def unasked(rows: list[Any]) -> list[Any]:
            return [row for row in rows if question(row.prompt) not in asked]

        train = unasked(gather(SFT, "sft", name, sft, train_size, seed))
        pairs = [] if dpo == "none" else unasked(gather(DPO, "dpo", name, dpo, train_size, seed))
        return Task(
            name,
            train,
            test,
            score,
            max_new_tokens=max_new_tokens,
            training=training(RECIPES[recipe], bool(pairs)),
            pairs=pairs,
        )

    tasks = (
        task("math", "math", ("gsm8k", "math"), math_sft, math_dpo),
        task("code", "tests", ("humaneval", "mbpp"), code_sft, code_dpo),
    )
    return Scenario("math_code", tasks, chat=True)


def training(recipe: Recipe, dpo: bool) -> Training:
    """SFT of 3 epochs and DPO of 1, batches of 128, 2,048 tokens, cosine after a tenth of warm-up."""
    preference = Preference(
        epochs=1.0,
        batch=128,
        learning_rate=recipe.dpo_rate,
        beta=recipe.beta,
        length_normalised=recipe.length_normalised,
    )
    return Training(
        epochs=3.0,
        batch=128,
        learning_rate=recipe.sft_rate,
        warmup=0.1,
        max_length=2048,
        preference=preference if dpo else None,
    )


# --- training data ---


class Source(NamedTuple):
    """A data set of the hub. rows: how many FuseChat-3.0 drew from it (SFT), where it is not its own data set."""

    place: str
    adapt: Callable[[hub.HubRow], Any]
    columns: tuple[str, ...]
    split: str = "train"
    rows: int | None = None


def turns(conversation: Sequence[dict[str, str]]) -> list[str]:
    """What was said, without the system's turn; of ShareGPT's form (from, value) or OpenAI's (role, content)."""
    said = [(t.get("from") or t["role"], t.get("value") or t["content"]) for t in conversation]
    return [text for who, text in said if who != "system"]


def fusechat_sft(row: hub.HubRow) -> Example:
    question, answer = turns(row["conversations"])[:2]
    return Example(question, answer)


def fusechat_dpo(row: hub.HubRow) -> Pair:
    return Pair(turns(row["prompt"])[0], turns(row["chosen"])[-1], turns(row["rejected"])[-1])


def openmathinstruct(row: hub.HubRow) -> Example:
    return Example(reasoning(row["problem"]), row["generated_solution"].strip())


def leetcode(row: hub.HubRow) -> Example:
    """The answer is the Python one of four languages, with its explanation."""
    return Example(f"{row['content'].strip()}\n\nSolve it in Python.", row["python"].strip())


def self_oss(row: hub.HubRow) -> Example:
    return Example(row["instruction"].strip(), row["response"].strip())


SFT = {
    "fusechat": Source("FuseAI/FuseChat-3.0-SFT-Data", fusechat_sft, ("dataset", "conversations")),
    "openmathinstruct-2": Source(
        "nvidia/OpenMathInstruct-2",
        openmathinstruct,
        ("problem", "generated_solution"),
        "train_1M",
        40_188,
    ),
    "leetcode": Source("greengerong/leetcode", leetcode, ("content", "python"), rows=1_877),
    "self-oss-instruct-sc2": Source(
        "bigcode/self-oss-instruct-sc2-exec-filter-50k",
        self_oss,
        ("instruction", "response"),
        rows=10_160,
    ),
}
DPO = {
    "fusechat": Source(
        "FuseAI/FuseChat-3.0-DPO-Data", fusechat_dpo, ("dataset", "prompt", "chosen", "rejected")
    ),
}
LOCAL = {
    "sft": Source("", columns.example, ("completion",)),
    "dpo": Source("", columns.pair, ("chosen", "rejected")),
}
# What FuseChat-3.0's column `dataset` says of rows for a task, without regard to case and punctuation.
KINDS = {"math": ("openmathinstruct2",), "code": ("leetcode", "selfossinstructsc2")}


def gather(
    known: dict[str, Source], config: str, task: str, names: str, size: int | None, seed: int
) -> list[Any]:
    """Examples (config `sft`) or pairs (`dpo`) of all sources named, or `size` of them drawn by the seed.

    Raises UnknownName for what is neither a source nor a folder, DataError for data of another form.
    """
    rows: list[Any] = []
    for name in [names] if Path(names).is_dir() else names.split("+"):
        if name not in known and not Path(name).is_dir():
            raise UnknownName(f"{config} data", name, known, "a folder")
        source = known.get(name, LOCAL[config])
        most = min((n for n in (source.rows, size) if n is not None), default=None)
        rows += hub.rows(
            source.place or name,
            source.adapt,
            source.columns,
            config=None if source.place else config,
            split=source.split,
            keep=(lambda kind: plain(kind).startswith(KINDS[task])) if name == "fusechat" else None,
            size=most,
            seed=f"{config}/{seed}/{task}/{name}",
        )
    return rows if size is None else sample(rows, size, f"{config}/{seed}/{task}")


def question(prompt: str) -> str:
    """What a prompt asks, without how it is put: with the request to reason or not, it is the same problem."""
    return plain(prompt).removesuffix(plain(reasoning("")))


def plain(text: str) -> str:
    return "".join(character for character in text.lower() if character.isalnum())
