"""What a host runs in test_training.py: `python -m tests.hosts.stage FOLDER ZERO STEPS HOSTFILE`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from cl_graft.config import Launch
from cl_graft.training import launch
from tests.training.test_launch import SFT, trained

SILENCE = 20.0

if __name__ == "__main__":
    folder, (zero, steps) = Path(sys.argv[1]), map(int, sys.argv[2:4])
    torch.set_num_threads(1)
    launch.SILENCE = SILENCE
    rows, recipe = SFT
    how = Launch(processes=2, zero=zero, micro_batch=1, save_steps=2, hostfile=Path(sys.argv[4]))
    weights, _ = trained(folder, (rows, replace(recipe, steps=steps)), how)
    save_file(weights, folder / "weights.safetensors")
