"""Stacked experts: what each reads and writes, by hand and by autograd, and what their factors are worth for it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from cl_graft.models.experts import routed, stacked, transposed_stacks
from cl_graft.models.meta_model import meta_model
from cl_graft.models.roles import roles
from cl_graft.models.spread import shapes_of
from cl_graft.skillpack.codecs import decode, payload_bytes
from cl_graft.skillpack.compress.calibrate import Moments, moments
from cl_graft.skillpack.compress.calibrated import Calibration
from cl_graft.skillpack.compress.compress import compress
from cl_graft.skillpack.compress.create import create
from cl_graft.skillpack.compress.policy import Adaptive
from cl_graft.skillpack.compress.stream import stream_moments
from cl_graft.skillpack.compress.tables import encode_table, table_directions, table_of
from cl_graft.skillpack.compress.work import ByteLimit, Piece, fetch, visit
from cl_graft.skillpack.folders.apply import apply_pack, remove_pack
from cl_graft.skillpack.folders.checkpoint import Checkpoint
from cl_graft.skillpack.format.file import SkillPack
from cl_graft.skillpack.live.grafted import Grafted
from cl_graft.skillpack.tools.convert import converted
from cl_graft.strategy.graftllm import pieces
from tests.skillpack.test_calibrated import calibrated

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FEW = {"num_local_experts": 4, "num_experts_per_tok": 2}
KINDS: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: hf.MixtralConfig(**SHAPE, **FEW),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(
        **SHAPE, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=24
    ),
    "gpt_oss": lambda: hf.GptOssConfig(**SHAPE, **FEW),
}
MORE: dict[str, Callable[[], Any]] = {
    "qwen2_moe": lambda: hf.Qwen2MoeConfig(
        **SHAPE,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=16,
    ),
    "nemotron_h": lambda: hf.NemotronHConfig(  # no gate
        **{k: v for k, v in SHAPE.items() if k != "num_hidden_layers"},
        layers_block_type=["moe", "full_attention"],
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=16,
    ),
}
LAYER = "model.layers.0.mlp"
EXPERTS = f"{LAYER}.experts"


def made(kind: str, scale: float = 4.0) -> Any:
    """Random weights, large enough for experts to differ; biases that are not zero."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config((KINDS | MORE)[kind]()).float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * 0.1 if name.endswith("bias") else scale * p)
    return model


def batch(seed: int, lengths: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 96, (len(lengths), max(lengths)), generator=generator)
    mask = torch.stack([torch.arange(max(lengths)) < n for n in lengths]).long()
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


BATCHES = [batch(1, (24, 14, 18)), batch(2, (9, 16))]
TOKENS = 24 + 14 + 18 + 9 + 16


def gated(kind: str, y: Tensor) -> Tensor:
    """What becomes of the first product, by the papers' formulas."""
    if kind == "gpt_oss":
        gate, up = y[..., ::2].clamp(max=7.0), y[..., 1::2].clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    gate, up = y.chunk(2, -1)
    return gate * torch.sigmoid(gate) * up


def by_hand(kind: str, experts: Any, x: Tensor, expert: int, shifts: Any = (0.0, 0.0)) -> Any:
    """(what the second matrix of an expert reads, what it writes) for rows x."""
    stacks = experts.gate_up_proj[expert], experts.down_proj[expert]
    biases = [0.0, 0.0]
    if kind == "gpt_oss":
        stacks = stacks[0].T, stacks[1].T
        biases = [experts.gate_up_proj_bias[expert], experts.down_proj_bias[expert]]
    inner = gated(kind, linear(x, stacks[0]) + biases[0] + shifts[0])
    return inner, linear(inner, stacks[1]) + biases[1] + shifts[1]


