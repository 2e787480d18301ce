"""Model folders that can be read in two ways, or in part: refused, and whole again after what the sentence says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM

from cl_graft.errors import CLGraftError
from cl_graft.models.load import check, load
from cl_graft.models.weights import INDEX, WEIGHTS
from cl_graft.skillpack.folders.checkpoint import Checkpoint
from tests.command import Call
from tests.model_folders import grafts_to, llama, pack_of, rewrite, saved, tensors, tuned
from tests.models.test_roles import FAMILIES
from tests.refusals import one_sentence

MODEL = tuned(llama())
WANTED = {name: tensor.detach().clone() for name, tensor in MODEL.state_dict().items()}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved(llama(), tmp_path / "base")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return saved(MODEL, tmp_path / "tuned", max_shard_size="20KB")


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return saved(MODEL, tmp_path / "tuned")


def told(folder: Path, *words: str) -> str:
    """The sentence of `pack` and of `run`, `plan`, `validate` and `transfer`: the same."""
    said = one_sentence(lambda: Checkpoint(folder), CLGraftError)
    assert one_sentence(lambda: check(str(folder)), CLGraftError) == said
    assert all(word in said for word in words), said
    return said


# --- two saves ---------------------------------------------------------------------------------


def test_a_file_beside_the_index_of_another_save(base: Path, sharded: Path, tmp_path: Path) -> None:
    """transformers 5.23 reads the file and says nothing of the shards."""
    shutil.copy(base / WEIGHTS, sharded)
    read = AutoModelForCausalLM.from_pretrained(sharded).lm_head.weight
    assert torch.equal(read, tensors(base)["lm_head.weight"])
    told(sharded, f"{WEIGHTS} beside {INDEX}", f"move {WEIGHTS} out")
    (sharded / WEIGHTS).unlink()
    grafts_to(base, sharded, WANTED, tmp_path / "out")


def test_what_belongs_to_the_other_save(base: Path, sharded: Path, tmp_path: Path) -> None:
    """The cure's other half: the shards and their index are what is moved away."""
    rewrite(sharded, {name: tensor + 1 for name, tensor in WANTED.items()})
    told(sharded, "or what belongs to the other save")
    for file in [sharded / INDEX, *sharded.glob("model-*")]:
        file.unlink()
    grafts_to(base, sharded, {n: t + 1 for n, t in WANTED.items()}, tmp_path / "out")


