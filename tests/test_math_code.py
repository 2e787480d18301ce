"""The paper's configuration: its numbers, its data's forms, its prompts, its architectures, and a run of it in small."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest

import cl_graft
from cl_graft import plugins
from cl_graft.data import DataError, benchmarks, columns
from cl_graft.errors import CLGraftError, UnknownName
from cl_graft.evaluation.programs import program_of
from cl_graft.evaluation.sandbox import ConsentNeeded, run_asserts
from cl_graft.models.chat import render
from cl_graft.task import Example, Pair, Scenario
from tests.chat import llama_tokenizer, qwen_tokenizer
from tests.real import DATA, needs_data
from tests.refusals import one_sentence

MAKE = plugins.load("scenario", "math_code")
MODULE = sys.modules[MAKE.__module__]


# One row of each data set of the hub, in its schema.
ROWS: dict[str, list[dict[str, Any]]] = {
    "FuseAI/FuseChat-3.0-SFT-Data": [
        {
            "dataset": name,
            "source_model": "Qwen2.5-72B-Instruct",
            "conversations": [
                {"from": "human", "value": f"{name}?"},
                {"from": "gpt", "value": f"{name}!"},
            ],
        }
        for name in ("openmathinstruct2", "leetcode", "self-oss-instruct-sc2", "ultrafeedback")
    ],
    "FuseAI/FuseChat-3.0-DPO-Data": [
        {
            "dataset": name,
            "source_model": "Qwen2.5-72B-Instruct",
            "prompt": [{"role": "user", "content": f"{name}?"}],
            "chosen": [{"role": "assistant", "content": "good"}],
            "rejected": [{"role": "assistant", "content": "bad"}],
        }
        for name in ("openmathinstruct2", "leetcode", "self_oss_instruct_sc2", "magpie")
    ],
    "nvidia/OpenMathInstruct-2": [
        {
            "problem": "What is 1+1?",
            "generated_solution": "It is\n\\[ \\boxed{2} \\]\n",
            "expected_answer": "2",
            "problem_source": "augmented_math",
        }
    ],
    "greengerong/leetcode": [
        {
            "id": 1,
            "slug": "two-sum",
            "title": "Two Sum",
            "difficulty": "Easy",
            "content": "Given an array ...\n",
            "java": "```java\n```",
            "python": "\n```python\ndef two_sum(): ...\n```\nA dictionary.\n",
        }
    ],
    "bigcode/self-oss-instruct-sc2-exec-filter-50k": [
        {"instruction": "Write f.", "response": "```python\ndef f(): ...\n```", "seed": "..."}
    ],
    "openai/gsm8k": [{"question": "Half of 2?", "answer": "2/2=<<2/2=1>>1\n#### 1"}],
    "DigitalLearningGmbH/MATH-lighteval": [
        {"problem": "Find $x$.", "level": "Level 1", "type": "Algebra", "solution": r"$\boxed{3}$"}
    ],
    "openai/openai_humaneval": [
        {
            "task_id": "HumanEval/0",
            "prompt": 'import math\n\n\ndef twice(x):\n    """Doubles."""\n',
            "canonical_solution": "    return 2 * x\n",
            "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate(2) == 4\n",
            "entry_point": "twice",
        }
    ],
    "google-research-datasets/mbpp": [
        {
            "task_id": 11,
            "text": "Write a function to double.",
            "code": "def twice(x):\r\n\treturn 2 * x",
            "test_list": ["assert twice(2) == 4", "assert twice(3) == 6"],
            "test_setup_code": "",
            "challenge_test_list": [],
        }
    ],
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The hub holds ROWS; what is asked of it is noted."""
    import datasets

    asked: list[tuple[Any, ...]] = []

    def load(place: str, config: str | None = None, *, split: str) -> Any:
        asked.append((place, config, split))
        return datasets.Dataset.from_list(ROWS[place])

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def made(**options: Any) -> Scenario:
    given = {k: options.pop(k) for k in ("seed", "data_dir") if k in options}
    chosen = plugins.check_options("scenario", "math_code", MAKE, options)
    return MAKE(**{"seed": 0, "data_dir": None, **given}, **chosen)


