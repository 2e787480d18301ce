"""The peak memory of one training stage, per process, by where it goes; nothing is allocated to tell.

Sizes that follow from counting are formulas (parameters, gradients, AdamW's two moments, ZeRO's shares: Rajbhandari
et al. 2020, sections 3 and 5; DeepSpeed's buffers by its configuration). The rest, what the forward and backward
pass hold, comes from `trace`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cl_graft.errors import CLGraftError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from cl_graft.planning.trace import Trace
    from cl_graft.training.term import Term


@dataclass(frozen=True)
class Job:
    """A stage, as far as its memory goes.

    micro_batch: examples (pairs in DPO) of one forward pass on one device. length: tokens of its longest row.
    accumulation: micro-batches of one optimizer step. lora: a PEFT configuration; None trains everything but `frozen`.
    precision: `fp32`; or `bf16` computed from fp32 master weights, by autocast or, with ZeRO, from bf16 copies.
    stage: ZeRO's, 0 for none (PyTorch's own data parallelism where there are several processes).
    offload: the optimizer's states, the fp32 master weights and their gradients are in the host's memory.
    bucket: elements of DeepSpeed's `reduce_bucket_size`. live: of its `stage3_max_live_parameters`.
    persistent: of `stage3_param_persistence_threshold`; smaller parameters are not divided.
    gpu: whether the device is one; it decides how the head works.
    flat: tokens and labels of the largest micro-batch, where it is laid out without padding.
    """

    kind: Literal["sft", "dpo"]
    micro_batch: int
    length: int
    accumulation: int = 1
    lora: Any = None
    frozen: tuple[str, ...] = ()
    precision: Literal["fp32", "bf16"] = "fp32"
    checkpointing: bool = False
    stage: Literal[0, 2, 3] = 0
    processes: int = 1
    offload: bool = False
    bucket: int = 500_000_000
    live: int = 1_000_000_000
    persistent: int = 100_000
    gpu: bool = False
    flat: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        known = {"kind": ("sft", "dpo"), "precision": ("fp32", "bf16"), "stage": (0, 2, 3)}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise CLGraftError(
                    f"{name} {getattr(self, name)!r} cannot be planned; choose one of {values}."
                )
        counts = ("micro_batch", "length", "accumulation", "processes")
        for name in counts:
            if getattr(self, name) < 1:
                raise CLGraftError(f"{name} is {getattr(self, name)}; give a number of at least 1.")
        if self.offload and not self.stage:
            raise CLGraftError("the optimizer is offloaded by ZeRO alone; choose stage 2 or 3.")

    @property
    def sequences(self) -> int:
        """Rows of one forward pass: DPO's chosen and rejected answers run together."""
        return self.micro_batch * (2 if self.kind == "dpo" else 1)


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at its peak; `device` is the sum of the parts.

    parameters: and the model's buffers, as the device holds them between layers. gradients: kept for the
    optimizer. optimizer: AdamW's moments, and the master weights where ZeRO makes some. activations: the most
    that a forward and backward pass, or the optimizer's step, needs beyond these. buffers: of communication,
    and stage 3's gathered parameters. terms: `of_terms`. host: what offloading moves to the host's memory.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    terms: int = 0
    host: int = 0

    @property
    def device(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self) if f.name != "host")


def estimate(model: str | Path | PreTrainedConfig, job: Job) -> Memory:
    """Estimate the memory of a job on a model folder or configuration; DPO's reference values are computed beforehand.

    Takes seconds (8 B parameters in 32 layers: about eight of a core's, after the imports). Not for a process that
    holds a ZeRO-3 configuration: transformers would divide the model that is made here, too.
    Raises CLGraftError for a folder without a usable configuration, and for a model of which no step can be traced.
    """
    import torch

    from cl_graft.models.meta_model import meta_model
    from cl_graft.planning.trace import trace

    config = meta_model(model).model.config
    halves = job.precision == "bf16"
    gradients: Literal["new", "kept", "freed"] = "freed"
    if not job.stage:
        gradients = "new" if job.accumulation == 1 else "kept"
    try:
        traced = trace(
            config,
            job.kind,
            job.sequences,
            job.length,
            gradients=gradients,
            lora=job.lora,
            frozen=job.frozen,
            dtype=torch.bfloat16 if halves and job.stage else torch.float32,
            autocast=halves and not job.stage,
            checkpointing=job.checkpointing,
            triton=job.gpu,
            counts=job.flat,
        )
    except Exception as error:  # a model's own code may fail in any way
        told = first_line(error)
        raise CLGraftError(
            f"the memory of {job.kind.upper()} on a model of type {config.model_type!r} cannot be told: a step of it "
            f"fails on tensors without contents ({type(error).__name__}: {told}); choose another model."
        ) from error
    return _sharded(job, traced) if job.stage else _whole(job, traced)


def of_terms(terms: Sequence[Term], job: Job, trained: int, vocabulary: int) -> int:
    """Bytes that a method's terms hold on a device: an upper bound, as other parts need not be at their most then.

    States as they are. Where logits are wanted, float32 ones three times over (values, their logarithms and
    gradients) and those of another model. For a projection the gradients that it compares with, and the one that ZeRO's
    shares are gathered into; not what such a gradient's own pass over other rows holds.
    """
    states = sum(
        x.nbytes for state in {id(t.state): t.state for t in terms}.values() for x in state.values()
    )
    logits = 4 * 4 * job.sequences * job.length * vocabulary if any(t.logits for t in terms) else 0
    projections = [t.gradients for t in terms if t.kind == "project"]
    held = max(projections) + (1 if job.stage else 0) if projections else 0
    return states + logits + 4 * trained * held


def _whole(job: Job, traced: Trace) -> Memory:
    """Memory without ZeRO: everything is in fp32 and on the device."""
    trained = sum(s.numel for s in traced.shapes if s.trained)
    kept = 4 * trained
    passes = traced.peak + (kept if job.accumulation > 1 else 0)
    return Memory(
        parameters=4 * sum(s.numel for s in traced.shapes) + traced.buffers,
        gradients=kept,
        optimizer=8 * trained,
        activations=max(passes, kept) - kept,
        buffers=kept if job.processes > 1 else 0,  # DistributedDataParallel's copies to reduce
    )


def _sharded(job: Job, traced: Trace) -> Memory:
    """Memory under DeepSpeed's ZeRO: a process keeps gradients and optimizer states of its share of the elements."""
    size = 2 if job.precision == "bf16" else 4
    everything = sum(s.numel for s in traced.shapes)
    share = ceil(sum(s.numel for s in traced.shapes if s.trained) / job.processes)
    parameters, gathered = size * everything, 0
    if job.stage == 3:
        kept = sum(s.numel for s in traced.shapes if s.numel <= job.persistent)
        divided = everything - kept
        largest = max(s.numel for s in traced.shapes)
        parameters = size * (kept + ceil(divided / job.processes))
        gathered = size * max(min(divided, job.live), largest)
    # at the step, the share's gradients are copied once more, in fp32, for the master weights
    step = 0 if job.offload else 4 * share
    return Memory(
        parameters=parameters + traced.buffers,
        gradients=0 if job.offload else size * share,
        optimizer=0 if job.offload else 12 * share,
        activations=max(traced.peak, step),
        buffers=size * job.bucket + gathered,
        host=16 * share if job.offload else 0,
    )
