"""One training job on a model in memory: SFT, then DPO where the recipe has a preference half. TRL trains."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import CLGraftError
from ..models.text import encode
from ..task import Example, Pair, Preference, Training

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


@dataclass
class Log:
    """What a stage cost and how its loss went."""

    seconds: float = 0.0
    tokens: int = 0
    losses: list[dict[str, float]] = field(default_factory=list)

    def add(self, other: Log) -> None:
        self.seconds += other.seconds
        self.tokens += other.tokens
        self.losses += other.losses


Progress = Callable[[float], None]  # fraction of the job done


def sft(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    training: Training,
    seed: int,
    progress: Progress = lambda done: None,
) -> Log:
    """Supervised fine-tuning in place, loss on the completion only."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows, tokens = [], 0
    for example in examples:
        head, tail = encode(tokenizer, example.prompt, example.completion, training.max_length)
        rows.append(
            {"input_ids": head + tail, "completion_mask": [0] * len(head) + [1] * len(tail)}
        )
        tokens += len(head) + len(tail)
    with _arguments(
        training, training.steps, training.batch, training.learning_rate, seed
    ) as common:
        trainer = SFTTrainer(
            model=model,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(rows),
            args=SFTConfig(
                **common,
                max_length=training.max_length,
                packing=False,
                completion_only_loss=True,  # rows already tokenised: the default would be the whole text
            ),
            callbacks=[_progress_callback(progress)],
        )
        log = _train(trainer)
    log.tokens = round(tokens / len(rows) * training.steps * training.batch)
    return log


def dpo(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    training: Training,
    preference: Preference,
    seed: int,
    progress: Progress = lambda done: None,
) -> Log:
    """Direct preference optimisation in place against the model as it is at the start (Rafailov et al. 2023)."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs]
    batch = min(preference.batch, len(rows))
    with _arguments(training, preference.steps, batch, preference.learning_rate, seed) as common:
        trainer = DPOTrainer(
            model=model,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(rows),
            args=DPOConfig(
                **common,
                beta=preference.beta,
                loss_type="sigmoid_norm" if preference.length_normalised else "sigmoid",
                max_length=training.max_length,
                precompute_ref_log_probs=True,
            ),
            callbacks=[_progress_callback(progress)],
        )
        log = _train(trainer)
    lengths = [len(tokenizer(r["prompt"] + r["chosen"])["input_ids"]) for r in rows]
    log.tokens = round(2 * sum(lengths) / len(rows) * preference.steps * batch)
    return log


@contextlib.contextmanager
def _arguments(
    training: Training, steps: int, batch: int, learning_rate: float, seed: int
) -> Iterator[dict[str, Any]]:
    import torch

    on_gpu = torch.cuda.is_available()
    micro = min(training.micro_batch or batch, batch)
    if batch % micro:
        raise CLGraftError(
            f"a batch of {batch} is not a multiple of the micro-batch {micro}; choose a divisor."
        )
    with tempfile.TemporaryDirectory(prefix="cl-graft-") as folder, _quiet():
        yield {
            "output_dir": folder,
            "max_steps": steps,
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": batch // micro,
            "learning_rate": learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": round(training.warmup * steps),
            "weight_decay": training.weight_decay,
            "max_grad_norm": 1.0,
            "optim": "adamw_torch",
            "seed": seed,
            "data_seed": seed,
            "use_cpu": not on_gpu,
            "bf16": False,  # the parameters keep their own dtype
            "gradient_checkpointing": False,
            "report_to": [],
            "save_strategy": "no",
            "logging_steps": max(1, steps // 20),
            "disable_tqdm": True,
        }


def _train(trainer: Any) -> Log:
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    trainer.train()
    kept = ("step", "loss", "grad_norm", "learning_rate", "rewards/accuracies", "rewards/margins")
    losses = [
        {k: float(entry[k]) for k in kept if k in entry}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    trainer.model.zero_grad(set_to_none=True)
    return Log(time.perf_counter() - start, 0, losses)


def _progress_callback(progress: Progress) -> Any:
    from transformers import TrainerCallback

    class Report(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            progress(state.global_step / max(1, state.max_steps))

    return Report()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the trainers' own logs out of the user's terminal; warnings of ours are not raised here."""
    import datasets
    from transformers.utils import logging as hf

    datasets.disable_progress_bars()
    level, bars = hf.get_verbosity(), hf.is_progress_bar_enabled()
    hf.set_verbosity_error()
    hf.disable_progress_bar()
    logging.getLogger("trl").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            hf.set_verbosity(level)
            if bars:
                hf.enable_progress_bar()
