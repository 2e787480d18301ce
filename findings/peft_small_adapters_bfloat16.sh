#!/usr/bin/env bash
# peft 0.21.2 beside a bfloat16 model: an adapter of a small update is lost in the layers' outputs, even one in float32.
#
# The guess: merged, what is under half the spacing of bfloat16 around a weight is lost, so one leaves the adapter beside
# the weights, where it is added in full. Seen: it is added to an output that has been rounded to bfloat16 already, and the
# sum is rounded to nearest again. Of a gradient step whose adapters are 4e-6 to 4e-4 of their weights a third of the fall
# of the loss is left beside them (with A and B in float32, as with both in bfloat16) and less merged; of a step of ten
# times that, which published fine-tunes take, nearly all is there in every way.
#
# Installs pinned packages in a temporary folder and fails if the behaviour is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
pip() { "$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0
pip transformers==5.23.0 accelerate==1.15.0 peft==0.21.2
"$folder/env/bin/python" -W ignore - <<'PYTHON'
import copy
from importlib.metadata import version

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

print(", ".join(f"{name} {version(name)}" for name in ("peft", "transformers", "torch")))
torch.manual_seed(0)
sizes = dict(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.bfloat16).eval()
exact = copy.deepcopy(model).float()  # the same weights
ids = torch.randint(0, 256, (16, 32))
exact(input_ids=ids, labels=ids).loss.backward()
layers = [n for n, m in exact.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n]
steps = {n: -exact.get_submodule(n).weight.grad for n in layers}


@torch.no_grad()
def adapted(of, size, dtype):
    config = LoraConfig(r=8, lora_alpha=8, target_modules="all-linear")
    peft = get_peft_model(copy.deepcopy(of), config, autocast_adapter_dtype=dtype == torch.float32).eval()
    for name in layers:
        layer = peft.base_model.model.get_submodule(name)
        left, values, right = torch.linalg.svd(size * steps[name])
        root = values[:8].sqrt()
        layer.lora_B["default"].weight.copy_(left[:, :8] * root)
        layer.lora_A["default"].weight.copy_(root[:, None] * right[:8])
        assert layer.lora_A["default"].weight.dtype == dtype
    return peft


@torch.no_grad()
def loss(of):
    return float(of(input_ids=ids, labels=ids).loss.float())


found = {}
for size in (3e-3, 3e-2):
    fall = loss(adapted(exact, size, torch.float32)) - loss(exact)
    for dtype in (torch.float32, torch.bfloat16):
        peft = adapted(model, size, dtype)
        beside = (loss(peft) - loss(model)) / fall
        merged = (loss(peft.merge_and_unload()) - loss(model)) / fall
        found[size, dtype] = beside, merged
        print(f"step {size}, adapter in {dtype}: the loss falls by {beside:.2f} of {-fall:.1e} beside, {merged:.2f} merged")
for dtype in (torch.float32, torch.bfloat16):
    assert max(found[3e-3, dtype]) < 0.5 and min(found[3e-2, dtype]) > 0.8, "the behaviour is another now"
PYTHON
