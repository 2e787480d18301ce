"""Two checkpoints side by side: exact differences, and a policy for each oddity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cl_graft.errors import CLGraftError, UnknownName
from cl_graft.skillpack.folders.checkpoint import Checkpoint
from cl_graft.skillpack.folders.pair import PairError, Pairing, pair, tied_copy
from cl_graft.skillpack.format.errors import NonFinite

E, H, Q, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.q.weight", "model.norm.weight"
ROPE = "model.rotary_emb.inv_freq"


def weights(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {E: (8, 4), Q: (4, 4), NORM: (4,), H: (8, 4)}
    return {n: torch.randn(shape, generator=generator).to(dtype) for n, shape in shapes.items()}


class Folders:
    """Makes the two sides of a pair in a temporary folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, name: str, tensors: dict[str, Tensor], **config: Any) -> Checkpoint:
        (self.folder / name).mkdir()
        copies = {key: tensor.clone().contiguous() for key, tensor in tensors.items()}
        save_file(copies, self.folder / name / "model.safetensors")
        config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **config}
        (self.folder / name / "config.json").write_text(json.dumps(config))
        return Checkpoint(self.folder / name)

    def pair(self, base: dict[str, Tensor], tuned: dict[str, Tensor], **config: Any) -> Pairing:
        return pair(self("base", base, **config), self("tuned", tuned, **config))


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(tmp_path)


def names(pairing: Pairing) -> set[str]:
    return {change.name for change in pairing.changes}


def noted(pairing: Pairing, *words: str) -> bool:
    """Whether one note has all of the words; every note is a sentence."""
    assert all(note.endswith(".") for note in pairing.notes)
    return any(all(word in note for word in words) for note in pairing.notes)


# --- differences -------------------------------------------------------------------------------


def test_plain_changes_in_the_tuned_order(folders: Folders) -> None:
    base, tuned = weights(0), weights(1)
    found = folders.pair(base, tuned, tie_word_embeddings=False)
    assert [change.name for change in found.changes] == list(found.tuned.tensors)
    assert all(change.shape == change.base_shape for change in found.changes)
    assert all(torch.equal(found.delta(name), tuned[name] - base[name]) for name in base)
    assert (found.added, found.grown, found.notes) == ([], {}, [])
    with pytest.raises(UnknownName, match=r"did you mean model.q.weight"):
        found.delta("model.q.wieght")


def test_differences_are_taken_in_float32_and_not_in_bfloat16(folders: Folders) -> None:
    base = {Q: torch.tensor([[1.0]]).bfloat16()}
    tuned = {Q: torch.tensor([[1.001]])}  # 1.0 in bfloat16
    found = folders.pair(base, tuned)
    assert found.delta(Q).item() == pytest.approx(0.001, rel=1e-3)
    assert found.delta(Q).dtype == torch.float32
    assert noted(found, "bfloat16", "float32")


def test_float64_keeps_what_float32_would_lose(folders: Folders) -> None:
    base = {Q: torch.tensor([[1.0]], dtype=torch.float64)}
    found = folders.pair(base, {Q: base[Q] + 1e-12})
    assert found.delta(Q).item() == pytest.approx(1e-12, rel=1e-3)


def test_unchanged_tensors_are_left_out_and_counted(folders: Folders) -> None:
    base = weights()
    tuned = base | {Q: base[Q] + 1}
    found = folders.pair(base, tuned, tie_word_embeddings=False)
    assert names(found) == {Q}
    assert noted(found, "3 of 4", "unchanged")


def test_equal_values_in_another_dtype_are_unchanged(folders: Folders) -> None:
    base = weights(dtype=torch.bfloat16)
    found = folders.pair(base, {n: t.float() for n, t in base.items()}, tie_word_embeddings=False)
    assert names(found) == set()


# --- heads -------------------------------------------------------------------------------------