def seen(model: Any, kind: str) -> dict[int, tuple[Tensor, Tensor]]:
    """Expert -> what its two matrices read of the tokens that are no padding, from the router's own output."""
    found: dict[int, list[Tensor]] = {}
    mlp = model.model.layers[0].mlp
    router = mlp.router if kind == "gpt_oss" else mlp.gate
    rows: list[Any] = []
    hook = router.register_forward_hook(lambda m, args, out: rows.append((args[0], out[2])))
    with torch.no_grad():
        for b in BATCHES:
            model(b["input_ids"], attention_mask=b["attention_mask"])
    hook.remove()
    for (x, index), b in zip(rows, BATCHES, strict=True):
        keep = b["attention_mask"].reshape(-1).bool()
        x, index = x.reshape(-1, 32)[keep], index.reshape(-1, 2)[keep]
        for expert in range(len(mlp.experts.down_proj)):
            found.setdefault(expert, []).append(x[(index == expert).any(1)])
    whole = {expert: torch.cat(parts) for expert, parts in found.items()}
    return {e: (x, by_hand(kind, mlp.experts, x, e)[0].detach()) for e, x in whole.items()}


@pytest.mark.parametrize("kind", [*KINDS, *MORE])
def test_experts_run_apart_compute_what_the_model_does(kind: str) -> None:
    model = made(kind)
    wanted: list[Tensor] = []
    apart: list[Tensor] = []
    name, module = next(iter(routed(model).items()))
    for into, run in ((wanted, lambda b: model(**b)), (apart, lambda b: moments(model, [b]))):
        hook = module.register_forward_hook(lambda m, args, out, into=into: into.append(out))
        run(BATCHES[0])
        hook.remove()
    torch.testing.assert_close(apart[0], wanted[0], rtol=1e-4, atol=1e-6)
    assert wanted[0].abs().max() > 0 and "forward" not in vars(module)


@pytest.mark.parametrize("kind", KINDS)
def test_each_expert_has_the_moments_of_what_was_routed_to_it(kind: str) -> None:
    """Also where experts are square, so that shapes do not tell what reads from what writes."""
    model = made(kind)
    found, rows = moments(model, BATCHES, gradients=False), seen(model, kind)
    up, down = (found.hessian(f"{EXPERTS}.{n}") for n in ("gate_up_proj", "down_proj"))
    assert up is not None and down is not None and len(up) == len(down) == len(rows)
    for expert, inputs in rows.items():
        for moment, x in zip((up, down), inputs, strict=True):
            torch.testing.assert_close(moment[expert], x.T @ x / TOKENS, rtol=1e-4, atol=1e-6)
    counts = torch.tensor([len(x) for x, _ in rows.values()]) / TOKENS
    assert counts.sum() == pytest.approx(2)
    torch.testing.assert_close(found.inputs[EXPERTS], counts)
    router = found.hessian(f"{LAYER}.{'router' if kind == 'gpt_oss' else 'gate'}.weight")
    assert router is not None and router.shape == (32, 32)
    for bias in ("gate_up_proj_bias", "down_proj_bias"):
        known = found.diagonal(f"{EXPERTS}.{bias}")
        assert (known is None) == (kind != "gpt_oss")
        assert known is None or torch.equal(known[:, 0], found.inputs[EXPERTS])


