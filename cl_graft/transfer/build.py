"""Sample, judge, select, write: each step goes on where a killed build left it."""

from __future__ import annotations

import gc
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cl_graft import plugins
from cl_graft.evaluation.sandbox import require_consent
from cl_graft.evaluation.scorers import described
from cl_graft.models.load import load
from cl_graft.store.digests import versions
from cl_graft.store.files import RecordError, write_json, write_text
from cl_graft.store.record import CellFolder
from cl_graft.task import Example
from cl_graft.transfer import folder, lines, logits, report, select
from cl_graft.transfer.config import BuildConfig
from cl_graft.transfer.judge import Judge, check_reward_model, reward_judge, rule_judge
from cl_graft.transfer.prompts import Prompts, judged_by_rule, read_prompts
from cl_graft.transfer.sample import ANSWERS, SAMPLERS, Chunk, chunks, require_vllm
from cl_graft.transfer.sources import check_readable, identify, reader, worded

BuildProgress = Callable[[str, float], None]
Rows = list[dict[str, Any]]


def build(config: BuildConfig, progress: BuildProgress = lambda what, done: None) -> dict[str, Any]:
    """Make the data sets in `config.out`, or go on with them; returns the report (report.json).

    Everything that can be known beforehand is checked before anything is sampled. Raises CLGraftError: for bad
    prompts, sources that cannot read them, a reward model that is none, a folder of another build, a verifier that
    fails, a full disk; what was finished by then stays, and the same call goes on from there.
    """
    prompts = read_prompts(config)
    if prompts.rule and plugins.load("scorer", prompts.rule.name).consent:
        what = f"judging answers by {prompts.rule.label!r}"
        require_consent(config.allow_code_execution, what)
    if config.backend == "vllm":
        require_vllm()
    work = CellFolder(config.out)
    with work.lock():
        progress("checking", 0.0)
        _check_models(config, prompts)
        folder.begin(config.out, _identity(config, prompts))
        texts = [example.prompt for example in prompts.examples]
        size = ANSWERS[config.backend]
        schedule = chunks(config.sources, texts, config.samples, config.seed, size)
        samples = _sample(config, prompts, schedule, progress)
        rewards = _judge(config, prompts, schedule, samples, progress)
        progress("selecting", 1.0)
        return _write(config, prompts, samples, rewards, progress)


def shortfall(built: dict[str, Any], config: BuildConfig) -> str | None:
    """Why the build is not what was asked for: no SFT row, or bounds on the gap that no pair keeps; else None."""
    if not built["sft"]:
        return (
            f"no answer to any of {built['prompts']:,} prompts is right; give other sources, easier prompts or more "
            "--samples."
        )
    if not built["dpo"] and (config.min_gap is not None or config.max_gap is not None):
        return (
            f"no pair is left ({report.why_no_pair(built)}); the SFT set is whole, and the same command with another "
            "--min-gap or --max-gap selects again from the same answers."
        )
    return None


def _check_models(config: BuildConfig, prompts: Prompts) -> None:
    texts = [example.prompt for example in prompts.examples]
    for source in config.sources:
        model, tokenizer = reader(source, config.data_dir)
        check_readable(source, tokenizer, model, texts, prompts.max_new_tokens, prompts.chat)
    if config.reward_model is not None:
        _, tokenizer = check_reward_model(config.reward_model, config.data_dir)
        ranked = [e.prompt for e in prompts.examples if not judged_by_rule(e, prompts.rule)]
        # of what is too long for it, it reads the end
        check_readable(config.reward_model, tokenizer, None, ranked, 0, prompts.chat)


