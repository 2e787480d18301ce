"""Moments of a folder that is loaded layer by layer, against those of the same model in memory."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cl_graft.errors import CLGraftError
from cl_graft.models.meta_model import MetaModel, meta_model
from cl_graft.models.roles import decoder_layers
from cl_graft.skillpack.compress.calibrate import Moments, moments
from cl_graft.skillpack.compress.round_robin import RoundRobin
from cl_graft.skillpack.compress.stream import stream_moments
from cl_graft.skillpack.compress.text import calibration_batches
from cl_graft.skillpack.folders.checkpoint import Checkpoint

SPECIAL = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAPE = {
    **SPECIAL,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
KINDS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaConfig(**SHAPE),
    "gemma3": lambda: hf.Gemma3TextConfig(  # two kinds of masks and of rotations
        **SHAPE,
        head_dim=4,
        sliding_window=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gpt2": lambda: hf.GPT2Config(**SPECIAL, n_embd=16, n_layer=3, n_head=4, n_positions=32),
    "opt": lambda: hf.OPTConfig(**SHAPE, ffn_dim=24, word_embed_proj_dim=8),
    "mixtral": lambda: hf.MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2),
    "mamba": lambda: hf.MambaConfig(**SPECIAL, hidden_size=16, num_hidden_layers=3, state_size=4),
    "jamba": lambda: hf.JambaConfig(
        **SHAPE, num_experts=2, mamba_d_state=4, attn_layer_period=2, attn_layer_offset=1
    ),
}


def made(kind: str) -> Any:
    """With norms and biases that are not all ones and zeros."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(KINDS[kind]()).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def batch(seed: int, lengths: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 40, (len(lengths), max(lengths)), generator=generator)
    mask = torch.stack([torch.arange(max(lengths)) < n for n in lengths]).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


BATCHES = [batch(1, (7, 4, 5)), batch(2, (3, 6)), batch(3, (8, 8))]