@pytest.mark.parametrize("kind", KINDS)
def test_each_expert_has_the_gradient_at_what_it_writes(kind: str) -> None:
    """For each expert alone: shift what it writes by zeros, and ask for the loss's gradient by them."""
    model, b = made(kind), BATCHES[0]
    experts, keep = model.model.layers[0].mlp.experts, b["attention_mask"].reshape(-1).bool()
    shifts: dict[int, list[Tensor]] = {}
    tokens: dict[int, int] = {}

    def forward(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in range(len(experts.down_proj)):
            token, place = (index == expert).nonzero(as_tuple=True)
            widths = 48 if kind == "qwen3_moe" else 64, 32
            shifts[expert] = [torch.zeros(len(token), n, requires_grad=True) for n in widths]
            tokens[expert] = int(keep[token].sum())
            _, y = by_hand(kind, experts, x[token], expert, shifts[expert])
            out = out.index_add(0, token, y * weights[token, place, None])
        return out

    experts.forward = forward
    logits = model(b["input_ids"], attention_mask=b["attention_mask"]).logits[:, :-1]
    loss = cross_entropy(logits.reshape(-1, 96), b["labels"][:, 1:].reshape(-1), reduction="sum")
    flat = [shift for pair in shifts.values() for shift in pair]
    gradients = iter(torch.autograd.grad(loss, flat))
    del experts.forward
    found = moments(model, [b]).outputs
    totals = [torch.zeros(()), torch.zeros(())]
    for expert in shifts:
        for i, name in enumerate(("gate_up_proj", "down_proj")):
            squares = next(gradients).square().sum(0)
            totals[i] = totals[i] + squares
            mine = found[f"{EXPERTS}.{name}"][expert]
            assert tokens[expert] > 0
            torch.testing.assert_close(mine, squares / tokens[expert], rtol=1e-3, atol=1e-9)
    for total, name in zip(totals, ("gate_up_proj", "down_proj"), strict=True):
        bias = found.get(f"{EXPERTS}.{name}_bias")
        assert (bias is None) == (kind != "gpt_oss")
        if bias is not None:
            torch.testing.assert_close(bias, total / sum(tokens.values()), rtol=1e-3, atol=1e-9)


def test_which_parameters_are_stacks() -> None:
    model = made("gpt_oss")
    found = {n: what for n, what in stacked(model).items() if n.startswith(LAYER)}
    assert found == {
        f"{EXPERTS}.gate_up_proj": "matrices",
        f"{EXPERTS}.gate_up_proj_bias": "vectors",
        f"{EXPERTS}.down_proj": "matrices",
        f"{EXPERTS}.down_proj_bias": "vectors",
    }
    assert {n for n in transposed_stacks(model) if n.startswith(LAYER)} == {
        f"{EXPERTS}.gate_up_proj",
        f"{EXPERTS}.down_proj",
    }
    assert not transposed_stacks(made("mixtral"))
    convolution = hf.MambaForCausalLM(
        hf.MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1)
    )
    assert stacked(convolution) == {}


def test_a_layers_moments_are_handed_over_before_the_next_is_run(tmp_path: Path) -> None:
    made("mixtral").save_pretrained(tmp_path)
    order: list[str] = []

    def sink(group: str, moment: Tensor, readers: list[str]) -> None:
        order.extend(re.findall(r"layers\.(\d)", group))

    stream_moments(Checkpoint(tmp_path), meta_model(tmp_path), BATCHES, sink=sink)
    assert order == ["0"] * 6 + ["1"] * 6  # qkv, o, router, both stacks, and the counts


# --- which matrix reads which moment ---


def never() -> Tensor:
    raise AssertionError("nothing is read here")


def test_matrices_of_one_expert_read_its_moment_wherever_they_are_stored() -> None:
    """In a stack, or one by one as Mixtral's are; of an expert without tokens all inputs count alike."""
    apart = [
        Piece(f"{i}.{w}", (6, 4), "mlp", never, expert=i) for i in range(3) for w in ("w1", "w3")
    ]
    moment = torch.stack([torch.eye(4) * 3, torch.zeros(4, 4), torch.eye(4) * 6])
    moment[0, 0, 1] = moment[0, 1, 0] = 1.0
    known = Moments({"up": moment}, {piece.name: "up" for piece in apart})
    work: Any = SimpleNamespace(pieces=apart, moments=known, device=torch.device("cpu"))
    found: list[Any] = []
    visit(work, found.append, lambda pieces: True)
    ((first, none, last),) = found
    assert [p.name for p in first.pieces] == ["0.w1", "0.w3"] and last.pieces[0].name == "2.w1"
    assert torch.equal(first.hessian, moment[0]) and torch.equal(last.hessian, moment[2])
    assert torch.equal(none.hessian, 3 * torch.eye(4)), "the mean of 3, 0 and 6"


