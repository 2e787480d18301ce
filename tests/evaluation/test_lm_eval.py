"""lm-evaluation-harness as a scorer: its own figures, document by document, on the model in memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="not installed: pip install cl-graft[lm-eval]")

from cl_graft.config import RunConfig
from cl_graft.data import harness
from cl_graft.errors import CLGraftError
from cl_graft.evaluation.scorers import Examinee, Scored, score
from cl_graft.experiment import cell
from cl_graft.models.chat import rendered
from cl_graft.store.files import RecordError
from cl_graft.task import Scenario
from tests.chat import CHATML
from tests.refusals import one_sentence

ROWS = "dataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl, train: shots.jsonl}}\n"
ROWS += "test_split: test\nfewshot_split: train\n"
CHOICE = (
    ROWS
    + """
task: larger
output_type: multiple_choice
doc_to_text: "{{a}} + {{b}} ="
doc_to_choice: options
doc_to_target: right
metric_list: [{metric: acc}, {metric: acc_norm}]
metadata: {version: 1.5}
"""
)
WRITTEN = (
    ROWS
    + """
task: written
output_type: generate_until
doc_to_text: "{{a}} + {{b}} ="
doc_to_target: "{{a + b}}"
num_fewshot: 2
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
filter_list:
  - {name: strict, filter: [{function: take_first}]}
  - {name: digit, filter: [{function: regex, regex_pattern: "(\\\\d)"}, {function: take_first}]}
"""
)


def rows(count: int, begin: int = 0) -> list[dict[str, Any]]:
    made = []
    for a in range(begin, begin + count):
        b = a * 7 % 5
        made.append({"a": a, "b": b, "options": [str(3 * a + 1), str(a + b), "none"], "right": 1})
    return made


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Task files and their rows; nothing is fetched."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name, those in (("rows", rows(12)), ("shots", rows(6, 20))):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in those))
    (tmp_path / "larger.yaml").write_text(CHOICE)
    (tmp_path / "written.yaml").write_text(WRITTEN)
    return tmp_path


def outcomes(model: Any, documents: list[Any], scoring: Any) -> list[Scored]:
    return score(Examinee(*model, 8, 512), documents, [scoring])["lm_eval"]


def own(model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, **more: Any) -> dict[str, Any]:
    """What lm-eval itself says of the tasks in the folder, run from there."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(folder)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    with harness.quiet():
        return simple_evaluate(
            HFLM(model[0], tokenizer=model[1], batch_size=8),
            tasks=["larger", "written"],
            task_manager=manager,
            bootstrap_iters=0,
            log_samples=True,
            **more,
        )


def log_probability(model: Any, text: str, start: str) -> float:
    """Of the tokens of `text` after those of `start`, by one plain forward."""
    ids = model[1](text, return_tensors="pt")["input_ids"]
    begin = len(model[1](start)["input_ids"])
    with torch.no_grad():
        scores = model[0](ids).logits[0, :-1].log_softmax(-1)
    return sum(scores[i - 1, ids[0, i]].item() for i in range(begin, ids.shape[1]))


def test_choices_by_brute_force(nano: Any, folder: Path) -> None:
    """`acc`: the likeliest by the sum over " choice", with no end-of-sequence; `acc_norm`: by that a character of the
    choice, the blank not counted."""
    documents, scoring = harness.measured_by("larger.yaml,larger.yaml:acc_norm", folder)
    scored = outcomes(nano, documents, scoring)
    assert len(documents) == len(scored) == 24
    for row, plain, norm in zip(rows(12), scored[:12], scored[12:], strict=True):
        start = f"{row['a']} + {row['b']} ="
        sums = [log_probability(nano, f"{start} {o}", start) for o in row["options"]]
        of_each = [s / len(o) for s, o in zip(sums, row["options"], strict=True)]
        assert plain.score == float(max(sums) == sums[1])
        assert norm.score == float(max(of_each) == of_each[1])
        assert plain.answer == f" {row['options'][sums.index(max(sums))]}"
    assert len({s.score for s in scored}) == 2  # else nothing was told apart


@pytest.mark.parametrize("shots", [None, 3])
def test_the_figures_are_lm_evals_own_document_by_document(
    nano: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, shots: int | None
) -> None:
    """With the task's own number of examples before a question, and with another, which are the same examples."""
    told = own(nano, folder, monkeypatch, num_fewshot=shots)
    for named, task, metric, name in (
        ("larger.yaml", "larger", "acc", "none"),
        ("larger.yaml:acc_norm", "larger", "acc_norm", "none"),
        ("written.yaml", "written", "exact_match", "strict"),
        ("written.yaml:digit", "written", "exact_match", "digit"),
    ):
        documents, scoring = harness.measured_by(named, folder)
        chosen = {} if shots is None else {"num_fewshot": shots}
        scored = outcomes(nano, documents, replace(scoring, options={**scoring.options, **chosen}))
        theirs = [s for s in told["samples"][task] if s["filter"] == name]
        assert [s.score for s in scored] == [s[metric] for s in theirs]
        assert sum(s.score for s in scored) / 12 == told["results"][task][f"{metric},{name}"]
        if task == "written":
            assert [s.answer for s in scored] == [s["resps"][0][0] for s in theirs]


