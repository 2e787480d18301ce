"""Checkpoint folders: read one tensor at a time, refused where they are not whole, written anew."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from cl_graft.errors import CLGraftError
from cl_graft.skillpack.folders.checkpoint import (
    INDEX,
    WEIGHTS,
    Checkpoint,
    CheckpointError,
    _shards,
    new_folder,
    write_checkpoint,
    write_tensors,
)
from cl_graft.skillpack.format.file import fingerprint

MANY = {
    "w": torch.randn(6, 4),
    "half": torch.randn(5, 3).bfloat16(),
    "double": torch.randn(3).double(),
    "scalar": torch.tensor(2.5),
    "none": torch.empty(0, 7),
    "mask": torch.tensor([True, False, True]),
    "ids": torch.arange(5),
}


def llama(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, **changes)
    return LlamaForCausalLM(config)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    return tmp_path / "sharded"


def folder_of(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return folder


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


# --- reading -----------------------------------------------------------------------------------


def test_every_dtype_and_shape_comes_back(tmp_path: Path) -> None:
    found = Checkpoint(folder_of(tmp_path, MANY))
    assert found.tensors.keys() == MANY.keys()
    for name, tensor in MANY.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert found.tensors[name].shape == tuple(tensor.shape)
        assert same(found.read(name), tensor)
    assert found.config == {"model_type": "llama"}
    assert set(found.floating) == {"w", "half", "double", "scalar", "none"}
    assert found.dtype == torch.float32


def test_what_is_read_is_a_copy(tmp_path: Path) -> None:
    found = Checkpoint(folder_of(tmp_path, MANY))
    found.read("w").zero_()
    assert same(found.read("w"), MANY["w"])


def test_shards_are_one_checkpoint(sharded: Path) -> None:
    found, model = Checkpoint(sharded), llama()
    assert len({info.file for info in found.tensors.values()}) > 2
    parameters = dict(model.named_parameters())
    assert found.tensors.keys() == parameters.keys()
    assert all(same(found.read(name), p.detach()) for name, p in parameters.items())


def test_the_fingerprint_is_that_of_the_model_whatever_the_dtype_and_the_shards(
    sharded: Path, tmp_path: Path
) -> None:
    model = llama().bfloat16()
    model.save_pretrained(tmp_path / "half")
    folders = [Checkpoint(tmp_path / "half"), Checkpoint(sharded)]
    assert folders[0].fingerprint() == fingerprint(model.float().named_parameters())
    assert folders[1].fingerprint() == fingerprint(llama().named_parameters())
    assert folders[0].fingerprint() != folders[1].fingerprint()


def test_integers_do_not_count_in_the_fingerprint(tmp_path: Path) -> None:
    one = folder_of(tmp_path / "a", {"w": MANY["w"], "ids": MANY["ids"]})
    other = folder_of(tmp_path / "b", {"w": MANY["w"]})
    assert Checkpoint(one).fingerprint() == Checkpoint(other).fingerprint()


READER = """
import sys, torch
from cl_graft.skillpack.folders.checkpoint import Checkpoint, write_checkpoint
found = Checkpoint(sys.argv[1])
specs = {name: (info.dtype, info.shape) for name, info in found.tensors.items()}
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
found.config
before = peak()
if sys.argv[2] == "read":
    for name in found.tensors:
        assert found.read(name)[-1, -1] == 0
else:
    write_checkpoint(sys.argv[2], specs, found.read, found, max_shard_bytes=1 << 26)