# --- the recipe ---


@pytest.mark.parametrize(
    ("recipe", "sft", "dpo", "beta", "normalised"),
    [
        ("llama-3.1-8b", 5e-6, 8e-7, 10.0, True),
        ("qwen2.5-7b", 2e-6, 3e-7, 0.01, False),
        ("gemma-2-9b", 2e-6, 5e-7, 0.01, False),
        ("llama-3.2", 5e-6, 1e-6, 10.0, True),
    ],
)
def test_the_recipes_are_the_published_ones(
    hub: Any, recipe: str, sft: float, dpo: float, beta: float, normalised: bool
) -> None:
    for task in made(recipe=recipe).tasks:
        how = task.training
        assert (how.epochs, how.batch, how.max_length, how.warmup) == (3.0, 128, 2048, 0.1)
        assert how.learning_rate == sft and how.preference
        assert (how.preference.epochs, how.preference.batch) == (1.0, 128)
        assert (how.preference.learning_rate, how.preference.beta) == (dpo, beta)
        assert how.preference.length_normalised is normalised


def test_an_unknown_recipe_or_source_is_answered_with_the_nearest(hub: Any) -> None:
    with pytest.raises(UnknownName, match="did you mean llama-3.1-8b"):
        made(recipe="llama-3.1-8B")
    with pytest.raises(UnknownName, match="sft data .* did you mean openmathinstruct-2"):
        made(math_sft="openmathinstruct2")
    with pytest.raises(UnknownName, match="dpo data"):
        made(code_dpo="leetcode")


def test_it_is_math_then_code_for_chat_models(hub: list[Any]) -> None:
    scenario = made()
    assert scenario.chat and scenario.task_names == ("math", "code")
    assert [task.score for task in scenario.tasks] == ["math", "tests"]
    assert [task.suites for task in scenario.tasks] == [("GSM8K", "MATH"), ("HumanEval", "MBPP")]
    assert ("openai/gsm8k", "main", "test") in hub
    assert ("google-research-datasets/mbpp", "full", "test") in hub


# --- the data ---


def test_fusechat_data_are_parted_by_task(hub: Any) -> None:
    math, code = made().tasks
    assert math.train == [Example("openmathinstruct2?", "openmathinstruct2!")]
    assert {e.prompt for e in code.train} == {"leetcode?", "self-oss-instruct-sc2?"}
    assert math.pairs == [Pair("openmathinstruct2?", "good", "bad")]
    assert {p.prompt for p in code.pairs} == {"leetcode?", "self_oss_instruct_sc2?"}


def test_the_sources_themselves_can_be_named(hub: list[Any]) -> None:
    math, code = made(
        math_sft="openmathinstruct-2", code_sft="leetcode+self-oss-instruct-sc2", math_dpo="none"
    ).tasks
    assert math.train == [
        Example(benchmarks.reasoning("What is 1+1?"), "It is\n\\[ \\boxed{2} \\]")
    ]
    assert code.train == [
        Example(
            "Given an array ...\n\nSolve it in Python.",
            "```python\ndef two_sum(): ...\n```\nA dictionary.",
        ),
        Example("Write f.", "```python\ndef f(): ...\n```"),
    ]
    assert ("nvidia/OpenMathInstruct-2", None, "train_1M") in hub
    assert not math.pairs and math.training.preference is None and code.training.preference


def test_as_many_rows_as_fusechat_took_from_a_source(hub: Any, monkeypatch: Any) -> None:
    """The paper's counts, unless fewer are asked for."""
    counts = {name: source.rows for name, source in MODULE.SFT.items()}
    assert counts == {
        "fusechat": None,
        "openmathinstruct-2": 40_188,
        "leetcode": 1_877,
        "self-oss-instruct-sc2": 10_160,
    }
    many = [{**ROWS["greengerong/leetcode"][0], "content": f"problem {i}"} for i in range(2000)]
    monkeypatch.setitem(ROWS, "greengerong/leetcode", many)
    code = made(code_sft="leetcode").tasks[1]
    assert (len(code.train), len(code.validation)) == (1877 - 64, 64)
    few = [made(code_sft="leetcode", train_size=5, seed=seed).tasks[1].train for seed in (0, 0, 1)]
    assert len(few[0]) == 5 and few[0] == few[1] != few[2]