def test_a_part_of_the_documents_is_scored_as_in_the_whole(nano: Any, folder: Path) -> None:
    """A router hands out groups: which examples stand before a question, does not depend on who else is asked."""
    documents, scoring = harness.measured_by("written.yaml:digit,larger.yaml", folder)
    whole = outcomes(nano, documents, scoring)
    order = Random("part").sample(range(24), 9)
    assert outcomes(nano, [documents[i] for i in order], scoring) == [whole[i] for i in order]
    some, _ = harness.measured_by("larger.yaml@5", folder)
    assert len(some) == 5 and set(some) < {replace(d) for d in documents}


def test_chat_is_what_the_scenario_says(
    nano: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its prompts are in the template, and lm-eval then puts all that it asks into the same, examples as turns."""
    nano[1].chat_template = "{{ bos_token }}" + CHATML
    told = own(nano, folder, monkeypatch, apply_chat_template=True)
    documents, scoring = harness.measured_by("written.yaml", folder)
    plain = Scenario(
        "x", (replace(harness.general([str(folder / "written.yaml")]), name="t"),), chat=True
    )
    (task,) = rendered(plain, nano[1]).tasks
    scored = outcomes(nano, list(task.test), scoring)
    theirs = [s for s in told["samples"]["written"] if s["filter"] == "strict"]
    assert [s.answer for s in scored] == [s["resps"][0][0] for s in theirs]
    assert theirs[0]["arguments"][0][0].count("<|im_start|>user") == 3
    assert [s.answer for s in outcomes(nano, documents, scoring)] != [s.answer for s in scored]


def test_model_tokenizer_and_chance_are_left_as_they_were(nano: Any, folder: Path) -> None:
    model, tokenizer = nano
    before = {name: p.clone() for name, p in model.named_parameters()}
    told = tokenizer.padding_side, tokenizer.pad_token, str(model.generation_config)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    documents, scoring = harness.measured_by("written.yaml,larger.yaml", folder)
    outcomes(nano, documents, scoring)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert (tokenizer.padding_side, tokenizer.pad_token, str(model.generation_config)) == told
    assert torch.equal(torch.get_rng_state(), state)


# --- what is found, and what is refused ---


@pytest.mark.parametrize("text", ["{{ ''.__class__ }}", "{{ a.__class__.__name__ }}"])
@pytest.mark.parametrize("key", ["doc_to_text", "doc_to_target", "gen_prefix", "description"])
def test_a_template_cannot_leave_the_sandbox(
    nano: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, key: str, text: str
) -> None:
    """lm-eval's own environment is no sandbox, and renders both to the name of a class."""
    monkeypatch.chdir(folder)
    kept = [line for line in WRITTEN.splitlines() if not line.startswith(key)]
    (folder / "written.yaml").write_text("\n".join([*kept, f'{key}: "{text}"', ""]))

    def attempt() -> None:
        documents, scoring = harness.measured_by("written.yaml", folder)
        outcomes(nano, documents, scoring)

    message = one_sentence(attempt)
    assert "lm-eval cannot" in message and "Security" in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("metric: acc}", "metric: accc}"), "no metric of lm-eval"),
        (
            ("metric: acc}, {metric: acc_norm", "metric: f1"),
            "none of which is a mean over documents",
        ),
        (("rows.jsonl", "none.jsonl"), "lm-eval cannot make its task"),
        (("doc_to_choice: options", "doc_to_choice: option"), "lm-eval cannot make its task"),
    ],
)
def test_a_task_that_cannot_be_made(folder: Path, change: tuple[str, str], words: str) -> None:
    """A metric that lm-eval does not know, it would download and run."""
    (folder / "larger.yaml").write_text(CHOICE.replace(*change))
    assert words in one_sentence(lambda: harness.measured_by("larger.yaml", folder))


def test_a_metric_that_a_task_does_not_have(folder: Path) -> None:
    for named in ("larger.yaml:acc_nrm", "written.yaml:strct"):
        assert "did you mean" in one_sentence(lambda n=named: harness.measured_by(n, folder))  # type: ignore[misc]


