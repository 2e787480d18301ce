"""A work store that outlives a kill: an item is there whole, or it is not there."""

from __future__ import annotations

import pytest
import torch

from cl_graft.skillpack.compress.work_store import Folder, Item


def test_what_is_put_there_is_found_again_by_another_reader(tmp_path):
    store = Folder(tmp_path / "work")
    store["encoded/a.b"] = Item({"x": torch.arange(6).reshape(2, 3)}, {"meta": {"rank": 3}})
    store["measured/a.b"] = Item({}, {})
    again = Folder(tmp_path / "work")
    tensors, about = again["encoded/a.b"]
    assert torch.equal(tensors["x"], torch.arange(6).reshape(2, 3)) and about == {
        "meta": {"rank": 3}
    }
    assert sorted(again) == ["encoded/a.b", "measured/a.b"] and len(again) == 2
    del again["encoded/a.b"]
    assert "encoded/a.b" not in store and "measured/a.b" in store


def test_a_torn_item_counts_as_absent(tmp_path):
    store = Folder(tmp_path)
    store["a"] = Item({"x": torch.zeros(100)}, {})
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:50])
    assert "a" not in store
    with pytest.raises(KeyError):
        store["a"]


def test_what_a_killed_writer_left_is_cleared_away(tmp_path):
    (tmp_path / "abc.tmp").write_bytes(b"half")
    Folder(tmp_path)
    assert not list(tmp_path.iterdir())