def test_a_problem_of_the_test_is_not_trained_on(hub: Any, monkeypatch: Any) -> None:
    rows = [{"problem": text, "generated_solution": "1"} for text in ("Half of 2?", "Half of 4?")]
    monkeypatch.setitem(ROWS, "nvidia/OpenMathInstruct-2", rows)
    (example,) = made(math_sft="openmathinstruct-2").tasks[0].train
    assert example.prompt == benchmarks.reasoning("Half of 4?")


def test_a_problem_of_the_test_is_in_no_pair_and_in_no_other_words(
    hub: Any, monkeypatch: Any
) -> None:
    """FuseChat's rows ask without the words that a test prompt ends in."""
    kept = ROWS["FuseAI/FuseChat-3.0-DPO-Data"][0]
    pair = {**kept, "prompt": [{"role": "user", "content": "Half of 2?"}]}
    monkeypatch.setitem(
        ROWS, "FuseAI/FuseChat-3.0-DPO-Data", [pair, *ROWS["FuseAI/FuseChat-3.0-DPO-Data"]]
    )
    sft = ROWS["FuseAI/FuseChat-3.0-SFT-Data"]
    told = {
        "dataset": sft[0]["dataset"],
        "conversations": [{"from": "human", "value": "Half of 2? "}, {"from": "gpt", "value": "1"}],
    }
    monkeypatch.setitem(ROWS, "FuseAI/FuseChat-3.0-SFT-Data", [told, *sft])
    math = made().tasks[0]
    assert [p.prompt for p in math.pairs] == ["openmathinstruct2?"]
    assert [e.prompt for e in math.train] == ["openmathinstruct2?"]


