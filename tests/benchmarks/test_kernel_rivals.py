# SPDX-License-Identifier: Apache-2.0
"""The comparison with rivals: cases, packed factors, the check against float64, and what it does with failures."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from deltaweave.formats import Band as FileBand
from deltaweave.formats import published_alpha
from deltaweave.runtime_plugin.library import find_library
from factored_records import RandomBand, RandomFactor, RandomRecord

KERNELS = Path(__file__).parents[2] / "benchmarks" / "kernels"
sys.path.insert(0, str(KERNELS))
from rivals import loading, vllm_lora, warm, workload  # noqa: E402
from rivals.cases import MODELS, Band, Case, Group, Slice, model_cases, preset_bands  # noqa: E402
from rivals.contenders import CONTENDERS, plan  # noqa: E402
from rivals.factors import PackedFactor, PackedRecord, draw_records  # noqa: E402
from rivals.measure import Row, layers_for, measure, refusal  # noqa: E402
from rivals.ours import Deltaweave  # noqa: E402
from rivals.torch_rivals import Base, MergedBmm, MergedLoop, TorchBmm, TorchLoop  # noqa: E402
from rivals.vllm_lora import VllmLora  # noqa: E402

BANDS = (Band(8, 2), Band(3, 5), Band(2, 9))


def small_case(tokens: int, tenants: int, outs: tuple[int, ...] = (192, 64, 64), features: int = 320) -> Case:
    """A group of unequal slices, as grouped-query attention has."""
    return Case("models", "tiny", 2, Group("qkv", features, tuple(Slice(out, BANDS) for out in outs)), tokens, tenants)


# Cases


@pytest.mark.parametrize("shape", [(4096, 4096), (11008, 4096), (1024, 4096), (5120, 13824)])
def test_the_presets_ranks_fill_a_sixteenth_of_the_matrix(shape: tuple[int, int]) -> None:
    bands = [FileBand(bits=band.bits, rank=band.rank, grid="affine") for band in preset_bands(*shape)]
    more = [*bands[:-1], dataclasses.replace(bands[-1], rank=bands[-1].rank + 1)]
    assert published_alpha(shape, tuple(bands)) <= 1 / 16 < published_alpha(shape, tuple(more))


def test_a_models_cases_hold_all_of_its_linears() -> None:
    parameters = {
        model: layers * sum(group.in_features * group.out_features for group in groups)
        for model, (layers, groups) in MODELS.items()
    }
    assert parameters == {"Llama-2-7B": 6476005376, "Llama-3-8B": 6979321856, "Llama-2-13B": 12687769600}
    cases = model_cases("Llama-2-7B", [1, 8], [512])
    assert [(case.tokens, case.tenants) for case in cases[::4]] == [(1, 1), (8, 8), (512, 1)]


def test_every_contender_has_work_and_none_gets_what_it_refuses() -> None:
    entries = plan(list(MODELS), [1, 8], [512], ["models", "bands", "sweep"])
    assert {kind.name for kind, _ in entries} == set(CONTENDERS)
    assert entries[0][1].model == "Llama-2-7B"
    assert all(kind.refuses(case) is None for kind, case in entries)
    gemlite = {case.model for kind, case in entries if kind.name == "gemlite"}
    assert gemlite == {"1 bit", "2 bit", "4 bit", "8 bit"}
    assert not [case for kind, case in entries if kind.name == "merged-loop" and case.tokens == 512]


def test_graphs_rotate_over_many_times_the_cache() -> None:
    for kind, case in plan(["Llama-2-7B"], [1, 8, 128], [512], ["models", "bands"]):
        layers = layers_for(kind, case)
        rotated = layers * kind.layer_bytes(case)
        assert rotated >= 300e6 or layers == (32 if case.tokens == case.tenants else 4)


# Packed factors


@pytest.mark.parametrize("length", [320, 576, 1024])
def test_values_are_those_of_the_files_layout(length: int) -> None:
    drawn = RandomFactor.draw(
        np.random.default_rng(1), tuple(RandomBand(band.bits, band.rank) for band in BANDS), {}, length, 128
    )
    codes = torch.from_numpy(np.frombuffer(drawn.codes, np.uint8).copy())
    grid = torch.from_numpy(np.frombuffer(drawn.grid, np.float16).copy())
    factor = PackedFactor(BANDS, length, codes, grid)
    assert torch.equal(factor.values(), torch.from_numpy(drawn.values))


def test_drawn_factors_have_the_files_sizes_and_use_every_code() -> None:
    generator = torch.Generator().manual_seed(0)
    factor = PackedFactor.draw(BANDS, 320, generator)
    reference = RandomFactor.draw(
        np.random.default_rng(0), tuple(RandomBand(band.bits, band.rank) for band in BANDS), {}, 320, 128
    )
    assert (factor.codes.nbytes, factor.grid.nbytes) == (len(reference.codes), len(reference.grid))
    last = factor.packed_bands()[-1]
    assert {int(code) & 3 for code in last.codes.flatten()} == {0, 1, 2, 3}
    assert factor.values().shape == (16, 320)


def test_a_record_applies_as_the_reference_does() -> None:
    drawn = RandomRecord.draw(
        np.random.default_rng(2), (192, 320), tuple(RandomBand(band.bits, band.rank) for band in BANDS)
    )
    factors = [
        PackedFactor(
            BANDS,
            length,
            torch.from_numpy(np.frombuffer(factor.codes, np.uint8).copy()),
            torch.from_numpy(np.frombuffer(factor.grid, np.float16).copy()),
        )
        for factor, length in ((drawn.v, 320), (drawn.u, 192))
    ]
    record = PackedRecord(factors[0], factors[1], torch.from_numpy(drawn.sigma))
    x = np.random.default_rng(3).standard_normal((3, 320))
    torch.testing.assert_close(record.apply(torch.from_numpy(x)), torch.from_numpy(drawn.apply(x)), rtol=1e-12, atol=0)


def test_our_bytes_are_those_of_the_records() -> None:
    case = small_case(5, 5)
    records = [draw_records(piece, 320, 1, 0, "cpu")[0] for piece in case.group.slices]
    padding = [
        -(band.rank * -(-length * band.bits // 8)) % 16
        for record in records
        for length in (record.v.length, record.u.length)
        for band in record.v.bands[:-1]
    ]
    assert Deltaweave.layer_bytes(case) == 5 * (sum(record.nbytes for record in records) - sum(padding))


# Contenders on the CPU


CPU_CASES = [
    pytest.param(kind, case, id=f"{kind.name}-{case.tokens}-{case.tenants}")
    for kind in (Base, MergedLoop, MergedBmm, TorchLoop, TorchBmm)
    for case in (small_case(1, 1), small_case(5, 5), small_case(6, 1))
    if kind.refuses(case) is None
]


@pytest.mark.parametrize(("kind", "case"), CPU_CASES)
def test_products_agree_with_float64(kind: type[workload.Workload], case: Case) -> None:
    errors = [kind(case, 2, "cpu").error(layer) for layer in range(2)]
    assert all(0 < error < 1e-2 for error in errors)


def test_an_output_that_is_not_written_fails_the_check() -> None:
    merged = MergedLoop(small_case(5, 5), 1, "cpu")
    merged.rows = merged.rows[:-1]
    assert np.isnan(merged.error(0))


def test_another_tenants_weights_fail_the_check() -> None:
    loop = TorchLoop(small_case(5, 5), 1, "cpu")
    loop.rows = [*loop.rows[1:], loop.rows[0]]
    assert loop.error(0) > 0.5


def test_surplus_ranks_are_zeros() -> None:
    loop = TorchLoop(small_case(2, 2), 1, "cpu")
    for span in loop.spans:
        assert not loop.first[:, :, span.start + 16 : span.stop].any()
        assert loop.first[:, :, span.start : span.start + 16].all(dim=-1).any()


def test_scattered_rows_are_refused() -> None:
    assert "scattered" in str(TorchLoop.refuses(small_case(6, 2)))


def test_the_fastest_setting_wins_and_refused_ones_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"slow": 3.0, "fast": 1.0}
    seen: list[str] = []
    monkeypatch.setattr(workload, "event_ms", lambda run: run() or times[seen[-1]])

    def run(name: str) -> None:
        if name not in times:
            raise RuntimeError("out of shared memory")
        seen.append(name)

    assert workload.fastest(["slow", "huge", "fast"], run) == "fast"
    with pytest.raises(RuntimeError, match="out of shared memory"):
        workload.fastest(["huge"], run)


# Failures


class Broken(Base):
    """A contender whose package raises."""

    name = "broken"

    def __init__(self, case: Case, layers: int, device: str = "cuda") -> None:
        raise ValueError("first line\nno kernel image is available")


def test_a_failure_is_a_row_with_its_last_line() -> None:
    row = measure(Broken, small_case(2, 2), 4e12)
    assert row.reason == "no kernel image is available"
    assert row.to_json().keys().isdisjoint({"us", "error", "share"})


def test_cuda_errors_are_named_by_their_first_line() -> None:
    error = RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with `TORCH_USE_CUDA_DSA`.")
    assert refusal(error) == "RuntimeError: CUDA error: an illegal memory access was encountered"


@pytest.mark.parametrize(("model", "fits"), [("Llama-2-7B", True), ("Llama-3-8B", False)])
def test_vllms_offsets_are_checked_before_they_overflow(model: str, fits: bool) -> None:
    (case,) = [case for case in model_cases(model, [128], []) if case.group.name == "gate_up"]
    if fits:
        vllm_lora._check_offsets(case)
    else:
        with pytest.raises(RuntimeError, match="32-bit offsets"):
            VllmLora(case, 1, "cpu")


def test_rows_name_their_case() -> None:
    row = Row.of(Base, small_case(4, 4), us=3.0, error=1e-3)
    assert (row.table, row.model, row.tokens, row.tenants, row.model_layers, row.contender) == (
        *("models", "tiny", 4, 4, 2, "base"),
    )
    assert row.to_json()["us"] == 3.0


def test_kernels_are_compiled_once_for_cases_that_share_them() -> None:
    entries = plan(["Llama-2-7B"], [8, 32, 128], [], ["models"])
    small = warm.warm_entries(entries)
    bitdelta = [case for kind, case in small if kind.name == "bitdelta"]
    assert [(case.tokens, case.tenants) for case in bitdelta] == [(2, 2)]
    tuned = [case for kind, case in small if kind.name == "vllm-lora-tuned"]
    assert len(tuned) == 3 * 4 and {case.tokens for case in tuned} == {8, 32, 128}


def test_a_workers_failure_keeps_the_entry_from_the_measuring_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    case = small_case(2, 2)
    monkeypatch.setattr(Broken, "compiles", True)
    monkeypatch.setattr(warm, "device_works", lambda: True)
    warm.work([(Broken, case), (Broken, small_case(3, 3))], tmp_path / "0.jsonl")
    lines = (tmp_path / "0.jsonl").read_text().splitlines()
    assert len(lines) == 2 and "no kernel image" in lines[0]
    monkeypatch.setattr(subprocess, "Popen", fake_worker(lines))
    reasons = warm.compile_in_workers([(Broken, case)], 2, 5.0, ["compare.py"])
    assert warm.failed((Broken, case), reasons) == "no kernel image is available"
    assert warm.failed((Broken, small_case(9, 9)), reasons) is None


def fake_worker(lines: list[str]) -> type:
    """A process that writes its part of the lines at once."""

    class Worker:
        returncode = 0

        def __init__(self, command: list[str], **_: object) -> None:
            index, count = (int(part) for part in command[-2].split("/"))
            Path(command[-1]).write_text("\n".join(lines[index::count]) + "\n")

        def wait(self, _: float) -> int:
            return 0

    return Worker


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(loading.ENVIRONMENT, raising=False)
    with pytest.raises(loading.RivalMissingError, match="set RIVALS"):
        loading.rival_folder("humming")
    monkeypatch.setenv(loading.ENVIRONMENT, str(tmp_path))
    with pytest.raises(loading.RivalMissingError, match="no such folder"):
        loading.use_package("humming")


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dequantize", "bitdelta", "torch-loop", "torch-bmm", "merged-bmm", "deltaweave"])
@pytest.mark.parametrize("tenants", [1, 5])
def test_contenders_agree_with_float64_on_the_gpu(name: str, tenants: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    case = small_case(5, tenants, outs=(256, 128, 128), features=512)
    kind = CONTENDERS[name]
    if kind.refuses(case):
        pytest.skip(kind.refuses(case))
    if kind is Deltaweave and find_library() is None:
        pytest.skip("needs libdeltaweave.so: build it with CUDA, or set DELTAWEAVE_LIBRARY")
    assert kind(case, 2).error(1) < 1e-2


@pytest.mark.gpu
def test_vllms_kernels_agree_with_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    try:
        loading.rival_folder("vllm")
    except loading.RivalMissingError as error:
        pytest.skip(str(error))
    assert VllmLora(small_case(6, 2, outs=(256, 128, 128), features=512), 2).error(1) < 1e-2