def _identity(config: BuildConfig, prompts: Prompts) -> dict[str, Any]:
    examples = prompts.examples
    reward_model = config.reward_model and identify(config.reward_model, config.data_dir)
    return {
        "sampling": {
            "sources": [identify(source, config.data_dir) for source in config.sources],
            "prompts": _digest([e.prompt for e in examples]),
            "samples": config.samples,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "max_new_tokens": prompts.max_new_tokens,
            "seed": config.seed,
            "backend": config.backend,
            "chat": prompts.chat,
        },
        "judging": {
            "rule": prompts.rule and prompts.rule.label,
            "scorer": prompts.rule and described(prompts.rule),
            "references": _digest([[e.completion, e.tests, e.setup] for e in examples]),
            "reward_model": reward_model,
        },
        "selection": {
            "min_gap": config.min_gap,
            "max_gap": config.max_gap,
            "logits": config.logits,
        },
        "prompts": config.prompts,
        "versions": versions(),
    }


def _digest(value: Any) -> str:
    """Digest of a build; identity.digest gives another value than the one in the folders of earlier builds."""
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()


def _sample(
    config: BuildConfig, prompts: Prompts, schedule: Sequence[Chunk], progress: BuildProgress
) -> Rows:
    """Rows of samples.jsonl, one a source and prompt, in the order of the schedule."""
    path = config.out / folder.SAMPLES
    rows, begun = _resume(path, schedule)
    sampler, loaded = None, None
    for number, chunk in enumerate(schedule[begun:], begun):
        progress(f"sampling from {chunk.source}", 0.8 * number / len(schedule))
        if chunk.source != loaded:
            sampler = None  # the last source's memory goes before the next one comes
            _free()
            make = SAMPLERS[config.backend]
            sampler = make(config, chunk.source, prompts.max_new_tokens, prompts.chat)
            loaded = chunk.source
        assert sampler is not None
        texts = [prompts.examples[i].prompt for i in chunk.prompts]
        new = [
            {
                "source": chunk.source,
                "index": i,
                "prompt": text,
                "responses": [answer.text for answer in said],
                "tokens": [answer.tokens for answer in said],
                "finished": [answer.finished for answer in said],
            }
            for i, text, said in zip(chunk.prompts, texts, sampler(texts, chunk.seed), strict=True)
        ]
        lines.append(path, new)
        rows += new
    return rows


def _free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _judge(
    config: BuildConfig,
    prompts: Prompts,
    schedule: Sequence[Chunk],
    samples: Rows,
    progress: BuildProgress,
) -> Rows:
    """Rows of rewards.jsonl, one for each row of samples.jsonl."""
    path = config.out / folder.REWARDS
    rows, begun = _resume(path, schedule)
    judges: dict[str, Judge] = {}
    for number, chunk in enumerate(schedule[begun:], begun):
        progress("judging", 0.8 + 0.2 * number / len(schedule))
        new = []
        for i, row in zip(chunk.prompts, samples[len(rows) :], strict=False):
            example = prompts.examples[i]
            by = "rule" if judged_by_rule(example, prompts.rule) else "reward model"
            if by not in judges:
                _free()
                judges[by] = _make_judge(by, config, prompts)
            different = list(dict.fromkeys(row["responses"]))
            rewards = dict(zip(different, judges[by](example, different), strict=True))
            new.append(
                {
                    "source": chunk.source,
                    "index": i,
                    "by": by,
                    "rewards": [rewards[text] for text in row["responses"]],
                }
            )
        lines.append(path, new)
        rows += new
    return rows


def _make_judge(by: str, config: BuildConfig, prompts: Prompts) -> Judge:
    if by == "rule":
        assert prompts.rule is not None
        return rule_judge(prompts.rule, config.allow_code_execution)
    assert config.reward_model is not None
    return reward_judge(config.reward_model, config.data_dir, prompts.chat)


def _resume(path: Path, schedule: Sequence[Chunk]) -> tuple[Rows, int]:
    """The rows that whole chunks left, and how many chunks those are."""
    ends, total = [], 0
    for chunk in schedule:
        total += len(chunk.prompts)
        ends.append(total)
    rows = lines.resume(path, ends)
    wanted = [(chunk.source, i) for chunk in schedule for i in chunk.prompts][: len(rows)]
    if [(row.get("source"), row.get("index")) for row in rows] != wanted:
        raise RecordError(
            f"{path} does not hold the rows that this build wrote; delete it to do its part of the build anew."
        )
    return rows, sum(end <= len(rows) for end in ends)


