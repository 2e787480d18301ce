"""Imported once by the process that workers are forked from: everything that a cell is going to import."""

import os
import warnings

from cl_graft.processes import modules_kept

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.filterwarnings("ignore")  # of libraries to each other

with modules_kept():
    # first: where torchvision does not fit this torch, it says so
    from cl_graft import stream  # noqa: F401, I001
    import datasets  # noqa: F401
    import trl  # noqa: F401

    from cl_graft.experiment import cell  # noqa: F401
    from cl_graft.models import load, meta_model  # noqa: F401
    from cl_graft.strategy import base  # noqa: F401
    from cl_graft.training.fit import quiet

    with quiet():
        from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401
        from trl import SFTConfig, SFTTrainer  # noqa: F401
