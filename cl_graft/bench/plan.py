"""Estimated against measured memory: stages of two steps, really trained through TRL, by the allocator's count."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import torch

from cl_graft.config import Launch
from cl_graft.models import toy_language
from cl_graft.models.embedded import toy_tokenizer
from cl_graft.planning.memory import Job, estimate
from cl_graft.task import Example, Pair, Preference, Task, Training
from cl_graft.training.config import Row, StageConfig, dpo_job, sft_job
from cl_graft.training.fit import fit
from cl_graft.training.tokens import largest, lengths, tokens

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

Stage = tuple[list[Row], StageConfig]


@dataclass(frozen=True)
class Case:
    """A Llama to measure: its widths, its recipe, and how long its rows are; none for those of `mini`'s arithmetic."""

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    vocabulary: int
    batch: int
    length: int | None
    kind: Literal["sft", "dpo"] = "sft"
    accumulation: int = 1
    checkpointing: bool = False
    lora: bool = False

    @property
    def config(self) -> PreTrainedConfig:
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads // 2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )


MINI = Case("mini-llama", 128, 384, 3, 4, 224, batch=16, length=None)
TEXT = Case("text-llama", 128, 384, 3, 4, 1024, batch=16, length=160)
WIDE = Case("wide", 512, 1408, 4, 8, 4096, batch=8, length=96)
BASES = (MINI, TEXT, WIDE)
CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"kind": "dpo"},
    {"checkpointing": True},
    {"kind": "dpo", "checkpointing": True},
    {"accumulation": 2},
    {"lora": True},
    {"kind": "dpo", "lora": True},
    {"lora": True, "checkpointing": True},
)


def bench_plan(cases: Iterable[Case] | None = None) -> list[dict[str, Any]]:
    """A row for each case: megabytes estimated and measured, their ratio, and the estimate's parts."""
    chosen = cases or [replace(base, **change) for base in BASES for change in CHANGES]
    return [compare(case) for case in chosen]


def compare(case: Case) -> dict[str, Any]:
    """Estimate and measurement of one case, in megabytes."""
    tokenizer = toy_tokenizer()
    stage = _stage(case)
    examples, micro = tokens(tokenizer, *stage), case.batch // case.accumulation
    job = Job(
        case.kind,
        micro_batch=micro,
        length=max(lengths(examples)),
        accumulation=case.accumulation,
        lora=_lora() if case.lora else None,
        checkpointing=case.checkpointing,
        gpu=torch.cuda.is_available(),
        flat=largest(examples, stage[1], micro),
    )
    estimated = estimate(case.config, job)
    measured = measure(case.config, tokenizer, stage, job)
    changes = [n for n in ("checkpointing", "lora") if getattr(case, n)]
    if case.accumulation > 1:
        changes.append(f"accumulation {case.accumulation}")
    return {
        "model": case.name,
        "stage": case.kind,
        "with": ", ".join(changes),
        "length": job.length,
        "estimated_mb": estimated.device / 1e6,
        "measured_mb": measured / 1e6,
        "ratio": estimated.device / measured,
        "parts_mb": {n: v / 1e6 for n, v in asdict(estimated).items()},
    }


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def _stage(case: Case) -> Stage:
    """A stage of two steps of a case."""
    half = Preference(steps=2, batch=case.batch)
    recipe = Training(steps=2, batch=case.batch, preference=half)
    pairs = texts(case, 2 * case.batch)
    if case.kind == "sft":
        examples = [Example(prompt, answer) for prompt, answer in pairs]
        return sft_job(Task("", examples, (), "exact", training=recipe), 0)
    made = [Pair(prompt, answer, answer[::-1]) for prompt, answer in pairs]
    return dpo_job(Task("", (), (), "exact", training=recipe), made, 0)


def texts(case: Case, count: int) -> list[tuple[str, str]]:
    """Prompts and answers of a case, drawn at random."""
    rng = Random(0)
    if case.length is None:
        items = [toy_language.pretraining(rng) for _ in range(count)]
        return [(toy_language.prompt(item.question), item.answer) for item in items]

    def words(size: int) -> str:
        return "".join(rng.choice("abcdefgh") for _ in range(size))

    half = case.length // 2
    return [(words(half), words(case.length - half - rng.randrange(9))) for _ in range(count)]


class Peak:
    """`bytes`: the most that was allocated, set when the measurement ends."""

    bytes = 0


@contextmanager
def measured(model: torch.nn.Module) -> Iterator[Peak]:
    """The allocator's peak on the model's device, what the model holds already included.

    On the CPU from the profiler's record of every allocation and release, which leaves out whatever was
    allocated before; resident memory would count what the C library keeps for itself.
    """
    peak = Peak()
    tensors = [*model.parameters(), *model.buffers()]
    if next(model.parameters()).is_cuda:
        torch.cuda.reset_peak_memory_stats()
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated()
        return
    gc.collect()  # what an earlier trainer left would be counted when it goes
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        yield peak
    events: Any = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    now = highest = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    peak.bytes = sum(held.values()) + highest


def measure(
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    stage: Stage,
    job: Job,
) -> int:
    """Bytes at the peak of the stage's steps, laid out as `job` says, without ZeRO, on weights drawn at random."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if job.lora is not None:
        from peft import get_peft_model

        model = get_peft_model(model, job.lora)
    model.to("cuda" if job.gpu else "cpu")
    launch = Launch(micro_batch=job.micro_batch, checkpointing=job.checkpointing)
    with TemporaryDirectory() as work, measured(model) as peak:
        fit(model, tokenizer, *stage, launch, Path(work))
    return peak.bytes