def test_experts_that_a_folder_keeps_apart_are_numbered(tmp_path: Path) -> None:
    config = hf.MixtralConfig(**{**SHAPE, "num_local_experts": 11, "num_experts_per_tok": 2})
    hf.MixtralForCausalLM(config).save_pretrained(tmp_path)
    meta, name = meta_model(tmp_path), "model.layers.1.block_sparse_moe.experts"
    for number in (2, 10):
        for which in ("w1", "w2", "w3"):
            assert meta.expert_of(f"{name}.{number}.{which}.weight") == number
    assert meta.expert_of("model.layers.1.block_sparse_moe.gate.weight") is None
    assert meta.stacked_as(f"{name}.10.w2.weight") is None


# --- what factors are worth ---


def clustered(model: Any) -> Any:
    """Every token is of one of four kinds, which are large in dimensions of their own, and goes to experts for it."""
    kinds = torch.arange(32) // 8
    router = next(p for n, p in model.named_parameters() if re.search(r"0\.mlp\.\w+\.weight$", n))
    with torch.no_grad():
        own = torch.arange(96)[:, None] % 4 == kinds
        embedding = model.model.embed_tokens.weight
        embedding.mul_(torch.where(own, 1.0, 0.1)).add_(0.2 * own)
        router.add_(torch.arange(len(router))[:, None] % 4 == kinds)
    return model


def moved(model: Any, seed: int = 7) -> dict[str, Tensor]:
    """A delta of the experts, whose columns are of very different sizes."""
    g = torch.Generator().manual_seed(seed)
    stacks = {n: p for n, p in model.named_parameters() if EXPERTS in n and p.ndim == 3}
    return {
        n: 0.01 * torch.randn(p.shape, generator=g) * torch.logspace(0, -1, p.shape[-1])
        for n, p in stacks.items()
    }


def as_table(delta: Tensor, limit: int) -> Tensor:
    """The delta as the finest table of its rows within so many bytes."""
    rows = delta.reshape(-1, delta.shape[-1])
    ones = table_of(rows, torch.ones(len(rows)), torch.ones(rows.shape[1]))
    none = table_directions(ones, 0)
    for step in torch.logspace(-4, 0, 80).tolist():
        found = encode_table(ones, none, tuple(rows.shape), step, "small")
        if payload_bytes(*found.spec) <= limit:
            return decode(found).reshape(delta.shape)
    raise AssertionError("no step is coarse enough")


