"""Codecs: how one tensor of a delta is stored. Each is one file of this package, found by being in it.

codec.py says what a codec is and what can be asked of an encoded tensor; docs/adding-a-codec.md writes
one. A codec of another package is known once its module is imported: its class is `register`ed there.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from cl_graft.skillpack.codecs.codec import (
    CODECS,
    Codec,
    Factored,
    Relaid,
    Relative,
    Scattered,
    check,
    check_parts,
    codec_named,
    decode,
    is_factored,
    is_scattered,
    kept_dtype,
    layout,
    layout_name,
    least_bits,
    payload_bytes,
    rank_of,
    register,
    relaid,
    restore,
    rows,
    weight_bits,
)
from cl_graft.skillpack.codecs.coded import coded
from cl_graft.skillpack.codecs.coded_low_rank import coded_low_rank
from cl_graft.skillpack.codecs.coded_low_rank_stack import coded_low_rank_stack
from cl_graft.skillpack.codecs.coded_rows import CodeLayout
from cl_graft.skillpack.codecs.coded_table import coded_table
from cl_graft.skillpack.codecs.dct_patches import dct_patches, dct_patches_spec
from cl_graft.skillpack.codecs.dense import dense, dense_spec
from cl_graft.skillpack.codecs.encoded import (
    DTYPES,
    MAX_DIMS,
    MAX_ELEMENTS,
    STORABLE,
    Encoded,
    Layout,
    Meta,
    Spec,
    check_shape,
    finite,
    part_bytes,
)
from cl_graft.skillpack.codecs.errors import NoDelta, SkillPackError, UnknownCodec
from cl_graft.skillpack.codecs.exact import exact, exact_spec, original
from cl_graft.skillpack.codecs.lossless import lossless
from cl_graft.skillpack.codecs.low_rank import low_rank, low_rank_spec
from cl_graft.skillpack.codecs.low_rank_stack import low_rank_stack, low_rank_stack_spec
from cl_graft.skillpack.codecs.mask import mask
from cl_graft.skillpack.codecs.quantized import quantized
from cl_graft.skillpack.codecs.quantized_low_rank import (
    quantized_low_rank,
    quantized_low_rank_spec,
)
from cl_graft.skillpack.codecs.quantized_product import quantized_product, quantized_product_spec
from cl_graft.skillpack.codecs.seeded_sparse import seeded_sparse, seeded_sparse_spec
from cl_graft.skillpack.codecs.sign_low_rank import sign_low_rank, sign_low_rank_spec
from cl_graft.skillpack.codecs.sign_scale import sign_scale, sign_scale_spec
from cl_graft.skillpack.codecs.sign_scales import sign_scales, sign_scales_spec
from cl_graft.skillpack.codecs.sparse import sparse, sparse_top
from cl_graft.skillpack.codecs.sparse_codebook import sparse_codebook, sparse_codebook_spec
from cl_graft.skillpack.codecs.sparse_low_rank import sparse_low_rank, sparse_low_rank_spec

__all__ = [
    "CODECS",
    "DTYPES",
    "MAX_DIMS",
    "MAX_ELEMENTS",
    "STORABLE",
    "CodeLayout",
    "Codec",
    "Encoded",
    "Factored",
    "Layout",
    "Meta",
    "NoDelta",
    "Relaid",
    "Relative",
    "Scattered",
    "SkillPackError",
    "Spec",
    "UnknownCodec",
    "check",
    "check_parts",
    "check_shape",
    "coded",
    "coded_low_rank",
    "coded_low_rank_stack",
    "coded_table",
    "codec_named",
    "dct_patches",
    "dct_patches_spec",
    "decode",
    "dense",
    "dense_spec",
    "exact",
    "exact_spec",
    "finite",
    "is_factored",
    "is_scattered",
    "kept_dtype",
    "layout",
    "layout_name",
    "least_bits",
    "lossless",
    "low_rank",
    "low_rank_spec",
    "low_rank_stack",
    "low_rank_stack_spec",
    "mask",
    "original",
    "part_bytes",
    "payload_bytes",
    "quantized",
    "quantized_low_rank",
    "quantized_low_rank_spec",
    "quantized_product",
    "quantized_product_spec",
    "rank_of",
    "register",
    "relaid",
    "restore",
    "rows",
    "seeded_sparse",
    "seeded_sparse_spec",
    "sign_low_rank",
    "sign_low_rank_spec",
    "sign_scale",
    "sign_scale_spec",
    "sign_scales",
    "sign_scales_spec",
    "sparse",
    "sparse_codebook",
    "sparse_codebook_spec",
    "sparse_low_rank",
    "sparse_low_rank_spec",
    "sparse_top",
    "weight_bits",
]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
