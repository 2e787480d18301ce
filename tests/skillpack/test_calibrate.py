"""Second moments of inputs and of output gradients, against a forward pass written out by hand and against autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from cl_graft.skillpack.compress import calibrate
from cl_graft.skillpack.compress.calibrate import (
    linear_layers,
    moments,
    stored_transposed,
)
from cl_graft.skillpack.compress.sums import Sums, Text

SPECIAL = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def llama(layers: int = 2, **changed: Any) -> Any:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        **SPECIAL,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        **changed,
    )
    return hf.LlamaForCausalLM(config)


def gpt2() -> Any:
    torch.manual_seed(0)
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(**SPECIAL, n_embd=16, n_layer=2, n_head=4, n_positions=32)
    )


def opt() -> Any:
    """Its MLP reads (tokens, width), without the dimension of the batch."""
    torch.manual_seed(0)
    config = hf.OPTConfig(
        **SPECIAL,
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        word_embed_proj_dim=16,
    )
    return hf.OPTForCausalLM(config)


def batch(seed: int, lengths: tuple[int, ...], prompt: int = 2) -> dict[str, Tensor]:
    """Padded on the right, with junk under the padding; labels only after the prompt."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 40, (len(lengths), max(lengths)), generator=generator)
    mask = torch.stack([torch.arange(max(lengths)) < n for n in lengths]).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :prompt] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


BATCHES = [batch(1, (7, 4, 5)), batch(2, (3, 6))]
TOKENS = 7 + 4 + 5 + 3 + 6


def rows(model: Any) -> list[Tensor]:
    """Every sequence alone, without its padding: the text that is to be counted."""
    return [
        ids[mask.bool()]
        for b in BATCHES
        for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
    ]


def mean_square(inputs: list[Tensor]) -> Tensor:
    x = torch.cat(inputs)
    assert len(x) == TOKENS
    return x.T @ x / TOKENS


# --- what is read ---


@torch.no_grad()
def test_inputs_of_a_llama_worked_out_without_hooks() -> None:
    """One layer, its own submodules called one after the other on each sequence alone."""
    model = llama(layers=1).eval()
    core, (layer,) = model.model, model.model.layers
    read: dict[str, list[Tensor]] = {}

    def note(name: str, x: Tensor) -> Tensor:
        read.setdefault(name, []).append(x[0])
        return x

    for ids in rows(model):
        h = core.embed_tokens(ids[None])
        positions = torch.arange(len(ids))[None]
        x = note("self_attn.q_proj", layer.input_layernorm(h))
        q, k, v = (
            proj(x).view(1, len(ids), -1, 4).transpose(1, 2)
            for proj in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        )
        q, k = hf.models.llama.modeling_llama.apply_rotary_pos_emb(
            q, k, *core.rotary_emb(h, positions)
        )
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = q @ k.transpose(2, 3) / 4**0.5
        seen = torch.ones(len(ids), len(ids)).tril().bool()
        mixed = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
        x = note("self_attn.o_proj", mixed.transpose(1, 2).reshape(1, len(ids), -1))
        h = h + layer.self_attn.o_proj(x)
        x = note("mlp.up_proj", layer.post_attention_layernorm(h))
        gated = nn.functional.silu(layer.mlp.gate_proj(x)) * layer.mlp.up_proj(x)
        h = h + layer.mlp.down_proj(note("mlp.down_proj", gated))
        note("lm_head", core.norm(h))
    found = moments(model, BATCHES, gradients=False)
    for name, inputs in read.items():
        full = f"{name}.weight" if name == "lm_head" else f"model.layers.0.{name}.weight"
        torch.testing.assert_close(found.hessian(full), mean_square(inputs), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [llama, gpt2, opt])
def test_padding_and_batching_change_nothing(make: Any) -> None:
    """One sequence at a time, unpadded, gives the same moments."""
    model = make()
    alone = []
    for b in BATCHES:
        for i, mask in enumerate(b["attention_mask"].bool()):
            alone.append({k: v[i : i + 1, mask] for k, v in b.items()})
    together, apart = moments(model, BATCHES), moments(model, alone)
    assert together.inputs.keys() == apart.inputs.keys()
    for name in together.inputs:
        torch.testing.assert_close(
            together.inputs[name], apart.inputs[name], rtol=1e-4, atol=1e-6, msg=name
        )
    for name in together.outputs:
        if (
            "wpe" not in name
        ):  # positions are written once a batch, so their gradient is the batch's
            torch.testing.assert_close(
                together.outputs[name], apart.outputs[name], rtol=1e-3, atol=1e-7, msg=name
            )


def test_modules_that_read_the_same_tensor_share_one_matrix() -> None:
    found = moments(llama(), BATCHES, gradients=False)
    assert len(found.inputs) == 1 + 2 * 4 + 1 and set(found.reads.values()) == set(found.inputs)
    for layer in (0, 1):
        assert found.reads[f"model.layers.{layer}.self_attn.v_proj.weight"].endswith("q_proj")
        q, k, v, o, gate, up, down = (
            found.hessian(f"model.layers.{layer}.{name}_proj.weight")
            for name in (
                *(f"self_attn.{p}" for p in "qkvo"),
                *(f"mlp.{p}" for p in ("gate", "up", "down")),
            )
        )
        assert q is k and k is v and gate is up
        assert len({id(x) for x in (q, o, gate, down)}) == 4
    assert (
        found.reads["model.layers.0.mlp.up_proj.weight"]
        != found.reads["model.layers.1.mlp.up_proj.weight"]
    )


