"""DeepSpeed's JSON for a stage, and its parameters made whole again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cl_graft.config import Launch
from cl_graft.training.config import StageConfig, accumulation

BUCKET = (
    50_000_000  # elements that are reduced at a time; DeepSpeed's own 500 million take a GB in bf16
)


def zero_json(job: StageConfig, launch: Launch, on_gpu: bool) -> dict[str, Any]:
    """Nothing is left for others to fill in, so that what is written down is what is run."""
    micro, accumulated = accumulation(job.batch, launch)
    zero: dict[str, Any] = {
        "stage": launch.zero,
        "overlap_comm": on_gpu,
        "contiguous_gradients": True,
        "reduce_bucket_size": BUCKET,
    }
    if launch.zero == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if launch.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    return {
        "zero_optimization": zero,
        "bf16": {"enabled": on_gpu},
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulated,
        "train_batch_size": job.batch,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW, as in a single process
        "wall_clock_breakdown": False,
    }


def whole(parameter: nn.Parameter) -> Tensor:
    """The float32 parameter of all processes, each of which must ask for it."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    gathered = safe_get_full_fp32_param(parameter)
    if gathered is not None:  # the optimizer holds it in float32
        return gathered.view(getattr(parameter, "ds_shape", parameter.shape))
    if not hasattr(parameter, "ds_id"):
        return parameter.detach().float()
    with deepspeed.zero.GatheredParameters([parameter]), torch.no_grad():
        return parameter.detach().float().clone()
