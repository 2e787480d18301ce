#!/usr/bin/env bash
# peft 0.21.2: reduce_intruder_dimension damps by another factor than its documentation says, and gives back an adapter that
# does not fit, or is transposed in silence, where layers store their matrices (in, out), as GPT-2's Conv1D do.
#
# The documentation: mitigation_lambda is the part of an intruder that is subtracted, the higher the more. The guess from
# it: 0 subtracts nothing, 1 everything, and the adapter stays one for the same layer. As in the paper (arXiv 2410.21228),
# whose lambda is the factor that is left, 1 subtracts nothing and 0 everything. And the factors of W (in, out) are written
# as B and A of a matrix (out, in): with lambda 1, which should change nothing, a square matrix of GPT-2 gets the transposed
# delta, at 1.4 times its own norm away, and the forward pass ends in an error at the first one that is not square. Left
# singular vectors of W (in, out) are, besides, directions of the input, and the paper looks at those of the output.
#
# Installs pinned packages in a temporary folder and fails if the behaviour is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2
"$folder/env/bin/python" - <<'PYTHON'
from importlib.metadata import version

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.intruders import reduce_intruder_dimension
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

print(f"peft {version('peft')}, transformers {version('transformers')}, torch {version('torch')}")


def reduced(model, targets, factor, **how):
    """{layer: (delta before, delta after)}, and the model with the adapter that came out."""
    torch.manual_seed(0)
    model = get_peft_model(model.eval(), LoraConfig(r=4, lora_alpha=8, target_modules=targets, **how))
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_B") and "default" in m.lora_B}
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
    reduce_intruder_dimension(model, mitigation_lambda=factor, logging_sink=None)
    names = ("default", "intruder_reduced")
    return model, {n: [m.get_delta_weight(x).detach() for x in names] for n, m in layers.items()}


def llama():
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes))


left = {}
for factor in (1.0, 0.75, 0.0):
    (before, after), = reduced(llama(), ["q_proj"], factor)[1].values()
    left[factor] = float((before - after).norm() / before.norm())
    print(f"Llama, mitigation_lambda {factor:g}: the adapter moves by {left[factor]:.3f} of its norm")
assert left[1.0] < 1e-5 < 0.1 < left[0.75] < left[0.0], "another now"

sizes = dict(n_embd=64, n_layer=1, n_head=2, vocab_size=100, n_positions=32, bos_token_id=0, eos_token_id=0)
targets, how = ["c_attn", "attn.c_proj"], {"fan_in_fan_out": True}
model, deltas = reduced(GPT2LMHeadModel(GPT2Config(**sizes)), targets, 1.0, **how)
for name, (before, after) in deltas.items():
    print(f"GPT-2, mitigation_lambda 1, {name.rpartition('h.0.')[2]}: {tuple(before.shape)} -> {tuple(after.shape)}")
before, after = next(pair for name, pair in deltas.items() if name.endswith("c_proj"))
moved = float((before - after).norm() / before.norm())
turned = float((before.T - after).norm() / before.norm())
print(f"c_proj: away from its delta by {moved:.2f} of the norm, from its transpose by {turned:.0e}")
assert moved > 1 and turned < 1e-4, "another now"
try:
    model(input_ids=torch.arange(8)[None])
except RuntimeError as error:
    print(f"the forward pass: {error}")
else:
    raise AssertionError("another now")
PYTHON
