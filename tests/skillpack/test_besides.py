"""What tuning changes besides weights goes along: how the model computes, how it is spoken to, where it stops."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from cl_graft.errors import CLGraftError
from cl_graft.skillpack.folders.apply import apply_pack
from cl_graft.skillpack.folders.besides import OwnCode, carried, changed_settings
from cl_graft.skillpack.folders.checkpoint import Checkpoint
from cl_graft.skillpack.folders.pair import PairError
from cl_graft.skillpack.format.file import SkillPack
from cl_graft.skillpack.live.attach import Attached
from cl_graft.skillpack.live.grafted import Grafted
from tests.command import Call
from tests.model_folders import grafts_to, llama, pack_of, saved, tensors, tokenizer, tuned
from tests.refusals import one_sentence

TEMPLATE = "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved(llama(), tmp_path / "base")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def made(base: Path, folder: Path) -> tuple[SkillPack, str]:
    """The pack of two folders, and all that `create` told."""
    out = folder.parent / f"{folder.name}.safetensors"
    notes = pack_of(base, folder, out).notes
    return SkillPack.load(out), "\n".join(notes)


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(torch.arange(8)[None]).logits


def contents(folder: Path) -> dict[str, bytes]:
    """All that a model folder holds besides weights, config.json and the record of how it was grafted."""
    kinds = (".safetensors", "config.json", "skillpack.json")
    files = [f for f in folder.rglob("*") if f.is_file() and not f.name.endswith(kinds)]
    files += [f for f in folder.glob("*_config.json")]
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


# --- how the model computes --------------------------------------------------------------------


def test_more_layers(base: Path, tmp_path: Path) -> None:
    """LLaMA Pro (arXiv 2401.02415): a copy of a layer that adds nothing, then trained, between two others."""
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
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in start.model.layers[1].parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    folder = saved(start, tmp_path / "tuned")
    pack, told = made(base, folder)
    assert len(pack.added) == 9 and "9 tensors (model.layers.2." in told
    assert "num_hidden_layers: 3 instead of 2" in told and "training began from" in told
    apply_pack(base, pack, tmp_path / "out")
    assert Checkpoint(tmp_path / "out").config["num_hidden_layers"] == 3
    assert torch.allclose(logits(tmp_path / "out"), logits(folder), atol=1e-2)
    smaller, told = made(tmp_path / "start", folder)
    assert not smaller.added and not smaller.files and smaller.nbytes < pack.nbytes
    with pytest.raises(CLGraftError, match="`cl-graft pack apply`"):
        Grafted(llama()).activate([pack])


def test_fewer_layers(base: Path, tmp_path: Path) -> None:
    folder = saved(tuned(llama(num_hidden_layers=1)), tmp_path / "tuned")
    said = one_sentence(lambda: pack_of(base, folder, tmp_path / "none"), PairError)
    assert "lacks 'model.layers.1." in said and not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_parameters", {"rope_theta": 5e5, "rope_type": "default"}),
        ("rope_parameters", {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}),
        ("rms_norm_eps", 0.1),
        ("hidden_act", "gelu"),
    ],
)
def test_another_use_of_the_same_weights(key: str, value: Any, base: Path, tmp_path: Path) -> None:
    """What is grafted computes as the tuned model does; with the base's own config.json it would not."""
    saved(llama(initializer_range=0.2), base)
    folder = saved(tuned(llama(initializer_range=0.2)), tmp_path / "tuned")
    edit(folder / "config.json", **{key: value})
    pack, told = made(base, folder)
    assert list(pack.files) == ["config.json"] and f"config.json ({key}: " in told
    apply_pack(base, pack, tmp_path / "out")
    missed = float((logits(tmp_path / "out") - logits(folder)).norm())
    shutil.copy(base / "config.json", tmp_path / "out")
    assert missed < 0.1 * float((logits(tmp_path / "out") - logits(folder)).norm())


