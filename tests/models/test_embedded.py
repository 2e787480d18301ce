"""The embedded models: made here once, the same everywhere, and ordinary Hugging Face folders afterwards."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cl_graft import plugins
from cl_graft.data import DataError
from cl_graft.errors import UnknownName
from cl_graft.evaluation.generate import log_likelihoods
from cl_graft.models import corpus, embedded, toy_language
from cl_graft.models.load import load, locate
from cl_graft.skillpack.format.fingerprint import fingerprint
from tests.real import DATA, needs_data
from tests.refusals import one_sentence

NAME = "nano-llama"
WORLD = (toy_language.math, toy_language.code, toy_language.cipher, toy_language.general)


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(scope="module")
def made(caches: Path) -> Path:
    """nano-llama in a cache of this module's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CL_GRAFT_CACHE", str(caches / "one"))
        return embedded.obtain(NAME)


@pytest.fixture
def cache(made: Path, caches: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache that `made` is in, for a test that asks again."""
    monkeypatch.setenv("CL_GRAFT_CACHE", str(caches / "one"))
    return caches / "one"


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


# --- made once, the same everywhere ---


def test_a_model_is_cached_where_the_variable_says(made: Path, cache: Path) -> None:
    assert made.parent == cache / "models" and made.name.startswith(f"{NAME}-")
    before = {p: p.stat().st_mtime_ns for p in made.iterdir()}
    assert embedded.obtain(NAME) == made and locate(NAME) == str(made)
    assert {p: p.stat().st_mtime_ns for p in made.iterdir()} == before
    assert not list(made.parent.glob(".building-*"))


TRAINER = """
import sys
from dataclasses import asdict, replace
from cl_graft.models import embedded
train = embedded._train
def counted(*given):
    print("training", flush=True)
    train(*given)
embedded._train = counted
embedded.SPECS["nano-llama"] = replace(embedded.SPECS["nano-llama"], steps=5)
print(embedded.obtain("nano-llama"))
"""


@pytest.mark.slow
def test_two_processes_train_it_once_and_bit_for_bit_as_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another folder, in processes that allow themselves two threads."""
    environment = {**os.environ, "CL_GRAFT_CACHE": str(tmp_path / "there"), "OMP_NUM_THREADS": "2"}
    both = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", TRAINER],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    monkeypatch.setenv("CL_GRAFT_CACHE", str(tmp_path / "here"))
    monkeypatch.setitem(embedded.SPECS, NAME, replace(embedded.SPECS[NAME], steps=5))
    here = embedded.obtain(NAME)
    said = [process.communicate()[0].split("\n") for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum(lines.count("training") for lines in said) == 1
    (there,) = {Path(lines[-2]) for lines in said}
    assert there == tmp_path / "there" / "models" / here.name
    assert digests(there) == digests(here)


def test_a_training_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CL_GRAFT_CACHE", str(tmp_path))

    def interrupted(*args: Any) -> None:
        (args[2] / "half").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "_train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embedded.obtain(NAME)
    assert [p.name for p in (tmp_path / "models").iterdir() if p.is_dir()] == []


def test_what_a_killed_training_left_goes_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CL_GRAFT_CACHE", str(tmp_path))
    target = embedded.folder(NAME, [])
    (target.parent / f".building-{target.name}-abcd").mkdir(parents=True)
    (target.parent / ".building-other-abcd").mkdir()
    monkeypatch.setattr(
        embedded, "_train", lambda spec, texts, build, progress: (build / "all").touch()
    )
    assert embedded.obtain(NAME) == target
    left = {p.name for p in target.parent.iterdir() if p.is_dir()}
    assert left == {target.name, ".building-other-abcd"}, "another model may be in the making"


def test_a_cache_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CL_GRAFT_CACHE", str(tmp_path / "file"))
    message = one_sentence(lambda: embedded.obtain(NAME))
    assert f"{NAME} cannot be cached in {tmp_path / 'file'}" in message
    assert "CL_GRAFT_CACHE" in message


def test_the_folders_name_tells_all_that_makes_the_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = {embedded.folder(name, []).name for name in embedded.SPECS}
    names |= {embedded.folder(NAME, ["one"]).name, embedded.folder(NAME, ["two"]).name}
    for change in ({"steps": 61}, {"seed": 1}, {"version": 2}, {"lr": 4e-3}):
        monkeypatch.setitem(embedded.SPECS, NAME, replace(embedded.SPECS[NAME], **change))
        names.add(embedded.folder(NAME, []).name)
        monkeypatch.undo()
    assert len(names) == len(embedded.SPECS) + 6


def test_making_a_model_leaves_the_callers_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CL_GRAFT_CACHE", str(tmp_path))
    monkeypatch.setitem(embedded.SPECS, NAME, replace(embedded.SPECS[NAME], steps=1))
    torch.set_num_threads(2)
    embedded.obtain(NAME)
    assert torch.get_num_threads() == 2


# --- an ordinary folder ---


def test_it_loads_like_any_model(made: Path, cache: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = load(NAME)
    plain = AutoModelForCausalLM.from_pretrained(made)
    again = AutoTokenizer.from_pretrained(made)
    assert type(plain).__name__ == "LlamaForCausalLM"
    ours = dict(model.named_parameters())
    assert all(torch.equal(p, ours[n].cpu()) for n, p in plain.named_parameters())
    fresh = embedded.toy_tokenizer()
    rng = Random(1)
    for text in ["", *(i.question + i.answer for i in map(toy_language.pretraining, [rng] * 200))]:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"] == fresh(text)["input_ids"]
    assert again.padding_side == "left"
    special = (again.pad_token_id, again.bos_token_id, again.eos_token_id)
    assert special == (0, 1, 2) == (fresh.pad_token_id, fresh.bos_token_id, fresh.eos_token_id)
    assert len(again) == plain.config.vocab_size


def test_it_has_learned_something(made: Path, cache: Path) -> None:
    """New items of the world are far likelier than to the same model before its training."""
    model, tokenizer = load(NAME)
    torch.manual_seed(0)
    untrained = embedded.new_llama(embedded.SPECS[NAME], len(tokenizer))
    rng = Random(99)
    items = [toy_language.pretraining(rng) for _ in range(40)]
    pairs = [(toy_language.prompt(item.question), item.answer) for item in items]
    before, after = (sum(log_likelihoods(m, tokenizer, pairs, 128)) for m in (untrained, model))
    assert after > 0.8 * before


# --- the model that is shipped ---

SHIPPED = "mini-llama"


def test_what_is_shipped_is_what_its_recipe_makes() -> None:
    """A change of the recipe or of the world asks for the weights to be made anew, and for new published tables."""
    recipe = json.dumps(asdict(embedded.SPECS[SHIPPED]), sort_keys=True).encode()
    source = Path(toy_language.__file__).read_bytes()
    assert hashlib.sha256(recipe + source).hexdigest()[:16] == "b4d56ce60af65c37"
    model, _ = load(SHIPPED)
    assert fingerprint(model.named_parameters()).startswith("6dac0bbd")
    untrained = embedded.without_weights(SHIPPED)
    assert model.config.to_diff_dict() | {"dtype": None, "architectures": None} == (
        untrained.config.to_diff_dict() | {"dtype": None, "architectures": None}
    )
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in untrained.named_parameters()
    }


def test_what_is_shipped_reads_the_world_as_its_tokenizer_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is there without a cache."""
    monkeypatch.setenv("CL_GRAFT_CACHE", str(tmp_path / "cache"))
    folder = embedded.obtain(SHIPPED)
    assert not (tmp_path / "cache").exists()
    embedded.toy_tokenizer().save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((folder / name).read_text()) == json.loads((tmp_path / name).read_text())


# --- what it was pre-trained on ---


def pretraining_prompts(name: str) -> set[str]:
    """Every prompt of the model's pre-training, from the very batches that it is trained on."""
    spec = embedded.SPECS[name]
    batches = islice(embedded.batches_of(spec, []), spec.steps)
    return {prompt for batch in batches for prompt, _ in batch}


@pytest.mark.parametrize("name", [n for n, s in embedded.SPECS.items() if s.corpus == "world"])
def test_no_embedded_model_has_seen_a_test_prompt(name: str) -> None:
    """Neither at the sizes of the published tables nor in larger test sets, nor what validation draws."""
    seen = pretraining_prompts(name)
    assert len(seen) > 1000
    scenario = plugins.load("scenario", "mini")(seed=0, test_size=500, train_size=1)
    for task in (*scenario.tasks, scenario.general):
        held = {example.prompt for example in (*task.test, *task.validation)}
        assert len(held) == 500 + 64 * bool(task.validation) and not seen & held, task.name
    rng = Random(7)
    for source in WORLD:
        for question in {source(rng).question for _ in range(3000)}:
            if toy_language.part(question) != "training":
                assert toy_language.prompt(question) not in seen


# --- its tokenizer ---


TOKENIZER = embedded.toy_tokenizer()


def test_text_of_the_world_survives_the_tokenizer() -> None:
    rng = Random(5)
    for source in WORLD:
        for _ in range(200):
            item = source(rng)
            text = toy_language.prompt(item.question) + item.answer
            ids = TOKENIZER(text)["input_ids"]
            assert ids[0] == TOKENIZER.bos_token_id and TOKENIZER.unk_token_id not in ids
            assert TOKENIZER.decode(ids, skip_special_tokens=True) == text


@settings(deadline=None)
@given(st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=126) | st.just("\n")))
def test_any_plain_text_survives_the_tokenizer(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert TOKENIZER.unk_token_id not in ids
    assert TOKENIZER.decode(ids) == text


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Tom has 12 apples.", ["Tom", "has", "1", "2", "apples", "."]),
        ("applesauce", list("applesauce")),
        ("f(x): return x+3", ["f", "(", "x", ")", ":", "return", "x", "+", "3"]),
        ("é", ["<unk>"]),
    ],
)
def test_words_of_the_world_are_tokens_and_other_words_are_letters(
    text: str, tokens: list[str]
) -> None:
    """Blanks left out: they go with the word or stand alone."""
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    found = [token.strip() for token in TOKENIZER.convert_ids_to_tokens(ids)]
    assert [token for token in found if token] == tokens


