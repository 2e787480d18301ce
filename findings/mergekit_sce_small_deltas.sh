#!/usr/bin/env bash
# mergekit 0.1.5 (and 0.1.4), sce: models that fine-tuning moved little are averaged, not weighed by their squares.
#
# SCE weighs a source by its share of the squared changes. The guess: a share has no unit, so deltas a hundred times
# smaller give a delta a hundred times smaller. Seen: where the sources' mean squares add up to less than 1e-6, each has
# the same weight. Of one delta and three times that delta the weights are 0.1 and 0.9 and the merge is 2.8 of the first,
# down to a spread of 3.2e-4; below it the merge is 2.0 of it. Fine-tuning at 5e-6 or 1e-5 moves entries by about 1e-4, so
# it is there that SCE is used, and there it is no SCE; nothing says so.
#
# Installs pinned packages in a temporary folder, merges files by mergekit-pytorch, and fails if the behaviour is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
pip() { "$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0
pip transformers==5.23.0 accelerate==1.15.0 peft==0.21.2 pydantic==2.14.3 click==8.5.1 immutables==0.21 sentencepiece==0.2.3
pip --no-deps mergekit==0.1.5
cd "$folder"
PATH="$folder/env/bin:$PATH" python - <<'PYTHON'
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

print(f"mergekit {version('mergekit')}, torch {version('torch')}")
CONFIG = """
merge_method: sce
base_model: base.safetensors
models: [{model: one.safetensors}, {model: three.safetensors}]
dtype: float32
"""
Path("config.yml").write_text(CONFIG)
draw = torch.Generator().manual_seed(0)
base, change = (torch.randn(256, 256, generator=draw) for _ in range(2))
base *= 0.02
save_file({"w": base}, "base.safetensors")
found = {}
for spread in (1e-2, 1e-3, 4e-4, 3e-4, 1e-4, 1e-5):
    for name, times in (("one", 1), ("three", 3)):
        save_file({"w": base + times * spread * change}, f"{name}.safetensors")
    subprocess.run(["mergekit-pytorch", "config.yml", "out"], check=True, capture_output=True)
    merged = load_file(next(Path("out").glob("*.safetensors")))["w"] - base
    one = load_file("one.safetensors")["w"] - base
    found[spread] = float((merged * one).sum() / one.square().sum())
    print(f"spread {spread:g}: the merge is {found[spread]:.3f} of the first delta")
    subprocess.run(["rm", "-r", "out"], check=True)
large = all(abs(found[s] - 2.8) < 0.01 for s in (1e-2, 1e-3, 4e-4))
small = all(abs(found[s] - 2.0) < 0.02 for s in (3e-4, 1e-4, 1e-5))
assert large and small, "the behaviour is another now"
PYTHON
