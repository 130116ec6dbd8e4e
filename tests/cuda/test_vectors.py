# SPDX-License-Identifier: Apache-2.0
"""Norms and biases of many tenants on the GPU, as Hugging Face rounds them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from deltaweave.runtime_plugin.library import Batch, Bias, BiasSlice, LibraryError, Norm, Parameter, ParameterKind
from gpu_checks import DTYPES, POISON, Poisoned, assert_close, draw_slots, make_arena
from table_records import RandomValues

pytestmark = pytest.mark.gpu


def vector(features):
    return Parameter(ParameterKind.VECTOR, features, 1, 0, 0)


NORMS = [
    (5, 1, 4096, 8),
    (1, 1, 576, 8),
    (7, 1, 32768, 8),
    (9, 32, 128, 8),
    (6, 3, 77, 8),
    (4, 1, 1001, 3),
    (300, 4, 64, 0),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "rows", "features", "shift"), NORMS)
def test_rms_norm_matches_hugging_face(gpu_library, tokens, rows, features, shift, dtype):
    """To the last bit but for the order of the sum; weights by slot."""
    rng, kind = np.random.default_rng(tokens * features), getattr(torch, dtype)
    tenants = [{0: RandomValues(rng.uniform(0.5, 2.0, features).astype(np.float32))} for _ in range(3)]
    arena = make_arena(gpu_library, [vector(features)], tenants)
    x = torch.from_numpy(rng.standard_normal((tokens, rows, features)) * 3).to(kind).cuda()
    weight = torch.from_numpy(rng.uniform(0.5, 2.0, features)).to(kind).cuda()
    slots = draw_slots(rng, tokens, 3)
    y = Poisoned((tokens, rows, features), kind, shift)
    norm = Norm(
        arena.batch(slots, kind), 0, rows, features, 1e-5,
        x.data_ptr(), x.stride(0), x.stride(1), y.inner.data_ptr(), y.wide.stride(0), y.wide.stride(1),
        weight.data_ptr(),
    )  # fmt: skip
    gpu_library.rms_norm(norm)
    got = y.numpy()
    own = {slot: torch.from_numpy(tenant[0].values).to(kind).cuda() for slot, tenant in enumerate(tenants)}
    weights = torch.stack([own.get(slot, weight) for slot in slots.tolist()])[:, None]
    wide = x.float()
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    expected = (weights * normal.to(kind)).double().cpu().numpy()
    assert (got == expected).mean() > 0.98
    assert (np.abs(got - expected) <= 2 * float(torch.finfo(kind).eps) * np.abs(expected)).all()
    assert_close(got, expected, dtype)


def test_rms_norm_in_place_and_repeated(gpu_library):
    rng = np.random.default_rng(3)
    arena = make_arena(gpu_library, [vector(512)], [{0: RandomValues(rng.standard_normal(512).astype(np.float32))}])
    x = torch.randn((4, 512), device="cuda").half()
    weight = torch.randn(512, device="cuda").half()
    slots = torch.tensor([0, -1, 0, 1], dtype=torch.int32, device="cuda")

    def norm_into(y, **how):
        where = (x.data_ptr(), 512, 512, y.data_ptr(), 512, 512, weight.data_ptr())
        gpu_library.rms_norm(Norm(arena.batch(slots, x.dtype, **how), 0, 1, 512, 1e-6, *where))
        return y

    first = norm_into(torch.full_like(x, POISON))
    assert torch.equal(first, norm_into(torch.full_like(x, POISON)))
    assert torch.equal(first, norm_into(torch.full_like(x, POISON), by_address=True))
    assert torch.equal(first, norm_into(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "widths", "shift"), [(5, (4096, 512, 512), 8), (3, (77,), 8), (9, (130, 5, 1, 64), 3)]
)
def test_add_bias(gpu_library, tokens, widths, shift, dtype):
    """Slices of one launch; the second parameter has no bias in the base, the last tenant none of its own."""
    rng, kind = np.random.default_rng(sum(widths)), getattr(torch, dtype)
    tenants = [
        {i: RandomValues(rng.standard_normal(width).astype(np.float32)) for i, width in enumerate(widths)}
        for _ in range(2)
    ]
    arena = make_arena(gpu_library, [vector(width) for width in widths], [*tenants, {}])
    slots = draw_slots(rng, tokens, 3)
    bases = [None if i == 1 else torch.from_numpy(rng.standard_normal(w)).to(kind).cuda() for i, w in enumerate(widths)]
    before = [torch.from_numpy(rng.standard_normal((tokens, width))).to(kind).cuda() for width in widths]
    outputs = [Poisoned((tokens, width), kind, shift) for width in widths]
    bias = Bias(arena.batch(slots, kind), len(widths))
    for i, y in enumerate(outputs):
        y.inner.copy_(before[i])
        address = None if bases[i] is None else bases[i].data_ptr()
        bias.slices[i] = BiasSlice(i, widths[i], y.inner.data_ptr(), y.wide.stride(0), address)
    gpu_library.add_bias(bias)
    for i, y in enumerate(outputs):
        base = torch.zeros(widths[i], dtype=kind) if bases[i] is None else bases[i].cpu()
        own = {slot: torch.from_numpy(tenant[i].values).to(kind) for slot, tenant in enumerate(tenants)}
        terms = torch.stack([own.get(slot, base) for slot in slots.tolist()])
        expected = (before[i].cpu().float() + terms.float()).to(kind).double().numpy()
        assert np.array_equal(y.numpy(), expected)


def test_bad_calls_are_refused(gpu_library):
    """Checks run before any launch."""
    arena = make_arena(gpu_library, [vector(64)], [{}])
    slots = torch.zeros(2, dtype=torch.int32, device="cuda")
    bad = [({"dtype": 2}, "dtype 2"), ({"slots": None}, "slots is null"), ({"arena": 8}, "arena is not aligned")]
    for change, message in bad:
        wrong = Batch.from_buffer_copy(arena.batch(slots, torch.float16))
        for name, value in change.items():
            setattr(wrong, name, value)
        with pytest.raises(LibraryError, match=message):
            gpu_library.rms_norm(Norm(wrong, 0, 1, 64, 1e-5))
