#!/usr/bin/env bash
# peft 0.21.2, add_weighted_adapter(combination_type="linear"): weights that sum to one do not average. A LoRA merged with
# itself at 1/2 and 1/2 is twice that LoRA, with n copies at 1/n n times it.
#
# The factors are merged each by itself, each times the root of its weight, and their product has a term for every pair of
# adapters. The guess from that: too much where adapters differ, by those cross terms, and right where they are equal.
# Seen: of four independent adapters the error is 1.7 times their mean; of equal ones it is 100 % at two and 300 % at
# four: (n / sqrt n)^2 = n. The more alike the adapters, the more the merge is a scale, which nobody chose. "cat" is exact.
#
# Installs pinned packages in a temporary folder and fails if the behaviour is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
pip() { "$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0
pip transformers==5.23.0 accelerate==1.15.0 peft==0.21.2
"$folder/env/bin/python" - <<'PYTHON'
from importlib.metadata import version

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

print(f"peft {version('peft')}, torch {version('torch')}")
torch.manual_seed(0)
config = LoraConfig(r=8, lora_alpha=16, target_modules=["0"])
model = get_peft_model(nn.Sequential(nn.Linear(64, 64, bias=False)), config, "a0")
for n in range(1, 4):
    model.add_adapter(f"a{n}", config)
layer = model.base_model.model[0]
names = [f"a{n}" for n in range(4)]
for name in names:
    nn.init.normal_(layer.lora_B[name].weight, std=0.02)


def merged(kind, adapters, name):
    weights = [1 / len(adapters)] * len(adapters)
    model.base_model.add_weighted_adapter(adapters, weights, name, combination_type=kind)
    return layer.get_delta_weight(name)


deltas = [layer.get_delta_weight(name) for name in names]
found = {}
for count in (1, 2, 4):
    made = merged("linear", ["a0"] * count, f"equal{count}")
    found[count] = float((made * deltas[0]).sum() / deltas[0].square().sum())
    print(f"{count} times the same adapter at 1/{count}: {found[count]:.3f} times that adapter")
mean = sum(deltas) / 4
wrong = {}
for kind in ("linear", "cat"):
    wrong[kind] = float((merged(kind, names, kind) - mean).norm() / mean.norm())
    print(f"four independent adapters at 1/4, {kind}: off by {wrong[kind]:.3f} of their mean")
right = all(abs(found[n] - n) < 1e-3 for n in found)
assert right and wrong["linear"] > 0.9 and wrong["cat"] < 1e-5, "the behaviour is another now"
PYTHON
