"""Writing a pack: a tensor at a time, the same bytes as `save`, and never half a file."""

from __future__ import annotations

import errno
import gc
import os
import random
import resource
import signal
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_graft.skillpack import codecs
from cl_graft.skillpack.codecs import Encoded
from cl_graft.skillpack.codecs.quant import round_to_nearest
from cl_graft.skillpack.format.file import (
    CorruptPack,
    NonFinite,
    SkillPack,
    SkillPackError,
    packed_size,
    write_pack,
)
from tests.refusals import refusal

ABOUT: dict[str, Any] = {"method": "graft", "options": {"budget": 0.1}, "base": "01" * 16}


def some_tensors() -> dict[str, Encoded]:
    """Every dtype and codec, so that the parts of a tensor do not lie side by side in the file."""
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    q = round_to_nearest(x, 3, 4)
    return {
        "norm.weight": codecs.dense(x[0], torch.float32),
        "a.weight": codecs.sparse_top(x, 4),
        "b.weight": codecs.low_rank(x[:, :1], x[:1], torch.float16),
        "c.weight": codecs.quantized(q),
        "d.weight": codecs.quantized_low_rank([(q, q)], (8, 8)),
        "e.weight": codecs.sign_scale(x),
    }


def some_pack(task: str = "math") -> SkillPack:
    return SkillPack(some_tensors(), task, **ABOUT)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "math.skillpack"
    some_pack().save(path)
    return path


# one tensor at a time


def test_the_bytes_are_those_of_save_and_each_tensor_is_fetched_once_in_order(saved: Path) -> None:
    tensors, asked = some_tensors(), []
    specs = {name: tensors[name].spec for name in reversed(tensors)}

    def fetch(name: str) -> Encoded:
        asked.append(name)
        return tensors[name]

    other = saved.parent / "other"
    size = write_pack(other, specs, fetch, task="math", **ABOUT)
    assert size == packed_size(specs, task="math", **ABOUT) == saved.stat().st_size
    assert other.read_bytes() == saved.read_bytes()
    assert asked == list(specs)


def test_added_and_grown_are_written_as_save_does(tmp_path: Path) -> None:
    tensors, lacking = some_tensors(), {"added": ["e.weight"], "grown": {"d.weight": (7, 8)}}
    specs = {name: encoded.spec for name, encoded in tensors.items()}
    streamed, whole = tmp_path / "a", tmp_path / "b"
    write_pack(streamed, specs, tensors.__getitem__, task="math", **ABOUT, **lacking)
    SkillPack(tensors, "math", **ABOUT, added=["e.weight"], grown={"d.weight": [7, 8]}).save(whole)
    assert streamed.read_bytes() == whole.read_bytes()


def test_no_more_than_one_tensor_is_alive(tmp_path: Path) -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def fetch(name: str) -> Encoded:
        nonlocal most
        encoded = codecs.dense(torch.full((64, 64), float(name)))
        alive.update(encoded.parts.values())
        most = max(most, len(alive))
        return encoded

    specs = {str(i): ("dense", (64, 64), {"dtype": "BF16"}) for i in range(50)}
    gc.disable()  # what only a collector would find counts as held
    try:
        write_pack(tmp_path / "x", specs, fetch, task="math", **ABOUT)
    finally:
        gc.enable()
    assert most == 1 and not alive
    found = SkillPack.load(tmp_path / "x").decode()
    assert all((found[name] == float(name)).all() for name in specs)


