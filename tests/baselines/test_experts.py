"""Adapters on mixtures of experts: under transformers 5 these are stacks (experts, rows, cols), not linear layers.

What PEFT 0.21.2 makes of `target_parameters` is checked against what it adds to the weights itself.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from cl_graft.budget import Budget
from cl_graft.errors import CLGraftError
from cl_graft.plugins import check_options, load
from cl_graft.skillpack.codecs import decode
from cl_graft.stream import benchmark
from cl_graft.training.adapters import (
    Adapter,
    adapted_layers,
    downs,
    encoded,
    largest_rank,
    mixtures,
    targets,
)
from tests.baselines.methods import learn, module, spied

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "qwen": lambda vocab: hf.Qwen3MoeConfig(
        **SIZES, vocab_size=vocab, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2
    ),
    "gpt-oss": lambda vocab: hf.GptOssConfig(  # its experts are stored (experts, in, out)
        **SIZES, vocab_size=vocab, num_local_experts=4, num_experts_per_tok=2
    ),
}


@pytest.fixture(params=CONFIGS)
def mixture(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(CONFIGS[request.param](1000)).eval()


@pytest.fixture
def qwen(nano: tuple[Any, Any], tiny_scenario: Any) -> Any:
    """Make a strategy by name on a tiny Qwen3-MoE."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(CONFIGS["qwen"](len(nano[1])))

    def make(name: str, **options: Any) -> Any:
        found = load("strategy", name)
        return found(
            model=model,
            tokenizer=nano[1],
            scenario=tiny_scenario,
            budget=Budget("40%", sum(p.numel() for p in model.parameters())),
            seed=0,
            options=check_options("strategy", name, found, options),
        )

    return make


def trained(adapter: Adapter) -> None:
    """Stands for training: B is no longer zero."""
    seed = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in adapted_layers(adapter.model).values():
            weight = layer.lora_B["default"].weight
            weight.copy_(torch.randn(weight.shape, generator=seed) / 4)


def test_every_matrix_of_a_layer_is_adapted_and_the_model_is_plain_again(mixture: Any) -> None:
    before, structure = {n: p.clone() for n, p in mixture.named_parameters()}, str(mixture)
    with Adapter(mixture, 3, 2.0, 0.0) as adapter:
        names = set(adapter.factors())
    inner = {n for n, p in before.items() if p.ndim > 1 and "layers." in n and "bias" not in n}
    assert names == inner and sum("experts" in n for n in names) == 4
    assert sum(n.endswith(("gate.weight", "router.weight")) for n in names) == 2
    assert str(mixture) == structure
    assert all(p.equal(before[n]) for n, p in mixture.named_parameters())


def test_a_packs_factors_are_peft_s_own_delta_and_the_model_answers_alike(mixture: Any) -> None:
    ids = torch.arange(24).view(2, 12) + 3
    with Adapter(mixture, 3, 2.0, 0.0) as adapter:
        trained(adapter)
        pairs = {n: (left.clone(), right.clone()) for n, (left, right) in adapter.factors().items()}
        for name, layer in adapted_layers(adapter.model).items():
            theirs = layer.get_delta_weight("default")
            assert theirs.abs().max() > 0
            assert torch.allclose(pairs[name][0] @ pairs[name][1], theirs, atol=1e-6), name
        with torch.no_grad():
            wanted = adapter.model(ids).logits
    with torch.no_grad():
        for name, parameter in mixture.named_parameters():
            if name in pairs:
                parameter += pairs[name][0] @ pairs[name][1]
        assert torch.allclose(mixture(ids).logits, wanted, atol=1e-4)


def test_an_adapter_goes_on_from_what_was_packed(mixture: Any) -> None:
    with Adapter(mixture, 3, 2.0, 0.0) as adapter:
        trained(adapter)
        kept = {name: encoded(pair) for name, pair in adapter.factors().items()}
    with Adapter(mixture, 3, 2.0, 0.0) as adapter:
        adapter.load(kept)
        for name, (left, right) in adapter.factors().items():
            assert torch.allclose(left @ right, decode(kept[name]), atol=1e-6), name


@pytest.mark.parametrize("convention", ["each", "trained_on", "merged"])
def test_lora_learns_the_experts_and_keeps_its_budget(qwen, tiny_scenario, convention) -> None:
    strategy = learn(qwen("lora", convention=convention), tiny_scenario)
    strategy.grafted.activate(strategy.compose(1))
    for name in mixtures(strategy.model):
        changed = strategy.model.get_parameter(name) - strategy.base[name]
        assert changed.abs().max() > 0, name
    strategy.restore_base()
    codecs = {n: e.codec for n, e in strategy.packs[1].tensors.items()}
    assert set(codecs.values()) == {"low_rank", "low_rank_stack"}
    assert strategy.packs[1].nbytes <= strategy.budget.bytes


