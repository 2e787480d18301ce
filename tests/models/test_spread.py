"""A model larger than one device: spread by accelerate's device map, here over host memory and the disk."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import psutil
import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

import cl_graft
from cl_graft.config import Launch, RunConfig
from cl_graft.errors import CLGraftError
from cl_graft.evaluation.features import Features
from cl_graft.evaluation.generate import answers, choice_likelihoods, log_likelihoods
from cl_graft.experiment.prepare import check
from cl_graft.models.dispatch import settle
from cl_graft.models.load import load
from cl_graft.models.spread import (
    copies,
    in_host_memory,
    is_spread,
    named_weights,
    offloaded,
    rereading,
    unwritten,
)
from cl_graft.skillpack.codecs import dense
from cl_graft.skillpack.compress.calibrate import moments
from cl_graft.skillpack.compress.text import padded
from cl_graft.skillpack.folders.checkpoint import Checkpoint
from cl_graft.skillpack.format.file import NonFinite, SkillPack, fingerprint
from cl_graft.skillpack.live.attach import Attached
from cl_graft.skillpack.live.ensemble import Ensemble
from cl_graft.skillpack.live.grafted import Grafted
from cl_graft.store.record import CellFolder
from cl_graft.sweep_config import sweep_of
from cl_graft.training import checkpoint
from cl_graft.training.stages import in_full_precision
from tests.command import Call, assert_refused
from tests.model_folders import llama, pack_of, saved, tokenizer, tuned

IDS = torch.arange(12).reshape(4, 3)
PROMPTS = ["ab", "hello", "what is it", "x"]
SOME, NONE = {"cpu": "70KB"}, {"cpu": "0"}  # of 96 KB: a part is in host memory; all is on the disk
MIXED = [(0, 1), None, 1, 0]


class Made(NamedTuple):
    """A base's folder, that of one tuned, and two packs."""

    base: Path
    tuned: Path
    packs: list[SkillPack]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    return {
        name: make(tmp_path_factory.mktemp(name), name == "tied") for name in ("untied", "tied")
    }


def make(folder: Path, tied: bool) -> Made:
    shape = {"num_hidden_layers": 3, "tie_word_embeddings": tied}
    base = saved(llama(**shape), folder / "base")
    for seed, budget in ((1, "30%"), (2, "60%")):
        saved(tuned(llama(**shape), seed), folder / f"tuned-{seed}")
        pack_of(base, folder / f"tuned-{seed}", folder / f"{seed}.safetensors", budget)
    packs = [SkillPack.load(folder / f"{seed}.safetensors") for seed in (1, 2)]
    return Made(base, folder / "tuned-1", packs)


@pytest.fixture
def made(both: dict[str, Made]) -> Made:
    return both["untied"]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def one_pack(name: str, delta: Tensor, base: str) -> SkillPack:
    return SkillPack({name: dense(delta, torch.float32)}, "a", "m", {}, base)


def weights(model: Any) -> str:
    return fingerprint(named_weights(model))


def assert_scores_as(model: Any, whole: Any) -> None:
    said = tokenizer()
    said.padding_side, said.pad_token = "left", said.eos_token
    pairs = [(prompt, "abc"[: k + 1]) for k, prompt in enumerate(PROMPTS[:3])]
    for how in (
        lambda m: answers(m, said, PROMPTS, 5),
        lambda m: answers(m, said, PROMPTS, 5, temperature=1.0, seed=3),
        lambda m: log_likelihoods(m, said, pairs, 64),
        lambda m: choice_likelihoods(m, said, PROMPTS, ["a", "bc", "b"], 64),
        lambda m: Features(m, said)(PROMPTS).tolist(),
    ):
        assert how(model) == how(whole)


def assert_measured_as(model: Any, whole: Any) -> None:
    """The same second moments, of a forward and a backward pass."""
    batch = padded([([1, 2, 3, 4], 1), ([5, 6], 1)], 27)
    one, other = (moments(m, [batch]) for m in (model, whole))
    for mine, theirs in ((one.inputs, other.inputs), (one.outputs, other.outputs)):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(("tied", "memory"), [("untied", SOME), ("tied", NONE)])
