"""One process of a launched stage: `python -m cl_graft.training.job FOLDER`, started by training/launch.py."""

from __future__ import annotations

import itertools
import os
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from cl_graft.config import Launch
from cl_graft.errors import CLGraftError, Diverged
from cl_graft.processes import modules_kept
from cl_graft.skillpack.folders.checkpoint import Checkpoint
from cl_graft.store.files import read_json, write_text
from cl_graft.training import checkpoint, fit, launch, term
from cl_graft.training.config import StageConfig


def main(work: Path) -> None:
    """Train on `work`/rows from `work`/start as `work`/job.json says, and write the checkpoint where it says."""
    given = read_json(work / "job.json")
    if given["launch"]["hostfile"] is None:
        watch = threading.Thread(target=_end_with_the_launcher, daemon=True)
    else:  # on other nodes nobody holds the other end of standard input
        words = (work / launch.ALIVE, given["token"], given["silence"])
        watch = threading.Thread(target=_end_in_silence, args=words, daemon=True)
        threading.Thread(target=_be_heard, args=(work, given["silence"]), daemon=True).start()
    watch.start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        _run(work, given)
    except BaseException as error:
        reason = (
            str(error) if isinstance(error, CLGraftError) else f"{type(error).__name__}: {error}"
        )
        if isinstance(error, Diverged):
            write_text(work / launch.DIVERGED, reason)
        rank = os.environ.get("RANK", "0")
        write_text(work / f"{launch.FAILED}{rank}", f"{reason}\n\n{traceback.format_exc()}")
        raise


def _run(work: Path, given: dict[str, Any]) -> None:
    with modules_kept():
        import deepspeed
        import torch
        from datasets import load_from_disk
        from transformers.integrations import HfDeepSpeedConfig
        from trl import DPOTrainer, SFTTrainer  # noqa: F401 (fit's)

    from cl_graft.training.zero import whole, zero_json

    on_gpu = torch.cuda.is_available()
    torch.set_num_threads(given["threads"])
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    config, how = StageConfig(**given["config"]), Launch(**given["launch"])
    if not on_gpu:
        # DeepSpeed's own collectives on a CPU serve inference alone, and would be compiled first
        deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed()
    settings = zero_json(config, how, on_gpu)
    partitions = HfDeepSpeedConfig(settings)  # while it lives, models are loaded in parts (ZeRO-3)
    model, tokenizer = checkpoint.load_start(work / "start", torch.float32)
    del partitions
    checkpoint.freeze(model, given["frozen"])
    rows = load_from_disk(str(work / "rows"))
    terms = term.load(work / "terms")
    trainer = fit.fit(
        model, tokenizer, rows, config, how, work, settings, terms=terms, flat=given["flat"]
    )
    inner = trainer.accelerator.unwrap_model(trainer.model)
    main, start = trainer.accelerator.is_main_process, Checkpoint(work / "start")
    checkpoint.save(inner, tokenizer, Path(given["out"]), whole, main, start)
    trainer.accelerator.wait_for_everyone()
    if trainer.accelerator.is_main_process:
        write_text(work / launch.DONE, "")
    torch.distributed.destroy_process_group()


def _end_with_the_launcher() -> None:
    """The launcher holds the other end of standard input: when it dies, however it dies, the job ends, too."""
    while os.read(0, 1):  # not sys.stdin, whose lock would be held when the interpreter ends
        pass
    os._exit(1)


def _be_heard(work: Path, silence: float) -> None:
    """Tell whoever started the job that this process lives: a node that is lost says nothing, and its peers wait."""
    file = work / f"{launch.HEARD}{os.environ.get('RANK', '0')}"
    for count in itertools.count():
        with suppress(OSError):
            file.write_text(f"{socket.gethostname()} {count}")
        time.sleep(min(5.0, silence / 4))


def _end_in_silence(file: Path, token: str, silence: float) -> None:
    """Who started the job writes to a file that all nodes see: once it is silent, or another has begun, the job ends.

    Its text is what tells, not its time: clocks of nodes differ.
    """
    said, heard = "", time.monotonic()
    while time.monotonic() - heard < silence:
        time.sleep(min(5.0, silence / 4))
        with suppress(OSError):
            text = file.read_text()
            if text and not text.startswith(token):
                break
            if text != said:
                said, heard = text, time.monotonic()
    os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
