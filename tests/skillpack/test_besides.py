"""What tuning changes besides weights: refused where a pack would compute something else, named where it would stop elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from cl_graft.errors import CLGraftError
from cl_graft.skillpack.folders.besides import computing, told_changes
from cl_graft.skillpack.folders.checkpoint import Checkpoint
from tests.command import Call
from tests.model_folders import grafts_to, llama, pack_of, saved, tensors, tokenizer, tuned
from tests.refusals import one_sentence

TEMPLATE = "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved(llama(), tmp_path / "base")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def told(base: Path, folder: Path, *words: str) -> None:
    out = folder.parent / "none.safetensors"
    said = one_sentence(lambda: pack_of(base, folder, out), CLGraftError)
    assert all(word in said for word in words), said
    assert not out.exists()


# --- how the model computes --------------------------------------------------------------------


def test_more_layers(base: Path, tmp_path: Path) -> None:
    """LLaMA Pro (arXiv 2401.02415): a copy of a layer that adds nothing, then trained; the cure is that start."""
    start = llama(num_hidden_layers=3)
    inner = llama().model
    for target, source in ((0, 0), (1, 0), (2, 1)):
        start.model.layers[target].load_state_dict(inner.layers[source].state_dict())
    rest = {n: t for n, t in llama().state_dict().items() if ".layers." not in n}
    start.load_state_dict(rest, strict=False)
    with torch.no_grad():
        start.model.layers[1].self_attn.o_proj.weight.zero_()
        start.model.layers[1].mlp.down_proj.weight.zero_()
    saved(start, tmp_path / "start")
    ids = torch.arange(8)[None]
    assert torch.allclose(start(ids).logits, llama()(ids).logits, atol=1e-6)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in start.model.layers[1].parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    folder = saved(start, tmp_path / "tuned")
    told(base, folder, f"num_hidden_layers is 2 in {base} and 3 in {folder}", "training began from")
    grafts_to(tmp_path / "start", folder, tensors(folder), tmp_path / "out")
    grafted = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "grafted")
    assert torch.allclose(grafted(ids).logits, start(ids).logits, atol=1e-2)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_parameters", {"rope_theta": 5e5, "rope_type": "default"}),
        ("rope_parameters", {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}),
        ("rms_norm_eps", 1e-5),
        ("hidden_act", "gelu"),
    ],
)
def test_another_use_of_the_same_weights(key: str, value: Any, base: Path, tmp_path: Path) -> None:
    """The cure: the same value in a copy of the base's config.json; what is grafted then computes as the tuned does."""
    folder = saved(tuned(llama()), tmp_path / "tuned")
    edit(folder / "config.json", **{key: value})
    told(base, folder, f"{key} is ", str(base), str(folder), "a copy of the base")
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    edit(copy / "config.json", **{key: value})
    grafts_to(copy, folder, tensors(folder), tmp_path / "out")
    ids = torch.arange(8)[None]
    one, other = (
        AutoModelForCausalLM.from_pretrained(f)(ids).logits
        for f in (tmp_path / "out/grafted", folder)
    )
    assert torch.allclose(one, other, atol=1e-2)


LLAMA = {"model_type": "llama"}
QWEN = {"model_type": "qwen2", "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("base", "tuned"),
    [
        (LLAMA | {"rope_theta": 1e4}, LLAMA),  # the class's default
        (LLAMA | {"rope_theta": 5e5}, LLAMA | {"rope_parameters": {"rope_theta": 5e5}}),
        (LLAMA, LLAMA | {"attention_dropout": 0.1, "use_cache": False, "torch_dtype": "float16"}),
        (QWEN | {"sliding_window": 4096}, QWEN | {"sliding_window": 9, "max_window_layers": 1}),
    ],
)
def test_what_makes_no_difference(base: dict[str, Any], tuned: dict[str, Any]) -> None:
    """Defaults, spellings of other versions, training alone, and a sliding window that is not used."""
    assert computing(base, tuned) == {}


@pytest.mark.parametrize(
    ("key", "base", "tuned"),
    [
        ("sliding_window", QWEN, QWEN | {"use_sliding_window": True, "max_window_layers": 0}),
        (
            "text_config.rms_norm_eps",
            *({"model_type": "gemma3", "text_config": {"rms_norm_eps": e}} for e in (1e-6, 1e-5)),
        ),
        ("hidden_act", LLAMA, LLAMA | {"hidden_act": "gelu"}),
    ],
)
def test_what_makes_one(key: str, base: dict[str, Any], tuned: dict[str, Any]) -> None:
    assert key in computing(base, tuned)


