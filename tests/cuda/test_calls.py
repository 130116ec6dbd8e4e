# SPDX-License-Identifier: Apache-2.0
"""Argument checks of the whole model's kernels. They run before any launch, so that no GPU is needed."""

from __future__ import annotations

import pytest
from deltaweave.runtime_plugin.library import (
    Batch,
    Bias,
    BiasSlice,
    Embedding,
    Gemm,
    LibraryError,
    Norm,
    Parameter,
    ParameterKind,
    Record,
    RepackArgs,
    Slice,
)

AT = 4096  # an address that is never read: a call that passes every check is not made here


def batch(**change):
    """Arguments that pass every check, but for the change."""
    good = {
        "arena": AT, "directory": AT, "slots": AT, "parameter_count": 3, "slot_count": 2, "token_count": 4, "dtype": 1,
    }  # fmt: skip
    return Batch(**(good | change))


def norm(**change):
    good = {
        "batch": batch(), "parameter": 1, "rows_per_token": 2, "features": 64, "epsilon": 1e-5, "x": AT,
        "x_token_stride": 128, "x_row_stride": 64, "y": AT, "y_token_stride": 128, "y_row_stride": 64, "weight": AT,
    }  # fmt: skip
    return Norm(**(good | change))


def bias(slice_count=1, shared=None, **change):
    good = {"parameter": 1, "features": 64, "y": AT, "y_stride": 64, "bias": None}
    call = Bias(shared or batch(), slice_count)
    call.slices[0] = BiasSlice(**(good | change))
    return call


def embedding(**change):
    good = {
        "batch": batch(), "parameter": 2, "base_rows": 100, "features": 64, "in_offset": 0, "ids": AT, "table": AT,
        "table_stride": 64, "y": AT, "y_stride": 64,
    }  # fmt: skip
    return Embedding(**(good | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_count": 0}, "token_count 0, expected 1"),
        ({"dtype": 2}, "dtype 2, expected 0 to 1"),
        ({"slot_count": 0}, "slot_count 0"),
        ({"parameter_count": 0}, "parameter_count 0"),
        ({"parameter_count": 1}, "parameter [12], expected 0 to 0"),
        ({"arena": None}, "arena is null"),
        ({"arena": AT + 16}, "arena is not aligned to 256 bytes"),
        ({"arena": None, "arena_address": AT + 4}, "arena_address is not aligned to 8 bytes"),
        ({"directory": AT + 4}, "directory is not aligned to 8 bytes"),
        ({"slots": None}, "slots is null"),
    ],
)
def test_bad_batches_are_refused(library, change, message):
    wrong = batch(**change)
    for call in (
        lambda: library.rms_norm(norm(batch=wrong)),
        lambda: library.add_bias(bias(shared=wrong)),
        lambda: library.embed(embedding(batch=wrong)),
    ):
        with pytest.raises(LibraryError, match=message):
            call()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parameter": -1}, "parameter -1, expected 0 to 2"),
        ({"features": 0}, "features 0, expected 1 to 32768"),
        ({"rows_per_token": 0}, "rows_per_token 0"),
        ({"batch": batch(token_count=1 << 20), "rows_per_token": 4096}, "rows of all tokens 4294967296"),
        ({"epsilon": -1.0}, "epsilon -1, expected at least 0"),
        ({"epsilon": float("nan")}, "epsilon nan"),
        ({"x": None}, "x is null"),
        ({"y": AT + 1}, "y is not aligned to 2 bytes"),
        ({"weight": None}, "weight is null"),
        ({"x_row_stride": 63}, "x_row_stride 63, expected 64"),
        ({"y_token_stride": 0}, "y_token_stride 0, expected 64"),
    ],
)
def test_bad_norms_are_refused(library, change, message):
    with pytest.raises(LibraryError, match=message):
        library.rms_norm(norm(**change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slice_count": 0}, "slice_count 0, expected 1 to 4"),
        ({"slice_count": 5}, "slice_count 5"),
        ({"slice_count": 2}, "features 0, expected 1 to 262144"),
        ({"parameter": 3}, "parameter 3, expected 0 to 2"),
        ({"y": None}, "y is null"),
        ({"y_stride": 63}, "y_stride 63, expected 64"),
        ({"bias": AT + 1}, "bias is not aligned to 2 bytes"),
    ],
)
def test_bad_biases_are_refused(library, change, message):
    with pytest.raises(LibraryError, match=message):
        library.add_bias(bias(**change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_rows": -1}, "base_rows -1, expected 0 to 262144"),
        ({"features": 32769}, "in_features 32769"),
        ({"in_offset": 128}, "in_offset 128, expected 0 to 127"),
        ({"ids": AT + 4}, "ids is not aligned to 8 bytes"),
        ({"table": None}, "table is null"),
        ({"table_stride": 5}, "table_stride 5, expected 64"),
        ({"y": None}, "y is null"),
        ({"y_stride": 0}, "y_stride 0, expected 64"),
    ],
)
def test_bad_embeddings_are_refused(library, change, message):
    with pytest.raises(LibraryError, match=message):
        library.embed(embedding(**change))