def test_what_belongs_to_the_base_stays(base: Path, tmp_path: Path) -> None:
    """dtype, code of its own and where it came from: of the base; a setting that it had and the tuned has not goes."""
    edit(base / "config.json", dtype="bfloat16", rope_scaling=None, auto_map={"A": "b"}, more=3)
    folder = saved(tuned(llama(max_position_embeddings=64)), tmp_path / "tuned")
    edit(folder / "config.json", auto_map={"X": "y"}, _name_or_path="/home/me")
    pack, _ = made(base, folder)
    assert b"/home/me" not in pack.files["config.json"].content()
    apply_pack(base, pack, tmp_path / "out")
    config = Checkpoint(tmp_path / "out").config
    assert config["dtype"] == "bfloat16" and config["auto_map"] == {"A": "b"}
    assert config["max_position_embeddings"] == 64 and "more" not in config
    assert "/home/me" not in config.values()


LLAMA = {"model_type": "llama"}
QWEN = {"model_type": "qwen2", "num_hidden_layers": 2}
GEMMA = {"model_type": "gemma3", "text_config": {"rms_norm_eps": 1e-6}}


@pytest.mark.parametrize(
    ("base", "tuned"),
    [
        (LLAMA | {"rope_theta": 1e4}, LLAMA),  # the class's default
        (LLAMA | {"rope_theta": 5e5}, LLAMA | {"rope_parameters": {"rope_theta": 5e5}}),
        (LLAMA, LLAMA | {"use_cache": False, "torch_dtype": "float16", "_name_or_path": "x"}),
        (LLAMA | {"vocab_size": 5}, LLAMA | {"vocab_size": 6}),  # told by the tensors
    ],
)
def test_what_makes_no_difference(base: dict[str, Any], tuned: dict[str, Any]) -> None:
    assert changed_settings(base, tuned) == []


@pytest.mark.parametrize(
    ("told", "base", "tuned"),
    [
        (
            "sliding_window: 9 instead of None",
            QWEN,
            QWEN | {"use_sliding_window": True, "sliding_window": 9},
        ),
        (
            "text_config.rms_norm_eps: 1e-05 instead of 1e-06",
            *(GEMMA | {"text_config": {"rms_norm_eps": e}} for e in (1e-6, 1e-5)),
        ),
        ("hidden_act: gelu instead of silu", LLAMA, LLAMA | {"hidden_act": "gelu"}),
        ("own_key: 3 instead of None", LLAMA, LLAMA | {"own_key": 3}),
        ("eos_token_id: 7 instead of 2", LLAMA, LLAMA | {"eos_token_id": 7}),
    ],
)
def test_what_makes_one(told: str, base: dict[str, Any], tuned: dict[str, Any]) -> None:
    assert told in changed_settings(base, tuned)


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


def test_chat_template_and_end_token_go_along(
    base: Path, chat: Path, tmp_path: Path, call: Call
) -> None:
    """`create`, `inspect` and `apply` name them; the result stops where the tuned model does."""
    pack = tmp_path / "pack.safetensors"
    done = call("pack", "create", "--base", base, "--tuned", chat, "--out", pack, "--budget", "50%")
    what = "config.json (eos_token_id: 28 instead of 27), chat template, end token ('<|end|>', id 28 instead of '</s>', id 27)"
    assert f"The tuned model has its own {what} and generation settings: in the pack" in done.out
    names = {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
    }
    shown = json.loads(call("pack", "inspect", pack, "--json").out)["files"]
    sizes = {name: (chat / name).stat().st_size for name in names - {"config.json"}}
    assert shown.keys() == names and shown.items() >= sizes.items()
    assert "chat_template.jinja" in call("pack", "inspect", pack).out
    assert call("pack", "verify", pack).code == 0
    words = ["--base", base, "--pack", pack]
    done = call("pack", "apply", *words, "--out", tmp_path / "out")
    assert (
        done.code == 0
        and f"{', '.join(sorted(names)[:-1])} and {sorted(names)[-1]}: as the" in done.out
    )
    out = tmp_path / "out"
    assert GenerationConfig.from_pretrained(out).eos_token_id == 28
    assert Checkpoint(out).config["eos_token_id"] == 28
    assert AutoTokenizer.from_pretrained(out).eos_token_id == 28
    assert AutoTokenizer.from_pretrained(out).chat_template == TEMPLATE
    assert contents(out) == contents(chat)
    assert call("pack", "remove", "--grafted", out, *words).code == 0


