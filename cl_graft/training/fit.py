"""One training job on a model in this process, alone or as one of several: SFT or DPO, by TRL."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_graft.config import Launch
from cl_graft.store.digests import peak_memory_mb
from cl_graft.store.files import flush, read_jsonl, write_json, write_text
from cl_graft.training.config import (
    Row,
    StageConfig,
    accumulation,
    at_step,
    logging_steps,
    order,
    save_steps,
)
from cl_graft.training.flat import Lay, flattens, layer
from cl_graft.training.restored import as_it_was
from cl_graft.training.term import FOLLOWED, Term
from cl_graft.training.tokens import Tokens, lengths, tokens, tokens_of_a_step
from cl_graft.training.trainer import dpo_class, sft_class

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

# fraction of the job done, and where it is in words: `step 12 of 250, loss 0.532`
Progress = Callable[[float, str], None]

LOG = "log.jsonl"
TOKENS = "tokens.json"  # how many the job trains on, which only who encodes the rows has counted
WHOLE = "whole"  # marks a step checkpoint that was written to its end


def fit(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    config: StageConfig,
    launch: Launch,
    work: Path,
    deepspeed: dict[str, Any] | None = None,
    progress: Progress = lambda done, at: None,
    terms: Sequence[Term] = (),
    flat: bool | None = None,
) -> Any:
    """Train in place, from the last whole checkpoint in `work` if there is one; returns TRL's trainer.

    `work`/log.jsonl has a line for every twentieth of the job: loss terms, learning rate, gradient norm, tokens a
    second, peak memory; `work`/tokens.json is the tokens of the whole job, `work`/followed.safetensors what terms keep
    of its weights. The loss is taken over answers only.
    `deepspeed`: its JSON, in a job of several processes. `terms`: what a method adds; the loss in the log is with them.
    flat: whether micro-batches are read as rows without padding; None asks the model (training/flat.py).
    rows: texts, or a data set on disk of the tokens that training/tokens.py makes of them. What TRL changes of the
    model besides its weights is put back. Raises Diverged where loss or gradients are no finite numbers.
    """
    from transformers import PrinterCallback

    with quiet(), as_it_was(model):
        lay = layer(model) if (flattens(model) if flat is None else flat) else None
        arguments = _arguments(config, launch, work, deepspeed)
        trainer, counts = _trainer(model, tokenizer, rows, config, arguments, terms, lay)
        main = trainer.accelerator.is_main_process
        last = _last_checkpoint(work, main)
        step = int(last.name.rsplit("-", 1)[1]) if last else 0
        count = tokens_of_a_step(counts, len(rows), config)
        report = _report(work, trainer, step, count, progress)
        if main:
            write_json(work / TOKENS, config.steps * count)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(report)
        if last:
            trainer.terms.restore(last / FOLLOWED)
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        if main:
            trainer.terms.save(work / FOLLOWED)
    trainer.model.zero_grad(set_to_none=True)
    return trainer


def _trainer(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row] | Any,
    config: StageConfig,
    given: dict,
    terms: Sequence[Term] = (),
    lay: Lay | None = None,
) -> tuple[Any, list[int]]:
    """TRL's trainer, and the lengths of the texts that it trains on, in tokens."""
    from datasets import Dataset

    examples = rows if isinstance(rows, Dataset) else tokens(tokenizer, rows, config)
    make = _dpo if config.kind == "dpo" else _sft
    return make(model, tokenizer, examples, config, given, terms, lay), lengths(examples)


def _sft(
    model: Any,
    tokenizer: Any,
    given_examples: Sequence[Tokens],
    config: StageConfig,
    given: dict,
    terms: Sequence[Term],
    lay: Lay | None,
) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    examples = list(given_examples)
    return sft_class(SFTTrainer, order(len(examples), config), terms, examples, lay)(
        model=model,
        processing_class=tokenizer,
        # TRL asks for an Arrow data set, and would map it and read rows of it slowly: the examples go past it
        train_dataset=Dataset.from_list(examples[:1]),
        args=_one_device(
            SFTConfig(
                **given,
                max_length=None,  # rows are cut already
                dataset_kwargs={"skip_prepare_dataset": True},
            )
        ),
    )