print(peak() - before)
"""


@pytest.mark.parametrize(("does", "count"), [("read", 32), ("write", 6)])
def test_memory_is_that_of_one_tensor(does: str, count: int, tmp_path: Path) -> None:
    """1 GiB of tensors of 32 MiB read, 192 MiB written; the file has a hole for its payload."""
    one = 32 << 20
    entries = {
        f"t{i}": {"dtype": "F32", "shape": [1024, 8192], "data_offsets": [i * one, (i + 1) * one]}
        for i in range(count)
    }
    header = json.dumps(entries).encode()
    with (tmp_path / WEIGHTS).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + count * one)
    (tmp_path / "config.json").write_text("{}")
    target = "read" if does == "read" else str(tmp_path / "out")
    words = [sys.executable, "-c", READER, str(tmp_path), target]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert 0.5 * one < int(done.stdout) < 1.5 * one


# --- folders that are not whole ----------------------------------------------------------------


def assert_refused(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        Checkpoint(folder)
    said = str(refused.value)
    assert said.endswith(".")
    for word in words:
        assert word in said


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert_refused(tmp_path / "nowhere", "no folder", "nowhere")


def test_a_folder_without_weights(tmp_path: Path) -> None:
    assert_refused(tmp_path, WEIGHTS, str(tmp_path))


def test_pickled_weights_are_refused_with_the_way_to_convert_them(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    assert_refused(tmp_path, "pytorch_model.bin", "pickled", "save_pretrained")


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    save_file({"w": MANY["w"]}, tmp_path / "adapter_model.safetensors")
    assert_refused(tmp_path, "adapter", "merge")


def test_a_shard_that_is_missing(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    assert_refused(sharded, shard.name, "index")


def test_a_tensor_missing_from_its_shard(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.extra"] = sorted(index["weight_map"].values())[0]
    (sharded / INDEX).write_text(json.dumps(index))
    assert_refused(sharded, "model.extra", "lacks")


def test_two_shards_with_one_name(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    tensors = load_file(first)
    save_file(tensors | load_file(second), second)
    assert_refused(sharded, first.name, second.name, "which the index assigns to")


def test_an_index_does_not_lead_out_of_the_folder(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"] = {name: "../stolen.safetensors" for name in index["weight_map"]}
    (sharded / INDEX).write_text(json.dumps(index))
    assert_refused(sharded, INDEX)


@pytest.mark.parametrize("left", [0, 4, 8, 100, -1])
def test_a_shard_that_is_cut_short(left: int, sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:left])
    assert_refused(sharded, shard.name, "fetch")


def test_a_shard_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    found = Checkpoint(folder_of(tmp_path, {"w": MANY["w"]}))
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="ends within 'w'"):
        found.read("w")


@given(st.integers(8, 400), st.integers(0, 255))
def test_a_header_with_any_byte_changed_is_read_or_refused_in_a_sentence(at: int, to: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        path = folder_of(Path(name), MANY) / WEIGHTS
        data = bytearray(path.read_bytes())
        data[at] = to
        path.write_bytes(data)
        try:
            found = Checkpoint(name)
            for tensor in found.tensors:
                found.read(tensor)
        except CLGraftError as error:
            assert str(error).endswith(".")


def test_a_dtype_that_is_not_known(tmp_path: Path) -> None:
    header = {"w": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}
    text = json.dumps(header).encode()
    (tmp_path / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + b"\0\0")
    assert_refused(tmp_path, "'F4'", "'w'")


def test_misspelt_names_are_answered_with_the_nearest(tmp_path: Path) -> None:
    found = Checkpoint(folder_of(tmp_path, MANY))
    with pytest.raises(CLGraftError, match="did you mean double"):
        found.read("doubel")


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    save_file(MANY, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        _ = Checkpoint(tmp_path).config


# --- writing -----------------------------------------------------------------------------------


def specs_of(found: Checkpoint) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (info.dtype, info.shape) for name, info in found.tensors.items()}


@pytest.mark.parametrize("limit", [20_000, 10**9])
def test_transformers_loads_what_was_written(limit: int, sharded: Path, tmp_path: Path) -> None:
    found, out = Checkpoint(sharded), tmp_path / "out"
    write_checkpoint(out, specs_of(found), found.read, found, max_shard_bytes=limit)
    model = AutoModelForCausalLM.from_pretrained(out)
    for name, parameter in model.named_parameters():
        assert same(parameter.detach(), found.read(name))
    assert (out / INDEX).exists() == (limit == 20_000)
    assert (out / WEIGHTS).exists() == (limit != 20_000)


def test_shards_and_index_are_those_of_transformers(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "theirs", max_shard_size=20_000)
    theirs = Checkpoint(tmp_path / "theirs")
    names = [name for name, _ in llama().named_parameters()]
    specs = {name: specs_of(theirs)[name] for name in names}
    out = tmp_path / "ours"
    write_checkpoint(out, specs, theirs.read, theirs, max_shard_bytes=20_000)
    written = {file.name for file in out.iterdir()}
    assert written == {file.name for file in theirs.folder.iterdir()}
    ours, other = (json.loads((f / INDEX).read_text()) for f in (out, theirs.folder))
    assert ours == other
    for file in out.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(4, 60))
def test_shards_keep_the_order_and_hold_what_fits(sizes: list[int], limit: int) -> None:
    specs = {f"t{i}": (torch.float32, (size,)) for i, size in enumerate(sizes)}
    shards = _shards(specs, limit)
    assert [name for shard in shards for name in shard] == list(specs)
    loads = [[4 * specs[name][1][0] for name in shard] for shard in shards]
    assert all(sum(load) <= limit or len(load) == 1 for load in loads)
    for one, following in zip(loads, loads[1:], strict=False):
        assert sum(one) + following[0] > limit


def test_a_file_of_mixed_dtypes_is_one_that_safetensors_reads(tmp_path: Path) -> None:
    narrow_first = dict(reversed(MANY.items()))
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in narrow_first.items()}
    write_tensors(tmp_path / WEIGHTS, specs, MANY.__getitem__)
    found = load_file(tmp_path / WEIGHTS)
    assert found.keys() == MANY.keys()
    assert all(same(found[name], tensor) for name, tensor in MANY.items())
    infos = Checkpoint(tmp_path).tensors.values()
    assert all(info.start % info.dtype.itemsize == 0 for info in infos)


def test_other_files_are_copied_and_weights_are_not(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "source", {"w": MANY["w"]})
    found = Checkpoint(source)
    kept = ["tokenizer.json", "tokenizer.model", "generation_config.json", "chat_template.jinja"]
    weights = ["pytorch_model.bin", "optimizer.pt", "old.safetensors", "flax_model.msgpack", INDEX]
    for name in [*kept, *weights, ".hidden"]:
        (source / name).write_text(name)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("tool")
    (source / "original").mkdir()
    (source / "original" / "notes.txt").write_text("old")
    write_checkpoint(tmp_path / "out", specs_of(found), found.read, found)
    written = {str(f.relative_to(tmp_path / "out")) for f in (tmp_path / "out").rglob("*.*")}
    assert written == {*kept, WEIGHTS, "config.json", "additional_chat_templates/tool.jinja"}
    assert (tmp_path / "out" / "tokenizer.model").read_text() == "tokenizer.model"


def test_a_config_may_take_the_place_of_the_old_one(tmp_path: Path) -> None:
    found = Checkpoint(folder_of(tmp_path / "source", {"w": MANY["w"]}, vocab_size=5))
    write_checkpoint(tmp_path / "out", specs_of(found), found.read, found, config={"vocab_size": 6})
    assert Checkpoint(tmp_path / "out").config == {"vocab_size": 6}
    assert found.config["vocab_size"] == 5


def test_a_folder_with_files_is_never_written_over(tmp_path: Path) -> None:
    found = Checkpoint(folder_of(tmp_path / "source", {"w": MANY["w"]}))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("mine")
    for taken in (tmp_path / "taken", tmp_path / "taken" / "mine", tmp_path / "source"):
        with pytest.raises(CheckpointError, match="not empty"):
            write_checkpoint(taken, specs_of(found), found.read, found)
    assert [f.name for f in (tmp_path / "taken").iterdir()] == ["mine"]
    (tmp_path / "empty").mkdir()
    write_checkpoint(tmp_path / "empty", specs_of(found), found.read, found)
    assert same(Checkpoint(tmp_path / "empty").read("w"), MANY["w"])


@pytest.mark.parametrize("fault", [RuntimeError("no"), KeyboardInterrupt(), OSError(28, "full")])
def test_an_interrupted_write_leaves_nothing(fault: BaseException, tmp_path: Path) -> None:
    found = Checkpoint(folder_of(tmp_path / "source", MANY))

    def fetch(name: str) -> Tensor:
        if name == "half":
            raise fault
        return found.read(name)

    with pytest.raises((type(fault), CheckpointError)):
        write_checkpoint(tmp_path / "out", specs_of(found), fetch, found)
    assert [f.name for f in tmp_path.iterdir()] == ["source"]


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="disk is full"), new_folder(tmp_path / "out"):
        raise OSError(28, "No space left on device")


def test_a_tensor_unlike_its_spec_is_refused(tmp_path: Path) -> None:
    found = Checkpoint(folder_of(tmp_path / "source", {"w": MANY["w"]}))
    with pytest.raises(CheckpointError, match="'w'.*as announced"):
        write_checkpoint(tmp_path / "out", {"w": (torch.float32, (4, 6))}, found.read, found)
    assert not (tmp_path / "out").exists()
