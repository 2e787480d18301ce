"""What a cell is made of besides its config: source files of its plug-ins, its data, and its model's files.

All of it is told without loading a model or computing anything, so that a finished cell is never taken for that of
an edited method, of other data or of other weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from os.path import relpath
from pathlib import Path
from typing import Any

from cl_graft import plugins
from cl_graft.config import RunConfig
from cl_graft.data import harness
from cl_graft.experiment.prepare import scenario_of
from cl_graft.models import corpus, embedded, published
from cl_graft.models.load import FILES
from cl_graft.store.digests import data_fingerprint, digest
from cl_graft.store.source_files import digest_of
from cl_graft.task import Scenario

Files = dict[str, str]  # name -> digest
DATA = ("scenario", "seed", "data_dir", "options", "scoring", "train_on", "general", "tuned")
_data_sets: dict[str, str] = {}  # the cells of a sweep ask for the same again and again


def sources(config: RunConfig, scorers: Iterable[str]) -> dict[str, Any]:
    """{"scenario", "strategy" or "router": files, "scorers": {name: files}} of the plug-ins, and what these import
    from beside them."""
    kinds = ("scenario", "strategy", *(["router"] if config.task_ids == "inferred" else []))
    files: dict[str, Any] = {kind: plugins.sources(kind, getattr(config, kind)) for kind in kinds}
    if config.general:
        files["general"] = {"lm-eval": harness.version()}
        files["general"] |= {
            relpath(f): digest_of(f) for f in harness.files(",".join(config.general))
        }
    return files | {"scorers": {name: plugins.sources("scorer", name) for name in scorers}}


def scorers_of(scenario: Scenario) -> list[str]:
    """The names by which the scorers of its tasks are found, sorted."""
    return sorted({scoring.name for task in scenario.examined for scoring in task.scorings})


def inputs(config: RunConfig) -> dict[str, Files]:
    """{"data": the data set, where files of the user's decide it, "model": its files, where it is a folder}.

    What is not on this machine is left out. Raises CLGraftError where the data cannot be read.
    """
    digests: dict[str, Files] = {}
    folders = [f for f in (config.data_dir, *config.trained_on.values()) if f and f.is_dir()]
    if folders:
        digests["data"] = {"data set": _data_set(config, folders)}
    if spec := embedded.SPECS.get(config.model):
        if spec.corpus == "data" and config.data_dir and config.data_dir.is_dir():
            digests["model"] = {"text to train the model on": digest(corpus.texts(config.data_dir))}
    elif entry := published.PUBLISHED.get(config.model):
        digests["model"] = {"GGUF that the model is made from": entry.sha256}
    elif (folder := Path(config.model)).is_dir():
        files = sorted({file for kind in FILES for file in folder.glob(kind)})
        digests["model"] = {str(file): digest_of(file) for file in files}
    return digests


def _data_set(config: RunConfig, folders: list[Path]) -> str:
    """Digest of the scenario's data; it is read again once a file in the folders or the scenario's own is another."""
    told = config.model_dump_json(include={*DATA})
    own = plugins.sources("scenario", config.scenario)
    key = digest(told, own, [list(_stamps(folder)) for folder in folders])
    if key not in _data_sets:
        _data_sets[key] = data_fingerprint(scenario_of(config))
    return _data_sets[key]


def _stamps(folder: Path) -> Iterator[tuple[str, int, int]]:
    """Name, size and time of change of every file below the folder."""
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        stat = file.stat()
        yield str(file), stat.st_size, stat.st_mtime_ns
