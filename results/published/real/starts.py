"""What fine-tuning does from a start that was quantised and dequantised, by models whose weights before are known.

Usage: python results/published/real/starts.py WORK-FOLDER [DATA-FOLDER]

`mini` is learned from mini-llama and from its layers' matrices rounded to Q4_1 blocks (gguf's own), three seeds, by
`individual` and by both policies of GraftLLM at 10 %, with the recipe of small_updates. With DATA-FOLDER, SmolLM2
learns AG News and DBpedia by `individual`, one seed, from an equal model whose weights are off the grid, and from that
one rounded. Printed: what is scored, what of the rounding a task's delta takes back, and what the deltas of two tasks
have in common. Killed and started again it goes on.
"""

import sys
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from cl_graft import SkillPack, run
from cl_graft.config import RunConfig
from cl_graft.models.load import load

BLOCKS = GGMLQuantizationType.Q4_1
Delta = dict[str, torch.Tensor]


@torch.no_grad()
def equal(model: Any) -> None:
    """Give a Llama other weights that make the same function: a channel times s, and divided by s where it is read."""
    generator = torch.Generator().manual_seed(0)
    for layer in model.model.layers:
        own, mlp = layer.self_attn, layer.mlp
        for norm, matrices in (
            (layer.input_layernorm, (own.q_proj, own.k_proj, own.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            by = 0.9 + 0.2 * torch.rand(len(norm.weight), generator=generator)
            norm.weight.div_(by)
            for matrix in matrices:
                matrix.weight.mul_(by)
        by = 0.9 + 0.2 * torch.rand(len(own.v_proj.weight), generator=generator)
        own.v_proj.weight.div_(by[:, None])
        heads = by.view(-1, 1, own.head_dim).expand(-1, own.num_key_value_groups, -1)
        own.o_proj.weight.mul_(heads.reshape(-1))
        by = 0.9 + 0.2 * torch.rand(len(mlp.up_proj.weight), generator=generator)
        mlp.up_proj.weight.div_(by[:, None])
        mlp.down_proj.weight.mul_(by)


@torch.no_grad()
def rounded(model: Any) -> None:
    """Round every matrix of the layers as llama.cpp stores it in Q4_1."""
    for name, weight in model.named_parameters():
        if name.endswith("proj.weight"):
            made = dequantize(quantize(weight.float().numpy(), BLOCKS), BLOCKS)
            weight.copy_(torch.from_numpy(made))


def changed(source: str, folder: Path, change: Callable[[Any], None]) -> str:
    """The folder of a model that was changed, made where it is not there."""
    if not folder.is_dir():
        model, tokenizer = load(source)
        change(model)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)


def learned(config: RunConfig) -> tuple[list[list[float]], list[Delta]]:
    """The matrix of a cell, and each task's delta of the layers' matrices, float64."""
    matrix = run(config)["matrix"]
    packs = sorted((config.out / config.cell / "packs").glob("*.safetensors"))
    deltas = [SkillPack.load(file).decode() for file in packs]
    return matrix, [
        {n: x.double() for n, x in delta.items() if n.endswith("proj.weight")} for delta in deltas
    ]


def dot(a: Delta, b: Delta) -> float:
    return sum(float((a[name] * b[name]).sum()) for name in a)


def cosine(a: Delta, b: Delta) -> float:
    return dot(a, b) / (dot(a, a) * dot(b, b)) ** 0.5


def told(values: Sequence[float], digits: int) -> str:
    error = f" ± {stdev(values) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{error}"


def compare(starts: dict[str, str], methods: Sequence[str], seeds: range, **asked: Any) -> None:
    """Print the tables of two starts, the second of which is the first one rounded."""
    print("| start | method | base, per cent | after each task's own training | OP |")
    print("|:--|:--|:--|:--|--:|")
    deltas = {}
    for start, model in starts.items():
        for method in methods:
            found = [
                learned(RunConfig(strategy=method, model=model, seed=seed, wandb="off", **asked))
                for seed in seeds
            ]
            deltas[start] = deltas.get(start) or [each for _, each in found]
            scores = [[100 * x for x in matrix[-1]] for matrix, _ in found]
            base = " / ".join(f"{100 * x:.1f}" for x in found[0][0][0])
            each = " / ".join(told(task, 1) for task in zip(*scores, strict=True))
            print(
                f"| {start} | {method} | {base} | {each} | {told([mean(s) for s in scores], 1)} |"
            )

    before, after = (dict(load(model)[0].named_parameters()) for model in starts.values())
    names = deltas[start][0][0]
    error = {name: (before[name] - after[name]).detach().double() for name in names}
    size = dot(error, error) / sum(float((before[n].detach().double() ** 2).sum()) for n in names)
    print(f"\nRounding: {100 * size**0.5:.1f} % of the weights.\n")
    print("| start | of the rounding a task takes back, per cent | cosine with it | of two tasks |")
    print("|:--|--:|--:|--:|")
    for start, of_seeds in deltas.items():
        back = [mean(100 * dot(x, error) / dot(error, error) for x in of) for of in of_seeds]
        along = [mean(cosine(x, error) for x in of) for of in of_seeds]
        common = [mean(cosine(a, b) for a, b in combinations(of, 2)) for of in of_seeds]
        print(f"| {start} | {told(back, 2)} | {told(along, 4)} | {told(common, 3)} |")
    print()


def main(work: Path, data: Path | None = None) -> None:
    torch.set_num_threads(1)
    place = {"out": work / "cells", "cache": work / "cache"}
    compare(
        {
            "mini-llama": "mini-llama",
            "rounded to Q4_1": changed("mini-llama", work / "rounded-mini", rounded),
        },
        ("individual", "graftllm", "graftllm_adaptive"),
        range(3),
        scenario="mini",
        options={"mini": {"learning_rate": 5e-4, "freeze_embeddings": True}},
        allow_code_execution=True,
        **place,
    )
    if data:
        recipe = {"steps": 24, "batch": 8, "learning_rate": 2e-5, "max_length": 192}
        off = changed("smollm2-135m", work / "equal", equal)
        compare(
            {
                "SmolLM2 off the grid": off,
                "rounded to Q4_1": changed(off, work / "rounded", rounded),
            },
            ("individual",),
            range(1),
            scenario="text_classification",
            options={
                "text_classification": {**recipe, "tasks": "agnews,dbpedia", "test_size": 100}
            },
            data_dir=data,
            **place,
        )


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