def test_o_lora_holds_every_expert_apart_from_its_own_past(qwen, tiny_scenario) -> None:
    """The overlap by brute force, expert by expert."""
    strategy = qwen("o_lora", dropout=0.0, rank=2)
    asked = spied(strategy)
    learn(strategy, tiny_scenario)
    old = downs(strategy.model, strategy.packs[:1])
    assert asked[1]["terms"][0].state.keys() == old.keys() > mixtures(strategy.model).keys()
    with Adapter(strategy.model, 2, 4.0, 0.0) as adapter:
        found = module("o_lora").penalty(adapter.model, {}, None, old, lambda_1=1.0, lambda_2=0.0)
        wanted = 0.0
        for name, layer in adapted_layers(adapter.model).items():
            new, count = layer.lora_A["default"].weight, getattr(layer, "num_experts", 1)
            for expert in range(count):
                past = old[name][expert] if old[name].ndim == 3 else old[name]
                wanted += (past @ new[expert * 2 : expert * 2 + 2].T).abs().sum().item()
    assert found["orthogonal"].item() == pytest.approx(wanted, rel=1e-4)


def test_adapters_that_go_on_from_the_last_task_do_so_expert_by_expert(qwen, tiny_scenario) -> None:
    """Nothing is learned in the second task, so slao's merge and start are told from its first B alone."""
    strategy = qwen("slao", rank=2, learning_rate_scale=1e-12)
    asked = spied(strategy)
    warm = learn(qwen("slao", rank=2), tiny_scenario, 1)
    strategy.packs, strategy.shared = list(warm.packs), dict(warm.shared)
    strategy.train(benchmark(tiny_scenario).train_stream[1], eval_streams=[])
    assert len(asked) == 1
    orthonormal = module("slao").orthonormal
    with Adapter(strategy.model, 2, 2.0, 0.0) as adapter:
        first, second = (adapter.read(pack.tensors) for pack in strategy.packs)
        for name, (a, b) in second.items():
            torch.testing.assert_close(a, orthonormal(first[name][0]), atol=0.01, rtol=0.01)
            torch.testing.assert_close(b, first[name][1], atol=0.01, rtol=0.01)
    codecs = {e.codec for e in strategy.packs[1].tensors.values()}
    assert codecs == {"low_rank", "low_rank_stack"}


def test_osf_keeps_directions_of_every_expert_and_router(qwen) -> None:
    model = qwen("osf").model
    state = module("osf").directions(model, 0.5)
    for name, weight in mixtures(model).items():
        k = min(weight.shape[-2:]) // 2
        assert state[f"left/{name}"].shape == (*weight.shape[:-1], k)
        assert state[f"right/{name}"].shape == (*weight.shape[:-2], k, weight.shape[-1])


def test_dropout_on_stacked_experts_is_refused_before_training(qwen) -> None:
    for name in ("lora", "o_lora", "slao", "i_lora", "sure"):
        with pytest.raises(CLGraftError, match=rf"{name}\.dropout=0.1 cannot be had on Qwen3Moe"):
            qwen(name, dropout=0.1).require_possible()
        qwen(name, dropout=0.0).require_possible()


def test_a_gate_of_a_single_row_does_not_hold_the_rank_at_one() -> None:
    """Qwen2-MoE weighs its shared expert by a linear layer of one row."""
    config = hf.Qwen2MoeConfig(
        **SIZES,
        vocab_size=224,
        num_experts=4,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
    )
    model = hf.AutoModelForCausalLM.from_config(config)
    assert min(m.weight.shape[0] for m in targets(model).values()) == 1
    rank = largest_rank(model, lambda specs: 0, Budget("40%", 10**6))
    assert rank == 24, "as many as the experts are wide"
    with Adapter(model, rank, 2.0, 0.0) as adapter:
        trained(adapter)
        left, right = adapter.factors()["model.layers.0.mlp.shared_expert_gate.weight"]
        kept = encoded((left, right))
    torch.testing.assert_close(decode(kept), left @ right, rtol=0.02, atol=0.02)


def test_experts_of_unknown_layout_and_state_spaces_are_refused() -> None:
    tokens = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    mamba = hf.MambaConfig(**tokens, hidden_size=32, num_hidden_layers=1, state_size=4)
    with torch.device("meta"):
        refused = hf.AutoModelForCausalLM.from_config(mamba)
    with pytest.raises(CLGraftError, match="PEFT refuses to adapt the state spaces of MambaFor"):
        largest_rank(refused, lambda specs: 0, Budget("40%", 10**6))
    llama = hf.Llama4TextConfig(
        **SIZES, vocab_size=96, intermediate_size_mlp=48, num_local_experts=4
    )
    with torch.device("meta"):
        refused = hf.AutoModelForCausalLM.from_config(llama)
    with pytest.raises(CLGraftError, match=r"which way the matrices of .*experts.* are stored"):
        largest_rank(refused, lambda specs: 0, Budget("40%", 10**6))
