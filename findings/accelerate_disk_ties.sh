#!/usr/bin/env bash
# accelerate 1.15.0, transformers 5.23.0: a model with tied embeddings that is spread onto the disk comes untied when it
# first runs. It lists one parameter more from then on, and saves the head a second time.
#
# The guess was that a forward pass leaves a model as it was. Seen: after one, `named_parameters` has `lm_head.weight`
# beside the embedding, each with a parameter of its own, and `save_pretrained` writes both, where the checkpoint that was
# loaded has one. Whoever tells a model by its parameters (a fingerprint, a count, a delta per name) has another model after
# the first forward pass than before it. The values stay equal.
#
# Installs pinned packages in a temporary folder and fails if the behaviour is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
pip() { "$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0
pip transformers==5.23.0 accelerate==1.15.0
cd "$folder"
"$folder/env/bin/python" - <<'PYTHON'
from importlib.metadata import version

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

print(f"accelerate {version('accelerate')}, transformers {version('transformers')}")
torch.manual_seed(0)
shape = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
config = LlamaConfig(**shape, num_attention_heads=2, tie_word_embeddings=True)
LlamaForCausalLM(config).save_pretrained("tied")


def keys(name):
    with safe_open(f"{name}/model.safetensors", "pt") as file:
        return set(file.keys())


def listed():
    return [name for name, _ in model.named_parameters()]


model = AutoModelForCausalLM.from_pretrained("tied", device_map={"": "disk"}, offload_folder="off")
before = listed()
with torch.no_grad():
    model(input_ids=torch.arange(4)[None])
after = listed()
model.save_pretrained("saved")
print(f"parameters before a forward pass {len(before)}, after it {len(after)}: {sorted(set(after) - set(before))}")
print(f"tensors of the checkpoint {len(keys('tied'))}, of the saved one {len(keys('saved'))}")
more = {"lm_head.weight"}
assert set(after) - set(before) == more and keys("saved") - keys("tied") == more, "another behaviour"
PYTHON
