"""The benchmark on real deltas at a small size: engines of two checkouts, held-out figures, peers, cells on disk."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from cl_graft.bench import deltas, experts, outputs, peers, previous, rounding
from cl_graft.bench.cells import Cells
from cl_graft.bench.deltas import Delta, smollm2_delta
from cl_graft.bench.engines import Engine, Made, this_engine
from cl_graft.bench.held_out import HeldOut
from cl_graft.bench.table import markdown
from cl_graft.errors import CLGraftError
from cl_graft.skillpack.folders.checkpoint import Checkpoint
from cl_graft.skillpack.format.file import SkillPack
from cl_graft.task import Example
from tests.command import Call
from tests.model_folders import llama, saved, tuned

ROOT = Path(__file__).parents[1]
TEXT = [Example("a b c d e"[: 3 + 2 * (i % 4)], " f g") for i in range(20)]


@pytest.fixture(scope="module")
def delta(tmp_path_factory: pytest.TempPathFactory) -> Delta:
    """A Llama of 17 k weights, all of them moved."""
    place = tmp_path_factory.mktemp("delta")
    base, after = saved(llama(), place / "base"), saved(tuned(llama()), place / "tuned")
    return Delta("small", base, after, TEXT, TEXT[:12], 64)


@pytest.fixture(scope="module")
def text(delta: Delta) -> HeldOut:
    return HeldOut(delta)


def whole(delta: Delta, factor: float = 1.0) -> dict[str, torch.Tensor]:
    """The delta of every tensor, times a factor."""
    before, after = Checkpoint(delta.base), Checkpoint(delta.tuned)
    return {n: factor * (after.read(n) - before.read(n)) for n in before.floating}


def test_the_error_is_that_of_outputs_on_held_out_tokens(delta: Delta, text: HeldOut) -> None:
    """By hand: every matrix's inputs caught in a forward of the tuned model, without padding."""
    kept = {n: x for n, x in whole(delta, 0.7).items() if "up_proj" not in n}
    model = AutoModelForCausalLM.from_pretrained(delta.tuned).eval()
    expected = []
    for name, module in model.model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        inputs: list[torch.Tensor] = []
        handle = module.register_forward_hook(lambda m, x, y, inputs=inputs: inputs.append(x[0]))
        for batch in text.batches(delta.test):
            with torch.no_grad():
                model(**{k: batch[k] for k in ("input_ids", "attention_mask")})
            inputs[-1] = inputs[-1][batch["attention_mask"].bool()]
        handle.remove()
        x, change = torch.cat(inputs), text.change(f"model.{name}.weight")
        missed = change - kept.get(f"model.{name}.weight", torch.zeros_like(change))
        expected.append(float((x @ missed.T).norm() / (x @ change.T).norm()))
    assert len(expected) == 14 and expected.count(1.0) == 2
    assert text.error(kept) == pytest.approx(sum(expected) / 14, rel=1e-4)
    assert text.error(whole(delta)) == 0 and text.error({}) == 1


def test_kl_is_that_of_the_next_tokens(delta: Delta, text: HeldOut) -> None:
    """By PyTorch's own, one example at a time, so without padding."""
    assert text.kl(whole(delta))["kl"] == pytest.approx(0, abs=1e-9)
    after = AutoModelForCausalLM.from_pretrained(delta.tuned).eval()
    base = AutoModelForCausalLM.from_pretrained(delta.base).eval()
    every, answers = [], []
    for batch in text.batches(delta.test):
        for ids, mask, labels in zip(
            *(batch[k] for k in ("input_ids", "attention_mask", "labels")), strict=True
        ):
            row = ids[mask.bool()][None]
            with torch.no_grad():
                p, q = (m(row).logits[0].log_softmax(-1) for m in (after, base))
            kl = functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
            every.append(kl)
            answers.append(kl[:-1][labels[mask.bool()][1:] != -100])
    found = text.kl({})
    assert found["kl"] == pytest.approx(float(torch.cat(every).mean()), rel=1e-4)
    assert found["kl_answers"] == pytest.approx(float(torch.cat(answers).mean()), rel=1e-4)
    half = text.kl(whole(delta, 0.5))["kl"]
    assert 0 < half < found["kl"]
    assert text.kl({}) == found  # the base is as it was