def test_it_scores_grafts_and_attaches_as_a_whole_one_to_the_last_digit(
    both, tied, memory, tmp_path, recwarn
):
    made = both[tied]
    whole, _ = load(str(made.base))
    model, _ = load(str(made.base), memory=memory, scratch=tmp_path)
    devices = {*model.hf_device_map.values()}
    assert devices == ({"cpu", "disk"} if memory is SOME else {"disk"}) and is_spread(model)
    assert memory is NONE or model.hf_device_map["model.layers.0"] == "cpu"
    names = [*dict(whole.named_parameters())]
    assert_scores_as(model, whole)
    assert weights(model) == weights(whole)
    live, plain = Grafted(model), Grafted(whole)
    assert live.base == plain.base == made.packs[0].base
    one, other = made.packs
    for active in ([one], [one, other], [other], [other, one], []):
        live.activate(active)
        plain.activate(active)
        assert weights(model) == weights(whole) and torch.equal(logits(model), logits(whole))
    live.activate([one])
    plain.activate([one])
    model.save_pretrained(tmp_path / "saved")  # as a server is given it
    assert Checkpoint(tmp_path / "saved").fingerprint() == weights(whole)
    assert live.base == plain.base
    live.unload()
    plain.unload()
    with Attached(model, made.packs) as beside, Attached(whole, made.packs) as as_well:
        for choice in (None, 1, (0, 1), MIXED):
            beside.choose(choice)
            as_well.choose(choice)
            assert torch.equal(logits(model), logits(whole))
    with Ensemble(model, [[one], [other]]), Ensemble(whole, [[one], [other]]):
        assert torch.equal(logits(model), logits(whole))
    assert torch.equal(logits(model), logits(whole)) and weights(model) == live.base
    assert [*dict(model.named_parameters())] == names
    assert not [str(w.message) for w in recwarn if "device" in str(w.message)]
    files = [f for f in (tmp_path / "offloaded").rglob("*") if f.is_file() and f.suffix != ".used"]
    assert not files  # the checkpoint's own are read


def test_what_is_in_host_memory_is_summed_once_and_what_is_on_the_disk_each_time(made, tmp_path):
    """Beside a GPU host memory holds offloaded parameters, too; here the GPU is this CPU."""
    whole, _ = load(str(made.base))
    beside, _ = load(str(made.base))
    settle(cpu_offload(beside, "cpu"), None)
    on_disk, _ = load(str(made.base), memory=NONE, scratch=tmp_path)
    plain, name = Grafted(whole), "model.layers.1.mlp.up_proj.weight"
    plain.activate(made.packs)
    for model, once in ((beside, True), (on_disk, False)):
        live, held = Grafted(model), offloaded(model)
        before = held.base(name).clone()
        live.activate(made.packs)
        assert held.in_memory(name) is once and (held[name] is held[name]) is once
        assert weights(model) == weights(whole) and torch.equal(logits(model), logits(whole))
        assert torch.equal(held.base(name), before)
        live.unload()
        assert weights(model) == live.base and torch.equal(held[name], before)


def test_what_goes_wrong_leaves_the_base(made, tmp_path):
    model, _ = load(str(made.base), memory=NONE, scratch=tmp_path)
    before, names = logits(model), [*model.named_parameters()]
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[1, 1000]]))
    assert all(a is b for (_, a), (_, b) in zip(model.named_parameters(), names, strict=True))
    live = Grafted(model)
    live.activate(made.packs[:1])
    far = torch.full((32,), 3e38)
    packs = [one_pack("model.norm.weight", far, live.base) for _ in "ab"]
    with pytest.raises(NonFinite, match=r"'model\.norm\.weight' overflows torch\.float32"):
        live.activate(packs)
    assert weights(model) == live.base and torch.equal(logits(model), before)
    with (
        pytest.raises(
            CLGraftError, match=r"a method writes to model\.norm\.weight of a model that is spread"
        ),
        unwritten(model, "a method"),
        torch.no_grad(),
    ):
        model.model.norm.weight.add_(1)


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "eos_token_id": 27}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads, **experts))


