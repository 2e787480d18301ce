"""A model's weights as they were loaded are read from its files again, and held once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cl_graft.models.load import load
from cl_graft.models.spread import Read, copies, shapes_of
from cl_graft.models.weights import CheckpointError
from cl_graft.skillpack.codecs import dense
from cl_graft.skillpack.folders.loaded import as_loaded
from cl_graft.skillpack.format.file import SkillPack, fingerprint
from cl_graft.skillpack.live.grafted import Grafted
from tests.model_folders import llama, rewrite, saved, tensors

NORM = "model.norm.weight"


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "stored in bfloat16"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return saved(llama(tie_word_embeddings=True).to(request.param), tmp_path / "base")


def values(weights: Any) -> dict[str, Any]:
    return {name: weights[name].clone() for name in weights}


def equal(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def double(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)


def test_what_is_read_is_the_base_whatever_becomes_of_the_model(folder: Path) -> None:
    model, _ = load(str(folder))
    before = values(copies(model))
    base = as_loaded(model)
    double(model)
    assert equal(values(base), before)
    assert {x.dtype for x in before.values()} == {torch.float32}
    assert shapes_of(base) == {name: tuple(x.shape) for name, x in before.items()}


def test_nothing_of_it_is_kept_in_memory(folder: Path) -> None:
    model, _ = load(str(folder))
    base = as_loaded(model)
    assert isinstance(base, Read)
    for name, reader in base.readers.items():
        held: Any = [*reader.args, *reader.keywords.values()]
        assert not any(isinstance(x, torch.Tensor) for x in held), name


def test_packs_come_off_bit_for_bit(folder: Path) -> None:
    model, _ = load(str(folder))
    before, grafted = values(copies(model)), Grafted(model, as_loaded(model))
    packs = [
        SkillPack({n: dense(x, torch.float32) for n, x in some.items()}, n, "m", {}, grafted.base)
        for n, some in (("all", before), ("norm", {NORM: before[NORM]}))
    ]
    for pack in (*packs, packs[0]):
        grafted.activate([pack])
        wanted = {n: x + pack.delta(n) if n in pack.tensors else x for n, x in before.items()}
        assert equal(values(copies(model)), wanted)
        assert grafted.base == fingerprint(before.items())
        assert not grafted._copies
    grafted.unload()
    assert equal(values(copies(model)), before)


def test_what_the_files_do_not_hold_is_copied(folder: Path) -> None:
    model, _ = load(str(folder))
    with torch.no_grad():
        model.model.norm.weight.mul_(3)  # before anybody asked
    before = values(copies(model))
    base = as_loaded(model)
    double(model)
    assert equal(values(base), before)


def test_a_model_made_here_is_copied() -> None:
    model = llama()
    before = values(copies(model))
    base = as_loaded(model)
    double(model)
    assert equal(values(base), before)


def test_files_that_are_written_to_are_refused(folder: Path) -> None:
    model, _ = load(str(folder))
    base = as_loaded(model)
    rewrite(folder, {name: 2 * x for name, x in tensors(folder).items()})
    with pytest.raises(
        CheckpointError, match="was written to or removed while a cell had its base"
    ):
        base[NORM]
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="or removed"):
        base[NORM]