# --- the model that is trained on the user's data ---


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Data of every file that `text-llama` reads, with test files and labels that it must not."""

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        listed = json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows))
        file.write_text(listed)

    for part in ("train", "test"):
        write(f"gsm8k/{part}.jsonl", [{"question": f"q {part}", "answer": "a" * 400}])
        for name in corpus.SENTENCES:
            rows = [{"sentence": f"s {part} {i}\r\nü", "label": "LABEL"} for i in range(5)]
            write(f"cl_benchmark/{name}/{part}.json", rows)
    programs = [{"text": f"t{i}", "code": f"c{i}", "task_id": i} for i in (600, 601, 974, 975)]
    write("mbpp/mbpp.jsonl", programs)
    return tmp_path


def test_the_corpus_holds_training_text_and_neither_tests_nor_labels(data_dir: Path) -> None:
    texts = corpus.texts(data_dir)
    assert len(texts) == 1 + 2 + 5 * 4
    assert texts[1:3] == ["# t601\nc601", "# t974\nc974"]
    assert max(map(len, texts)) == corpus.CHARACTERS
    everything = "".join(texts)
    assert "test" not in everything and "LABEL" not in everything and "\r" not in everything


def test_the_corpus_leaves_out_what_a_test_asks_too(data_dir: Path) -> None:
    """Whatever its blanks and capitals; MBPP's file holds training and test programs."""
    before = corpus.texts(data_dir)
    program, sentence = before[1], before[3]
    rows = [json.loads(line) for line in (data_dir / "mbpp/mbpp.jsonl").read_text().split("\n")]
    rows.append({"text": " T601 ", "code": "another", "task_id": 11})
    (data_dir / "mbpp/mbpp.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (data_dir / "mawps").mkdir()
    (data_dir / "mawps/test.jsonl").write_text(json.dumps({"input": f"{sentence.upper()} "}))
    assert program == "# t601\nc601" and before.count(sentence) == len(corpus.SENTENCES)
    assert corpus.texts(data_dir) == [t for t in before if t not in (program, sentence)]


@needs_data("mbpp", "gsm8k", "mawps", "cl_benchmark")
def test_no_real_test_question_is_in_the_corpus() -> None:
    """Not one of the questions that scenarios on real files ask by default is part of any text."""
    everything = "\n".join(" ".join(text.split()).lower() for text in corpus.texts(DATA))
    for name, options in (("math_then_code", {"math": "mawps+gsm8k"}), ("text_classification", {})):
        for task in plugins.load("scenario", name)(seed=0, data_dir=DATA, **options).tasks:
            for example in task.test:
                first = example.prompt.split("\n")[0]
                question = first.removeprefix("Question: ").removeprefix("# ")
                assert corpus.plain(question) not in everything, (task.name, question)


def test_text_llama_is_made_from_the_data_folder(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CL_GRAFT_CACHE", str(tmp_path / "cache"))
    spec = replace(embedded.SPECS["text-llama"], hidden=16, layers=1, heads=2, ffn=16, steps=2)
    monkeypatch.setitem(embedded.SPECS, "text-llama", spec)
    model, tokenizer = load("text-llama", data_dir)
    assert model.config.vocab_size == len(tokenizer)
    for text in ("Any text – even ünknown 漢字 \t\n", "digits 1234"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    (data_dir / "gsm8k" / "train.jsonl").write_text('{"question": "other", "answer": "1"}')
    assert embedded.folder("text-llama", corpus.texts(data_dir)).exists() is False


def test_text_llama_asks_for_the_data_folder(tmp_path: Path) -> None:
    assert "--data-dir" in one_sentence(lambda: locate("text-llama"), DataError)
    assert "gsm8k" in one_sentence(lambda: locate("text-llama", tmp_path), DataError)


# --- names and folders ---


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("mini-lama", "mini-llama"), ("nanollama", NAME), ("text_llama", "text-llama")],
)
def test_an_unknown_model_is_answered_with_the_nearest(typo: str, meant: str) -> None:
    assert f"no model named {typo!r}; did you mean {meant}" in one_sentence(
        lambda: locate(typo), UnknownName
    )


def test_a_hub_id_and_a_folder_are_taken_as_they_are(made: Path) -> None:
    assert locate("owner/model") == "owner/model"
    assert locate(str(made)) == str(made)
    for path in ("./owner/model", "/no/such/folder", "../model"):
        assert f"there is no folder {path}" in one_sentence(lambda p=path: locate(p))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    assert "holds no config.json" in one_sentence(lambda: locate(str(tmp_path)))


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


@pytest.mark.parametrize("damage", ["torn weights", "no weights", "no tokenizer", "torn config"])
def test_a_damaged_folder_is_refused_in_one_sentence(copy: Path, damage: str) -> None:
    if damage == "torn weights":
        weights = copy / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "no weights":
        (copy / "model.safetensors").unlink()
    elif damage == "no tokenizer":
        for file in copy.glob("token*"):
            file.unlink()
    else:
        (copy / "config.json").write_text("{")
    message = one_sentence(lambda: load(str(copy)))
    told = {
        "torn weights": [str(copy / "model.safetensors"), "bytes and not", "fetch it again"],
        "no weights": [str(copy), "no model.safetensors", "Hugging Face model"],
    }
    cannot = [f"model {str(copy)!r} cannot be loaded", "hub id"]
    assert all(word in message for word in told.get(damage, cannot))


def test_a_tokenizer_without_a_padding_token_pads_with_the_end(copy: Path) -> None:
    from transformers import AutoTokenizer

    plain = AutoTokenizer.from_pretrained(copy)
    plain.pad_token, plain.padding_side = None, "right"
    plain.save_pretrained(copy)
    _, tokenizer = load(str(copy))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id and tokenizer.padding_side == "left"
    plain.eos_token = None
    plain.save_pretrained(copy)
    assert "has no end-of-sequence token" in one_sentence(lambda: load(str(copy)))


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "was-run"
    classes = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    config = {"model_type": "own", "auto_map": classes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "pytorch_model.bin").write_bytes(b"weights")
    (tmp_path / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Config: pass\n")
    assert "cannot be loaded" in one_sentence(lambda: load(str(tmp_path)))
    assert not marker.exists()