def _dpo(
    model: Any,
    tokenizer: Any,
    examples: Any,
    config: StageConfig,
    given: dict,
    terms: Sequence[Term],
    lay: Lay | None,
) -> Any:
    """Against the model as it is at the start, whose log-probabilities are computed once."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    # one on disk is given on as it is: the reference's log-probabilities are shared through a file beside it
    pairs = examples if isinstance(examples, Dataset) else Dataset.from_list(examples)
    return dpo_class(DPOTrainer, order(len(pairs), config), terms, lay)(
        model=model,
        processing_class=tokenizer,
        train_dataset=pairs,
        args=_one_device(
            DPOConfig(
                **given,
                beta=config.beta,
                loss_type="sigmoid_norm" if config.length_normalised else "sigmoid",
                max_length=None,  # rows are cut already
                precompute_ref_log_probs=True,
            )
        ),
    )


def _one_device(arguments: Any) -> Any:
    arguments._n_gpu = min(1, arguments.n_gpu)  # not every GPU that this process happens to see
    return arguments


def _arguments(
    config: StageConfig, launch: Launch, work: Path, deepspeed: dict[str, Any] | None
) -> dict[str, Any]:
    import torch

    on_gpu = torch.cuda.is_available()
    micro, accumulated = accumulation(config.batch, launch)
    return {
        "output_dir": str(work),
        "max_steps": config.steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulated,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": round(config.warmup * config.steps),
        "weight_decay": config.weight_decay,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "seed": config.seed,
        "data_seed": config.seed,
        "use_cpu": not on_gpu,
        "bf16": on_gpu,  # the products only: parameters and optimizer states are float32
        "gradient_checkpointing": launch.checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if launch.checkpointing else None,
        "report_to": [],
        "save_strategy": "steps",
        "save_steps": save_steps(config, launch),
        "logging_steps": logging_steps(config),
        "logging_nan_inf_filter": False,  # which logs other losses in the place of NaN; ours stops there
        "disable_tqdm": True,
        "deepspeed": deepspeed,
        "remove_unused_columns": False,  # our batches hold what is used
    }


def _last_checkpoint(work: Path, tidy: bool) -> Path | None:
    """The furthest step checkpoint that is whole; torn ones are removed by one process."""
    whole = []
    for folder in work.glob("checkpoint-*"):
        if (folder / WHOLE).is_file():
            whole.append(folder)
        elif tidy:
            shutil.rmtree(folder, ignore_errors=True)
    return max(whole, key=lambda f: int(f.name.rsplit("-", 1)[1]), default=None)


def _report(work: Path, trainer: Any, step: int, tokens: float, progress: Progress) -> Any:
    """The callback that writes the log, marks whole checkpoints, and removes those before them."""
    from transformers import TrainerCallback

    file = work / LOG
    kept = [x for x in read_jsonl(file) if x["step"] <= step] if file.is_file() else []
    before = kept[-1]["seconds"] if kept else 0.0
    seen = kept[-1].get("num_tokens", 0.0) if kept else 0.0  # TRL counts from where it goes on
    main = trainer.accelerator.is_main_process
    if main:
        write_text(file, "".join(json.dumps(line) + "\n" for line in kept))

    class Report(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            self.begun, self.last = time.perf_counter(), (time.perf_counter(), state.global_step)

        def on_step_end(self, args, state, control, **kwargs):
            trainer.follow()
            if state.global_step == state.max_steps:
                control.should_save = False  # the stage itself is saved next
            losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
            progress(
                state.global_step / max(1, state.max_steps),
                at_step(state.global_step, state.max_steps, losses[-1] if losses else None),
            )

        def on_log(self, args, state, control, logs=None, **kwargs):
            if not main or "loss" not in (logs or {}):
                return
            now, (then, at) = time.perf_counter(), self.last
            self.last = now, state.global_step
            line = {"step": state.global_step}
            line |= {k: float(v) for k, v in logs.items() if isinstance(v, (int, float))}
            if "num_tokens" in line:
                line["num_tokens"] += seen
            line["tokens_per_second"] = tokens * (state.global_step - at) / max(now - then, 1e-9)
            line["peak_memory_mb"] = _peak_mb()
            line["seconds"] = before + now - self.begun
            with file.open("a") as log:
                log.write(json.dumps(line) + "\n")

        def on_save(self, args, state, control, **kwargs):
            trainer.accelerator.wait_for_everyone()  # each process writes its share
            if main:
                saved = work / f"checkpoint-{state.global_step}"
                trainer.terms.save(saved / FOLLOWED)
                flush(saved)
                (saved / WHOLE).touch()
                for folder in work.glob("checkpoint-*"):
                    if folder != saved:
                        shutil.rmtree(folder, ignore_errors=True)

    return Report()


def _peak_mb() -> float:
    """Peak of the accelerator's memory where there is one, else of the process's, in MiB."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return peak_memory_mb()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the trainers' own logs out of the user's terminal; warnings of ours are not raised here."""
    import datasets
    import torch
    from transformers.utils import logging as hf

    if not torch.cuda.is_available():  # DeepSpeed says on standard output that it has to guess
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    datasets.disable_progress_bars()
    level, bars = hf.get_verbosity(), hf.is_progress_bar_enabled()
    hf.set_verbosity_error()
    hf.disable_progress_bar()
    logging.getLogger("trl").setLevel(logging.ERROR)
    tqdm = os.environ.get("TQDM_DISABLE", "")
    os.environ["TQDM_DISABLE"] = "1"  # TRL's bar of reference log-probabilities
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            os.environ["TQDM_DISABLE"] = tqdm
            hf.set_verbosity(level)
            if bars:
                hf.enable_progress_bar()