def test_data_of_another_form_are_refused_in_one_sentence(hub: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(ROWS, "greengerong/leetcode", [{"content": "x", "rust": "y"}])
    with pytest.raises(DataError, match="greengerong/leetcode has no column 'python' but content"):
        made(code_sft="leetcode")
    name = "FuseAI/FuseChat-3.0-SFT-Data"
    monkeypatch.setitem(ROWS, name, [{**ROWS[name][0], "conversations": []}])
    with pytest.raises(DataError, match=f"row 0 of {name}"):
        made()
    monkeypatch.setitem(ROWS, name, [{**ROWS[name][0], "dataset": "ultrafeedback"}])
    with pytest.raises(DataError, match="no row .* which holds ultrafeedback"):
        made()


def test_data_that_cannot_be_had_are_told_in_one_sentence(monkeypatch: Any) -> None:
    import datasets

    def load(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no network\nand a long trace")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match="openai/gsm8k cannot be read .*no network") as caught:
        made()
    assert "\n" not in str(caught.value)


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options of the scenario for data in folders: training data of two configurations, and the four test sets."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for task in ("math", "code"):
        answers = ("\\boxed{2}", "\\boxed{3}") if task == "math" else ("return 1", "return 2")
        sft = [{"prompt": f"{task} {i}?", "completion": answers[0]} for i in range(8)]
        dpo = [
            {"prompt": f"{task} {i}?", "chosen": answers[0], "rejected": answers[1]}
            for i in range(8)
        ]
        write(tmp_path / task, "sft.jsonl", sft)
        write(tmp_path / task, "dpo.jsonl", dpo)
        (tmp_path / task / "README.md").write_text(
            "---\nconfigs:\n- config_name: sft\n  data_files: sft.jsonl\n"
            "- config_name: dpo\n  data_files: dpo.jsonl\n---\n"
        )
    tests = tmp_path / "tests"
    write(tests / "gsm8k", "test.jsonl", ROWS["openai/gsm8k"] * 3)
    write(tests / "math", "test.jsonl", ROWS["DigitalLearningGmbH/MATH-lighteval"] * 2)
    write(tests / "humaneval", "HumanEval.jsonl", ROWS["openai/openai_humaneval"])
    plain = tests / "humaneval" / "HumanEval.jsonl"
    plain.with_name("HumanEval.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    (mbpp,) = ROWS["google-research-datasets/mbpp"]
    write(tests / "mbpp", "mbpp.jsonl", [mbpp, {**mbpp, "task_id": 601}])
    folders = {
        f"{task}_{kind}": str(tmp_path / task)
        for task in ("math", "code")
        for kind in ("sft", "dpo")
    }
    return {"data_dir": tests, **folders}


def test_local_folders_take_the_hubs_place(local: dict[str, Any]) -> None:
    math, code = made(**local).tasks
    assert [len(t.train) for t in (math, code)] == [8, 8]
    assert math.train[0] == Example("math 0?", "\\boxed{2}")
    assert code.pairs[7] == Pair("code 7?", "return 1", "return 2")
    assert math.suites == ("GSM8K",) * 3 + ("MATH",) * 2
    assert code.suites == ("HumanEval", "MBPP"), "the training split of MBPP is no test"
    small = made(**local, train_size=3, test_size=1)
    assert [len(t.train) for t in small.tasks] == [len(t.pairs) for t in small.tasks] == [3, 3]
    assert small.tasks[0].suites == ("GSM8K", "MATH")


def said(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in turns]


ASKED, ANSWER, WRONG = ("user", "1+1?"), ("assistant", "2"), ("assistant", "3")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "1+1?", "completion": "2"},
        {"prompt": said(ASKED), "completion": said(ANSWER)},
        {"prompt": "1+1?", "completion": said(ASKED, ANSWER)},
        {"completion": said(ASKED, ANSWER)},
        {"prompt": [{"from": "human", "value": "1+1?"}], "completion": "2"},
    ],
    ids=["text", "TRL's messages", "prompt twice", "prompt within", "ShareGPT's words"],
)
def test_an_example_is_read_from_text_and_from_messages(row: dict[str, Any]) -> None:
    assert columns.example(row) == Example("1+1?", "2")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "1+1?", "chosen": "2", "rejected": "3"},
        {"prompt": said(ASKED), "chosen": said(ANSWER), "rejected": said(WRONG)},
        {"prompt": "1+1?", "chosen": said(ASKED, ANSWER), "rejected": said(ASKED, WRONG)},
        {"chosen": said(ASKED, ANSWER), "rejected": said(ASKED, WRONG)},
    ],
    ids=["text", "TRL's messages", "ultrafeedback_binarized", "TRL's implicit prompt"],
)
def test_a_pair_is_read_from_text_and_from_messages(row: dict[str, Any]) -> None:
    assert columns.pair(row) == Pair("1+1?", "2", "3")


MISREAD = [
    ("sft", {"prompt": "a", "completion": 3}, "has int in column 'completion'; write text"),
    ("sft", {"prompt": "a", "completion": None}, "has nothing in column 'completion'"),
    ("sft", {"prompt": "a", "completion": " "}, "has nothing in column 'completion'"),
    ("sft", {"prompt": None, "completion": "b"}, "has nothing in column 'prompt'"),
    ("sft", {"prompt": "a", "completion": ["b"]}, "has a list of str in column 'completion'"),
    ("sft", {"prompt": said(("system", "s"), ASKED), "completion": "b"}, "turns of system, user"),
    ("sft", {"prompt": "a", "completion": said(ANSWER, ASKED)}, "ends in a turn of 'user'"),
    ("sft", {"completion": "b"}, "has no column 'prompt'; its columns are completion"),
    ("dpo", {"prompt": "a", "chosen": said(ASKED, ANSWER), "rejected": "3"}, "'1+1?' in column"),
    ("dpo", {"prompt": "a", "chosen": "2", "rejected": {"b": 1}}, "has dict in column 'rejected'"),
]