def test_what_no_file_holds_as_it_is_loaded_lies_in_a_folder_for_as_long_as_the_model_lives(
    tmp_path,
):
    """Experts that are stored one by one are stacked on loading."""
    base = saved(mixtral(), tmp_path / "base")
    left = tmp_path / "offloaded" / "of a process that was killed"
    left.mkdir(parents=True)
    (left / "weight.safetensors").write_bytes(b"0" * 64)
    whole, _ = load(str(base))
    model, _ = load(str(base), memory=NONE, scratch=tmp_path)
    other, _ = load(str(base), memory=NONE, scratch=tmp_path)  # leaves the first one's alone
    assert not left.exists()
    assert {f.name for f in (tmp_path / "offloaded").glob("*/*")} == {
        f"model.layers.{i}.mlp.experts.{n}_proj.safetensors"
        for i in "01"
        for n in ("gate_up", "down")
    }
    del other
    gc.collect()
    assert weights(model) == weights(whole) and torch.equal(logits(model), logits(whole))
    assert_measured_as(model, whole)
    held = offloaded(model)
    name = "model.layers.0.mlp.experts.down_proj"
    pack = one_pack(name, 0.1 * torch.randn(held.base(name).shape), weights(whole))
    Grafted(whole).activate([pack])
    with Attached(model, [pack]) as beside:
        beside.choose(0)
        assert torch.equal(logits(model), logits(whole))
    del model, held, beside
    gc.collect()
    assert not [*(tmp_path / "offloaded").iterdir()]


def test_a_backward_pass_reads_weights_again_and_holds_none_meanwhile(made, tmp_path):
    whole, _ = load(str(made.base))
    model, _ = load(str(made.base), memory=NONE, scratch=tmp_path)
    assert_measured_as(model, whole)
    given: list[weakref.ref] = []
    source = offloaded(model)._source

    class Watched(Mapping):
        def __getitem__(self, name: str) -> Tensor:
            given.append(weakref.ref(x := source[name]))
            return x

        def __iter__(self):
            return iter(source)

        def __len__(self):
            return len(source)

    offloaded(model)._source = Watched()
    model.requires_grad_(False)
    batch = padded([([1, 2, 3, 4], 1), ([5, 6], 1)], 27)
    batch["inputs_embeds"] = torch.randn(2, 4, 32, requires_grad=True)
    del batch["input_ids"]
    with rereading(model):
        loss = model(**batch, use_cache=False).loss
    assert len(given) > 20 and not any(ref() is not None for ref in given)
    loss.backward()
    assert batch["inputs_embeds"].grad.abs().sum() > 0


def test_a_launched_stage_starts_from_it_and_comes_back_into_it(made, tmp_path):
    whole, said = load(str(made.base))
    model, _ = load(str(made.base), memory=SOME, scratch=tmp_path)
    for which, at in ((whole, "whole"), (model, "spread")):
        checkpoint.save_start(which, said, tmp_path / at)
    one, other = ((tmp_path / at / "model.safetensors").read_bytes() for at in ("whole", "spread"))
    assert one == other
    start = copies(model)
    with in_full_precision(model), in_host_memory(model):
        checkpoint.load_into(model, made.tuned)
    checkpoint.load_into(whole, made.tuned)
    assert weights(model) == weights(whole) and torch.equal(logits(model), logits(whole))
    assert fingerprint(start.items()) == made.packs[0].base


