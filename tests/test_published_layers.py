"""results/published/real/layers.py leaves out what it says, and every parameter by one of its choices."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cl_graft import plugins

FILE = Path(__file__).parents[1] / "results/published/real/layers.py"


def test_each_parameter_is_left_out_once() -> None:
    sizes = {"vocab_size": 8, "hidden_size": 4, "intermediate_size": 4, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=12))  # of 10 and 11, too
    delta = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    context = SimpleNamespace(model=model, dense=dict)
    layers = plugins.load("strategy", str(FILE)).function
    left = {
        part: delta.keys() - layers(delta, context, without=part).keys()
        for part in ("first", "middle", "last", "rest")
    }
    assert left["rest"] == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for part, numbers in (("first", range(4)), ("middle", range(4, 8)), ("last", range(8, 12))):
        assert {int(n.split(".")[2]) for n in left[part]} == set(numbers)
    assert sum(map(len, left.values())) == len(delta)