def test_shards_of_another_save(base: Path, sharded: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        rewrite(sharded, tensors(base), f"model-{number:05}-of-00002.safetensors")
    told(sharded, "model-00001-of-00002.safetensors and 1 more like it", "does not list it")
    for file in sharded.glob("model-*-of-00002.safetensors"):
        file.unlink()
    grafts_to(base, sharded, WANTED, tmp_path / "out")


def test_shards_without_their_index(base: Path, sharded: Path, tmp_path: Path) -> None:
    shutil.move(sharded / INDEX, tmp_path)
    told(sharded, f"no {INDEX}", "fetch it too")
    shutil.move(tmp_path / INDEX, sharded)
    grafts_to(base, sharded, WANTED, tmp_path / "out")


@pytest.mark.parametrize("keep", ["safetensors", "bin"])
def test_two_formats(keep: str, base: Path, single: Path, tmp_path: Path) -> None:
    """transformers reads the safetensors and says nothing of the other, were it newer or not."""
    torch.save(llama(seed=5).state_dict(), single / "pytorch_model.bin")
    told(single, f"pytorch_model.bin beside {WEIGHTS}", "move pytorch_model.bin out")
    (single / ("pytorch_model.bin" if keep == "safetensors" else WEIGHTS)).unlink()
    if keep == "safetensors":
        grafts_to(base, single, WANTED, tmp_path / "out")
    else:
        assert torch.equal(load(str(single))[0].lm_head.weight, llama(seed=5).lm_head.weight)


def test_weights_that_no_reader_takes_are_no_second_save(single: Path) -> None:
    """Mistral's and Meta's own files, which come with many models of the hub."""
    rewrite(single, tensors(single), "consolidated.safetensors")
    (single / "optimizer.pt").write_bytes(b"0")
    assert Checkpoint(single).tensors.keys() == WANTED.keys()
    check(str(single))


def test_every_command_that_reads_a_model_says_so(
    base: Path, sharded: Path, call: Call, tmp_path: Path
) -> None:
    """Before anything is computed, in the same sentence."""
    shutil.copy(base / WEIGHTS, sharded)
    said = told(sharded, "two saves")
    (tmp_path / "sweep.yaml").write_text(
        f"scenarios: mini\nstrategies: lora\nmodels: {sharded}\nallow_code_execution: true\n"
    )
    pack = tmp_path / "pack.safetensors"
    pack_of(base, saved(MODEL, tmp_path / "good"), pack)
    cell = [
        "--scenario",
        "mini",
        "--strategy",
        "lora",
        "--model",
        sharded,
        "--allow-code-execution",
    ]
    build = ["--prompts", tmp_path / "p.jsonl", "--task", "exact", "--out", tmp_path / "data"]
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    on, out = ["--base", sharded, "--pack", pack], ["--out", tmp_path / "out"]
    for words in (
        ["run", *cell, "--wandb", "off", *out],
        ["plan", tmp_path / "sweep.yaml"],
        ["validate", tmp_path / "sweep.yaml"],
        ["transfer", "build", "--source", sharded, *build],
        ["pack", "create", "--base", sharded, "--tuned", base, *out],
        ["pack", "apply", *on, *out],
        ["pack", "remove", "--grafted", sharded, "--pack", pack, "--base", base],
        ["pack", "export", *on, *out, "--to", "peft"],
        ["pack", "inspect", pack, "--base", base, "--tuned", sharded],
        ["pack", "verify", pack, "--base", sharded],
        ["pack", "verify", pack, "--model", sharded],
    ):
        assert call(*words).reason == f"error: {said}", words
    assert not (tmp_path / "out").exists()


# --- an index and its shards -------------------------------------------------------------------


def of_index(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]


@pytest.mark.parametrize("which", ["of no file", "of another shard"])
def test_a_tensor_that_the_index_does_not_assign_there(
    which: str, base: Path, sharded: Path, tmp_path: Path
) -> None:
    index = of_index(sharded)
    shard = index["model.norm.weight"]
    other = next(name for name, file in index.items() if file != shard)
    over = "model.layers.7.mlp.up_proj.weight" if which == "of no file" else other
    good = tensors(sharded, shard)
    rewrite(sharded, good | {over: torch.ones(40, 32)}, shard)
    named = "not assign to any file" if which == "of no file" else f"assigns to {index[other]}"
    told(sharded, shard, over, named, "again without it")
    rewrite(sharded, good, shard)
    grafts_to(base, sharded, WANTED, tmp_path / "out")


# --- names -------------------------------------------------------------------------------------

NAMES: dict[str, Callable[[str], str]] = {
    "_orig_mod.": lambda name: f"_orig_mod.{name}",
    "module.": lambda name: f"module.{name}",
    "module.module.": lambda name: f"module.module.{name}",
    "model.": lambda name: f"model.{name}",
    "base_model.model.": lambda name: f"base_model.model.{name}",
    "_orig_mod.' and 'module.": lambda name: f"module._orig_mod.{name}",
    "_checkpoint_wrapped_module.": lambda name: name.replace(
        ".mlp.", "._checkpoint_wrapped_module.mlp."
    ),
    "_fsdp_wrapped_module.": lambda name: name.replace(
        "layers.0.", "layers.0._fsdp_wrapped_module."
    ),
}


@pytest.mark.parametrize("added", NAMES)
def test_what_training_puts_into_names_is_taken_out(
    added: str, base: Path, single: Path, tmp_path: Path
) -> None:
    """The pack is that of the plain names, with a note; `run` loads the same weights."""
    rewrite(single, {NAMES[added](name): tensor for name, tensor in WANTED.items()})
    created = grafts_to(base, single, WANTED, tmp_path / "out")
    assert f"Training has put '{added}' into the names" in created.notes[0]
    model, _ = load(str(single))
    assert all(torch.equal(p, WANTED[name]) for name, p in model.named_parameters())


def test_a_base_under_such_names_is_the_same_base(base: Path, tmp_path: Path) -> None:
    plain = Checkpoint(base).fingerprint()
    rewrite(base, {f"_orig_mod.{name}": tensor for name, tensor in tensors(base).items()})
    assert Checkpoint(base).fingerprint() == plain


def test_models_own_names_stay() -> None:
    """`model.` before every name is a tied model's own, and OPT's `model.decoder.`."""
    from cl_graft.models.weights import _prefix

    assert _prefix(["model.layers.0.mlp.up_proj.weight", "model.norm.weight"]) == ""
    assert _prefix(["model.decoder.embed_tokens.weight"]) == ""
    assert _prefix(["module.a", "b"]) == ""


def test_one_tensor_under_two_names(base: Path, single: Path, tmp_path: Path) -> None:
    rewrite(single, WANTED | {"_orig_mod.lm_head.weight": WANTED["lm_head.weight"].clone()})
    told(single, "one name but for what training has put into it (_orig_mod.)", "the model itself")
    shutil.rmtree(single)
    saved(MODEL, single)
    grafts_to(base, single, WANTED, tmp_path / "out")


# --- weights that are not there ----------------------------------------------------------------


def test_transformers_fills_in_no_random_numbers(single: Path, call: Call, tmp_path: Path) -> None:
    """Under names that it does not know; the cure is a folder that is whole."""
    rewrite(single, {name.replace("up_proj", "up"): t for name, t in WANTED.items()})
    said = one_sentence(lambda: load(str(single)), CLGraftError)
    assert "no weights for 2 of its parameters ('model.layers.0.mlp.up_proj.weight', ...)" in said
    words = ["run", "--scenario", "mini", "--strategy", "sequential", "--model", single]
    done = call(*words, "--allow-code-execution", "--wandb", "off", "--out", tmp_path / "results")
    assert "no weights for 2" in done.reason and "LOAD REPORT" not in done.err
    rewrite(single, WANTED)
    load(str(single))


def test_layers_that_the_config_does_not_count(single: Path) -> None:
    config = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    said = one_sentence(lambda: load(str(single)), CLGraftError)
    assert "more layers than its config.json counts" in said
    (single / "config.json").write_text(json.dumps(config))
    load(str(single))


def test_no_numbers(single: Path) -> None:
    broken = WANTED["model.norm.weight"].clone()
    broken[3] = torch.nan
    rewrite(single, WANTED | {"model.norm.weight": broken})
    said = one_sentence(lambda: load(str(single)), CLGraftError)
    assert "'model.norm.weight'" in said and "NaN or Inf" in said
    rewrite(single, WANTED)
    load(str(single))


def test_empty_tensors(single: Path) -> None:
    rewrite(single, {name: torch.empty(0) for name in WANTED})
    told(single, "21 of 21 tensors", "ZeRO-3", "stage3_gather_16bit_weights_on_model_save", "NEW")


def test_a_pointer_of_git_lfs(single: Path) -> None:
    whole = (single / WEIGHTS).read_bytes()
    (single / WEIGHTS).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 9\n"
    )
    told(single, "git-lfs's pointer", "fetch the file itself")
    (single / WEIGHTS).write_bytes(whole)
    Checkpoint(single)


@pytest.mark.parametrize("family", ["gemma2", "gpt-oss", "mamba", "llama"])
def test_a_family_without_sdpa_is_loaded_too(family: str, tmp_path: Path) -> None:
    """transformers 5.23 has its own choice of attention, which asked for SDPA it refuses to make."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family][0]()).eval()
    read, _ = load(str(saved(model, tmp_path / "model")))
    had = family == "gemma2" and Version(transformers.__version__) < Version("5.21")
    plain = "llama" not in family and not had
    assert read.config._attn_implementation == ("eager" if plain else "sdpa")
    rows = torch.tensor([[1, 5, 9]])
    with torch.no_grad():
        torch.testing.assert_close(read(rows).logits, model(rows).logits)