def test_tasks_tags_and_groups_of_the_package(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it has them: these files stand for the 14,000 that are read to find one. Its own may name code."""
    from lm_eval.tasks import TaskManager

    (folder / "code.py").write_text(
        "def text(doc):\n    return f\"{doc['a']} plus {doc['b']} is\"\n"
    )
    own_code = CHOICE.replace('doc_to_text: "{{a}} + {{b}} ="', "doc_to_text: !function code.text")
    (folder / "spelled.yaml").write_text(own_code.replace("larger", "spelled") + "tag: both\n")
    (folder / "larger.yaml").write_text(CHOICE + "tag: both\n")
    group = "group: all\ntask: [larger, spelled]\naggregate_metric_list: [{metric: acc, weight_by_size: %s}]\n"
    (folder / "all.yaml").write_text(group % "true")
    (folder / "even.yaml").write_text(group.replace("all", "even") % "false")
    programs = CHOICE.replace("larger", "programs").replace("{metric: acc}", "{metric: code_eval}")
    (folder / "programs.yaml").write_text(programs + "unsafe_code: true\n")
    monkeypatch.chdir(folder)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    monkeypatch.setattr(harness, "_index", lambda: manager)
    harness._of_package.cache_clear()
    documents, scoring = harness.measured_by("spelled,all,both:acc_norm")
    assert [d.suite for d in documents[::12]] == [
        "spelled", "all", "all", "larger:acc_norm", "spelled:acc_norm",
    ]  # fmt: skip
    assert documents[0].prompt == "0 plus 0 is"
    assert scoring.options["made_by"].endswith("spelled 1.5, larger 1.5")
    assert "name its tasks one by one: larger,spelled" in one_sentence(
        lambda: harness.measured_by("even")
    )
    assert "did you mean larger" in one_sentence(lambda: harness.measured_by("largr"))
    assert "outside the sandbox" in one_sentence(lambda: harness.measured_by("programs"))
    harness._of_package.cache_clear()


def test_an_example_that_is_no_document(nano: Any, tiny_scenario: Scenario) -> None:
    from cl_graft.evaluation.scorers import resolved

    task = replace(tiny_scenario.tasks[0], score="lm_eval")
    with pytest.raises(CLGraftError, match="no document of a task of lm-eval"):
        resolved(replace(tiny_scenario, tasks=(task,)), "mini", {})


# --- in a cell ---

STREAM = """
tasks:
  - name: sums
    train: shots.jsonl
    prompt: "{a} + {b} ="
    completion: " {options.1}"
    lm_eval: larger.yaml
    also: [neg_bits_per_byte]
    training: {steps: 2, batch: 2}
"""


def test_general_ability_and_a_task_s_score_in_a_cell(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Versions are in the record, one outcome a document is kept, the model is loaded once, and an edited task file is
    another experiment."""
    from transformers import AutoModelForCausalLM

    loads = []
    real = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM,
        "from_pretrained",
        lambda *args, **more: loads.append(args) or real(*args, **more),
    )
    monkeypatch.chdir(folder)
    Path("stream.yaml").write_text(STREAM)
    config = RunConfig(
        scenario="stream.yaml",
        strategy="individual",
        model="nano-llama",
        out=folder / "out",
        wandb="off",
        general=["./written.yaml:digit", "larger.yaml@5"],
    )
    result = cell.run(config)
    assert len(loads) == 1
    assert result["scenario"] == "stream(general=./written.yaml:digit,larger.yaml@5)"
    place = folder / "out" / config.cell
    record = json.loads((place / "cell.json").read_text())
    version = f"lm-eval {harness.version()}"
    conventions = record["conventions"]
    assert conventions["sums"]["lm_eval"] == f"its own code, {version}, larger 1.5"
    general = conventions["written:digit+larger"]["lm_eval"]
    assert general == f"its own code, {version}, written of no version, larger 1.5"
    files = {"lm-eval", "written.yaml", "larger.yaml", "rows.jsonl", "shots.jsonl"}
    assert set(record["sources"]["general"]) == files
    assert set(record["sources"]["scenario"]) >= {"stream.yaml", "shots.jsonl", "larger.yaml"}
    lines = [json.loads(line) for line in (place / "experiences/01/examples.jsonl").open()]
    kept = [line for line in lines if line["task"].startswith("general:")]
    assert len(kept) == 17 and {line["metric"] for line in kept} == {"lm_eval"}
    parts = json.loads((place / "experiences/01/experience.json").read_text())["general"]["sums"]
    assert (parts["written:digit"]["n"], parts["larger"]["n"], parts["score"]["n"]) == (12, 5, 17)
    assert parts["larger"]["stderr"] is not None
    assert cell.run(config) == result
    (place / "result.json").unlink()
    assert cell.run(config)["matrix"] == result["matrix"]  # from what was kept
    Path("written.yaml").write_text(WRITTEN + "# edited\n")
    with pytest.raises(RecordError, match="another written.yaml than there is now"):
        cell.run(config)
