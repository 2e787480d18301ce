"""The engine alone on one decoder layer: a script that also runs on an earlier checkout of this project.

    python -P engine.py HIDDEN INNER SAMPLES LENGTH SEED THREADS

Prints {"calibration": seconds, "rest": seconds, "error": mean held-out error} as JSON. Of the project it uses what
`cl_graft.bench.layer` has had since its first version.
"""

from __future__ import annotations

import json
import sys
from time import perf_counter

import torch

from cl_graft.bench import layer


def measure(hidden: int, inner: int, samples: int, length: int, seed: int) -> dict[str, float]:
    """Seconds of calibration and of the rest, and the mean relative error of the outputs on held-out text."""
    torch.manual_seed(seed)
    model = layer.one_layer(hidden, inner)
    modules = {n: m for n, m in layer.linear_layers(model).items() if n != "lm_head"}
    deltas = {n: layer.falling_delta(_shape(m), i) for i, (n, m) in enumerate(modules.items())}
    text = torch.randint(0, layer.VOCABULARY, (samples + samples // 4, length))
    begun = perf_counter()
    batches = [
        {"input_ids": x, "attention_mask": torch.ones_like(x)} for x in text[:samples].split(8)
    ]
    measured = layer.moments(model, batches, gradients=False)
    calibrated = perf_counter()
    ours = layer.within_budget(deltas, measured)
    done = perf_counter()
    inputs = layer.inputs_of(model, {"input_ids": text[samples:]}, [*deltas])
    errors = [layer.relative(inputs[n], d, ours[n]) for n, d in deltas.items()]
    return {
        "calibration": calibrated - begun,
        "rest": done - calibrated,
        "error": sum(errors) / len(errors),
    }


def _shape(module: torch.nn.Module) -> tuple[int, int]:
    rows, cols = module.weight.shape  # type: ignore[union-attr, misc]
    return int(rows), int(cols)


if __name__ == "__main__":
    *sizes, threads = map(int, sys.argv[1:])
    torch.set_num_threads(threads)
    print(json.dumps(measure(*sizes)))
