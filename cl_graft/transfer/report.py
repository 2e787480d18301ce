"""What came of a build: counts as plain data, as tables, and the data set's card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from cl_graft.report.table import UNMEASURED, Table
from cl_graft.transfer import select

BINS = 10
REASONS = (
    select.RIGHT,
    select.WRONG,
    select.FEW,
    select.CUT_OFF,
    select.BELOW,
    select.ABOVE,
    select.BEATEN,
)


def summary(
    samples: Sequence[Mapping[str, Any]],
    rewards: Sequence[Mapping[str, Any]],
    sft: Sequence[Mapping[str, Any]],
    dpo: Sequence[Mapping[str, Any]],
    dropped: Mapping[str, Mapping[str, int]],
    prompts: int,
    duplicates: int,
) -> dict[str, Any]:
    """Counts of the whole build, of every source, and histograms of the rewards.

    samples, rewards: the rows of samples.jsonl and rewards.jsonl, in the same order. dropped: {source: {why: prompts}}.
    Lengths are means and maxima over all answers, in characters and in the source's tokens.
    """
    sources = {}
    for name in dropped:
        own = [(s, r) for s, r in zip(samples, rewards, strict=True) if s["source"] == name]
        texts = [text for s, _ in own for text in s["responses"]]
        tokens = [count for s, _ in own for count in s["tokens"]]
        ruled = [reward for _, r in own if r["by"] == "rule" for reward in r["rewards"]]
        ranked = [reward for _, r in own if r["by"] == "reward model" for reward in r["rewards"]]
        sources[name] = {
            "answers": len(texts),
            "different": sum(len(set(s["responses"])) for s, _ in own),
            "empty": sum(not text.strip() for text in texts),
            "cut off": sum(not done for s, _ in own for done in s["finished"]),
            "right": _mean(ruled),
            "reward": _mean(ranked),
            "characters": {
                "mean": _mean([len(text) for text in texts]),
                "max": max(map(len, texts)),
            },
            "tokens": {"mean": _mean(tokens), "max": max(tokens)},
            "sft": sum(row["source"] == name for row in sft),
            "dpo": sum(row["source"] == name for row in dpo),
            "dropped": {why: dropped[name][why] for why in REASONS if dropped[name].get(why)},
        }
    kinds = ("rule", "reward model")
    values = {kind: [x for r in rewards if r["by"] == kind for x in r["rewards"]] for kind in kinds}
    return {
        "prompts": prompts,
        "duplicate prompts": duplicates,
        "sft": len(sft),
        "dpo": len(dpo),
        "sources": sources,
        "rewards": {kind: histogram(some) for kind, some in values.items() if some},
    }


def histogram(values: Sequence[float]) -> list[dict[str, Any]]:
    """Equal bins from the least to the greatest value, or one a value where there are at most BINS of them.

    A bin holds what is at least `from` and below `to`; the last one its `to`, too.
    """
    different = sorted(set(values))
    if len(different) <= BINS:
        counts = Counter(values)
        return [{"from": v, "to": v, "answers": counts[v]} for v in different]
    low, width = different[0], (different[-1] - different[0]) / BINS
    counts = Counter(min(BINS - 1, int((value - low) / width)) for value in values)
    return [
        {"from": low + i * width, "to": low + (i + 1) * width, "answers": counts[i]}
        for i in range(BINS)
    ]


def tables(summary: Mapping[str, Any]) -> list[Table]:
    """Yield by source, why pairs were dropped, and the rewards."""
    sources = summary["sources"]
    head = f"{summary['prompts']:,} prompts ({summary['duplicate prompts']:,} duplicates left out)"
    total = f"{summary['sft']:,} SFT rows, {summary['dpo']:,} DPO pairs"
    columns = (
        "Source",
        "Answers",
        "Different",
        "Empty",
        "Cut off",
        "Right %",
        "Mean reward",
        "Characters mean",
        "max",
        "Tokens mean",
        "max",
        "SFT rows",
        "DPO pairs",
    )
    rows = [
        (
            name,
            *(f"{one[key]:,}" for key in ("answers", "different", "empty", "cut off")),
            _show(one["right"], 100, ".1f"),
            _show(one["reward"], 1, ".4g"),
            _show(one["characters"]["mean"], 1, ".1f"),
            f"{one['characters']['max']:,}",
            _show(one["tokens"]["mean"], 1, ".1f"),
            f"{one['tokens']['max']:,}",
            f"{one['sft']:,}",
            f"{one['dpo']:,}",
        )
        for name, one in sources.items()
    ]
    made = [Table(f"{head}: {total}", columns, tuple(rows))]
    reasons = [why for why in REASONS if any(why in one["dropped"] for one in sources.values())]
    if reasons:
        kept = tuple(
            (name, *(f"{one['dropped'].get(why, 0):,}" for why in reasons))
            for name, one in sources.items()
        )
        made.append(
            Table("Prompts without a pair of the source, and why", ("Source", *reasons), kept)
        )
    for kind, bins in summary["rewards"].items():
        counted = tuple(
            (
                f"{b['from']:.4g}" + (f" to {b['to']:.4g}" if b["to"] != b["from"] else ""),
                f"{b['answers']:,}",
            )
            for b in bins
        )
        made.append(Table(f"Rewards by the {kind}", ("Reward", "Answers"), counted))
    return made


def markdown(summary: Mapping[str, Any]) -> str:
    return "\n\n".join(table.markdown() for table in tables(summary)) + "\n"


def card(summary: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """The data set's README.md: what `datasets` reads to load `sft` and `dpo`, and what a reader wants to know.

    A set without a row is no config, since there is nothing to load.
    """
    configs = [
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}.jsonl"
        for name in ("sft", "dpo")
        if summary[name]
    ]
    front = ["configs:", *configs] if configs else ["configs: []"]
    models = ", ".join(f"`{one['name']}`" for one in settings["sampling"]["sources"])
    told = [f"- {key}: {value}" for part in settings.values() for key, value in _flat(part)]
    lines = [
        "---",
        *front,
        "task_categories:",
        "- text-generation",
        "tags:",
        "- synthetic",
        "- cl-graft",
        "---",
        "",
        "# Answers of source models, selected for training",
        "",
        f"Sampled from {models} by `cl-graft transfer build`. `sft` holds the best answer to each prompt, `dpo` the "
        "best and the worst answer of one and the same source. `samples.jsonl` holds every answer, `rewards.jsonl` "
        "how each was judged, `build.json` the settings and the digest of each file. The licences of the prompts "
        "and of the sources apply.",
        "",
        *told,
        "",
        markdown(summary),
    ]
    return "\n".join(lines)


def _flat(part: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(k, v) for k, v in part.items() if not isinstance(v, (dict, list)) and v is not None]


def why_no_pair(summary: Mapping[str, Any]) -> str:
    """How many prompts of all sources gave no pair, for each reason."""
    totals: Counter[str] = Counter()
    for one in summary["sources"].values():
        totals.update(one["dropped"])
    return ", ".join(f"{totals[why]:,} {why}" for why in REASONS if totals[why])


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _show(value: float | None, scale: float, spec: str) -> str:
    return UNMEASURED if value is None else format(value * scale, spec)