def _write(
    config: BuildConfig, prompts: Prompts, samples: Rows, rewards: Rows, progress: BuildProgress
) -> dict[str, Any]:
    """The data sets, the report, the card, the sources' logits if they are asked for, and the marker."""
    answers: dict[int, list[select.Judged]] = {i: [] for i in range(len(prompts.examples))}
    # by source in the order given: the schedule's
    for row, judged in zip(samples, rewards, strict=True):
        ruled = judged["by"] == "rule"
        share = judged["rewards"].count(1) / len(judged["rewards"]) if ruled else 0.0
        for text, reward, finished in zip(
            row["responses"], judged["rewards"], row["finished"], strict=True
        ):
            answers[row["index"]].append(
                select.Judged(row["source"], text, reward, finished, ruled, share)
            )
    sft, dpo = [], []
    dropped: dict[str, Counter[str]] = {source: Counter() for source in config.sources}
    for i, example in enumerate(prompts.examples):
        different = select.distinct(answers[i])
        seed = f"{config.seed}\n{example.prompt}"
        if best := select.best(different, seed):
            sft.append(_sft_row(example, best))
        pair, why = select.pair(different, config.sources, config.gaps, seed)
        if pair:
            dpo.append(_dpo_row(example, pair))
        for source, reason in why.items():
            dropped[source][reason] += 1
    summary = report.summary(
        samples, rewards, sft, dpo, dropped, len(prompts.examples), prompts.duplicates
    )
    out, identity = config.out, folder.read_marker(config.out) or {}
    write_text(out / folder.SFT, "".join(map(lines.line, sft)))
    write_text(out / folder.DPO, "".join(map(lines.line, dpo)))
    write_json(out / "report.json", summary)
    write_text(out / "report.md", report.markdown(summary))
    write_text(out / "README.md", report.card(summary, {p: identity[p] for p in folder.PARTS}))
    _store_logits(config, prompts, sft, progress)
    folder.finish(out, len(config.sources) if config.logits else 0)
    return summary


def _store_logits(
    config: BuildConfig, prompts: Prompts, sft: Rows, progress: BuildProgress
) -> None:
    """Let every source read the SFT rows, its own and the others'; files of the same rows stay as they are."""
    for number, source in enumerate(config.sources if config.logits else ()):
        path = folder.file_of(config.out, number)
        rows = [(row["prompt"], row["completion"]) for row in sft]
        who = identify(source, config.data_dir)
        asked = _digest([who, config.logits, prompts.chat, rows, versions()])
        if logits.asked_of(path) == asked:
            continue
        _free()
        model, tokenizer = load(source, config.data_dir)
        worded_rows = [(worded(tokenizer, source, p, prompts.chat), a) for p, a in rows]
        told = partial(progress, f"reading by {source}")
        said = logits.say(model, tokenizer, worded_rows, config.logits, progress=told)
        logits.write(path, said, source, asked)


def _sft_row(example: Example, best: select.Judged) -> dict[str, Any]:
    return {
        "prompt": example.prompt,
        "completion": best.text,
        "source": best.source,
        "reward": best.reward,
        "judged_by": "rule" if best.by_rule else "reward model",
    }


def _dpo_row(example: Example, pair: select.Chosen) -> dict[str, Any]:
    return {
        "prompt": example.prompt,
        "chosen": pair.better.text,
        "rejected": pair.worse.text,
        "source": pair.better.source,
        "chosen_reward": pair.better.reward,
        "rejected_reward": pair.worse.reward,
        "judged_by": "rule" if pair.better.by_rule else "reward model",
    }
