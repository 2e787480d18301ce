"""`cl-graft transfer build`: what is on disk afterwards, and what a stopped build goes on to."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cl_graft.store.files import RecordError
from cl_graft.task import Example, Pair
from cl_graft.transfer import build as building
from cl_graft.transfer import lines
from cl_graft.transfer.build import build
from cl_graft.transfer.config import BuildConfig
from cl_graft.transfer.folder import FILES
from cl_graft.transfer.read import read_examples, read_pairs
from tests.command import Call


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def contents(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(out.iterdir()) if p.name != ".lock"}


@pytest.fixture
def config(torn: Path, sure: Path, questions: Path, tmp_path: Path) -> BuildConfig:
    """Two sources and six chunks of eight prompts with eight samples."""
    return BuildConfig(
        sources=(str(torn), str(sure)),
        prompts=str(questions),
        out=tmp_path / "out",
        task="exact",
        samples=8,
        max_new_tokens=6,
        temperature=1.0,
        top_p=1.0,
    )


@pytest.fixture
def words(config: BuildConfig) -> list[object]:
    """The config as a user writes it."""
    torn, sure = config.sources
    given = ["--source", torn, "--source", sure, "--prompts", config.prompts, "--task", "exact"]
    options = ["--samples", 8, "--max-new-tokens", 6, "--temperature", 1.0, "--top-p", 1.0]
    return [*given, *options, "--out", config.out]


# --- what comes out ---


def test_two_data_sets_and_a_report(words: list, config: BuildConfig, call: Call) -> None:
    done = call(*words)
    assert done.code == 0, done.err
    out, (torn, sure) = config.out, config.sources
    assert contents(out).keys() == {*FILES, "build.json"}
    sft, dpo = rows(out / "sft.jsonl"), rows(out / "dpo.jsonl")
    asked = [row["prompt"] for row in rows(Path(config.prompts))]
    assert [row["prompt"] for row in sft] == asked  # `sure` is right about each, in the order given
    assert {row["completion"] for row in sft} == {"yes"}
    assert {row["source"] for row in sft} == {sure}, "`torn` guesses, and is right less often"
    assert 12 <= len(dpo) <= 24  # `torn` says both among eight answers nearly always
    for row in dpo:
        assert row["chosen"] == "yes" != row["rejected"]
        assert (row["chosen_reward"], row["rejected_reward"]) == (1.0, 0.0)
        assert row["judged_by"] == "rule"
    samples, rewards = rows(out / "samples.jsonl"), rows(out / "rewards.jsonl")
    assert [(s["source"], s["index"]) for s in samples] == [
        (r["source"], r["index"]) for r in rewards
    ]
    for said, judged in zip(samples, rewards, strict=True):
        assert asked[said["index"]] == said["prompt"]
        assert judged["rewards"] == [float(text.strip() == "yes") for text in said["responses"]]

    found = json.loads((out / "report.json").read_text())
    assert (found["prompts"], found["sft"], found["dpo"]) == (24, 24, len(dpo))
    for source in (torn, sure):
        texts = [t for s in samples if s["source"] == source for t in s["responses"]]
        one = found["sources"][source]
        assert one["answers"] == len(texts) == 24 * 8
        assert one["characters"]["mean"] == pytest.approx(sum(map(len, texts)) / len(texts))
        assert one["characters"]["max"] == max(map(len, texts))
        assert one["right"] == sum(t.strip() == "yes" for t in texts) / len(texts)
        assert one["sft"] == sum(row["source"] == source for row in sft)
        assert one["dpo"] == sum(row["source"] == source for row in dpo)
        assert one["dpo"] + sum(one["dropped"].values()) == 24
    ones = sum(sum(judged["rewards"]) for judged in rewards)
    assert found["rewards"] == {
        "rule": [
            {"from": 0.0, "to": 0.0, "answers": 2 * 24 * 8 - ones},
            {"from": 1.0, "to": 1.0, "answers": ones},
        ]
    }
    for told in ("24 SFT rows", f"{len(dpo)} DPO pairs", "fewer than two different answers"):
        assert told in done.out and told in (out / "report.md").read_text()


def test_the_same_seed_gives_the_same_bytes(config: BuildConfig, tmp_path: Path) -> None:
    build(config)
    again = config.model_copy(update={"out": tmp_path / "again"})
    build(again)
    assert contents(again.out) == contents(config.out)
    other = config.model_copy(update={"out": tmp_path / "other", "seed": 1})
    build(other)
    assert contents(other.out)["samples.jsonl"] != contents(config.out)["samples.jsonl"]


LOADER = """
import json, sys
from datasets import load_dataset
print(json.dumps({name: load_dataset(sys.argv[1], name, split="train").to_list() for name in ("sft", "dpo")}))
"""


@pytest.mark.slow
def test_datasets_loads_the_folder_without_a_network(config: BuildConfig, tmp_path: Path) -> None:
    build(config)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOADER, str(config.out)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["sft"] == rows(config.out / "sft.jsonl")
    assert found["dpo"] == rows(config.out / "dpo.jsonl")


def test_a_reward_model_ranks_what_no_rule_judges(
    config: BuildConfig, reward_model: Path, write: Callable[..., Path]
) -> None:
    """Every other question has a reference: rules label those, the reward model ranks the rest."""
    asked = rows(Path(config.prompts))
    for row in asked[::2]:
        del row["completion"]
    mixed = config.model_copy(
        update={"prompts": str(write(asked)), "reward_model": str(reward_model)}
    )
    found = build(mixed)
    sft, dpo = rows(config.out / "sft.jsonl"), rows(config.out / "dpo.jsonl")
    assert [row["judged_by"] for row in sft] == ["reward model", "rule"] * 12
    samples, rewards = rows(config.out / "samples.jsonl"), rows(config.out / "rewards.jsonl")
    assert {r["by"] for r in rewards if r["index"] % 2 == 0} == {"reward model"}
    for row, text in zip(sft[::2], (row["prompt"] for row in asked[::2]), strict=True):
        best = max(
            reward
            for s, r in zip(samples, rewards, strict=True)
            if s["prompt"] == text
            for reward, said, whole in zip(r["rewards"], s["responses"], s["finished"], strict=True)
            if said.strip() and whole
        )
        assert (row["prompt"], row["reward"]) == (text, best)
    assert {row["judged_by"] for row in dpo} == {"reward model", "rule"}
    assert set(found["rewards"]) == {"reward model", "rule"}
    assert len(found["rewards"]["reward model"]) <= 10
    ranked = sum(b["answers"] for b in found["rewards"]["reward model"])
    assert ranked == 12 * 2 * 8


def test_programs_need_consent(
    config: BuildConfig, write: Callable[..., Path], call: Call, words: list
) -> None:
    words[words.index("exact")] = "tests"
    tests = write([{"prompt": "Q: Copy a.\nA: ", "tests": ["assert yes == 1"]}])
    words[words.index(config.prompts)] = tests
    assert "--allow-code-execution" in call(*words).reason
    assert not config.out.exists()
    done = call(*words, "--allow-code-execution")
    assert "no answer to any of 1 prompts is right" in done.reason  # `yes` is no program's name
    assert rows(config.out / "rewards.jsonl")[0]["rewards"] == [0.0] * 8


# --- stopped and continued ---


class Killed(BaseException):
    pass


def test_a_build_stopped_after_any_chunk_ends_the_same(
    config: BuildConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve appends, six of samples and six of rewards; each build is stopped after one more of them, and may leave
    the beginning of the next behind."""
    torn_ends = itertools.cycle([b"", b'{"source": "x", "ind', b'{"source": "x"}\n', b"{"])
    build(config)
    stopped = config.model_copy(update={"out": tmp_path / "stopped"})
    for torn_end in itertools.islice(torn_ends, 12):
        with monkeypatch.context() as patch:
            append, calls = lines.append, []

            def once(path: Path, new: list, append=append, calls=calls, torn_end=torn_end) -> None:
                if calls:
                    with open(path, "ab") as file:
                        file.write(torn_end)
                    raise Killed
                calls.append(path.name)
                append(path, new)

            patch.setattr(lines, "append", once)
            try:
                build(stopped)
            except Killed:
                assert "files" not in json.loads((stopped.out / "build.json").read_text())
                with pytest.raises(RecordError, match="is not complete"):
                    read_examples(stopped.out)
    build(stopped)
    assert contents(stopped.out) == contents(config.out)