def test_embeddings_count_how_often_a_row_is_read() -> None:
    counts = torch.bincount(torch.cat(rows(None)), minlength=40) / TOKENS
    found = moments(gpt2(), BATCHES, gradients=False)
    torch.testing.assert_close(found.hessian("transformer.wte.weight"), counts)
    positions = torch.zeros(32)
    for ids in rows(None):
        positions[: len(ids)] += 1 / TOKENS
    torch.testing.assert_close(found.hessian("transformer.wpe.weight"), positions)
    assert found.hessian("lm_head.weight").shape == (16, 16)  # tied, but reads something else


def test_moments_are_symmetric_float32_and_cover_every_matrix() -> None:
    """OPT's learned positions are no plain table: they are looked up by the mask, with an offset."""
    for model in (llama().bfloat16(), gpt2(), opt()):
        found = moments(model, BATCHES)
        matrices = {n: p for n, p in model.named_parameters() if p.ndim == 2}
        matrices.pop("model.decoder.embed_positions.weight", None)
        assert matrices.keys() <= found.reads.keys() & found.outputs.keys()
        transposed = stored_transposed(model)
        for name, p in matrices.items():
            inputs, outputs = found.hessian(name), found.outputs[name]
            assert inputs.dtype == outputs.dtype == torch.float32
            if inputs.ndim == 1:
                assert (len(inputs), len(outputs)) == tuple(p.shape)
                continue
            width, height = p.shape if name in transposed else p.shape[::-1]
            assert inputs.shape == (width, width) and outputs.shape == (height,)
            torch.testing.assert_close(inputs, inputs.T)
            assert torch.linalg.eigvalsh(inputs.double()).min() > -1e-4
            assert (outputs >= 0).all()


def test_sums_are_float32_though_activations_are_not() -> None:
    """Widened before they are multiplied: 257 has no bfloat16, 256 + 1 summed in bfloat16 stays 256."""
    model = nn.Linear(1, 1, bias=False)
    sums = Sums(text=Text(1, 257, None))
    sums.read("x", model, torch.ones(1, 257, 1, dtype=torch.bfloat16))
    assert sums.inputs["x"].dtype == torch.float32 and sums.inputs["x"].item() == 257
    total = sums.inputs["x"]
    sums.read("x", model, torch.ones(1, 3, 1, dtype=torch.bfloat16))
    assert sums.inputs["x"] is total and total.item() == 260


# --- what is written ---


@pytest.mark.parametrize("make", [llama, gpt2, opt])
def test_outputs_equal_a_gradient_per_layer(make: Any) -> None:
    """For each layer alone: shift its output by a tensor of zeros and ask for the loss's gradient by that."""
    model = make().eval()
    found = moments(model, BATCHES).outputs
    for name, module in linear_layers(model).items():
        total = torch.zeros(found[f"{name}.weight"].shape)
        for b in BATCHES:
            shift: list[Tensor] = []

            def add(module: nn.Module, inputs: Any, output: Tensor, shift=shift) -> Tensor:
                shift.append(torch.zeros_like(output, requires_grad=True))
                return output + shift[0]

            hook = module.register_forward_hook(add)
            logits = model(b["input_ids"], attention_mask=b["attention_mask"]).logits
            hook.remove()
            loss = nn.functional.cross_entropy(
                logits[:, :-1].reshape(-1, 40), b["labels"][:, 1:].reshape(-1), reduction="sum"
            )
            (gradient,) = torch.autograd.grad(loss, shift)
            total += gradient.reshape(-1, len(total)).square().sum(0)
        torch.testing.assert_close(
            found[f"{name}.weight"], total / TOKENS, rtol=1e-4, atol=1e-9, msg=name
        )


def test_a_label_on_the_first_token_weighs_nothing() -> None:
    """No position predicts it, so the mean loss does not count it, and neither may the sum."""
    with_first = [batch(1, (7, 4, 5), prompt=0)]
    without = [{**with_first[0], "labels": with_first[0]["labels"].clone()}]
    without[0]["labels"][:, 0] = -100
    model = llama()
    one, two = moments(model, with_first).outputs, moments(model, without).outputs
    for name in one:
        torch.testing.assert_close(one[name], two[name])