def without(tensors: dict[str, Tensor], *left: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in left}


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The head as a copy of the embedding."""
    return tensors | {H: tensors[E]}


def test_a_copy_that_only_the_tuned_stores_is_left_out(folders: Folders) -> None:
    found = folders.pair(without(weights(0), H), copied(weights(1)))
    assert names(found) == {E, Q, NORM}
    assert noted(found, H, "repeats the embedding")


def test_a_head_that_tuning_untied_is_added(folders: Folders) -> None:
    tuned = weights(1)
    found = folders.pair(without(weights(0), H), tuned)
    assert found.added == [H]
    assert torch.equal(found.delta(H), tuned[H])
    assert noted(found, H, "tie_word_embeddings becomes false")


def test_a_copy_that_only_the_base_stores_is_left_out(folders: Folders) -> None:
    found = folders.pair(copied(weights(0)), without(weights(1), H), tie_word_embeddings=True)
    assert names(found) == {E, Q, NORM}
    assert noted(found, H, "base only")


def test_copies_on_both_sides_are_left_out(folders: Folders) -> None:
    found = folders.pair(copied(weights(0)), copied(weights(1)))
    assert names(found) == {E, Q, NORM}


def test_copies_of_a_base_that_is_not_tied_are_changes(folders: Folders) -> None:
    found = folders.pair(copied(weights(0)), copied(weights(1)), tie_word_embeddings=False)
    assert names(found) == {E, Q, NORM, H}
    assert tied_copy(found.base) is None


def test_a_head_that_stays_while_its_embedding_moves_is_kept_as_a_change(folders: Folders) -> None:
    """Its delta is zero, but the base ties it to an embedding that is no longer the same."""
    base = copied(weights(0))
    found = folders.pair(base, base | {E: base[E] + 1})
    assert names(found) == {E, H}
    assert not found.delta(H).any()


def test_a_head_that_tuning_tied_is_a_change_to_the_embedding(folders: Folders) -> None:
    base, tuned = weights(0), weights(1)
    found = pair(
        folders("base", base, tie_word_embeddings=False),
        folders("tuned", without(tuned, H), tie_word_embeddings=True),
    )
    assert torch.equal(found.delta(H), tuned[E] - base[H])
    assert noted(found, H, "tuned only")


def test_a_head_that_is_missing_is_an_error(folders: Folders) -> None:
    with pytest.raises(PairError, match=H):
        folders.pair(weights(0), without(weights(1), H), tie_word_embeddings=False)


# --- rows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [11, 5])
def test_another_number_of_rows(rows: int, folders: Folders) -> None:
    base, tuned = weights(0), weights(1)
    tuned |= {E: torch.randn(rows, 4), H: torch.randn(rows, 4)}
    found = folders.pair(base, tuned, tie_word_embeddings=False)
    assert found.grown == {E: [8, 4], H: [8, 4]}
    delta, both = found.delta(E), min(rows, 8)
    assert torch.equal(delta[:both], tuned[E][:both] - base[E][:both])
    assert torch.equal(delta[both:], tuned[E][both:])
    assert noted(found, E, "8 rows", f"{rows} tuned")


@pytest.mark.parametrize(
    ("name", "shape"), [(E, (8, 5)), (Q, (5, 4)), (NORM, (5,)), (E, (8, 4, 1))]
)
def test_any_other_shape_is_an_error(name: str, shape: tuple[int, ...], folders: Folders) -> None:
    with pytest.raises(PairError, match=name):
        folders.pair(weights(0), weights(1) | {name: torch.randn(shape)}, tie_word_embeddings=False)


# --- missing and additional --------------------------------------------------------------------


def test_a_missing_weight_is_an_error_that_names_it(folders: Folders) -> None:
    with pytest.raises(PairError, match=Q):
        folders.pair(weights(0), without(weights(1), Q))


def test_an_additional_weight_is_added(folders: Folders) -> None:
    extra = torch.randn(3)
    found = folders.pair(weights(0), weights(1) | {"model.q.bias": extra})
    assert found.added == ["model.q.bias"]
    assert torch.equal(found.delta("model.q.bias"), extra)
    assert noted(found, "model.q.bias", "not in the base")


MASK = "model.h.0.attn.bias"


@pytest.mark.parametrize("kind", ["rope", "mask", "integers"])
def test_buffers_are_the_bases(kind: str, folders: Folders) -> None:
    buffer = {
        "rope": {ROPE: torch.rand(4)},
        "mask": {MASK: torch.full((1, 1, 3, 3), -torch.inf)},
        "integers": {"model.position_ids": torch.arange(4)},
    }[kind]
    for sides in ((buffer, {}), ({}, buffer), (buffer, buffer)):
        before, after = weights(0) | sides[0], weights(1) | sides[1]
        inner = Folders(folders.folder / f"{len(list(folders.folder.iterdir()))}")
        inner.folder.mkdir()
        found = inner.pair(before, after, tie_word_embeddings=False)
        assert names(found) == {E, Q, NORM, H}
        assert noted(found, next(iter(buffer))) == (sides[0] != sides[1])


def test_a_bias_is_no_mask(folders: Folders) -> None:
    with pytest.raises(PairError, match=MASK):
        folders.pair(weights(0) | {MASK: torch.zeros(4)}, weights(1))


def test_buffers_that_differ_stay_with_a_note(folders: Folders) -> None:
    found = folders.pair(weights(0) | {ROPE: torch.ones(4)}, weights(1) | {ROPE: torch.zeros(4)})
    assert ROPE not in names(found)
    assert noted(found, ROPE, "differ")


def test_integers_that_differ_are_an_error(folders: Folders) -> None:
    ids = {"model.position_ids": torch.arange(4)}
    other = {"model.position_ids": torch.arange(4) + 1}
    with pytest.raises(PairError, match="position_ids"):
        folders.pair(weights(0) | ids, weights(1) | other)


def test_integers_in_place_of_floats_are_an_error(folders: Folders) -> None:
    with pytest.raises(CLGraftError, match=Q):
        folders.pair(weights(0), weights(1) | {Q: torch.ones(4, 4, dtype=torch.int32)})


# --- models that make no pair ------------------------------------------------------------------


def test_two_architectures_are_refused_by_name(folders: Folders) -> None:
    base = folders("base", weights())
    mistral = folders("m", weights(1), model_type="mistral", architectures=["MistralForCausalLM"])
    with pytest.raises(PairError, match=r"llama.*mistral"):
        pair(base, mistral)
    scorer = folders("s", weights(1), architectures=["LlamaForSequenceClassification"])
    with pytest.raises(PairError, match=r"LlamaForCausalLM.*LlamaForSequenceClassification"):
        pair(base, scorer)


def test_quantised_checkpoints_are_refused(folders: Folders) -> None:
    base = folders("base", weights())
    with pytest.raises(PairError, match="quantised"):
        pair(base, folders("gptq", weights(1), quantization_config={"bits": 4}))
    eight = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in weights(1).items()}
    with pytest.raises(PairError, match="quantised"):
        pair(base, folders("float8", eight))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("side", ["base", "tuned", "both"])
def test_nan_and_inf_are_refused_by_name(value: float, side: str, folders: Folders) -> None:
    base, tuned = weights(0), weights(1)
    for broken in {"base": [base], "tuned": [tuned], "both": [base, tuned]}[side]:
        broken[Q][2, 1] = value
    with pytest.raises(NonFinite, match=Q):
        folders.pair(base, tuned)


def test_names_that_transformers_does_not_know_are_told_with_another_cure(folders: Folders) -> None:
    """It would make the weights up; the cure is to rename them, as every other test here has them."""
    renamed = {f"decoder.{name}": tensor for name, tensor in weights(1).items()}
    with pytest.raises(PairError, match=r"'decoder\..*rename its tensors as the base's"):
        folders.pair(weights(0), renamed)


def test_names_that_transformers_knows_are_one_after_its_save(tmp_path: Path) -> None:
    """GPT-2 on the hub names its tensors without `transformer.`, a save of today with it."""
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 8, "n_embd": 4, "n_layer": 1, "n_head": 1, "n_positions": 4}
    config = GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    for folder in (base, tuned):
        GPT2LMHeadModel(config).save_pretrained(folder)
    theirs = load_file(base / "model.safetensors")
    short = {name.removeprefix("transformer."): tensor for name, tensor in theirs.items()}
    save_file(short, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(PairError, match="load both with transformers and save them again"):
        pair(Checkpoint(base), Checkpoint(tuned))
    for folder in (base, tuned):
        AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / f"{folder.name}-2")
    found = pair(Checkpoint(tmp_path / "base-2"), Checkpoint(tmp_path / "tuned-2"))
    name = "transformer.wte.weight"
    wanted = load_file(tuned / "model.safetensors")[name] - theirs[name]
    assert torch.equal(found.delta(name), wanted)


def test_what_configs_say_is_no_matter_of_tensors(folders: Folders) -> None:
    found = pair(
        folders("base", weights(0), attention_dropout=0.0, dtype="bfloat16", hidden_act="silu"),
        folders("tuned", weights(1), attention_dropout=0.5, dtype="float32"),
    )
    assert found.notes == []