def test_what_the_tuned_model_has_not_is_left_out(base: Path, tmp_path: Path) -> None:
    """A base that is spoken to by templates, and a tuned model that is not."""
    tokenizer("</s>", TEMPLATE).save_pretrained(base)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (base / "notes.txt").write_text("mine")
    folder = saved(tuned(llama()), tmp_path / "tuned")
    pack, told = made(base, folder)
    assert "its own chat template: in the pack" in told
    gone = {"chat_template.jinja", "additional_chat_templates/tools.jinja"}
    assert {name for name, file in pack.files.items() if not file.size} == gone
    apply_pack(base, pack, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(folder) | {"notes.txt": b"mine"}
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template is None


def test_a_folder_without_a_tokenizer_has_none_of_its_own(base: Path, chat: Path) -> None:
    for file in [
        *chat.glob("token*"),
        chat / "generation_config.json",
        chat / "chat_template.jinja",
    ]:
        file.unlink()
    found = carried(base, chat)
    assert list(found.files) == ["config.json"]


def test_new_words(base: Path, tmp_path: Path) -> None:
    model = llama()
    model.resize_token_embeddings(50)
    folder = tmp_path / "tuned"
    tuned(model).save_pretrained(folder)
    wide = tokenizer()
    wide.add_tokens([f"<{n}>" for n in range(21)])
    wide.save_pretrained(folder)
    pack, told = made(base, folder)
    assert "its own tokenizer: in the pack" in told and "no text" not in told
    apply_pack(base, pack, tmp_path / "out")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 50
    assert (
        logits(tmp_path / "out").shape[-1]
        == Checkpoint(tmp_path / "out").config["vocab_size"]
        == 50
    )


def test_more_words_than_rows_are_told(base: Path, tmp_path: Path) -> None:
    folder = saved(tuned(llama()), tmp_path / "tuned")
    wide = tokenizer()
    wide.add_tokens([f"<{n}>" for n in range(30)])
    wide.save_pretrained(folder)
    assert (
        f"The tokenizer of {folder} has the id 58 and the embedding 48 rows"
        in made(base, folder)[1]
    )


def test_one_tokenizer_in_two_spellings(base: Path, tmp_path: Path) -> None:
    """Padding of the last call, blanks, and merges as strings or as pairs: no difference."""
    folder = saved(tuned(llama()), tmp_path / "tuned")
    for place, merges in ((base, ["a b"]), (folder, [["a", "b"]])):
        found = json.loads((place / "tokenizer.json").read_text())
        found["model"]["merges"] = merges
        found["padding"] = None if place == base else {"strategy": "BatchLongest"}
        (place / "tokenizer.json").write_text(json.dumps(found, indent=0 if place == base else 9))
    assert carried(base, folder).files == {}
    found["model"]["merges"] = [["b", "a"]]
    (folder / "tokenizer.json").write_text(json.dumps(found))
    assert list(carried(base, folder).files) == ["tokenizer.json"]


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_code_of_its_own_is_refused(name: str, base: Path, chat: Path, tmp_path: Path) -> None:
    """And the cure: without the key, the folder is read as it was."""
    key = "auto_map" if name.startswith("tok") else "custom_generate"
    edit(chat / name, **{key: {"AutoTokenizer": ["me/mine--tokenizer.Mine", None]}})
    said = one_sentence(lambda: pack_of(base, chat, tmp_path / "none"), OwnCode)
    assert str(chat / name) in said and f"'{key}'" in said and "save it without" in said
    found = json.loads((chat / name).read_text())
    del found[key]
    (chat / name).write_text(json.dumps(found))
    assert name in made(base, chat)[0].files


def test_a_live_model_says_what_it_does_not_take(base: Path, chat: Path) -> None:
    pack, _ = made(base, chat)
    model = llama()
    with pytest.warns(
        UserWarning, match="also holds chat_template.jinja, config.json, .*pack apply"
    ):
        Grafted(model).activate([pack])
    with pytest.warns(UserWarning, match="does not take"), Attached(llama(), [pack]):
        pass


# --- nothing at all ----------------------------------------------------------------------------


def test_an_empty_pack_is_no_pack(base: Path, tmp_path: Path) -> None:
    same = saved(llama(), tmp_path / "same")
    said = one_sentence(lambda: pack_of(base, same, tmp_path / "none"), PairError)
    assert "no tensor of" in said and not (tmp_path / "none").exists()
    grafted = saved(tuned(llama()), tmp_path / "tuned")
    grafts_to(base, grafted, tensors(grafted), tmp_path / "out")
