"""Packs beside a model: each sample of a batch gets the answers of its own packs, the base stays."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from cl_graft.skillpack import codecs
from cl_graft.skillpack.codecs import Encoded
from cl_graft.skillpack.codecs.quant import round_to_nearest
from cl_graft.skillpack.format.file import ShapeMismatch, SkillPack, WrongBase, fingerprint
from cl_graft.skillpack.live.attach import Attached, Choice
from cl_graft.skillpack.live.attachment_points import AttachError, find_attachment_points
from cl_graft.skillpack.live.decode import Entries
from cl_graft.skillpack.live.grafted import Grafted

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
END = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **END, tie_word_embeddings=False)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **END, tie_word_embeddings=True)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2, **END)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, **END, num_local_experts=4)),
}
# beside the largest logit; bfloat16 rounds a layer's base and delta apart, Grafted their sum
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 0.03, torch.float16: 4e-3}
MIXED: list[int | None | Choice] = [0, 2, None, 1, (0, 2), 0]


def make(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[kind]().to(dtype).eval()
    if (
        dtype != torch.float32
    ):  # of two experts about as good, rounding would pick the one or the other
        for module in model.modules():
            vars(module).update({"top_k": 4} if hasattr(module, "top_k") else {})
    return model


def noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator) * 0.05


def some_delta(shape: tuple[int, ...], kind: int, generator: torch.Generator) -> Encoded:
    """Matrices in each of the five codecs in turn, all else dense: norms, biases, stacked experts."""
    if len(shape) != 2:
        return codecs.dense(noise(shape, generator), torch.float32)
    rows, cols = shape
    left, right = noise((4, rows), generator), noise((4, cols), generator) * 20
    if kind == 0:
        return codecs.low_rank(left.T, right)
    if kind == 1:
        sides = [(round_to_nearest(f[:2], 8), round_to_nearest(f[2:], 3)) for f in (left, right)]
        pairs = list(zip(*sides, strict=True))
        return codecs.quantized_low_rank(pairs, (rows, cols))
    if kind == 2:
        return codecs.sparse_top(noise(shape, generator), rows * cols // 5)
    if kind == 3:
        return codecs.sign_scale(noise(shape, generator))
    return codecs.dense(noise(shape, generator))


def packs_for(model: nn.Module, count: int = 3) -> list[SkillPack]:
    """Packs that touch every parameter, each parameter by another codec in each pack."""
    base, packs = fingerprint(model.named_parameters()), []
    for task in range(count):
        generator = torch.Generator().manual_seed(task)
        tensors = {
            name: some_delta(tuple(p.shape), (n + 2 * task) % 5, generator)
            for n, (name, p) in enumerate(model.named_parameters())
        }
        packs.append(SkillPack(tensors, f"task {task}", "test", {}, base))
    return packs


def chosen(packs: list[SkillPack], entry: int | None | Choice) -> list[SkillPack]:
    return [
        packs[k] for k in (() if entry is None else entry if isinstance(entry, tuple) else (entry,))
    ]


def batch(rows: int, tokens: int = 7) -> Tensor:
    return torch.randint(3, 64, (rows, tokens), generator=torch.Generator().manual_seed(9))


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits.float()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", MODELS)
def test_each_sample_of_a_mixed_batch_gets_what_its_packs_give_in_the_weights(
    kind: str, dtype: torch.dtype
) -> None:
    model = make(kind, dtype)
    packs, ids = packs_for(model), batch(len(MIXED))
    base, grafted, expected = logits(model, ids), Grafted(model), []
    for row, entry in enumerate(MIXED):
        grafted.activate(chosen(packs, entry))
        expected.append(logits(model, ids)[row])
    grafted.unload()
    with Attached(model, packs) as attached:
        assert torch.equal(logits(model, ids), base)  # nothing chosen
        attached.choose(MIXED)
        mixed = logits(model, ids)
        for row, entry in enumerate(MIXED):
            limit = TOLERANCE[dtype] * expected[row].abs().max()
            assert (mixed[row] - expected[row]).abs().max() <= limit
            attached.choose(entry)  # one for all: any difference is of a product's batch
            assert (logits(model, ids)[row] - mixed[row]).abs().max() <= limit
            if entry is not None:
                assert (expected[row] - base[row]).abs().max() > 10 * limit


def test_a_step_below_the_resolution_of_bfloat16_moves_the_loss_as_in_float32(nano: Any) -> None:
    """96 of 100 entries of this gradient step are under a tenth of the spacing of bfloat16 around their weights.

    Rounded to nearest the step is all but gone, in the weights and as much in a layer's outputs, where it is added to
    what has been rounded already; its effect is there if either is rounded without bias.
    """
    model, tokenizer = nano
    model.to(torch.bfloat16)
    # different ones, over which the rounding averages: the same row is rounded alike
    asked = [f"Question: {a} + {b}? Answer: {a + b}" for a in range(2, 12) for b in (3, 5, 8, 13)]
    text = tokenizer(asked, return_tensors="pt", padding=True)
    rows = {"input_ids": text["input_ids"], "attention_mask": text["attention_mask"]}
    rows["labels"] = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)

    def loss(model: Any) -> Tensor:
        return model(**rows).loss.float()

    exact = deepcopy(model).float()
    before = loss(exact)
    before.backward()
    step = {n: -5e-5 * p.grad for n, p in exact.named_parameters()}
    nearest = deepcopy(model)
    with torch.no_grad():
        for (n, p), q in zip(exact.named_parameters(), nearest.parameters(), strict=True):
            q.copy_(p + step[n])
            p += step[n]
        wanted = loss(exact) - before
        of_base = loss(model)

        def in_factors(x: Tensor) -> Encoded:
            if x.dim() == 1:
                return codecs.dense(x, torch.float32)
            left, sizes, right = torch.linalg.svd(x, full_matrices=False)
            return codecs.low_rank(left * sizes, right)

        def share(model: Any) -> float:
            return float((loss(model) - of_base) / wanted)

        assert wanted < 0 and share(nearest) < 0.25
        base = fingerprint(model.named_parameters())
        pack = SkillPack({n: in_factors(x) for n, x in step.items()}, "task", "test", {}, base)
        with Attached(model, [pack]) as attached:
            attached.choose(0)
            beside = share(model)
        grafted = Grafted(model)
        grafted.activate([pack])
        assert 0.75 < share(model) < 1.25, share(model)
        assert 0.75 < beside < 1.25, beside


def few_rows(shape: tuple[int, ...], task: int, layout: codecs.CodeLayout) -> Encoded:
    """Factors and a quarter of the rows on their own; of the last task, those rows alone."""
    generator = torch.Generator().manual_seed(task)
    rows, cols = shape
    rank, own = 3 * (task < 2), torch.arange(task, rows, 4)
    codes = [(noise((n, m), generator) * 60).short() for n, m in ((rank, rows), (rank, cols))]
    shifts = (torch.arange(rows) % 3).short() - 1, (torch.arange(cols) % 2).short()
    own_codes = (noise((len(own), cols), generator) * 60).short()
    if task == 2:
        steps, whole = torch.full((rows,), 1e-2), torch.zeros(shape, dtype=torch.int16)
        whole[own] = own_codes
        return codecs.coded(whole, steps, shape, layout)
    scales = torch.tensor([2e-3] * rank + [1e-2])
    return codecs.coded_table(*codes, scales, shifts, (own, own_codes), layout)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2"])
def test_rows_of_a_weight_are_added_to_what_the_layer_gives(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of tables, also as a tied head, of layers (out, in) and of GPT-2's (in, out): nothing is merged for a call."""
    model = make(kind, dtype)
    base, shapes = (
        fingerprint(model.named_parameters()),
        {n: tuple(p.shape) for n, p in model.named_parameters() if p.ndim == 2},
    )
    packs = [
        SkillPack(
            {n: few_rows(s, task, "fast" if task else "small") for n, s in shapes.items()},
            f"task {task}", "test", {}, base,
        )
        for task in range(3)
    ]  # fmt: skip
    ids, plain, grafted = batch(len(MIXED)), logits(model, batch(len(MIXED))), Grafted(model)
    expected = []
    for row, entry in enumerate(MIXED):
        grafted.activate(chosen(packs, entry))
        expected.append(logits(model, ids)[row])
    grafted.unload()
    assert torch.equal(logits(model, ids), plain)
    monkeypatch.setattr(Attached, "_merged", None)
    with Attached(model, packs) as attached:
        attached.choose(MIXED)
        mixed = logits(model, ids)
        for row, entry in enumerate(MIXED):
            limit = TOLERANCE[dtype] * expected[row].abs().max()
            assert (mixed[row] - expected[row]).abs().max() <= limit
            attached.choose(entry)
            assert (logits(model, ids)[row] - mixed[row]).abs().max() <= limit
            if entry is not None:
                assert (expected[row] - plain[row]).abs().max() > 10 * limit
    assert torch.equal(logits(model, ids), plain)


