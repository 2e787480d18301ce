#!/usr/bin/env bash
# trl 1.16.0, the fused LM head of SFTTrainer and DPOTrainer: on a CPU it scores every place of a batch, not the labels.
#
# `add_fused_lm_head` says that it projects "only the positions whose next-token label is not -100". The guess from that:
# answers of two tokens behind prompts of sixty cost two rows of the head. Seen: without Triton all places are projected,
# padding included, and once more for the gradient. SmolLM2-135M (49,152 words) on AG News, batches of 8, one core: a step
# took 12.2 s, of which the head at the labels alone needs 0.1.
#
# Installs pinned packages in a temporary folder and fails if the behaviour is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
pip() { "$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0
pip transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0 trl==1.16.0
"$folder/env/bin/python" - <<'PYTHON'
from importlib.metadata import version

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

print(f"trl {version('trl')}, torch {version('torch')}")
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
)
model = LlamaForCausalLM(config)
add_fused_lm_head(model)
ids = torch.randint(96, (8, 64))
labels = torch.full_like(ids, -100)
labels[:, -2:] = ids[:, -2:]

rows, multiply = [], torch.mm


def counted(left, right, **given):
    rows.append(len(left))
    return multiply(left, right, **given)


torch.mm = counted
model(input_ids=ids, labels=labels, fused_lm_head=True).loss.backward()
print(f"{int((labels != -100).sum())} labels in {ids.numel()} places: rows of the head's products {rows}")
assert rows and min(rows) == 8 * 63, "the behaviour is another now"
PYTHON
