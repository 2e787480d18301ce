"""Folders of other programs: made by these, refused in a sentence, and cured by what the sentence says, run as printed."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_graft.errors import CLGraftError
from cl_graft.models.load import check
from cl_graft.skillpack.folders.checkpoint import Checkpoint
from cl_graft.training.launch import surroundings
from tests.model_folders import grafts_to, llama, saved, tensors, tuned
from tests.refusals import one_sentence


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved(llama(), tmp_path / "base")


def told(folder: Path, *words: str, runs: bool = False) -> str:
    """The sentence by which the folder is refused, by `pack` and by `run`, if that does not read it, too."""
    said = one_sentence(lambda: Checkpoint(folder), CLGraftError)
    assert all(word in said for word in words), said
    if not runs:
        assert one_sentence(lambda: check(str(folder)), CLGraftError) == said
    return said


def command(said: str, new: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run what stands between backticks, in this process."""
    (text,) = re.findall(r"`(.*?)`", said)
    words = [str(new) if word == "NEW" else word for word in shlex.split(text)]
    monkeypatch.setattr(sys, "argv", words[2:] if words[0] == "python" else words)
    if words[0] == "python":
        runpy.run_module(words[2], run_name="__main__", alter_sys=False)
    else:
        from accelerate.commands.accelerate_cli import main

        main()


def expression(said: str, **names: Any) -> None:
    """Run the Python that a sentence ends with."""
    import peft
    from transformers import AutoModelForCausalLM

    (text,) = re.findall(r"\S*AutoPeft\S*\)|AutoModelForCausalLM\S*\)", said)
    eval(text, {"peft": peft, "AutoModelForCausalLM": AutoModelForCausalLM, **names})


def complete(folder: Path, base: Path) -> None:
    """Copy config.json and the tokenizer's files of the base there."""
    for file in [base / "config.json", *base.glob("token*")]:
        shutil.copy(file, folder)