def test_rows_are_their_entries() -> None:
    x = torch.zeros(6, 5)
    x[1, 4], x[4], x[5, 0] = 2.0, torch.arange(1.0, 6), -3.0
    places = x.view(-1).nonzero().view(-1)
    entries = Entries(places, x.view(-1)[places])
    assert entries.touched(5).tolist() == [1, 4, 5]
    rows, ids = entries.laid(5, torch.float32), torch.tensor([5, 0, 4, 4, 3])
    assert rows.ids.tolist() == [1, 4, 5] and torch.equal(rows.values, x[rows.ids])
    assert torch.equal(rows.rows(ids, 5), x[ids]) and torch.equal(entries.rows(ids, 5), x[ids])
    assert all(torch.equal(a, b) for a, b in zip(rows.entries(), entries, strict=True))
    none = Entries(places[:0], x.view(-1)[:0]).laid(5, torch.float32)
    assert none.values.shape == (0, 5) and not none.rows(ids, 5).any()


@pytest.mark.parametrize("codec", [codecs.sign_scale, codecs.dense])
def test_rows_of_a_bfloat16_table_are_rounded_as_in_the_weights(codec: Any) -> None:
    """Deltas far below the spacing: each entry's own random bits decide, wherever the row is looked up."""
    model = nn.Sequential(nn.Embedding(40, 16)).bfloat16()
    change = torch.randn(40, 16, generator=torch.Generator().manual_seed(0)) * 1e-4
    base = fingerprint(model.named_parameters())
    pack = SkillPack({"0.weight": codec(change)}, "a", "test", {}, base)
    ids, before = torch.tensor([[7, 0], [39, 7]]), model[0].weight.detach().clone()
    example = {"input": torch.tensor([[1, 2], [3, 4], [5, 6]])}
    with Attached(model, [pack], example) as attached:
        attached.choose(0)
        looked_up = model(ids)
    Grafted(model).activate([pack])
    assert torch.equal(looked_up, model(ids)) and not torch.equal(looked_up, before[ids])