@pytest.mark.parametrize(
    ("strategy", "tied", "tasks"),
    [("graftllm", "untied", "math"), ("sequential", "tied", "math,cipher")],
)
def test_a_cell_whose_stages_are_known_comes_to_the_same_result(
    both, tmp_path, strategy, tied, tasks
):
    pytest.importorskip("deepspeed")
    made = both[tied]
    few = {"tasks": tasks, "train_size": 24, "test_size": 4, "steps": 2, "batch": 4}
    cell = {"scenario": "mini", "strategy": strategy, "model": str(made.base), "budget": "60%"}
    cell |= {"options": {"mini": few}, "cache": tmp_path / "cache", "wandb": "off"}
    wanted = cl_graft.run(**cell, out=tmp_path / "whole")
    for kept in (tmp_path / "cache").iterdir():
        if kept.name != "stages":
            shutil.rmtree(kept) if kept.is_dir() else kept.unlink()
    more = {"max_memory": SOME, "launch": Launch(processes=2, zero=3)}
    found = cl_graft.run(**cell, **more, out=tmp_path / "spread")
    assert found["matrix"] == wanted["matrix"]
    one, other = (CellFolder(next((tmp_path / at).glob("mini__*"))) for at in ("whole", "spread"))
    for mine, theirs in zip(one.experiences(), other.experiences(), strict=True):
        for told in ("scores", "kl_to_base", "pack", "alive_bytes"):
            assert mine[told] == theirs[told]
    files = [sorted((tmp_path / at).rglob("*.safetensors")) for at in ("whole", "spread")]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]] != []
    gc.collect()
    assert not [*(tmp_path / "cache" / "offloaded").iterdir()]


def test_what_does_not_fit_is_spread_unasked(made, tmp_path, monkeypatch, call: Call):
    """The machine is made out to be a small one."""
    monkeypatch.setenv("CL_GRAFT_CACHE", str(tmp_path))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=60_000))
    model, _ = load(str(made.base))
    assert {*model.hf_device_map.values()} == {"cpu", "disk"}
    pack = tmp_path / "pack.safetensors"
    made.packs[0].save(pack)
    done = call("pack", "verify", pack, "--model", made.base)
    assert done.code == 0 and "is whole" in done.out
    words = ["run", "--scenario", "mini", "--strategy", "graftllm", "--model", made.base]
    words += ["--out", tmp_path / "out", "--allow-code-execution"]
    assert_refused(
        call(*words),
        "is spread over devices (cpu, disk) and cannot train in this process",
        "--launch",
    )
    monkeypatch.undo()
    assert not is_spread(load(str(made.base))[0])


ASKED = ["--max-memory", "cpu=70KB"]
LAUNCHED = [*ASKED, "--launch", "processes=2", "--strategy"]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (
            ["--strategy", "graftllm", *ASKED],
            ["(cpu, disk) and cannot train in this process", "zero=3"],
        ),
        ([*LAUNCHED, "lora"], ["lora does more with its weights", "as graftllm"]),
        (
            [*LAUNCHED, "model_grafting"],
            ["model_grafting works on the weights of the model itself"],
        ),
        ([*LAUNCHED, "svd", "--max-memory", "7=1GiB"], ["names GPU 7, and this machine has none"]),
    ],
)
def test_what_a_spread_model_cannot_do_is_refused_before_anything_starts(
    made, tmp_path, call: Call, asked, words
):
    pytest.importorskip("deepspeed")
    plain = ["run", "--scenario", "mini", "--allow-code-execution", "--model", made.base]
    done = call(*plain, "--out", tmp_path / "out", *asked)
    assert done.code == 1 and all(word in done.reason for word in words), done.err
    assert not [*tmp_path.rglob("experience*")]


def test_a_sweep_is_refused_before_its_first_cell(made, tmp_path):
    cell = {"scenario": "mini", "strategy": "graftllm", "model": str(made.base), "out": tmp_path}
    config = RunConfig(**cell, allow_code_execution=True, max_memory=SOME)
    with pytest.raises(CLGraftError, match=r"is spread over devices \(cpu, disk\)"):
        check([config])
    check([config.model_copy(update={"max_memory": {"0": "1GiB"}})])  # of another machine, perhaps


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"gpu": "1GiB"}, "'gpu' is no device; write a GPU's number, as 0, or cpu"),
        ({0: "much"}, "'much' is no memory of device 0; write bytes, as 70GiB"),
    ],
)
def test_a_memory_that_is_none_is_refused(given, words):
    with pytest.raises(CLGraftError, match=words):
        sweep_of({"scenarios": "mini", "strategies": "svd", "max_memory": given}, "here")


def test_devices_and_bytes_may_be_written_as_yaml_reads_them():
    config = RunConfig(scenario="mini", strategy="svd", max_memory={0: "70GiB", "CPU": 10**9})
    assert config.max_memory == {"0": "70GiB", "cpu": "1000000000"}