KILLED = """
import os, signal
from cl_graft.cli import main
from cl_graft.transfer import lines

def once(path, rows, append=lines.append):
    append(path, rows)
    os.kill(os.getpid(), signal.SIGKILL)

lines.append = once
main()
"""


@pytest.mark.slow
def test_a_killed_command_goes_on_to_the_same_bytes(
    words: list, config: BuildConfig, call: Call, tmp_path: Path
) -> None:
    """SIGKILL once the first chunk is on disk."""
    build(config)
    stopped = tmp_path / "stopped"
    words = [*words[:-1], stopped]
    command = [sys.executable, "-W", "ignore", "-c", KILLED, "transfer", "build"]
    command += map(str, words)
    process = subprocess.run(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    assert process.returncode == -signal.SIGKILL
    begun = (stopped / "samples.jsonl").read_bytes()
    assert 0 < len(begun) < len(contents(config.out)["samples.jsonl"])
    done = call(*words)
    assert done.code == 0, done.err
    assert contents(stopped) == contents(config.out)


def test_a_complete_build_is_not_sampled_again(
    config: BuildConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, before = build(config), contents(config.out)

    def sampler(*given: object) -> None:
        raise AssertionError("a source was loaded")

    monkeypatch.setitem(building.SAMPLERS, "hf", sampler)
    assert build(config) == first
    assert contents(config.out) == before


def test_a_further_source_costs_its_own_answers_alone(
    config: BuildConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Complete, and stopped on the way to the second; it ends as if both had been there from the first."""
    config = config.model_copy(update={"logits": 3})
    build(config)
    torn, sure = config.sources
    grown = config.model_copy(update={"out": tmp_path / "grown", "sources": (torn,)})
    build(grown)
    both = grown.model_copy(update={"sources": (torn, sure)})
    sampler, asked = building.SAMPLERS["hf"], []

    def spoken(config: BuildConfig, source: str, *given: object):
        asked.append(source)
        if len(asked) == 1:
            raise Killed
        return sampler(config, source, *given)

    monkeypatch.setitem(building.SAMPLERS, "hf", spoken)
    with pytest.raises(Killed):
        build(both)
    with pytest.raises(RecordError, match="is not complete"):
        read_examples(grown.out)
    build(both)
    assert asked == [sure, sure]
    assert contents(grown.out) == contents(config.out)
    for other in ((sure, torn), (sure,), (torn,)):
        with pytest.raises(RecordError, match=f"was begun with the sources {torn}, {sure}; give"):
            build(grown.model_copy(update={"sources": other}))


def test_other_gaps_select_again_from_the_same_answers(
    config: BuildConfig, reward_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranked = config.model_copy(update={"task": None, "reward_model": str(reward_model)})
    free = build(ranked)
    before = contents(config.out)
    gaps = [r["chosen_reward"] - r["rejected_reward"] for r in rows(config.out / "dpo.jsonl")]
    middle = sorted(gaps)[len(gaps) // 2]
    monkeypatch.delitem(building.SAMPLERS, "hf")
    bounded = build(ranked.model_copy(update={"min_gap": middle}))
    kept = [r["chosen_reward"] - r["rejected_reward"] for r in rows(config.out / "dpo.jsonl")]
    assert 0 < len(kept) <= free["dpo"] and min(kept) >= middle > min(gaps)
    assert bounded["sft"] == free["sft"]
    after = contents(config.out)
    assert [
        n for n in ("samples.jsonl", "rewards.jsonl", "sft.jsonl") if after[n] != before[n]
    ] == []
    build(ranked)
    assert contents(config.out) == before


# --- read back ---


def test_read_back(config: BuildConfig) -> None:
    build(config)
    sft, dpo = rows(config.out / "sft.jsonl"), rows(config.out / "dpo.jsonl")
    assert read_examples(config.out) == tuple(Example(r["prompt"], r["completion"]) for r in sft)
    assert read_pairs(config.out) == tuple(
        Pair(r["prompt"], r["chosen"], r["rejected"]) for r in dpo
    )


def test_only_what_the_build_left_is_read(config: BuildConfig, tmp_path: Path) -> None:
    build(config)
    with open(config.out / "dpo.jsonl", "a") as file:
        file.write(json.dumps({"prompt": "p", "chosen": "c", "rejected": "r"}) + "\n")
    assert read_examples(config.out)
    with pytest.raises(RecordError, match=r"dpo\.jsonl is not as the build left it"):
        read_pairs(config.out)
    (config.out / "sft.jsonl").unlink()
    with pytest.raises(RecordError, match=r"sft\.jsonl is not as the build left it"):
        read_examples(config.out)
    with pytest.raises(RecordError, match="holds no build.json"):
        read_pairs(tmp_path)
    (config.out / "build.json").write_text("{}")
    with pytest.raises(RecordError, match="was not written by this version"):
        read_pairs(config.out)