def test_what_is_told() -> None:
    """A longer context changes no weight's use; a key that no class knows may mean anything."""
    other = LLAMA | {"max_position_embeddings": 4096, "own_key": 3, "eos_token_id": 7}
    first, second = told_changes(LLAMA, other)
    assert "max_position_embeddings is 2048 in the base, 4096 in the tuned" in first
    assert "own_key is None in the base, 3 in the tuned" in second


# --- how it is spoken to, and where it stops ---------------------------------------------------


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    """One vocabulary, and a template and an end of its own, as Llama 3.1 Instruct has."""
    model = tuned(llama())
    model.config.eos_token_id = model.generation_config.eos_token_id = 28
    model.generation_config.temperature, model.generation_config.do_sample = 0.6, True
    model.save_pretrained(tmp_path / "chat")
    tokenizer("<|end|>", TEMPLATE).save_pretrained(tmp_path / "chat")
    return tmp_path / "chat"


def test_chat_template_and_end_token_are_told_and_taken_over(
    base: Path, chat: Path, tmp_path: Path, call: Call
) -> None:
    """`create` and `apply` name them; with the option that both print, the result stops where the tuned model does."""
    pack = tmp_path / "pack.safetensors"
    done = call("pack", "create", "--base", base, "--tuned", chat, "--out", pack, "--budget", "50%")
    what = "chat template, end token ('<|end|>', id 28 instead of '</s>', id 27) and generation settings"
    option = f"`cl-graft pack apply --tokenizer {chat}`"
    assert f"The tuned model has its own {what}: not in the pack" in done.out and option in done.out
    words = ["pack", "apply", "--base", base, "--pack", pack]
    done = call(*words, "--out", tmp_path / "plain")
    assert f"{tmp_path / 'plain'} has the base's chat template, end token and" in done.out
    assert "give --tokenizer" in done.out
    done = call(*words, "--out", tmp_path / "whole", "--tokenizer", chat)
    assert done.code == 0 and "give --tokenizer" not in done.out
    ends = {"plain": 27, "whole": 28}
    for name, end in ends.items():
        made = tmp_path / name
        assert GenerationConfig.from_pretrained(made).eos_token_id == end
        assert Checkpoint(made).config["eos_token_id"] == end
        assert AutoTokenizer.from_pretrained(made).eos_token_id == end
        assert bool(AutoTokenizer.from_pretrained(made).chat_template) == (name == "whole")
    assert call("pack", "remove", "--grafted", tmp_path / "whole", *words[2:]).code == 0


def test_a_tokenizer_that_does_not_fit(base: Path, chat: Path, tmp_path: Path, call: Call) -> None:
    """The tuned model's own does."""
    pack_of(base, chat, tmp_path / "pack")
    words = [
        "pack",
        "apply",
        "--base",
        base,
        "--pack",
        tmp_path / "pack",
        "--out",
        tmp_path / "out",
    ]
    (tmp_path / "bare").mkdir()
    assert "holds no tokenizer" in call(*words, "--tokenizer", tmp_path / "bare").reason
    wide = tokenizer()
    wide.add_tokens([f"<{n}>" for n in range(30)])
    wide.save_pretrained(tmp_path / "wide")
    assert (
        "has the id 58 and the embedding 48 rows"
        in call(*words, "--tokenizer", tmp_path / "wide").reason
    )
    assert not (tmp_path / "out").exists()
    assert call(*words, "--tokenizer", chat).code == 0


def test_a_folder_without_a_tokenizer_has_none_of_its_own(
    base: Path, chat: Path, tmp_path: Path
) -> None:
    for file in chat.glob("token*"):
        file.unlink()
    assert not any("not in the pack" in note for note in pack_of(base, chat, tmp_path / "p").notes)


def test_new_words(base: Path, tmp_path: Path, call: Call) -> None:
    model = llama()
    model.resize_token_embeddings(50)
    folder = tmp_path / "tuned"
    tuned(model).save_pretrained(folder)
    wide = tokenizer()
    wide.add_tokens([f"<{n}>" for n in range(21)])
    wide.save_pretrained(folder)
    notes = pack_of(base, folder, tmp_path / "pack").notes
    assert any("its own tokenizer: not in the pack" in note for note in notes)
    words = [
        "pack",
        "apply",
        "--base",
        base,
        "--pack",
        tmp_path / "pack",
        "--out",
        tmp_path / "out",
    ]
    assert call(*words, "--tokenizer", folder).code == 0
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 50


# --- nothing at all ----------------------------------------------------------------------------


def test_an_empty_pack_is_no_pack(base: Path, tmp_path: Path) -> None:
    told(base, saved(llama(), tmp_path / "same"), "no tensor of", "differs", "the tuned model")
    grafted = saved(tuned(llama()), tmp_path / "tuned")
    grafts_to(base, grafted, tensors(grafted), tmp_path / "out")
