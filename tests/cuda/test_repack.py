# SPDX-License-Identifier: Apache-2.0
"""The header that repack writes; blocks are checked by the products that read them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from deltaweave.runtime_plugin.library import Field, Parameter, ParameterKind
from factored_records import RandomBand, RandomRecord
from gpu_checks import make_arena

pytestmark = pytest.mark.gpu

FEATURES, OUT = 256, 300
GROUPS = 3  # of 128 in OUT


def scale_u(record, factor):
    """Multiplies u by a power of two; returns the largest scale and the largest 16-bit value, 0 for none."""
    grid, codes = np.frombuffer(record.u.grid, "<f2").copy(), bytearray(record.u.codes)
    largest_scale = largest_value = 0.0
    grid_at = code_at = 0
    for band in record.bands:
        code_at += -code_at % 16
        size = band.rank * ((band.bits * OUT + 7) // 8)
        if band.bits == 16:
            scaled = (np.frombuffer(codes[code_at : code_at + size], "<f2") * factor).astype("<f2")
            codes[code_at : code_at + size] = scaled.tobytes()
            largest_value = max(largest_value, float(np.abs(scaled).max()))
        else:
            step = 1 if band.grid == "codebook" else 2
            scales = grid[grid_at : grid_at + band.rank * GROUPS * step : step]
            scales[:] = (scales * factor).astype("<f2")
            largest_scale = max(largest_scale, float(np.abs(scales).max()))
            grid_at += band.rank * GROUPS * step
        code_at += size
    record.u.grid, record.u.codes = grid.tobytes(), bytes(codes)
    return largest_scale, largest_value


@pytest.mark.parametrize(
    "bands",
    [
        (RandomBand(8, 2), RandomBand(3, 32), RandomBand(2, 90)),
        (RandomBand(16, 5), RandomBand(2, 40)),
        (RandomBand(16, 9),),
        (RandomBand(4, 7, "codebook"), RandomBand(1, 13)),
    ],
)
@pytest.mark.parametrize("factor", [2.0**-7, 1.0, 2.0**12])
def test_header_normalizes_u(gpu_library, bands, factor):
    """The largest of u's scales and 16-bit values is stored within [64, 128), and the header undoes it.

    It also bounds sigma * v.
    """
    record = RandomRecord.draw(np.random.default_rng(2), (OUT, FEATURES), bands)
    scale, value = scale_u(record, factor)
    arena = make_arena(gpu_library, [Parameter(ParameterKind.LINEAR, FEATURES, OUT, 0, 0)], [{0: record}])
    torch.cuda.synchronize()
    at = arena.arena.directory_rows(0)[0][Field.HEADER]
    header = arena.buffer[at : at + 256].cpu().view(torch.float32).double().numpy()
    assert np.log2(header[1]) == np.round(np.log2(header[1]))
    assert 64 <= max(scale, value) / header[1] < 128
    assert header[0] == max(scale / header[1], 1.0 if value else 0.0)
    largest = np.abs(record.sigma[:, None] * record.v.values).max()
    assert largest <= header[2] * (1 + 2**-20) < 40 * largest
    count = len(bands)
    ones = np.array([band.bits == 16 for band in bands])
    assert (header[8 : 8 + count][ones] == 1).all()
    assert header[8 : 8 + count].max() == header[0] and header[8 : 8 + count].all()
    assert not header[3:8].any() and not header[8 + count :].any()


def test_zero_u_has_a_neutral_header(gpu_library):
    record = RandomRecord.draw(np.random.default_rng(2), (OUT, FEATURES), (RandomBand(2, 20),))
    scale_u(record, 0.0)
    arena = make_arena(gpu_library, [Parameter(ParameterKind.LINEAR, FEATURES, OUT, 0, 0)], [{0: record}])
    torch.cuda.synchronize()
    at = arena.arena.directory_rows(0)[0][Field.HEADER]
    assert arena.buffer[at : at + 8].cpu().view(torch.float32).tolist() == [0.0, 1.0]
