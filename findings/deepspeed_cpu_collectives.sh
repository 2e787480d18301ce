#!/usr/bin/env bash
# deepspeed 0.19.8 on a CPU: beginning to train compiles collectives that training does not call.
#
# The guess: `init_distributed("gloo")` hands collectives to gloo, and the shared-memory ones, made for inference, are
# built where inference asks for them. Seen: processes that begin to train build them first (75 s of a core), and again
# wherever the environment's headers are newer than the build; a ZeRO-2 stage of two processes does not call them, and
# with an empty table of compatible operations nothing is compiled and the weights are the same to the last bit.
#
# Installs pinned packages in a temporary folder and fails if the behaviour is another. Needs a C++ compiler.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
pip() { "$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0
pip deepspeed==0.19.8 ninja==1.13.0
cat >"$folder/train.py" <<'PYTHON'
import hashlib
import os
import sys
from pathlib import Path

import deepspeed
import torch

if sys.argv[1] == "left":
    deepspeed.ops.__compatible_ops__ = {}
deepspeed.init_distributed("gloo")
calls = []
backend = type(deepspeed.comm.comm.cdb)
backend.inference_all_reduce = lambda *_, **__: calls.append(1)
torch.manual_seed(0)
model = torch.nn.Linear(8, 8)
config = {"train_batch_size": 4, "zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True}
engine, *_ = deepspeed.initialize(
    model=model, optimizer=torch.optim.AdamW(model.parameters(), 0.1), config=config
)
for _ in range(4):
    engine.backward(engine(torch.randn(2, 8)).square().mean())
    engine.step()
built = sorted(file.name for file in Path(os.environ["TORCH_EXTENSIONS_DIR"]).rglob("*.so"))
weights = hashlib.sha256(model.weight.detach().numpy().tobytes()).hexdigest()[:16]
if engine.global_rank == 0:
    print(f"RESULT {built} {len(calls)} {weights}")
PYTHON
run() {
  TORCH_EXTENSIONS_DIR="$folder/$1" PATH="$folder/env/bin:$PATH" "$folder/env/bin/python" -m torch.distributed.run --standalone \
    --nproc_per_node=2 "$folder/train.py" "$1" 2>/dev/null | grep RESULT
}
kept=$(run kept) left=$(run left)
echo "torch 2.13.0, deepspeed 0.19.8, four steps of ZeRO-2 in two processes: compiled, calls of it, weights"
echo "as it comes:    $kept"
echo "an empty table: $left"
[[ $kept == "RESULT ['deepspeed_shm_comm.so'] 0 "* && $left == "RESULT [] 0 "* && ${kept##* } == "${left##* }" ]]
