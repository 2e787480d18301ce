"""Fingerprints of a base: the same weights have one, however they are loaded, laid out or ordered."""

from __future__ import annotations

import hashlib
import resource
import struct
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from cl_graft.skillpack.format import fingerprint as module
from cl_graft.skillpack.format.fingerprint import fingerprint


def test_a_fingerprint_by_hand() -> None:
    """Hashes of `[name,kind,shape]` and of the values, hashed in the order of the names."""
    named = {"b": torch.tensor([1, 2], dtype=torch.int16), "a": torch.tensor([[1.5, -0.0]]).half()}
    a = b'["a", "float", [1, 2]]' + struct.pack("<2f", 1.5, -0.0)
    b = b'["b", "torch.int16", [2]]' + struct.pack("<2h", 1, 2)
    inner = [hashlib.blake2b(data, digest_size=16).digest() for data in (a, b)]
    assert (
        fingerprint(named.items()) == hashlib.blake2b(b"".join(inner), digest_size=16).hexdigest()
    )


def test_a_fingerprint_covers_names_shapes_and_values() -> None:
    x = torch.arange(6, dtype=torch.bfloat16)
    base = {"a": x, "b": x.float(), "c": torch.tensor(1.5), "d": torch.empty(0), "e": x.long()}
    found = fingerprint(base.items())
    assert len(found) == 32 and found == fingerprint(reversed(base.items()))
    nudged = x.clone()
    nudged.view(torch.int16)[3] += 1
    negative = x.clone()
    negative[0] = -0.0
    others = [
        base | {"a": nudged},
        base | {"a": negative},
        base | {"a": x.view(2, 3)},
        base | {"a": x.view(torch.int16)},
        base | {"a": x.double()},
        base | {"e": x.int()},
        base | {"a": base["e"], "e": base["a"]},
        {("A" if name == "a" else name): tensor for name, tensor in base.items()},
        {name: base[name] for name in "abce"},
        base | {"d": torch.empty(0, 1)},
    ]
    assert len({found, *(fingerprint(other.items()) for other in others)}) == 11


@pytest.mark.parametrize(
    "narrow", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_widening_to_float32_changes_nothing(narrow: torch.dtype) -> None:
    x = torch.randn(5, 7).to(narrow)
    assert fingerprint([("x", x)]) == fingerprint([("x", x.float())])
    assert fingerprint([("x", x)]) != fingerprint([("x", x.double())])


def test_a_model_has_one_fingerprint_in_whichever_dtype_it_is_loaded(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    found = set()
    for dtype in (torch.bfloat16, torch.float32):
        model = LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert model.dtype == dtype
        found.add(fingerprint(model.named_parameters()))
    assert len(found) == 1


def test_a_fingerprint_does_not_depend_on_strides() -> None:
    x = torch.randn(3, 4)
    assert fingerprint([("x", x.T)]) == fingerprint([("x", x.T.contiguous())])


def test_packed_dtypes_count_by_their_bytes() -> None:
    two = torch.tensor([1, 2], dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    assert fingerprint([("x", two)]) != fingerprint([("x", two.view(torch.uint8))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_pieces_change_nothing_and_are_small(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    x = (torch.randn(7, 5, 6) * 9).to(dtype)
    views = [x, x[0], x[:, 0], x[0, 0], x.permute(2, 0, 1), x.reshape(-1), x[0, 0, 0], x[:0]]
    whole = [fingerprint([("x", view)]) for view in views]
    for piece in (1, 2, 5, 6, 29, 31, 100, 209):
        monkeypatch.setattr(module, "PIECE", piece)
        assert [fingerprint([("x", view)]) for view in views] == whole
        for view in views:
            pieces = list(module._pieces(view))
            assert max(part.numel() for part in pieces) <= piece
            assert torch.equal(torch.cat([p.reshape(-1) for p in pieces]), view.reshape(-1))


def test_tensors_are_taken_one_at_a_time() -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()

    def stream() -> Iterator[tuple[str, Tensor]]:
        for i in range(20):
            assert not alive
            tensor = torch.ones(3)
            alive.add(tensor)
            yield str(i), tensor
            del tensor

    fingerprint(stream())


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not say")
@pytest.mark.parametrize("transposed", [False, True])
def test_a_large_tensor_takes_little_more_memory(transposed: bool) -> None:
    """128 MiB of bfloat16, whose float32 copy would take 256 MiB, in address space for 96."""
    x = torch.zeros(1 << 13, 1 << 13, dtype=torch.bfloat16)
    x = x.T if transposed else x
    fingerprint([("x", x[:8])])
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (held + (96 << 20), limits[1]))
    try:
        fingerprint([("x", x)])
        with pytest.raises(RuntimeError):
            x.float()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