def test_bad_heads_are_refused(library):
    gemm = Gemm(
        arena=AT, directory=AT, parameter_count=2, slot_count=4, max_rank=128, dtype=0, token_count=4,
        in_features=256, x=AT, x_stride=256, plan=AT, slice_count=1, workspace=AT,
    )  # fmt: skip
    gemm.slices[0] = Slice(1, 384, 0, AT, 384)
    gemm.workspace_bytes = library.workspace_bytes(gemm) - 1
    with pytest.raises(LibraryError, match=r"workspace of \d+ bytes, needed \d+"):
        library.dense_gemm(gemm)
    gemm.weights = AT
    with pytest.raises(LibraryError, match="weights of a dense product, expected NULL"):
        library.dense_gemm(gemm)
    gemm.slice_count = 2
    with pytest.raises(LibraryError, match="slice_count of a dense product 2, expected 1 to 1"):
        library.dense_gemm(gemm)


LINEAR = Parameter(ParameterKind.LINEAR, 256, 128, 0, 0)
TABLE = Parameter(ParameterKind.EMBEDDING, 256, 128, 0, 0)
VECTOR = Parameter(ParameterKind.VECTOR, 256, 1, 0, 0)
FACTORED = Record.factored(0, [(2, 4, "codebook")])


@pytest.mark.parametrize(
    ("record", "parameter", "missing"),
    [
        (FACTORED, LINEAR, "v_codes"),
        (FACTORED, LINEAR, "v_grid"),
        (FACTORED, LINEAR, "u_codes"),
        (FACTORED, LINEAR, "u_grid"),
        (FACTORED, LINEAR, "sigma"),
        (FACTORED, LINEAR, "levels"),
        (Record.dense(0, 5, 8, "affine"), TABLE, "v_codes"),
        (Record.dense(0, 5, 8, "affine"), TABLE, "v_grid"),
        (Record.replaced_rows(0, 5), TABLE, "indices"),
        (Record.replaced_rows(0, 5), TABLE, "values"),
        (Record.values(0), VECTOR, "values"),
        (Record.values(0), VECTOR, "payload"),
    ],
)
def test_repack_names_what_is_missing(library, record, parameter, missing):
    tensors = ("v_codes", "v_grid", "u_codes", "u_grid", "sigma", "levels", "indices", "values", "payload")
    arguments = RepackArgs(record=record, parameter=parameter, payload_bytes=1 << 20)
    for name in tensors:
        setattr(arguments, name, None if name == missing else AT)
    with pytest.raises(LibraryError, match=f"{missing} is null"):
        library.repack(arguments)


@pytest.mark.parametrize(
    ("record", "change", "message"),
    [
        (Record.values(0), {"payload_bytes": 1000}, "payload of 1000 bytes, needed 1024"),
        (Record.values(0), {"payload": AT + 128}, "payload is not aligned to 256 bytes"),
        (Record.shared(0, 1), {}, "parameter 0 shares the record of 1, whose bytes are repacked once"),
        (FACTORED, {}, "a factored record of a vector"),
        (Record.values(0), {"parameter": Parameter(5, 256, 1, 0, 0)}, "kind 5, expected 0 to 3"),
    ],
)
def test_bad_repacks_are_refused(library, record, change, message):
    good = {"parameter": VECTOR, "values": AT, "payload": AT, "payload_bytes": 1024}
    with pytest.raises(LibraryError, match=message):
        library.repack(RepackArgs(record=record, **(good | change)))


def test_library_without_kernels_says_so(library):
    if library.has_cuda:
        pytest.skip("this library has kernels")
    for name, call in [
        ("dw_rms_norm", library.rms_norm),
        ("dw_add_bias", library.add_bias),
        ("dw_embed", library.embed),
    ]:
        arguments = {"dw_rms_norm": norm, "dw_add_bias": bias, "dw_embed": embedding}[name]()
        with pytest.raises(LibraryError, match=f"{name}: this libdeltaweave was built without CUDA"):
            call(arguments)