@pytest.mark.parametrize("kind", MODELS)
def test_detached_modules_are_what_they_were(kind: str) -> None:
    model, ids = make(kind), batch(2)
    packs, before = packs_for(model), logits(model, ids)
    states = {name: dict(m.__dict__) for name, m in model.named_modules()}
    parameters = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    attached = Attached(model, packs)
    attached.choose([1, (0, 2)])
    assert not torch.allclose(logits(model, ids), before)
    attached.detach()
    attached.detach()
    for name, module in model.named_modules():
        assert "forward" not in module.__dict__
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert not module._forward_hooks_always_called and not module._forward_hooks_with_kwargs
        assert not module._forward_pre_hooks_with_kwargs
        assert {k: id(v) for k, v in module.__dict__.items()} == {
            k: id(v) for k, v in states[name].items()
        }
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name][0] and torch.equal(parameter, parameters[name][1])
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("kind", MODELS)
def test_generation_of_a_mixed_batch_equals_the_separate_ones(kind: str) -> None:
    """With left padding and a cache; the first sample is the shortest."""
    model = make(kind)
    packs, ids = packs_for(model), batch(4, 6)
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = 0, 0
    entries: list[int | None | Choice] = [0, None, 2, (1, 2)]

    def generate(rows: slice, beams: int) -> Tensor:
        more = {"attention_mask": mask[rows], "max_new_tokens": 6, "do_sample": False}
        return model.generate(ids[rows], num_beams=beams, **more)

    with Attached(model, packs) as attached:
        for beams in (1, 3):
            attached.choose(entries, beams=beams)
            mixed, separate = generate(slice(None), beams), []
            for row, entry in enumerate(entries):
                attached.choose(entry)
                separate.append(generate(slice(row, row + 1), beams))
            assert mixed.shape == (4, 12)
            assert torch.equal(mixed, torch.cat(separate))
        attached.choose(None)
        assert not torch.equal(generate(slice(None), 1), mixed)