def wanted(model: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def test_fsdp_shards(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As accelerate's save_fsdp_model writes them under SHARDED_STATE_DICT."""
    import torch.distributed.checkpoint as dcp

    model = tuned(llama())
    folder = tmp_path / "checkpoint"
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder / "pytorch_model_fsdp_0")
    (folder / "optimizer_0").mkdir()
    said = told(folder, "the shards of FSDP")
    command(said, tmp_path / "new", monkeypatch)
    complete(tmp_path / "new", base)
    grafts_to(base, tmp_path / "new", wanted(model), tmp_path / "out")


def test_a_whole_state_dict_of_fsdp(base: Path, tmp_path: Path) -> None:
    model, new = tuned(llama()), tmp_path / "new"
    for folder in (tmp_path / "checkpoint", new):
        folder.mkdir()
    torch.save(model.state_dict(), tmp_path / "checkpoint" / "pytorch_model_fsdp.bin")
    said = told(tmp_path / "checkpoint", "pytorch_model_fsdp.bin")
    shutil.copy(tmp_path / "checkpoint" / "pytorch_model_fsdp.bin", new / "pytorch_model.bin")
    complete(new, base)
    expression(said, NEW=new, CONVERTED=tmp_path / "converted")
    grafts_to(base, tmp_path / "converted", wanted(model), tmp_path / "out")


ZERO = """
import os, sys, deepspeed, torch
from transformers import LlamaForCausalLM
os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[3]}
model = LlamaForCausalLM.from_pretrained(sys.argv[1])
deepspeed.ops.__compatible_ops__ = {}  # nothing is compiled for it
deepspeed.init_distributed("gloo")
zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
config = {"train_batch_size": 1, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), 0.5), config=config)
ids = torch.arange(8)[None]
engine.backward(engine(input_ids=ids, labels=ids).loss)
engine.step()
engine.save_checkpoint(sys.argv[2])
model.save_pretrained(sys.argv[2])
"""


@pytest.mark.slow
def test_deepspeed(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ZeRO-3 engine's own checkpoint, and beside it what save_pretrained makes of parameters that are not gathered."""
    folder, new = tmp_path / "checkpoint", tmp_path / "new"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = [sys.executable, "-c", ZERO, str(base), str(folder), port]
    subprocess.run(words, check=True, capture_output=True, env=surroundings())
    assert all(tensor.shape == (0,) for tensor in tensors(folder).values())
    said = told(folder, "21 of 21 tensors", "are empty", "ZeRO-3", str(folder))
    command(said, new, monkeypatch)
    complete(new, base)
    made = tensors(new)
    assert made.keys() == tensors(base).keys()
    assert not torch.equal(made["lm_head.weight"], tensors(base)["lm_head.weight"])
    grafts_to(base, new, made, tmp_path / "out")
    (folder / "model.safetensors").unlink()
    said = told(folder, "partitioned weights of DeepSpeed")
    shutil.rmtree(new)
    command(said, new, monkeypatch)
    assert tensors(new).keys() == made.keys()


def test_an_adapter(base: Path, tmp_path: Path) -> None:
    import peft

    config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(llama(), config)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(tmp_path / "adapter")
    said = told(tmp_path / "adapter", "a PEFT adapter and no model")
    expression(said, NEW=tmp_path / "new")
    merged = adapted.merge_and_unload()
    grafts_to(base, tmp_path / "new", wanted(merged), tmp_path / "out")


def test_an_adapter_that_was_saved_with_its_model(base: Path, tmp_path: Path) -> None:
    import peft

    config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(llama(), config)
    folder = tmp_path / "whole"
    llama().save_pretrained(folder, state_dict=adapted.state_dict())
    told(folder, "LoRA adapter that is not merged", "merge_and_unload()")
    saved(adapted.merge_and_unload(), tmp_path / "new")
    grafts_to(base, tmp_path / "new", wanted(adapted.get_base_model()), tmp_path / "out")


def test_an_adapter_beside_a_model(base: Path, tmp_path: Path) -> None:
    """transformers 5.23 puts the adapter on the model, other readers do not."""
    import peft
    from transformers import AutoModelForCausalLM

    folder = saved(tuned(llama()), tmp_path / "both")
    adapted = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"], r=2))
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder)
    read = AutoModelForCausalLM.from_pretrained(folder)
    assert any("lora_A" in name for name, _ in read.named_parameters())
    told(folder, "beside a model", "adapter_config.json")
    (tmp_path / "own").mkdir()
    for file in folder.glob("adapter_*"):
        shutil.move(file, tmp_path / "own")
    grafts_to(base, folder, tensors(folder), tmp_path / "out")


def test_pickled_weights(base: Path, tmp_path: Path) -> None:
    """`run` reads them, since transformers does so without running what is in them; `pack` does not."""
    model, folder = tuned(llama()), tmp_path / "pickled"
    folder.mkdir()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    complete(folder, base)
    check(str(folder))
    expression(told(folder, "pytorch_model.bin", "pickled", runs=True), NEW=tmp_path / "new")
    grafts_to(base, tmp_path / "new", wanted(model), tmp_path / "out")


def test_the_hubs_cache(base: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--acme--tuned"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc123")
    saved(llama(seed=5), cache / "snapshots" / "abc122")
    model = tuned(llama())
    saved(model, cache / "snapshots" / "abc123")
    (given,) = re.findall(r"give (\S+)\.$", told(cache, "the hub's cache"))
    grafts_to(base, Path(given), wanted(model), tmp_path / "out")
    shutil.rmtree(cache / "snapshots")
    told(cache, "without a snapshot", "download it again")


def test_the_folder_of_a_training_run(base: Path, tmp_path: Path) -> None:
    model, run = tuned(llama()), tmp_path / "run"
    for step in (9, 20, 100):
        saved(model if step == 100 else llama(seed=5), run / f"checkpoint-{step}")
    (given,) = re.findall(r": (\S+)\.$", told(run, "one of its checkpoints"))
    grafts_to(base, Path(given), wanted(model), tmp_path / "out")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["model-Q4_K_M.gguf", "config.json"], ["llama.cpp"]),
        (["consolidated.00.pth", "params.json"], ["its authors' own code"]),
        (["flax_model.msgpack"], ["flax_model.msgpack", "safetensors"]),
        (["notes.txt"], ["config.json"]),
    ],
)
def test_other_folders(files: list[str], words: list[str], base: Path, tmp_path: Path) -> None:
    """The cure is the same model in another folder, as every other test gives it."""
    (tmp_path / "other").mkdir()
    for file in files:
        (tmp_path / "other" / file).write_bytes(b"{}" * 40)
    said = one_sentence(lambda: check(str(tmp_path / "other")), CLGraftError)
    assert all(word in said for word in words)
    told(tmp_path / "other", runs=files == ["notes.txt"])