def test_outputs_predict_the_change_of_the_loss() -> None:
    """To first order: the mean square of d(loss) for random shifts of one output, as the docstring promises."""
    model, name, size, tries = llama().eval(), "model.layers.1.mlp.down_proj", 1e-3, 2000
    b = batch(3, (6, 6))
    found = moments(model, [b]).outputs[f"{name}.weight"]
    generator = torch.Generator().manual_seed(0)
    shifts = size * torch.randn(tries * 2, 6, 16, generator=generator)

    @torch.no_grad()
    def losses(shift: Tensor) -> Tensor:
        """Summed over the batch, for every try."""
        hook = model.get_submodule(name).register_forward_hook(lambda m, i, output: output + shift)
        logits = model(b["input_ids"].repeat(tries, 1)).logits[:, :-1].transpose(1, 2)
        hook.remove()
        target = b["labels"][:, 1:].repeat(tries, 1)
        return nn.functional.cross_entropy(logits, target, reduction="none").view(tries, -1).sum(1)

    changes = losses(shifts) - losses(torch.zeros_like(shifts))
    predicted = (found * size**2).sum() * b["attention_mask"].sum()
    assert changes.square().mean().item() == pytest.approx(predicted.item(), rel=0.15)


# --- what is left behind ---


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was_found(gradients: bool, training: bool) -> None:
    """Also the gradients that a caller has collected, and also where a batch makes it fail."""
    model = llama().train(training)
    for i, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, float(i)) if i % 2 else None
    model.lm_head.weight.requires_grad_(False)
    held = {n: (p.detach().clone(), p.grad) for n, p in model.named_parameters()}
    broken = {**BATCHES[1], "attention_mask": BATCHES[1]["attention_mask"][:, :-2]}
    for batches in (BATCHES, [BATCHES[0], broken]):
        try:
            moments(model, batches, gradients)
        except (ValueError, RuntimeError):
            assert batches[-1] is broken
        else:
            assert batches is BATCHES
        for i, (name, p) in enumerate(model.named_parameters()):
            assert torch.equal(p, held[name][0]) and p.grad is held[name][1]
            assert p.grad is None or (p.grad == i).all()
            assert p.requires_grad is (name != "lm_head.weight")
        assert model.training is training
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert "forward" not in model.lm_head.__dict__


def test_without_gradients_there_are_no_output_moments_and_the_same_input_moments() -> None:
    model = llama()
    without, with_ = moments(model, BATCHES, gradients=False), moments(model, BATCHES)
    assert without.outputs == {} and with_.outputs
    assert without.reads == with_.reads
    for name, x in without.inputs.items():
        torch.testing.assert_close(x, with_.inputs[name], rtol=1e-5, atol=1e-7)
    unlabelled = [{k: v for k, v in b.items() if k != "labels"} for b in BATCHES]
    assert moments(model, unlabelled, gradients=False).reads == without.reads


def test_layers_that_are_stored_transposed() -> None:
    names = stored_transposed(gpt2())
    assert "transformer.h.0.attn.c_attn.weight" in names and "lm_head.weight" not in names
    assert len(names) == 2 * 4
    assert stored_transposed(llama()) == set()
    assert len(linear_layers(llama())) == 2 * 7 + 1


# --- bfloat16 where it pays ---


@pytest.mark.parametrize("make", [llama, gpt2, opt])
def test_products_in_bfloat16_change_moments_by_its_rounding(make: Any, monkeypatch) -> None:
    monkeypatch.setattr(calibrate, "_has_bfloat16", lambda: False)
    model = make()
    exact = moments(model, BATCHES)
    monkeypatch.setattr(calibrate, "_has_bfloat16", lambda: True)
    monkeypatch.setattr(calibrate, "BFLOAT16_FROM", 1)
    rounded = moments(model, BATCHES)
    assert exact.reads == rounded.reads
    different = 0
    for kind in ("inputs", "outputs"):
        for name, x in getattr(exact, kind).items():
            found = getattr(rounded, kind)[name]
            assert found.dtype == torch.float32
            assert (found - x).norm() <= 0.05 * x.norm(), name
            different += not torch.equal(found, x)
    assert different and all(p.dtype == torch.float32 for p in model.parameters())


def test_narrow_models_and_other_processors_stay_in_float32(monkeypatch) -> None:
    monkeypatch.setattr(calibrate, "_has_bfloat16", lambda: True)
    assert not calibrate.bfloat16_pays(llama())
    monkeypatch.setattr(calibrate, "BFLOAT16_FROM", 16)
    assert calibrate.bfloat16_pays(llama())
    monkeypatch.setattr(calibrate, "_has_bfloat16", lambda: False)
    assert not calibrate.bfloat16_pays(llama())


def test_only_what_is_wanted_is_summed_up_and_visited_in_the_models_order() -> None:
    model = llama()
    whole = moments(model, BATCHES, gradients=False)
    group = "model.layers.1.mlp.gate_proj"
    part = moments(model, BATCHES, gradients=False, wanted=lambda name: name == group)
    assert part.inputs.keys() == {group} and part.reads == whole.reads
    assert torch.equal(part.inputs[group], whole.inputs[group])
    seen: list[str] = []
    whole.visit(lambda name, moment: seen.append(name), lambda name: "layers.0" in name)
    assert seen == [
        f"model.layers.0.{n}"
        for n in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    ]
    down = whole.hessian("model.layers.0.mlp.down_proj.weight")
    assert torch.equal(whole.diagonal("model.layers.0.mlp.down_proj.weight"), down.diagonal()[None])
    assert torch.equal(down, down.T)
    assert whole.diagonal("model.embed_tokens.weight").shape == (40, 1)