def errors(model: Any, delta: Tensor, found: Tensor, held: Tensor, name: str) -> list[float]:
    missed = delta - found
    missed = missed.mT if name in transposed_stacks(model) else missed
    return [float(((m @ h) * m).sum()) for m, h in zip(missed, held, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stack", ["gate_up_proj", "down_proj"])
def test_factors_under_what_is_routed_beat_a_table_and_the_inputs_of_all_tokens(
    kind: str, stack: str
) -> None:
    """Of the same bytes, on other text; for every expert the table, and for the sum over experts the rest."""
    model, name = clustered(made(kind)), f"{EXPERTS}.{stack}"
    texts, other = ([batch(seed + i, (32,) * 16) for i in range(2)] for seed in (0, 10))
    mine, held = (moments(model, x, gradients=False).hessian(name) for x in (texts, other))
    assert mine is not None and held is not None
    everyone = mine.sum(0).expand_as(mine)
    delta = moved(model)[name]
    context: Any = SimpleNamespace(
        model=model, roles=roles(model), shapes=shapes_of(dict(model.named_parameters()))
    )
    every = {p.name: p for p in pieces(context, {name: delta})}
    whole = every[name]
    limit = int(0.1 * 2 * delta.numel())
    within = ByteLimit(lambda s: sum(payload_bytes(*x) for x in s.values()), limit, f"{limit}B")
    found: dict[str, list[float]] = {}
    for what, piece, moment in (
        ("routed", whole, mine),
        ("all", whole, everyone),
        ("nothing", whole, None),
    ):
        given = Moments() if moment is None else Moments({name: moment}, {name: name})
        store: dict[str, Any] = {}
        specs = compress([piece], given, Adaptive(), within, store)
        assert 0.98 * limit <= payload_bytes(*specs[name]) <= limit
        rebuilt = decode(fetch(store, name)).reshape(delta.shape)
        found[what] = errors(model, delta, rebuilt, held, name)
    found["table"] = errors(model, delta, as_table(delta, limit), held, name)
    assert all(a < b for a, b in zip(found["routed"], found["table"], strict=True))
    assert sum(found["routed"]) < min(sum(found["all"]), sum(found["nothing"]))


# --- packs ---


def folders(
    root: Path, kind: str, stacks: bool = True, idle: int | None = None
) -> tuple[Path, ...]:
    model = made(kind, scale=1.0)
    if idle is not None:
        with torch.no_grad():
            model.model.layers[0].mlp.router.bias.zero_()[idle] = -1e4
    model.save_pretrained(root / "base", save_original_format=not stacks)
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=g) * torch.logspace(0, -2, p.shape[-1])
            p += (p.ndim > 1) * 0.2 * p.abs().mean() * noise
    model.save_pretrained(root / "tuned", save_original_format=not stacks)
    return root / "base", root / "tuned", root / "pack.safetensors"


@pytest.mark.parametrize("kind", KINDS)
def test_a_pack_of_stacks_meets_its_budget_and_goes_on_and_off(kind: str, tmp_path: Path) -> None:
    base, after, out = folders(tmp_path, kind)
    found = create(base, after, out, budget="30%", calibration=Calibration(BATCHES))
    assert 0.97 * found.limit <= found.bytes <= found.limit  # of 30 KB, a third of it header
    pack = SkillPack.load(out)
    for stack in ("gate_up_proj", "down_proj"):
        assert pack.tensors[f"{EXPERTS}.{stack}"].codec == "coded_low_rank_stack"
    assert converted(converted(pack, "fast"), "small").digest == pack.digest
    apply_pack(base, pack, tmp_path / "applied")
    assert remove_pack(tmp_path / "applied", pack, base) > 0
    live, there = (hf.AutoModelForCausalLM.from_pretrained(f) for f in (base, tmp_path / "applied"))
    Grafted(live).activate([pack])
    torch.testing.assert_close(live(**BATCHES[0]).logits, there(**BATCHES[0]).logits)


@pytest.mark.parametrize("calibration", [None, Calibration(BATCHES[:1])], ids=["no text", "text"])
def test_the_same_call_gives_the_same_bytes(
    calibration: Calibration | None, tmp_path: Path
) -> None:
    base, after, out = folders(tmp_path, "gpt_oss")
    first = create(base, after, out, budget="30%", calibration=calibration)
    again = tmp_path / "again.safetensors"
    create(base, after, again, budget="30%", calibration=calibration)
    assert again.read_bytes() == out.read_bytes() and first.bytes <= first.limit


def test_an_expert_without_tokens_is_factorised_all_the_same_and_told(tmp_path: Path) -> None:
    base, after, out = folders(tmp_path, "gpt_oss", idle=3)
    found = create(base, after, out, budget="30%", calibration=Calibration(BATCHES))
    (note,) = [note for note in found.notes if "No token" in note]
    assert f"1 of 4 in {EXPERTS})" in note and "more text" in note
    whole = decode(SkillPack.load(out).tensors[f"{EXPERTS}.gate_up_proj"])
    assert whole[3].abs().sum() > 0


def test_the_experts_of_a_folder_that_keeps_them_apart_read_what_the_stacks_read(
    tmp_path: Path,
) -> None:
    base, after, _ = folders(tmp_path, "mixtral", stacks=False)
    known = calibrated(base, after, {})
    known.visit(lambda group, moment: None, lambda group: True)
    for which, stack in (("w1", "gate_up_proj"), ("w3", "gate_up_proj"), ("w2", "down_proj")):
        tensor, parameter = (
            f"model.layers.0.block_sparse_moe.experts.2.{which}.weight",
            f"{EXPERTS}.{stack}",
        )
        assert known.reads[tensor] == known.reads[parameter] == parameter
        assert torch.equal(known.outputs[tensor], known.outputs[parameter][2])