def test_the_lowest_module_with_the_samples_apart_is_taken() -> None:
    tied, experts = make("llama-tied"), make("mixtral")
    name = "model.embed_tokens.weight"
    spots = find_attachment_points(tied, {name: dict(tied.named_parameters())[name]})
    assert {spot.module for spot in spots} == {tied.lm_head, tied.model.embed_tokens}
    weights = {n: p for n, p in experts.named_parameters() if "layers.0.mlp" in n}
    assert len(weights) == 3  # a router and two stacks, of which none gets a batch
    assert [spot.module for spot in find_attachment_points(experts, weights)] == [
        experts.model.layers[0].mlp
    ]


def test_the_base_is_neither_copied_nor_decoded_in_full() -> None:
    model = make("llama")
    names = [n for n, p in model.named_parameters() if p.ndim == 2]
    pack = packs_for(model, 1)[0]
    low = {
        n: codecs.low_rank(torch.ones(p.shape[0], 2), torch.ones(2, p.shape[1]))
        for n, p in model.named_parameters()
        if n in names
    }
    attached = Attached(model, [SkillPack(low, "low", "test", {}, pack.base)])
    held = [tuple(t.shape) for (pair,) in attached._held[0].values() for t in pair]
    assert len(held) == 2 * len(names) and all(2 in shape for shape in held)


class Pooled(nn.Module):
    """Reads a parameter where the samples are already summed up."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.last = nn.Linear(4, 2)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.last(self.table(input_ids).sum((0, 1)))


def one_pack(model: nn.Module, name: str, **fields: object) -> SkillPack:
    shape = dict(model.named_parameters())[name].shape
    base = fingerprint(model.named_parameters())
    tensors = {name: codecs.dense(torch.ones(shape))}
    return SkillPack(
        **{"tensors": tensors, "task": "a", "method": "m", "options": {}, "base": base, **fields}
    )


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        (AttachError, {}, ("'last.weight'", "cannot be told apart", "Grafted")),
        (WrongBase, {"base": "f" * 32}, ("'a'", "load the base")),
        (ShapeMismatch, {"added": ["last.weight"]}, ("cl-graft pack apply",)),
        (ShapeMismatch, {"grown": {"last.weight": [1, 4]}}, ("cl-graft pack apply",)),
    ],
)
def test_refused_packs_leave_the_model_alone(
    kind: type[Exception], fields: dict[str, object], words: tuple[str, ...]
) -> None:
    model = Pooled()
    with pytest.raises(kind) as caught:
        Attached(model, [one_pack(model, "last.weight", **fields)])
    assert type(caught.value) is kind
    assert str(caught.value).endswith(".") and all(word in str(caught.value) for word in words)
    assert all("forward" not in m.__dict__ and not m._forward_pre_hooks for m in model.modules())


def test_choices_that_fit_no_pack_or_no_batch_are_refused() -> None:
    model = make("llama")
    with Attached(model, packs_for(model, 2)) as attached:
        for bad in (2, -1, [0, 2], (0, 5), True):
            with pytest.raises(AttachError, match="no pack has the index"):
                attached.choose(bad)
        with pytest.raises(AttachError, match="chooses nothing"):
            attached.choose([])
        attached.choose([0, 1])
        for rows in (1, 3, 4):
            with pytest.raises(
                AttachError, match=f"has {rows} samples, but packs were chosen for 2"
            ):
                logits(model, batch(rows))
        attached.choose([0])
        with pytest.raises(AttachError, match="chosen for 1"):
            logits(model, batch(2))


def test_an_error_within_a_call_leaves_the_weights() -> None:
    model = make("llama")
    before = {name: p for name, p in model.named_parameters()}
    with Attached(model, packs_for(model, 2)) as attached:
        attached.choose([0, 1])
        with pytest.raises(IndexError):
            logits(model, torch.full((2, 3), 64))  # no such token
        assert all(p is before[name] for name, p in model.named_parameters())


def test_a_model_that_needs_another_call_is_given_an_example() -> None:
    class Scored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score = nn.Linear(4, 2)

        def forward(self, features: Tensor) -> Tensor:
            return self.score(features)

    model, x = Scored(), torch.randn(2, 3, 4)
    pack = one_pack(model, "score.weight")
    with pytest.raises(AttachError, match="does not run on the example"):
        Attached(model, [pack])
    with Attached(model, [pack], example={"features": torch.zeros(3, 2, 4)}) as attached:
        attached.choose([None, 0])
        plain = nn.functional.linear(x, model.score.weight, model.score.bias)
        assert torch.allclose(
            model(x),
            plain + torch.tensor([0.0, 1.0])[:, None, None] * x.sum(-1, keepdim=True),
            atol=1e-6,
        )