class Counted(Checkpoint):
    """Counts what is read."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.reads: list[str] = []

    def read(self, name: str) -> Tensor:
        self.reads.append(name)
        return super().read(name)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[str], tuple[Any, Counted, MetaModel]]:
    def save(kind: str) -> tuple[Any, Counted, MetaModel]:
        model = made(kind)
        model.save_pretrained(tmp_path)
        return model, Counted(tmp_path), meta_model(tmp_path)

    return save


def assert_same(found: Moments, wanted: Moments) -> None:
    assert found.reads == wanted.reads
    assert found.inputs.keys() == wanted.inputs.keys()
    assert found.outputs.keys() == wanted.outputs.keys()
    for name, x in wanted.inputs.items():
        # sums that cancel are as exact as their largest terms, which differ by processor in the last digits
        largest = x.abs().max().item()
        torch.testing.assert_close(
            found.inputs[name], x, rtol=1e-5, atol=1e-7 + 1e-6 * largest, msg=name
        )
    for name, x in wanted.outputs.items():
        torch.testing.assert_close(found.outputs[name], x, rtol=1e-4, atol=1e-10, msg=name)


# --- the same numbers ---


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_moments_are_those_of_the_model_in_memory(kind: str, saved: Any) -> None:
    model, checkpoint, meta = saved(kind)
    found = stream_moments(checkpoint, meta, BATCHES, gradient_batches=BATCHES[:2])
    inputs, outputs = moments(model, BATCHES, gradients=False), moments(model, BATCHES[:2])
    assert_same(found, Moments(inputs.inputs, inputs.reads, outputs.outputs))
    assert any(x.abs().max() > 0 for x in found.outputs.values())


def test_without_gradient_batches_nothing_is_known_of_outputs(saved: Any) -> None:
    model, checkpoint, meta = saved("llama")
    assert_same(stream_moments(checkpoint, meta, BATCHES), moments(model, BATCHES, False))


def test_a_skeleton_can_be_used_again(saved: Any) -> None:
    _, checkpoint, meta = saved("gemma3")
    buffers = {n: b.clone() for n, b in meta.model.named_buffers()}
    first = stream_moments(checkpoint, meta, BATCHES, gradient_batches=BATCHES[:1])
    assert all(p.is_meta and p.grad is None for p in meta.model.parameters())
    assert meta.model.lm_head.weight is meta.model.model.embed_tokens.weight
    assert all(torch.equal(b, buffers[n]) for n, b in meta.model.named_buffers())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in meta.model.modules())
    assert not any("forward" in m.__dict__ for m in meta.model.modules())
    assert_same(stream_moments(checkpoint, meta, BATCHES, gradient_batches=BATCHES[:1]), first)


def test_weights_in_bfloat16_are_widened(saved: Any, tmp_path: Path) -> None:
    model, _, meta = saved("llama")
    model.bfloat16().save_pretrained(tmp_path)
    assert Checkpoint(tmp_path).dtype == torch.bfloat16
    assert_same(
        stream_moments(Checkpoint(tmp_path), meta, BATCHES), moments(model.float(), BATCHES, False)
    )


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_weights_can_come_from_elsewhere(kind: str, saved: Any) -> None:
    """Those of the compressed layers before, say; by the checkpoint's keys."""
    model, checkpoint, meta = saved(kind)
    found = stream_moments(
        checkpoint, meta, BATCHES, weights=lambda key: checkpoint.read(key) * 1.25
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    assert_same(found, moments(model, BATCHES, False))


# --- one layer at a time ---


def loaded_layers(model: nn.Module) -> list[int]:
    _, layers = decoder_layers(model)
    return [i for i, layer in enumerate(layers) if any(not p.is_meta for p in layer.parameters())]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_one_layer_is_in_memory_at_a_time_and_each_is_read_once(kind: str, saved: Any) -> None:
    model, checkpoint, meta = saved(kind)
    seen: list[list[int]] = []
    hooks = [
        layer.register_forward_hook(lambda *_: seen.append(loaded_layers(meta.model)))
        for layer in decoder_layers(meta.model)[1]
    ]
    stream_moments(checkpoint, meta, BATCHES)
    assert seen == [[0]] * 3 + [[1]] * 3 + [[2]] * 3, "batches in lockstep"
    head = meta.key_of("lm_head.weight")
    wanted = set(checkpoint.tensors)
    if not meta.model.config.tie_word_embeddings:
        wanted.remove(head)  # nothing needs what it writes
    assert sorted(checkpoint.reads) == sorted(wanted)
    for hook in hooks:
        hook.remove()


def test_going_back_each_layer_is_read_once_more(saved: Any) -> None:
    _, checkpoint, meta = saved("llama")
    seen: list[list[int]] = []
    for i, layer in enumerate(meta.model.model.layers):

        def note(module: nn.Module, grads: Any, outputs: Any, i: int = i) -> None:
            seen.append([i, *loaded_layers(meta.model)])

        layer.mlp.down_proj.register_full_backward_hook(note)
    stream_moments(checkpoint, meta, [], gradient_batches=BATCHES[:1])
    assert seen == [[2, 2], [1, 1], [0, 0]]
    for name in checkpoint.tensors:
        assert checkpoint.reads.count(name) == (2 if ".layers." in name else 1), name


def test_moments_are_handed_over_when_their_layer_is_done(saved: Any) -> None:
    model, checkpoint, meta = saved("llama")
    order: list[tuple[str, list[int]]] = []
    kept: dict[str, Tensor] = {}
    reads: dict[str, list[str]] = {}

    def sink(group: str, hessian: Tensor, readers: list[str]) -> None:
        order.append((group, loaded_layers(meta.model)))
        kept[group], reads[group] = hessian, readers

    found = stream_moments(checkpoint, meta, BATCHES, sink=sink)
    assert found.inputs == {}
    found.inputs = kept
    assert_same(found, moments(model, BATCHES, False))
    assert all(layers == [] for _, layers in order), "the layer's weights are dropped before"
    assert len(order) == len(kept) == 1 + 3 * 4 + 1
    layer = "model.layers.1"
    assert reads[f"{layer}.self_attn.q_proj"] == [
        f"{layer}.self_attn.{name}_proj.weight" for name in "qkv"
    ]
    assert {name: g for g, names in reads.items() for name in names} == found.reads


def test_only_wanted_groups_are_summed_up(saved: Any) -> None:
    model, checkpoint, meta = saved("llama")
    whole = moments(model, BATCHES, False)
    wanted = {"model.layers.1.self_attn.q_proj", "model.layers.2.mlp.down_proj"}
    found = stream_moments(checkpoint, meta, BATCHES, wanted=wanted.__contains__)
    assert found.inputs.keys() == wanted and found.reads == whole.reads
    assert_same(found, Moments({group: whole.inputs[group] for group in wanted}, whole.reads))


@pytest.mark.parametrize("kind", KINDS)
def test_products_in_bfloat16_are_those_of_the_model_in_memory(
    kind: str, saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cl_graft.skillpack.compress.calibrate._has_bfloat16", lambda: True)
    monkeypatch.setattr("cl_graft.skillpack.compress.calibrate.BFLOAT16_FROM", 1)
    model, checkpoint, meta = saved(kind)
    found = stream_moments(checkpoint, meta, BATCHES[:1], gradient_batches=BATCHES[:1])
    wanted = moments(model, BATCHES[:1])
    for name, x in wanted.inputs.items():
        assert (found.inputs[name] - x).norm() <= 0.02 * x.norm(), name
    assert found.outputs.keys() == wanted.outputs.keys()


def test_a_second_pass_gives_the_same_bits(saved: Any) -> None:
    _, checkpoint, meta = saved("llama")
    first, second = (stream_moments(checkpoint, meta, BATCHES).inputs for _ in range(2))
    assert all(torch.equal(first[group], second[group]) for group in first)


def test_progress_rises_to_one(saved: Any) -> None:
    _, checkpoint, meta = saved("llama")
    done: list[float] = []
    stream_moments(checkpoint, meta, BATCHES, gradient_batches=BATCHES[:2], progress=done.append)
    assert done == sorted(done) and 0 < done[0] < 0.1 and done[-1] == 1.0


# --- models that are loaded whole, and models that fail ---


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_model_whose_names_are_not_known_is_loaded_whole(
    saved: Any, monkeypatch: pytest.MonkeyPatch, elsewhere: bool
) -> None:
    model, checkpoint, meta = saved("mixtral")
    monkeypatch.setattr(
        "cl_graft.models.meta_model._renaming", lambda model: lambda key: (key, None)
    )
    assert not meta.plain
    kept: dict[str, Tensor] = {}
    found = stream_moments(
        checkpoint,
        meta,
        BATCHES,
        gradient_batches=BATCHES[:1],
        sink=lambda group, moment, readers: kept.update({group: moment}),
        weights=(lambda key: checkpoint.read(key) * 1.25) if elsewhere else None,
    )
    if elsewhere:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.25)
    inputs, outputs = moments(model, BATCHES, False), moments(model, BATCHES[:1]).outputs
    found.inputs = kept
    assert_same(found, Moments(inputs.inputs, inputs.reads, outputs))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("turn", [1, 2, 3])
def test_an_error_inside_a_layer_ends_the_run(saved: Any, turn: int) -> None:
    """Whichever batch it is in, none of the others is left waiting."""
    _, checkpoint, meta = saved("llama")
    before, calls = threading.active_count(), [0]

    def fail(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == turn:
            raise ValueError("no more")

    hook = meta.model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="no more"):
        stream_moments(checkpoint, meta, BATCHES)
    assert calls == [turn] and threading.active_count() == before
    assert all(p.is_meta for p in meta.model.parameters())
    hook.remove()
    assert stream_moments(checkpoint, meta, BATCHES).inputs


@pytest.mark.timeout(60)
def test_weights_that_cannot_be_read_end_the_run(saved: Any, tmp_path: Path) -> None:
    _, checkpoint, meta = saved("llama")
    stored = load_file(tmp_path / "model.safetensors")
    stored["model.layers.1.mlp.up_proj.weight"] = torch.ones(3, 3)
    save_file(stored, tmp_path / "model.safetensors")
    for arguments in ({"batches": BATCHES}, {"batches": [], "gradient_batches": BATCHES}):
        with pytest.raises(CLGraftError, match=r"layers.1.mlp.up_proj.weight has the shape"):
            stream_moments(Checkpoint(tmp_path), meta, **arguments)
        assert all(p.is_meta for p in meta.model.parameters())


@pytest.mark.timeout(60)
def test_layers_that_run_twice_a_pass_are_refused(saved: Any) -> None:
    _, checkpoint, meta = saved("llama")
    layers = meta.model.model.layers
    run = meta.model.model.forward

    def twice(*args: Any, **kwargs: Any) -> Any:
        layers[0](torch.zeros(1, 2, 16), position_embeddings=(torch.ones(1, 2, 4),) * 2)
        return run(*args, **kwargs)

    meta.model.model.forward = twice
    with pytest.raises(CLGraftError, match=r"runs model.layers.0.\S+ several times a pass"):
        stream_moments(checkpoint, meta, BATCHES)


def test_modules_that_several_layers_share_are_counted_in_all_of_them(saved: Any) -> None:
    model, checkpoint, meta = saved("llama")
    for m in (model, meta.model):
        m.model.layers[2].mlp = m.model.layers[0].mlp
    meta = MetaModel(meta.model, meta.folder, meta.keys)
    found = stream_moments(checkpoint, meta, BATCHES)
    assert_same(found, moments(model, BATCHES, False))


# --- taking turns ---


def test_jobs_take_turns_in_order() -> None:
    steps, log = RoundRobin(), list[str]()

    def job(name: str, turns: int) -> None:
        for i in range(turns):
            log.append(f"{name}{i}")
            steps.pause()
        log.append(f"{name}.")

    steps.run([lambda: job("a", 2), lambda: job("b", 3), lambda: job("c", 0)])
    assert log == ["a0", "b0", "c.", "a1", "b1", "a.", "b2", "b."]
    RoundRobin().run([])


@pytest.mark.timeout(60)
def test_a_job_that_swallows_errors_is_stopped_all_the_same() -> None:
    steps, log = RoundRobin(), list[str]()

    def stubborn() -> None:
        while True:
            try:
                steps.pause()
            except Exception:
                log.append("swallowed")

    def failing() -> None:
        steps.pause()
        raise KeyError("first")

    with pytest.raises(KeyError, match="first"):
        steps.run([stubborn, failing, stubborn, failing])
    assert log == []


# --- calibration text ---


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "<unk>", *"abcdefgh"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    hf.PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(tmp_path / "tok")
    return tmp_path / "tok"


def write(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n")
    return path


def test_rows_become_padded_batches_with_labels(tokenizer: Path, tmp_path: Path) -> None:
    rows = [
        {"text": "a b c d e f"},
        {"prompt": "a b", "completion": "c", "other": 1},
        "",
        {"text": "h g"},
        {"text": "not reached"},
    ]
    found = calibration_batches(
        tokenizer, write(tmp_path / "x.jsonl", *rows), samples=3, length=5, batch=2
    )
    a, b, c, d, e, g, h, end = 4, 5, 6, 7, 8, 10, 11, 2
    assert [x["input_ids"].tolist() for x in found] == [
        [[h, g, 0, 0], [a, b, c, end]],
        [[a, b, c, d, e]],
    ]
    assert found[0]["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert found[0]["labels"].tolist() == [[h, g, -100, -100], [-100, -100, c, end]]
    assert found[1]["labels"].tolist() == [[a, b, c, d, e]]
    assert all(x.dtype == torch.int64 for part in found for x in part.values())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "x.jsonl, line 2 is not JSON"),
        ("[1]", "x.jsonl, line 2 is not "),
        ({"txt": "a"}, "x.jsonl, line 2 is not "),
        ({"text": 3}, "x.jsonl, line 2 is not "),
        ({"prompt": "a"}, "x.jsonl, line 2 is not "),
        ({"text": ""}, "x.jsonl, line 2 has an empty 'text'"),
        ({"prompt": "", "completion": ""}, "x.jsonl, line 2 has an empty 'completion'"),
    ],
)
def test_a_bad_line_is_answered_with_file_and_line(
    row: Any, message: str, tokenizer: Path, tmp_path: Path
) -> None:
    path = write(tmp_path / "x.jsonl", {"text": "a"}, row)
    with pytest.raises(CLGraftError) as refused:
        calibration_batches(tokenizer, path, samples=9, length=8, batch=2)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_files_without_rows_and_sizes_below_one_are_refused(
    tokenizer: Path, tmp_path: Path
) -> None:
    sizes = {"samples": 1, "length": 8, "batch": 1}
    with pytest.raises(CLGraftError, match="has no rows"):
        calibration_batches(tokenizer, write(tmp_path / "x.jsonl", ""), **sizes)
    with pytest.raises(CLGraftError, match="cannot be read as text"):
        calibration_batches(tokenizer, tmp_path / "none.jsonl", **sizes)
    path = write(tmp_path / "x.jsonl", {"text": "a"})
    with pytest.raises(CLGraftError, match="no readable tokenizer"):
        calibration_batches(tmp_path / "none", path, **sizes)
    for name in sizes:
        with pytest.raises(CLGraftError, match="calibration needs samples"):
            calibration_batches(tokenizer, path, **{**sizes, name: 0})
