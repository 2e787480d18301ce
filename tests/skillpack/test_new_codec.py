"""A new codec is one file, and a codec that nobody registered is an error everywhere."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from cl_graft.budget import Budget
from cl_graft.report.packs import tensor_rows
from cl_graft.skillpack import codecs
from cl_graft.skillpack.codecs import CODECS, Codec, Encoded, Factored, Meta, Scattered, register
from cl_graft.skillpack.codecs.encoded import fields
from cl_graft.skillpack.folders.apply import apply_pack
from cl_graft.skillpack.folders.checkpoint import Checkpoint
from cl_graft.skillpack.format.errors import SkillPackError, UnknownCodec
from cl_graft.skillpack.format.file import SkillPack, fingerprint
from cl_graft.skillpack.live.attach import Attached
from cl_graft.skillpack.live.grafted import Grafted
from cl_graft.skillpack.tools.adapter import adapter_of
from cl_graft.skillpack.tools.compare import compare
from cl_graft.skillpack.tools.peft_adapter import export_peft
from cl_graft.strategy.context import Context
from cl_graft.stream import benchmark
from tests.command import Call
from tests.refusals import one_sentence, refusal

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-codec.md"
Q, UP = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"
NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"


@pytest.fixture(autouse=True)
def codecs_of_this_test() -> Iterator[None]:
    """What a test registers is known to it alone."""
    before = dict(CODECS)
    yield
    CODECS.clear()
    CODECS.update(before)


# --- one file -----------------------------------------------------------------------------------

BASELINE = '''

from cl_graft.strategy import compressor


@compressor(keeps="per_task")
def kept(delta, context):
    """Every tensor in ternary."""
    encoded = {name: ternary(x) for name, x in delta.items()}
    context.require_fit(encoded)
    return encoded
'''


@pytest.fixture
def listing() -> str:
    """The codec that the page writes, as the page has it."""
    (text,) = re.findall(r"<!-- file: ternary.py -->\n```python\n(.*?)```", PAGE.read_text(), re.S)
    return text


def test_the_codec_of_the_page_needs_no_other_file(
    listing: str, build: Any, tiny_scenario: Any, call: Call, tmp_path: Path
) -> None:
    """Learned, counted, written, read, inspected, compared, applied, taken off, attached and exported."""
    (tmp_path / "kept.py").write_text(listing + BASELINE)
    strategy = build(str(tmp_path / "kept.py"), budget="12.5%:weights")
    base, ids = tmp_path / "base", torch.arange(12)[None]
    strategy.model.save_pretrained(base)
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    strategy.train(benchmark(tiny_scenario).train_stream[0], eval_streams=[])
    pack = strategy.packs[0]
    assert {e.codec for e in pack.tensors.values()} == {"ternary"}
    weights = sum(p.numel() for p in plain.parameters())
    assert sum(codecs.weight_bits(*e.spec) for e in pack.tensors.values()) == 2 * weights
    parts = sum(math.ceil(2 * math.prod(e.shape) / 8) + 4 for e in pack.tensors.values())
    assert sum(codecs.payload_bytes(*e.spec) for e in pack.tensors.values()) == parts
    file = tmp_path / "math.safetensors"
    assert pack.save(file) == file.stat().st_size == pack.nbytes
    read = SkillPack.load(file, base=pack.base)
    assert read.digest == pack.digest

    rows = json.loads(call("pack", "inspect", file, "--base", base, "--json").out)["tensors"]
    assert {(row["codec"], row["rank"]) for row in rows} == {("ternary", None)}
    assert call("pack", "verify", file, "--base", base).code == 0
    assert "ternary" in call("pack", "diff", file, file).out
    words = ["--base", base, "--pack", file]
    assert call("pack", "apply", *words, "--out", tmp_path / "tuned").code == 0
    assert call("pack", "remove", *words, "--grafted", tmp_path / "tuned").code == 0
    done = call("pack", "export", *words, "--to", "peft", "--out", tmp_path / "lora")
    assert done.code == 0 and "ternary" in done.out

    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned").eval()
    with torch.no_grad():
        before, wanted = plain(ids).logits, tuned(ids).logits
        assert not torch.allclose(before, wanted, atol=1e-4)
        with Attached(plain, [read]) as attached:
            attached.choose(0)
            assert torch.allclose(plain(ids).logits, wanted, atol=1e-5)
        Grafted(plain).activate([read])
        assert torch.equal(plain(ids).logits, wanted)


def test_the_codec_of_the_page_refuses_what_stands_for_nothing(listing: str) -> None:
    made: dict[str, Any] = {"__name__": "ternary"}
    exec(listing, made)
    encoded = made["ternary"](torch.tensor([[4.0, -2.0, 0.1], [0.0, -0.2, 3.0]]))
    assert codecs.decode(encoded).tolist() == [[3, -3, 0], [0, 0, 3]]
    for parts in ({"codes": encoded.parts["codes"] | 3}, {"codes": encoded.parts["codes"] | 128}):
        with pytest.raises(ValueError, match="nothing|not zero"):
            codecs.decode(Encoded("ternary", (2, 3), {}, encoded.parts | parts))
    with pytest.raises(ValueError, match="fields"):
        codecs.layout("ternary", (2, 3), {"more": 1})


# --- the two quicker kinds ----------------------------------------------------------------------


class Outer(Factored):
    """A column times a row, in float32."""

    name = "outer"

    def layout(self, shape: tuple[int, ...], meta: Meta) -> codecs.Layout:
        fields(meta)
        rows, cols = shape
        return {"row": (torch.float32, (cols,)), "column": (torch.float32, (rows,))}

    def decode(self, encoded: Encoded) -> Tensor:
        return torch.outer(encoded.parts["column"], encoded.parts["row"])

    def weight_bits(self, shape: tuple[int, ...], meta: Meta) -> int:
        return 16 * sum(shape)

    def rank(self, meta: Meta) -> int:
        return 1

    def write_factors(self, encoded: Encoded, left: Tensor, right: Tensor) -> None:
        left.copy_(encoded.parts["column"][:, None])
        right.copy_(encoded.parts["row"][None])


class First(Scattered):
    """The first elements, as many as the part has."""

    name = "first"

    def layout(self, shape: tuple[int, ...], meta: Meta) -> codecs.Layout:
        fields(meta, "count")
        return {"values": (torch.float32, (meta["count"],))}

    def entries(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        values = encoded.parts["values"]
        return torch.arange(len(values)), values

    def decode(self, encoded: Encoded) -> Tensor:
        x = torch.zeros(encoded.shape)
        x.view(-1)[: encoded.meta["count"]] = encoded.parts["values"]
        return x

    def weight_bits(self, shape: tuple[int, ...], meta: Meta) -> int:
        return 16 * meta["count"]


def llama(folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder)
    return folder


def pack_for(folder: Path, tensors: dict[str, Encoded]) -> SkillPack:
    return SkillPack(tensors, "t", "m", {}, Checkpoint(folder).fingerprint())


def test_new_codecs_of_both_kinds_are_as_quick_as_ours(tmp_path: Path) -> None:
    """Neither is decoded as a whole where a model or an adapter takes it."""
    register(Outer)
    register(First)
    base, ids = llama(tmp_path / "base"), torch.arange(12)[None]

    def outer(rows: int, cols: int) -> Encoded:
        parts = {"row": torch.randn(cols) * 0.3, "column": torch.randn(rows) * 0.3}
        return Encoded("outer", (rows, cols), {}, parts)

    tensors = {
        Q: outer(32, 32),
        EMBEDDING: Encoded("first", (48, 32), {"count": 99}, {"values": torch.randn(99)}),
    }
    pack = pack_for(base, tensors)
    pack.save(tmp_path / "pack")
    rows = export_peft(adapter_of(SkillPack.load(tmp_path / "pack"), base), tmp_path / "lora")
    assert [(row.name, row.rank) for row in rows] == [(EMBEDDING, None), (Q, 1)]
    assert rows[1].error == pytest.approx(0, abs=1e-6)
    assert [row["rank"] for row in tensor_rows(pack, {})] == [1, None]
    apply_pack(base, pack, tmp_path / "tuned")
    tuned, plain = (
        AutoModelForCausalLM.from_pretrained(f).eval() for f in (tmp_path / "tuned", base)
    )

    def refuse(self: Any, encoded: Encoded) -> Tensor:
        raise AssertionError("decoded as a whole")

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        wanted = tuned(ids).logits
        patch.setattr(Outer, "decode", refuse)
        patch.setattr(First, "decode", refuse)
        with Attached(plain, [pack]) as attached:
            attached.choose(0)
            assert torch.allclose(plain(ids).logits, wanted, atol=1e-5)
        Grafted(plain).activate([pack])
        assert torch.allclose(plain(ids).logits, wanted, atol=1e-5)


# --- registering --------------------------------------------------------------------------------


def test_a_name_is_taken_once() -> None:
    register(Outer)
    register(Outer)
    other = type("Other", (Outer,), {"__module__": "elsewhere"})
    assert "'outer'" in one_sentence(lambda: register(other), SkillPackError)
    assert type(CODECS["outer"]) is Outer


def test_a_class_that_does_not_say_everything_is_refused_where_it_is_defined() -> None:
    with pytest.raises(TypeError, match="weight_bits"):

        @register
        class Half(Codec):
            name = "half"

            def layout(self, shape: tuple[int, ...], meta: Meta) -> codecs.Layout:
                return {}

            def decode(self, encoded: Encoded) -> Tensor:
                return torch.zeros(encoded.shape)

    assert "half" not in CODECS


def test_a_part_in_a_dtype_that_no_file_has_is_refused() -> None:
    register(type("Short", (First,), {"name": "short", "layout": lambda *_: SHORT}))
    with pytest.raises(ValueError, match="codec short lays out part x in torch.int16"):
        codecs.layout("short", (2,), {})


SHORT = {"x": (torch.int16, (2,))}


# --- unknown ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ghosts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SkillPack, Path]:
    """A base, a pack whose codec nobody knows any more, and its file."""
    folder = tmp_path_factory.mktemp("ghosts")
    base = llama(folder / "base")
    register(type("Ghost", (First,), {"name": "ghost"}))
    ghost = Encoded("ghost", (32, 32), {"count": 3}, {"values": torch.ones(3)})
    pack = pack_for(base, {Q: ghost})
    pack.save(folder / "pack")
    del CODECS["ghost"]
    return base, pack, folder / "pack"


def context(pack: SkillPack, budget: str) -> Context:
    return Context(None, None, None, {}, Budget(budget, 1000), 0, pack)  # type: ignore[arg-type]


def linear() -> nn.Module:
    return nn.ModuleDict({"q": nn.Linear(32, 32, bias=False)})


def live(pack: SkillPack) -> tuple[nn.Module, SkillPack]:
    """A model, and the pack as one for its only parameter."""
    model = linear()
    tensors = {"q.weight": pack.tensors[Q]}
    return model, SkillPack(tensors, "t", "m", {}, fingerprint(model.named_parameters()))


EVERYWHERE: dict[str, Callable[[Path, SkillPack, Path, Path], Any]] = {
    "weight_bits": lambda base, pack, file, out: codecs.weight_bits(*pack.tensors[Q].spec),
    "cost_of, weights": lambda base, pack, file, out: context(pack, "9%:weights").cost(
        pack.tensors
    ),
    "cost_of, bytes": lambda base, pack, file, out: context(pack, "9%").cost(pack.tensors),
    "layout": lambda base, pack, file, out: codecs.layout(*pack.tensors[Q].spec),
    "payload_bytes": lambda base, pack, file, out: codecs.payload_bytes(*pack.tensors[Q].spec),
    "least_bits": lambda base, pack, file, out: codecs.least_bits(*pack.tensors[Q].spec),
    "rank_of": lambda base, pack, file, out: codecs.rank_of(pack.tensors[Q]),
    "check": lambda base, pack, file, out: codecs.check(pack.tensors[Q]),
    "decode": lambda base, pack, file, out: codecs.decode(pack.tensors[Q]),
    "delta": lambda base, pack, file, out: pack.delta(Q),
    "rows": lambda base, pack, file, out: pack.rows(Q, torch.tensor([1])),
    "digest": lambda base, pack, file, out: pack.digest,
    "nbytes": lambda base, pack, file, out: pack.nbytes,
    "save": lambda base, pack, file, out: pack.save(out),
    "load": lambda base, pack, file, out: SkillPack.load(file),
    "apply to a model": lambda base, pack, file, out: _activate(*live(pack)),
    "attach": lambda base, pack, file, out: _attach(*live(pack)),
    "apply to a folder": lambda base, pack, file, out: apply_pack(base, pack, out),
    "export": lambda base, pack, file, out: export_peft(adapter_of(pack, base), out),
    "inspect": lambda base, pack, file, out: tensor_rows(pack, {}),
    "compare": lambda base, pack, file, out: compare(pack, pack),
}


def _activate(model: nn.Module, pack: SkillPack) -> None:
    Grafted(model).activate([pack])


def _attach(model: nn.Module, pack: SkillPack) -> None:
    model.forward = lambda x: model["q"](x)  # type: ignore[index, method-assign]
    Attached(model, [pack], {"x": torch.zeros(3, 2, 32)})


@pytest.mark.parametrize("what", EVERYWHERE)
def test_an_unknown_codec_is_refused_by_name_and_nothing_is_written(
    what: str, ghosts: tuple[Path, SkillPack, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    refusal(UnknownCodec, lambda: EVERYWHERE[what](*ghosts, out), "'ghost'", "import the module")
    assert not out.exists()


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_commands_refuse_it_in_a_sentence(command: str, ghosts: Any, call: Call) -> None:
    done = call("pack", command, ghosts[2])
    assert "'ghost'" in done.reason and str(ghosts[2]) in done.reason and Q in done.reason