@pytest.mark.parametrize(("kind", "row", "told"), MISREAD)
def test_what_a_column_should_not_hold_is_named_with_its_row(
    local: dict[str, Any], kind: str, row: dict[str, Any], told: str
) -> None:
    folder = Path(local[f"math_{kind}"])
    with (folder / f"{kind}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    message = one_sentence(lambda: made(**local), DataError, ".")
    assert f"{kind}.jsonl, line 9 " in message and told in message


def test_an_answer_that_is_a_date_stays_text(local: dict[str, Any], tmp_path: Path) -> None:
    """`datasets` (5.2) reads "2024-01-05" in a JSON file as a datetime, from which no text comes back."""
    for name, text in (("train.jsonl", "{}\n"), ("data.json", "[{}]")):
        folder = tmp_path / name
        folder.mkdir()
        row = json.dumps({"prompt": "When?", "completion": "2024-01-05"})
        (folder / name).write_text(text.replace("{}", row))
        task = made(**{**local, "math_sft": str(folder)}).tasks[0]
        assert task.train == [Example("When?", "2024-01-05")]


# --- the prompts ---


def test_what_a_chat_model_is_asked(hub: Any) -> None:
    math, code = made().tasks
    assert math.test[0].prompt == (
        "Half of 2?\n\nPlease reason step by step, and put your final answer within \\boxed{}."
    )
    humaneval, mbpp = code.test
    assert humaneval.prompt == (
        "Complete this Python function. Answer with the whole function in one ```python block.\n\n"
        '```python\nimport math\n\n\ndef twice(x):\n    """Doubles."""\n```'
    )
    assert mbpp.prompt == (
        "Write a function to double. Your code should pass these tests:\n\n"
        "assert twice(2) == 4\nassert twice(3) == 6\n\n"
        "Answer with the program in one ```python block."
    )
    for tokenizer in (llama_tokenizer(), qwen_tokenizer()):
        for example in (*math.test, *code.test):
            text = render(tokenizer, [example.prompt])[0]
            assert example.prompt.strip() in text
            assert tokenizer.decode(tokenizer(text)["input_ids"]).count("user") == 1


def test_references_of_both_programming_sets_pass(hub: Any) -> None:
    for example in made().tasks[1].test:
        program = program_of(example.completion, example.setup, example.tests)
        assert run_asserts(program, example.tests, example.setup).passed
        assert not run_asserts(program.replace("2 *", "3 *"), example.tests, example.setup).passed


# --- the real test sets ---


real = needs_data("humaneval", "math")


@real
def test_the_real_test_sets_are_whole() -> None:
    sizes = {name: len(benchmarks.examples(name, DATA)) for name in benchmarks.BENCHMARKS}
    assert sizes == {"gsm8k": 1319, "math": 5000, "humaneval": 164, "mbpp": 500}
    with pytest.raises(UnknownName, match="did you mean humaneval"):
        benchmarks.examples("humanevals", DATA)


@real
@pytest.mark.parametrize("kind", ["whole", "body"])
def test_canonical_solutions_of_humaneval_pass(kind: str) -> None:
    """A sample of 40 of 164, as a whole function and as a body alone (all of them take 16 s and 20 s)."""
    for example in Random(0).sample(benchmarks.examples("humaneval", DATA), 40):
        body = example.completion.removeprefix("```python\n").removesuffix("\n```")
        body = body[len(example.setup.lstrip("\n")) :] if kind == "body" else example.completion
        program = program_of(body, example.setup, example.tests)
        outcome = run_asserts(program, example.tests, example.setup)
        assert outcome.passed, (example.prompt, outcome)


@real
def test_references_of_mbpp_pass() -> None:
    found = [e for e in benchmarks.examples("mbpp", DATA) if "amicable" not in e.prompt]
    for example in Random(0).sample(found, 20):
        program = program_of(example.completion, example.setup, example.tests)
        outcome = run_asserts(program, example.tests, example.setup)
        assert outcome.passed, (example.prompt, outcome)


# --- the models ---


def llama_8b() -> Any:
    """Llama-3.1-8B's public config.json."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131_072,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )


def qwen_7b() -> Any:
    """Qwen2.5-7B's public config.json; attention has biases."""
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=152_064,
        hidden_size=3584,
        intermediate_size=18_944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=32_768,
        tie_word_embeddings=False,
    )