def resident() -> int:
    """Bytes of memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not say")
def test_memory_does_not_grow_with_the_number_of_tensors(tmp_path: Path) -> None:
    """128 MiB of tensors are written while the process grows by less than 24 MiB."""
    start, most = 0, 0

    def fetch(name: str) -> Encoded:
        nonlocal start, most
        start = start or resident()
        most = max(most, resident() - start)
        return codecs.dense(torch.full((1 << 20,), float(name)))

    specs = {str(i): ("dense", (1 << 20,), {"dtype": "BF16"}) for i in range(64)}
    assert write_pack(tmp_path / "x", specs, fetch, task="math", **ABOUT) > 128 << 20
    assert most < 24 << 20


# what is fetched must be what was foretold, and fit to be stored


def test_another_tensor_than_foretold_is_refused(saved: Path) -> None:
    tensors, before = some_tensors(), saved.read_bytes()
    specs = {name: encoded.spec for name, encoded in tensors.items()}
    x = torch.ones(6, 8)
    bad = codecs.dense(x)
    bad.parts["values"][0, 0] = torch.nan
    short = Encoded("dense", (6, 8), {"dtype": "BF16"}, {"values": x[1:].bfloat16()})
    for other, spec, kind in (
        (codecs.dense(x, torch.float16), codecs.dense(x).spec, CorruptPack),
        (codecs.dense(x.T), codecs.dense(x).spec, CorruptPack),
        (short, short.spec, CorruptPack),
        (bad, bad.spec, NonFinite),
    ):
        found = tensors | {"e.weight": other}
        about = {"task": "b", **ABOUT}
        refusal(
            kind,
            lambda spec=spec, found=found, about=about: write_pack(
                saved, specs | {"e.weight": spec}, found.__getitem__, **about
            ),
            "'e.weight'",
        )
        assert list(saved.parent.iterdir()) == [saved] and saved.read_bytes() == before


def test_a_spec_without_a_meaning_is_refused_before_anything_is_fetched(tmp_path: Path) -> None:
    def fetch(name: str) -> Encoded:
        raise AssertionError(name)

    specs: dict[str, Any] = {"w": ("dense", (6, -8), {"dtype": "BF16"})}
    write = lambda: write_pack(tmp_path / "x", specs, fetch, task="", **ABOUT)  # noqa: E731
    refusal(CorruptPack, write, "'w'", "-8")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError(errno.ENOENT, "no shard"), KeyError("w"), SystemExit(1)])
@pytest.mark.parametrize("nth", [0, 3, 5])
def test_what_fetch_raises_passes_and_leaves_the_old_file(
    saved: Path, error: BaseException, nth: int
) -> None:
    tensors, before = some_tensors(), saved.read_bytes()
    specs = {name: encoded.spec for name, encoded in tensors.items()}

    def fetch(name: str) -> Encoded:
        if name == list(specs)[nth]:
            raise error
        return tensors[name]

    with pytest.raises(type(error)) as caught:
        write_pack(saved, specs, fetch, task="b", **ABOUT)
    assert caught.value is error
    assert list(saved.parent.iterdir()) == [saved] and saved.read_bytes() == before


# a save that fails or is killed


@pytest.mark.parametrize(("module", "call"), [(os, "replace"), (os, "fsync"), (os, "pwrite")])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_failed_save_leaves_the_old_file(
    saved: Path, monkeypatch: pytest.MonkeyPatch, module: Any, call: str, error: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise error

    before = saved.read_bytes()
    monkeypatch.setattr(module, call, fail)
    if isinstance(error, OSError):
        refusal(SkillPackError, lambda: some_pack("b").save(saved), str(saved), "disk is full")
    else:
        with pytest.raises(KeyboardInterrupt):
            some_pack("b").save(saved)
    assert list(saved.parent.iterdir()) == [saved]
    assert saved.read_bytes() == before


def test_a_write_that_the_system_cuts_short_leaves_the_old_file(saved: Path) -> None:
    before, limits = saved.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        refusal(SkillPackError, lambda: some_pack("b").save(saved), str(saved), "too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(saved.parent.iterdir()) == [saved]
    assert saved.read_bytes() == before


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    path = tmp_path / "no" / "x"
    refusal(SkillPackError, lambda: some_pack().save(path), str(path), "No such file")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of fork in a process with threads
def test_a_killed_save_leaves_the_old_file_or_the_new(saved: Path) -> None:
    old, new = some_pack(), some_pack("code")
    rng = random.Random(0)
    for _ in range(20):
        child = os.fork()
        if not child:
            while True:
                new.save(saved)
                old.save(saved)
        time.sleep(rng.uniform(0.001, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert SkillPack.load(saved).digest in (old.digest, new.digest)
