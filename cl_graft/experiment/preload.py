"""Imported once by the process that workers are forked from: everything that a cell is going to import."""

import gc
import os
import warnings

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.filterwarnings("ignore")  # of libraries to each other

# first: where torchvision does not fit this torch, it says so
from cl_graft import stream  # noqa: E402, F401, I001
import datasets  # noqa: E402, F401
import trl  # noqa: E402, F401

from cl_graft.experiment import cell  # noqa: E402, F401
from cl_graft.models import load, meta_model  # noqa: E402, F401
from cl_graft.strategy import base  # noqa: E402, F401
from cl_graft.training.fit import quiet  # noqa: E402

with quiet():
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401
    from trl import SFTConfig, SFTTrainer  # noqa: F401

gc.freeze()  # modules are no garbage: what is forked need not look through them after every stage