@pytest.mark.parametrize(
    ("config", "parameters"), [(llama_8b, 8_030_261_248), (qwen_7b, 7_615_616_512)]
)
def test_the_targets_are_built_without_their_weights(config: Any, parameters: int) -> None:
    from cl_graft.budget import Budget
    from cl_graft.models.meta_model import meta_model
    from cl_graft.models.roles import roles

    model = meta_model(config()).model
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert all(p.is_meta for p in model.parameters())
    found = roles(model)
    assert set(found.values()) == {"embedding", "head", "attention", "mlp", "norm"}
    assert Budget("5%", parameters).bytes == parameters // 10
    assert Budget("10%", parameters).bytes == parameters // 5


# --- all of it, in small ---


def tiny(folder: Path) -> Path:
    """A random Llama of the same architecture, 60 k parameters, with a chat tokenizer."""
    import torch
    from transformers import LlamaForCausalLM

    tokenizer = llama_tokenizer()
    config = llama_8b()
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "head_dim": 8,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    for field, value in shape.items():
        setattr(config, field, value)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


SHORT = '''
"""`math_code` with its recipe cut to a few steps."""

from dataclasses import replace
from cl_graft import plugins


def short(*, seed, data_dir=None, math_sft: str, math_dpo: str, code_sft: str, code_dpo: str):
    make = plugins.load("scenario", "math_code")
    made = make(
        seed=seed, data_dir=data_dir, max_new_tokens=8,
        math_sft=math_sft, math_dpo=math_dpo, code_sft=code_sft, code_dpo=code_dpo,
    )
    preference = made.tasks[0].training.preference
    preference = replace(preference, steps=2, epochs=None, batch=4, learning_rate=1e-3)
    return made.with_training(
        steps=3, epochs=None, batch=4, learning_rate=1e-2, preference=preference
    )
'''.replace(": str", ': str = ""')


@pytest.mark.slow
def test_the_whole_configuration_runs_with_the_target_swapped(
    local: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SFT, DPO on the given pairs, compression, all four benchmarks; then continued from disk."""
    (tmp_path / "short.py").write_text(SHORT)
    given = {
        "scenario": str(tmp_path / "short.py"),
        "strategy": "graftllm",
        "model": str(tiny(tmp_path / "tiny")),
        "budget": "30%",  # headers weigh much in a pack this small
        "data_dir": local.pop("data_dir"),
        "options": {"short": local},
        "out": tmp_path / "out",
        "wandb": "off",
    }
    with pytest.raises(ConsentNeeded):
        cl_graft.run(**given)
    result = cl_graft.run(**given, allow_code_execution=True)
    assert result["complete"] and result["tasks"] == ["math", "code"]
    assert result["n"] == [[5, 2]] * 3
    assert set(result["extra_matrices"]) == {"GSM8K", "MATH", "HumanEval", "MBPP"}
    assert [row[1] for row in result["extra_matrices"]["GSM8K"]] == [None] * 3
    assert all(0 <= x <= 1 for row in result["matrix"] for x in row)
    assert all(0 < size <= result["budget_bytes"] for size in result["pack_bytes"])
    (marker,) = (tmp_path / "out").glob("*/cell.json")
    folder = marker.parent
    experiences = sorted((folder / "experiences").iterdir())
    for experience in experiences[1:]:
        losses = json.loads((experience / "experience.json").read_text())["losses"]
        assert any("rewards/accuracies" in point for point in losses), "DPO took place"
    lines = [json.loads(x) for x in (experiences[0] / "examples.jsonl").read_text().splitlines()]
    assert [line["metric"] for line in lines] == ["math"] * 5 + ["tests"] * 2
    (folder / "result.json").unlink()
    again = cl_graft.run(**given, allow_code_execution=True)
    assert (
        again["matrix"] == result["matrix"] and again["extra_matrices"] == result["extra_matrices"]
    )


@pytest.mark.slow
def test_a_target_without_a_chat_template_is_refused(local: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "short.py").write_text(SHORT)
    with pytest.raises(CLGraftError, match="no chat template"):
        cl_graft.run(
            scenario=str(tmp_path / "short.py"),
            strategy="individual",
            model="nano-llama",
            data_dir=local.pop("data_dir"),
            options={"short": local},
            out=tmp_path / "out",
            wandb="off",
            allow_code_execution=True,
        )
