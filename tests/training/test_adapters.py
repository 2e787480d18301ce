"""An adapter's factors are PEFT's delta, however a layer stores its matrix, and go out and in unchanged."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from cl_graft.skillpack.codecs import low_rank
from cl_graft.skillpack.format.file import SkillPack, fingerprint
from cl_graft.training.adapters import Adapter, adapted_layers, downs, targets


def llama():
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=16, num_attention_heads=2, **sizes))


def gpt2():
    """Its layers store their matrices (in, out)."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2, n_positions=8))


@pytest.mark.parametrize("make", [llama, gpt2])
def test_factors_are_the_delta_and_come_back(make):
    torch.manual_seed(0)
    model = make()
    before, structure = fingerprint(model.named_parameters()), str(model)
    with Adapter(model, rank=2, alpha_over_rank=4.0, dropout=0.1) as adapter:
        layers = adapted_layers(adapter.model)
        for layer in layers.values():
            torch.nn.init.normal_(layer.lora_B["default"].weight)
        factors = adapter.factors()
        for name, (left, right) in factors.items():
            theirs = layers[name].get_delta_weight("default")
            torch.testing.assert_close(left @ right, theirs)
        rows = {n: x.lora_A["default"].weight.detach().clone() for n, x in layers.items()}
    assert (fingerprint(model.named_parameters()), str(model)) == (before, structure)
    parameters = dict(model.named_parameters())
    assert factors.keys() == {f"{n}.weight" for n in targets(model)}
    assert all((left @ right).shape == parameters[n].shape for n, (left, right) in factors.items())

    tensors = {n: low_rank(*pair, torch.float32) for n, pair in factors.items()}
    pack = SkillPack(tensors, "t", "m", {}, before)
    for name, found in downs(model, [pack, pack]).items():
        assert torch.equal(found, torch.cat([rows[name], rows[name]]))
    with Adapter(model, rank=2, alpha_over_rank=4.0, dropout=0.1) as again:
        again.load(tensors)
        torch.testing.assert_close(again.factors(), factors)
