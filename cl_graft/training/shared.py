"""Train once, graft many: a stage's outcome is kept under the hash of everything that determines it.

Strategies that start a task from the same weights, with the same data, recipe and seed, share its training. The
folder may be deleted at any time; what is missing is trained again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..models import text
from ..record import RecordError
from ..skillpack.file import fingerprint
from ..task import Example, Task
from . import preferences, stage
from .stage import Log


def stage_key(model: nn.Module, task: Task, seed: int) -> str:
    """Digest of start weights, examples, recipe, seed, threads, code and library versions."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(fingerprint(model.named_parameters()).encode())
    digest.update(_examples(task.train).encode())
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "trl")}
    rest = [
        asdict(task.training),
        task.score,
        task.max_new_tokens,
        seed,
        torch.get_num_threads(),
        versions,
    ]
    digest.update(json.dumps(rest, sort_keys=True).encode())
    for module in (stage, preferences, text):
        digest.update(Path(str(module.__file__)).read_bytes())
    return digest.hexdigest()


def train_or_recall(
    folder: Path | None, model: nn.Module, task: Task, seed: int, train: Callable[[], Log]
) -> Log:
    """Leave the trained weights in the model: those of an earlier run of the same stage, or by `train` now.

    The log is the one of the run that did the work, so that costs are those of training, shared or not.
    """
    if folder is None:
        return train()
    path = folder / f"{stage_key(model, task, seed)}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):  # whoever comes second waits and finds the work done
            log = _recall(path, model)
            if log is None:
                log = train()
                _keep(path, model, log)
    except OSError as error:
        raise RecordError(
            f"{path} cannot be written ({error.strerror}); free space or choose another --out, "
            "then run the same command again to continue."
        ) from error
    return log


def _recall(path: Path, model: nn.Module) -> Log | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file, torch.no_grad():
            log = Log(**json.loads(file.metadata()["log"]))
            for name, parameter in model.named_parameters():
                parameter.copy_(file.get_tensor(name))
    except SafetensorError:
        return None  # not whole: train again, and replace it
    return log


def _keep(path: Path, model: nn.Module, log: Log) -> None:
    weights = {n: p.detach().cpu().contiguous() for n, p in model.named_parameters()}
    temporary = path.with_suffix(".tmp")
    try:
        save_file(weights, temporary, metadata={"log": json.dumps(asdict(log))})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _examples(examples: Sequence[Example]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for example in examples:
        digest.update(json.dumps(asdict(example)).encode())
    return digest.hexdigest()
