"""What fine-tuning does from a start that was quantised and dequantised: mini-llama, whose weights before are known.

Usage: python results/published/real/starts.py WORK-FOLDER [PACKS ...]

`mini` is learned from the base and from its matrices rounded to Q4_1 blocks (gguf's own), three seeds, by `individual`
and by both policies of GraftLLM at 10 %, with the recipe of small_updates. Printed: what of the rounding each task's
delta takes back, what tasks' deltas have in common from either start, and what is scored. PACKS are folders of packs of
one model; of their deltas it prints what they have in common. Killed and started again it goes on.
"""

import sys
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev

import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from cl_graft import SkillPack, run
from cl_graft.config import RunConfig
from cl_graft.models.load import load

SEEDS = (0, 1, 2)
MINI = {"learning_rate": 5e-4, "freeze_embeddings": True}  # results/published/small_updates
BLOCKS = GGMLQuantizationType.Q4_1


def rounded(folder: Path) -> Path:
    """mini-llama with every matrix rounded as llama.cpp stores a model in Q4_1."""
    if not folder.is_dir():
        model, tokenizer = load("mini-llama")
        for weight in model.parameters():
            if weight.ndim == 2:
                stored = quantize(weight.detach().float().numpy(), BLOCKS)
                weight.data = torch.from_numpy(dequantize(stored, BLOCKS)).to(weight.dtype)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def deltas(packs: Path) -> list[dict[str, torch.Tensor]]:
    """The decoded matrices of each task's pack, in the order of the tasks."""
    return [
        {name: x.double() for name, x in SkillPack.load(file).decode().items() if x.ndim == 2}
        for file in sorted(packs.glob("*.safetensors"))
    ]


def dot(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return sum(float((a[name] * b[name]).sum()) for name in a)


def common(of: list[dict[str, torch.Tensor]]) -> float:
    """The mean cosine of two tasks' deltas: of their energy, what they share."""
    norms = [dot(x, x) ** 0.5 for x in of]
    return mean(
        dot(a, b) / (m * n) for (a, m), (b, n) in combinations(zip(of, norms, strict=True), 2)
    )


def told(values: list[float], digits: int) -> str:
    error = stdev(values) / len(values) ** 0.5
    return f"{mean(values):.{digits}f} ± {error:.{digits}f}"


def main(work: Path, others: list[Path]) -> None:
    starts = {"the base": "mini-llama", "rounded to Q4_1": str(rounded(work / "rounded"))}
    before, after = (dict(load(name)[0].named_parameters()) for name in starts.values())
    print("| start | method | base's scores | scores, per cent | OP |\n|:--|:--|:--|:--|--:|")
    packs = {}
    for start, model in starts.items():
        for method in ("individual", "graftllm", "graftllm_adaptive"):
            found = []
            for seed in SEEDS:
                config = RunConfig(
                    scenario="mini", strategy=method, model=model, seed=seed, options={"mini": MINI},
                    allow_code_execution=True, wandb="off", out=work / "cells", cache=work / "cache",
                )  # fmt: skip
                found.append(run(config)["matrix"])
                packs[start, method, seed] = config.out / config.cell / "packs"
            scores = [[100 * x for x in matrix[-1]] for matrix in found]
            base = " / ".join(f"{100 * x:.1f}" for x in found[0][0])
            each = " / ".join(told(list(task), 1) for task in zip(*scores, strict=True))
            print(
                f"| {start} | {method} | {base} | {each} | {told([mean(s) for s in scores], 1)} |"
            )

    print(
        "\n| start | rounding that a task takes back, per cent | cosine with it | cosine of two tasks |"
    )
    print("|:--|--:|--:|--:|")
    for start in starts:
        back, cosine, shared = [], [], []
        for seed in SEEDS:
            learned = deltas(packs[start, "individual", seed])
            error = {name: (before[name] - after[name]).detach().double() for name in learned[0]}
            size = dot(error, error)
            back.append(100 * mean(dot(x, error) / size for x in learned))
            cosine.append(mean(dot(x, error) / (size * dot(x, x)) ** 0.5 for x in learned))
            shared.append(common(learned))
        print(f"| {start} | {told(back, 2)} | {told(cosine, 4)} | {told(shared, 3)} |")
    for folder in others:
        print(f"\n{folder.parent.name}: cosine of two tasks {common(deltas(folder)):.3f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), [Path(word) for word in sys.argv[2:]])