@pytest.mark.slow
def test_an_engine_is_run_in_its_own_checkout(delta: Delta, text: HeldOut, tmp_path: Path) -> None:
    """Another checkout of this engine, which says by a file that it was run; the delta that comes back is the pack's."""
    other = tmp_path / "other"
    shutil.copytree(
        ROOT / "cl_graft", other / "cl_graft", ignore=shutil.ignore_patterns("__pycache__", "bench")
    )
    create = other / "cl_graft" / "skillpack" / "compress" / "create.py"
    create.write_text(
        create.read_text()
        + f"\nfrom pathlib import Path as _P\n_P({str(tmp_path / 'ran')!r}).touch()\n"
    )
    engine = Engine("previous", other)
    assert engine.digest != this_engine().digest
    (tmp_path / "place").mkdir()
    made = engine.make(delta, "30%", tmp_path / "place")
    assert (tmp_path / "ran").is_file()
    pack = SkillPack.load(tmp_path / "place" / "made.pack")
    assert (
        made.bytes == (tmp_path / "place" / "made.pack").stat().st_size
        and pack.options["calibrated"]
    )
    assert made.deltas.keys() == pack.tensors.keys() and made.make > 0
    for name in pack.tensors:
        assert torch.equal(made.deltas[name], pack.delta(name)), name
    assert 0 < text.error(made.deltas) < 0.9


def test_an_engine_that_fails_or_is_none(delta: Delta, tmp_path: Path) -> None:
    with pytest.raises(CLGraftError, match="git worktree add"):
        Engine("previous", tmp_path)
    (tmp_path / "cl_graft" / "skillpack").mkdir(parents=True)
    (tmp_path / "cl_graft" / "__init__.py").write_text("")
    (tmp_path / "cl_graft" / "__main__.py").write_text(
        "import sys; sys.exit('error: no such budget.')"
    )
    with pytest.raises(
        CLGraftError, match=f"the engine in {tmp_path} failed: error: no such budget.$"
    ):
        Engine("previous", tmp_path).make(delta, "nothing", tmp_path)


