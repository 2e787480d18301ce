#!/usr/bin/env bash
# trl 1.16.0: the moving averages of SDFT's teachers are other ones than those of the paper (arXiv 2601.19897): a bfloat16
# teacher all but stands still, and an adapter's teacher has the square of the share that it should have.
#
# The paper's teacher is teacher + rate (student - teacher) after each step, rate .01 to .05. The guess: TRL's two
# callbacks do this, whatever the dtype, for full models and for adapters. The full teacher has the model's dtype: in
# bfloat16 (the authors' own script loads both so) most steps of 1 % are less than half of a weight's last bit and are
# rounded away, and after 100 of them it is 0.11 of the way to a student that stands 1e-3 off, where 0.63 is due. For
# adapters A and B start from zero and are averaged apart, so that the teacher's delta is share^2 B A: after the first
# step at .05 it has 0.0025 of the student's, where 0.05 is due. TRL's default teacher is none of these, and stands still.
#
# Installs pinned packages in a temporary folder and fails if the behaviour is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 \
  trl==1.16.0 peft==0.21.2
"$folder/env/bin/python" - <<'PYTHON'
from copy import deepcopy
from importlib.metadata import version
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from trl.experimental.sdft import SDFTConfig
from trl.experimental.sdft.teacher_sync import PEFTAdapterEMACallback, SyncTeacherModelCallback

print(f"trl {version('trl')}, peft {version('peft')}, torch {version('torch')}")
Accelerator(cpu=True)
torch.manual_seed(0)
base = torch.nn.Linear(256, 256, bias=False).requires_grad_(False)
ways = {}
for dtype in (torch.float32, torch.bfloat16):
    student, teacher = deepcopy(base).to(dtype), deepcopy(base).to(dtype)
    start = teacher.weight.float().clone()
    student.weight += (1e-3 * torch.randn(256, 256)).to(dtype)
    apart = student.weight.float() - start
    following, how = SyncTeacherModelCallback(teacher), SimpleNamespace(teacher_sync_steps=1, teacher_update_rate=0.01)
    for step in range(1, 101):
        following.on_step_end(how, SimpleNamespace(global_step=step), None, model=student)
    ways[dtype] = float(((teacher.weight.float() - start) * apart).sum() / apart.square().sum())
    print(f"{dtype}: after 100 steps at .01 {ways[dtype]:.2f} of the way, {1 - 0.99**100:.2f} are due")
assert abs(ways[torch.float32] - 0.634) < 0.01 and ways[torch.bfloat16] < 0.2, "another now"

sizes = dict(hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)
model = LlamaForCausalLM(LlamaConfig(vocab_size=16, bos_token_id=0, eos_token_id=0, **sizes))
model = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]))
layer = model.base_model.model.model.layers[0].self_attn.q_proj
torch.nn.init.normal_(layer.lora_B["default"].weight)
following = PEFTAdapterEMACallback(model, update_rate=0.05)
following.on_train_begin(None, None, None)
for step in range(1, 21):
    following.on_step_end(None, SimpleNamespace(global_step=step), None)
    student, teacher = (layer.get_delta_weight(n).detach() for n in ("default", "teacher"))
    share, due = float((student * teacher).sum() / student.square().sum()), 1 - 0.95**step
    if step in (1, 5, 20):
        print(f"adapter, step {step}: {share:.4f} of the student's delta, {due:.4f} are due")
    assert abs(share - due**2) < 1e-3, "another now"
plain = SDFTConfig(output_dir="unused", report_to=[], use_cpu=True, bf16=False)
told = plain.distillation_alpha, plain.distillation_mode, plain.distillation_topk, plain.teacher_model_kind
print(f"by default: alpha, mode, top k, teacher = {told}")
assert told == (0.5, "topk_logits", 100, "base"), "another now"
PYTHON