def test_the_ratios_by_hand(delta: Delta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two engines that keep a share of the delta: errors are what is left."""
    asked, kept = [], {"previous": {"2%": 0.5, "10%": 0.75}, "this": {"2%": 0.6, "10%": 0.9}}

    def make(engine: Engine, delta: Delta, budget: str, place: Path) -> Made:
        asked.append((engine.name, budget))
        size = 1000 * int(budget.rstrip("%"))
        return Made(size, 1.0, 0.1, whole(delta, kept[engine.name][budget]))

    monkeypatch.setattr(Engine, "make", make)
    monkeypatch.setattr(previous, "embedded_deltas", lambda data_dir: [delta])
    monkeypatch.setattr(previous, "smollm2_delta", lambda *given: replace(delta, name="smol"))
    for name in ("EMBEDDED", "SMOLLM2", "KL_BUDGETS"):
        monkeypatch.setattr(previous, name, ("2%", "10%"))
    given = (ROOT, None, Cells(tmp_path / "cells"))
    error = previous.error_over_previous(*given)
    assert error["error_over_previous"] == pytest.approx((0.4 / 0.5 + 0.1 / 0.25) / 2, rel=1e-3)
    assert len(asked) == 8 and len(error["rows"]) == 4
    needed = previous.bytes_at_equal_error(*given)
    # this: error 0.4 in 2,000 and 0.1 in 10,000 bytes; 0.25 lies log(0.25 / 0.1) / log(4) of the way to 2,000
    expected = 10000 * 0.2**0.66096 / 10000
    assert needed["bytes_at_equal_error"] == pytest.approx(expected, rel=1e-3)
    assert [row["bytes_at_equal_error"] is None for row in needed["rows"]] == [True, False] * 2
    kl = previous.kl_over_previous(*given)
    assert 0 < kl["kl_over_previous"] < 1
    assert len(asked) == 8  # everything after the first part was read back
    table = markdown(
        {"error_over_previous": error, "bytes_at_equal_error": needed, "kl_over_previous": kl}
    )
    assert (
        "| error_over_previous, smol, 10% | 0.400 | 0.25 -> 0.1 in 10,000 -> 10,000 bytes" in table
    )
    assert "outside what was measured" in table


def test_other_code_is_measured_anew(tmp_path: Path) -> None:
    cells, calls = Cells(tmp_path), []

    def measure() -> dict[str, float]:
        calls.append(1)
        return {"error": 0.5}

    for about in ({"engine": "a", "engine_digest": "1"}, {"engine": "a", "engine_digest": "2"}) * 2:
        assert cells.measured(about, measure) == {"error": 0.5}
    assert len(calls) == 2 == len(list(tmp_path.glob("*.json")))
    told = [
        json.loads(file.read_text())["about"]["engine_digest"] for file in tmp_path.glob("*.json")
    ]
    assert sorted(told) == ["1", "2"]


def test_the_peers_keep_what_their_papers_say(delta: Delta, text: HeldOut, tmp_path: Path) -> None:
    """LoRA: the best of its rank, and no byte too many. BitDelta: sign and mean, so the squared error is its formula's.
    Delta-CoMe: within its bytes, nearer with more of them."""
    size = 12_000
    made = peers.lora(text, size, tmp_path)
    per_rank = sum(2 * sum(text.change(n).shape) for n in text.decoder)
    rank = size // per_rank
    assert rank >= 1 and made.bytes < rank * per_rank + 4000
    for name in text.decoder:
        s = torch.linalg.svdvals(text.change(name))
        missed = (text.change(name) - made.deltas[name]).norm()
        assert missed == pytest.approx(float(s[rank:].norm()), rel=0.01)
    bit = peers.bitdelta(text, None, tmp_path)
    for name in text.decoder:
        d = text.change(name)
        expected = (d**2).sum() - d.numel() * d.abs().mean() ** 2
        assert ((d - bit.deltas[name]) ** 2).sum() == pytest.approx(float(expected), rel=1e-4)
    few, many = (peers.delta_come(text, share, tmp_path) for share in (6_000, 16_000))
    assert few.bytes <= 6_000 < many.bytes <= 16_000
    assert text.error(many.deltas) < text.error(few.deltas) < 1
    with pytest.raises(CLGraftError, match="no LoRA adapter of rank 1"):
        peers.lora(text, 100, tmp_path)


def test_stochastic_rounding_keeps_what_nearest_loses(
    delta: Delta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a delta of 3e-4 of the weights, by what is kept of it; on a larger one, which changes the answers, by those."""
    model = llama()
    base = saved(model, tmp_path / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 3e-4 * (parameter.ndim == 2))
    small = Delta("small", base, saved(model, tmp_path / "small"), TEXT, TEXT[:12], 64)
    monkeypatch.setattr(
        rounding, "smollm2_delta", lambda steps, *given: small if steps == 12 else delta
    )
    figures = rounding.bf16_kl_share(None, Cells(tmp_path / "cells"))
    found, large = figures["deltas"]
    assert found["size"] == pytest.approx(3e-4, rel=0.01) and large["size"] > 0.01
    rows = {row["how"]: row for row in found["rows"]}
    kept = {how: row["kept"] for how, row in rows.items()}
    assert kept["bfloat16, nearest"] < 0.1 and kept["difference of bfloat16 checkpoints"] < 0.1
    for how in ("bfloat16, stochastic", "float16, stochastic", "attached, delta in bfloat16"):
        assert kept[how] == pytest.approx(1, abs=0.2)
    assert all(row["lost"] == row["kl"] / found["base"]["kl"] for row in rows.values())
    lost = {row["how"]: row["lost"] for row in large["rows"]}
    assert lost["attached, delta in bfloat16"] < 1e-3 > lost["float16, stochastic"]
    both = [rows["bfloat16, stochastic"]["lost"], lost["bfloat16, stochastic"]]
    assert figures["bf16_kl_share"]["lost"] == max(both)
    assert "| KL lost, small, bfloat16, nearest |" in markdown({"bf16_kl_share": figures})


def test_of_a_small_delta_outputs_to_nearest_lose_what_a_hash_keeps(
    delta: Delta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a gradient step of 2e-4 of the weights; of one of a hundredth all is there in any way."""
    model = llama()
    base = saved(model, tmp_path / "base")
    text = HeldOut(Delta("small", base, base, TEXT, TEXT[:12], 64))
    for batch in text.batches(TEXT[:12]):
        model(**batch).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                step = parameter.grad * (2e-4 * parameter.norm() / parameter.grad.norm())
                parameter.sub_(step)
    small = Delta("small", base, saved(model, tmp_path / "small"), TEXT, TEXT[:12], 64)
    monkeypatch.setattr(
        rounding, "smollm2_delta", lambda steps, *given: small if steps == 12 else delta
    )
    figures = outputs.bf16_outputs_kept(None, Cells(tmp_path / "cells"))
    found, large = ({row["how"]: row for row in d["rows"]} for d in figures["deltas"])
    kept = {how: row["kept"] for how, row in found.items()}
    assert kept["in the weights, nearest"] < 0.2 and kept["beside, sum to nearest"] < 0.7
    assert kept["in the weights, stochastic"] == pytest.approx(1, abs=0.4)
    assert kept[outputs.OURS] == pytest.approx(1, abs=0.4)
    for row in large.values():
        assert row["kept"] == pytest.approx(1, abs=0.02) and row["error"] < 0.02
        assert row["kept_answers"] == pytest.approx(1, abs=0.02)
    assert figures["bf16_outputs_kept"] in (kept[outputs.OURS], found[outputs.OURS]["kept_answers"])
    assert "| shift kept, small, beside, sum to nearest |" in markdown(
        {"bf16_outputs_kept": figures}
    )


def test_every_peer_is_beside_ours_at_its_bytes(
    delta: Delta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours keeps nine tenths of everything here, whatever the bytes; theirs are what they are."""
    asked: list[int] = []

    def make(engine: Engine, delta: Delta, budget: str, place: Path) -> Made:
        asked.append(int(budget.rstrip("B")))
        return Made(asked[-1], 1.0, 0.1, whole(delta, 0.9))

    monkeypatch.setattr(Engine, "make", make)
    monkeypatch.setattr(peers, "smollm2_delta", lambda *given: delta)
    monkeypatch.setattr(peers, "SMALL", "40%")
    monkeypatch.setitem(
        peers._MAKERS, "deltatensors int4", lambda *given: Made(9000, 2.0, 0.2, whole(delta, 0.5))
    )
    monkeypatch.setitem(
        peers._MAKERS,
        "deltatensors one-bit",
        lambda *given: Made(3000, 2.0, 0.2, whole(delta, 0.95)),
    )
    cells = Cells(tmp_path)
    found = peers.peers(None, cells)
    rows = {(row["method"], row["bytes"]): row for row in found["rows"]}
    weights = sum(x.numel() for x in whole(delta).values())
    bit = next(size for name, size in rows if name == "BitDelta")
    assert asked == [2 * weights * 40 // 100, bit]
    assert [name for name, _ in rows].count("LoRA") == 2 and len(rows) == 7
    for (name, size), row in rows.items():
        assert size <= max(asked) + 3000 and row["kl"] > 0 and 0 < row["error"] < 1, name
    ratio = peers.deltatensors_kl_ratio(None, cells)
    assert asked[2:] == [9000, 3000]
    assert (
        ratio["deltatensors_kl_ratio"]["int4"] < 0.2 < 1 < ratio["deltatensors_kl_ratio"]["one-bit"]
    )
    table = markdown({"peers": found, "deltatensors_kl_ratio": ratio})
    assert table.count("| Delta-CoMe, ") == 2 and "| deltatensors_kl_ratio, int4 | " in table


def test_delta_comes_ranks() -> None:
    """Two at 8 bits, 32 at 3, then as many at 2 as fit, each counted with its scales."""
    assert peers._come((256, 256), 1e9) == {8: 2, 3: 32, 2: 222}
    assert list(peers._come((256, 256), 4000)) == [8, 3]
    assert peers._come((256, 256), 10) == {}


def test_deltatensors_is_called_as_a_package(delta: Delta, text: HeldOut, tmp_path: Path) -> None:
    pytest.importorskip("deltatensors", reason="deltatensors is not installed here")
    sign = peers._deltatensors("quantized", text, None, tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    d = text.change(name)
    expected = torch.where(d > 0, 1.0, -1.0) * d.abs().mean(1, keepdim=True)
    torch.testing.assert_close(sign.deltas[name], expected, rtol=2e-3, atol=1e-6)
    four = peers._deltatensors("int4", text, None, tmp_path)
    assert four.bytes > sign.bytes and text.error(four.deltas) < text.error(sign.deltas) < 1


def test_smollm2_is_tuned_once_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a small model in its place: completion only, and a killed run ends in the same weights."""
    monkeypatch.setenv("CL_GRAFT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data" / deltas.SST2
    folder.mkdir(parents=True)
    rows = [
        {"sentence": f"{c} {d}", "label": "ab"[i % 2]}
        for i, (c, d) in enumerate(zip("cdefghij" * 2, "klmnopqr" * 2, strict=True))
    ]
    for part in ("train", "test"):
        (folder / f"{part}.json").write_text(json.dumps(rows))
    (folder / "labels.json").write_text('["a", "b"]')
    from tests.model_folders import tokenizer

    base = tmp_path / "base"
    llama().save_pretrained(base)
    tokenizer(template="{% for m in messages %}{{ m['content'] }}{% endfor %} z").save_pretrained(
        base
    )
    whole = smollm2_delta(4, tmp_path / "data", model_name=str(base), save_steps=2)
    assert whole.tuned.is_dir() and whole.train[0].prompt.endswith(" z")
    assert not list(whole.tuned.parent.glob("*.work"))
    wanted = Checkpoint(whole.tuned).fingerprint()
    assert wanted != Checkpoint(base).fingerprint()
    told = deltas._told(whole)
    assert told["steps"] == 4 and 0 < told["size"] < 1e-2

    shutil.rmtree(whole.tuned)

    def stop(at: str) -> None:
        if "step 3" in at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        smollm2_delta(4, tmp_path / "data", stop, str(base), 2)
    assert list(whole.tuned.parent.glob("*.work/checkpoint-2"))
    seen: list[str] = []
    again = smollm2_delta(4, tmp_path / "data", seen.append, str(base), 2)
    assert [line.split(",")[0][-11:] for line in seen] == ["step 3 of 4", "step 4 of 4"]
    assert Checkpoint(again.tuned).fingerprint() == wanted


def test_experts_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two engines that keep a share of the delta of every expert but the first layer's: errors are what is left."""
    small = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    kept = {"previous": 0.5, "this": 0.6}

    def make(engine: Engine, delta: Delta, budget: str, place: Path) -> Made:
        part = whole(delta, kept[engine.name])
        return Made(1000, 1.0, 0.1, {n: x for n, x in part.items() if "layers.0.mlp" not in n})

    monkeypatch.setattr(Engine, "make", make)
    for name, value in (("BASE_STEPS", 1), ("STEPS", 2), ("SHAPE", experts.SHAPE | small)):
        monkeypatch.setattr(experts, name, value)
    for sizes in experts.MIXTURES.values():
        monkeypatch.setitem(sizes, "intermediate_size", 24)
    found = experts.experts_over_previous(ROOT, lambda text: None)
    assert found["experts_over_previous"] == pytest.approx(0.7 / 0.75, rel=1e-3)
    assert [row["delta"].split(",")[0] for row in found["rows"]] == list(experts.MIXTURES)
    assert "| experts_over_previous, gpt_oss, 8 experts, 5% | 0.933 |" in markdown(
        {"experts_over_previous": found}
    )


def test_what_a_part_needs_is_said_before_anything_is_measured(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "--previous FOLDER" in call("bench", "pack", "--only", "bytes,kl_over_previous").reason
    assert "did you mean peers" in call("bench", "pack", "--only", "peer").reason
