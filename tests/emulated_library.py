# SPDX-License-Identifier: Apache-2.0
"""libdeltaweave whose products and repack run on the CPU, for tests where there is no GPU.

The sources of `cuda/src` are compiled as C++ with the language of `cuda/emulation/device.h`, after what only a GPU can
do was replaced by its meaning. What this cannot show: races that take two threads at the same time, copies that arrive
late, and speed.
"""

from __future__ import annotations

import fcntl
import hashlib
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = ["build_emulated", "cuda_headers"]

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "emulated"
SOURCES = ROOT / "cuda" / "src"
EMULATION = Path(__file__).parent / "cuda" / "emulation"
KERNELS = (
    *("base_gemm", "delta_gemm", "dense_gemm", "expand", "lora", "plan", "prefill_gemm", "prefill_images"),
    *("prepare", "repack", "repack_blocks", "repack_numbers", "shrink"),
)
HOST = ("allocator", "arena", "batch_args", "gemm_args", "payload", "status", "no_cuda")
# A file, an instruction in it by its first words, and C++ that means the same.
INSTRUCTIONS = (
    ("base_gemm.cu", "cp.async.cg", "to = *static_cast<const uint4*>(from);"),
    ("base_gemm.cu", "createpolicy", "policy = 0;"),
    ("base_gemm.cu", "cp.async.commit_group", ""),
    ("base_gemm.cu", "cp.async.wait_group", ""),
    ("expand_shares.cuh", "prefetch", ""),
    (
        "fragment.cuh",
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16",
        "emulation::multiply<__nv_bfloat162>(d, a, b0, b1);",
    ),
    ("fragment.cuh", "mma.sync", "emulation::multiply(d, a, b0, b1);"),
    ("fragment.cuh", "lop3", "selected = (bits & mask) | exponent;"),
    ("prefill_item.cuh", "bar.sync", "emulation::wait_at(1, 32 * kConsumers);"),
    ("prefill_stage2.cuh", "prefetch", ""),
    ("prefill_stage2.cuh", "red.global.add.noftz.f16x2", "to[0] = add(to[0], first), to[1] = add(to[1], second);"),
    ("prefill_stage2.cuh", "red.global.add.noftz.bf16x2", "to[0] = add(to[0], first), to[1] = add(to[1], second);"),
    ("prefill_stage2.cuh", "mad.wide.u32", "address = reinterpret_cast<uint64_t>(y) + uint64_t{pitch} * row;"),
    # Kernels run one after another here: who would wait now would wait for ever.
    ("step.cuh", "ld.acquire", "if ((done = *done_of(gemm, part)) < blocks) std::abort();"),
    ("step.cuh", "prefetch", ""),
)


def build_emulated() -> Path:
    """Compiles the library if its sources have changed; of pytest's processes the first does, and the others wait."""
    made_of = sorted((*SOURCES.iterdir(), *EMULATION.iterdir(), Path(__file__)))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in made_of)).hexdigest()[:16]
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        library = BUILD / f"libdeltaweave_{digest}.so"
        if not library.exists():
            for old in BUILD.glob("libdeltaweave_*.so"):
                old.unlink()
            with tempfile.TemporaryDirectory(dir=BUILD) as folder:
                _compile(Path(folder)).replace(library)
    return library


def _compile(folder: Path) -> Path:
    shutil.copytree(SOURCES, folder, dirs_exist_ok=True)
    for name in ("copies.cuh", "products.cuh", "device.cc"):
        shutil.copy(EMULATION / name, folder)
    _rewrite(folder)
    compile_one = ["c++", "-std=c++20", "-O2", "-w", "-fPIC", "-fvisibility=hidden", "-DDW_BUILDING", "-DDW_WGMMA=1"]
    compile_one += [f"-I{path}" for path in (ROOT / "cuda" / "include", folder, cuda_headers())]
    kernel = [*compile_one, "-include", str(EMULATION / "device.h"), "-x", "c++", "-c"]
    commands = [[*kernel, f"{name}.cu", "-o", f"{name}.o"] for name in KERNELS]
    commands += [[*kernel, "device.cc", "-o", "device.o"]]
    commands += [[*compile_one, "-c", f"{name}.cc", "-o", f"{name}.o"] for name in HOST]
    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(lambda command: _run(command, folder), commands):
            pass
    objects = [f"{name}.o" for name in (*KERNELS, "device", *HOST)]
    # no_cuda, the last, has the entry points that are not emulated.
    library = folder / "libdeltaweave.so"
    _run(["c++", "-shared", "-Wl,-Bsymbolic,--allow-multiple-definition", *objects, "-o", str(library)], folder)
    return library


def cuda_headers() -> Path | None:
    """The folder of CUDA's headers, beside nvcc."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    for folder in (Path(nvcc).resolve().parents[1], Path("/usr/local/cuda")):
        if (folder / "include" / "cuda_runtime.h").is_file():
            return folder / "include"
    return None


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def _rewrite(folder: Path) -> None:
    def edit(name: str, pattern: str, by: str) -> None:
        path = folder / name
        text, count = re.subn(pattern, by, path.read_text(), flags=re.DOTALL)
        assert count > 0, f"{name} has nothing like {pattern!r} any more: what does it do now?"
        path.write_text(text)

    for name, start, meaning in INSTRUCTIONS:
        edit(name, rf'asm ?(?:volatile)?\(\s*"{re.escape(start)}.*?\);(?=\s)', meaning)
    edit("ring.cuh", r"#if defined[^\n]*\n\n.*?#endif\n", '#include "copies.cuh"\n')
    edit("stages.cuh", r"template <int kStages, int kConsumers.*?\n};\n", "")
    edit("prefill.cuh", r"#if DW_WGMMA\n.*#endif\n(?=\n}  // namespace prefill)", '#include "products.cuh"\n')
    for name in ("base_gemm.cu", "dense_gemm.cu", "expand.cu", "prefill_gemm.cu", "shrink.cu"):
        edit(name, r"extern __shared__ [^;]*?(\w+)\[\];", r"unsigned char* \1 = emulation::shared_memory;")
    # Launches.
    started = "emulation::launch(grid.x, threads, [&] { kernel(arguments...); });\n  return cudaSuccess;\n"
    edit("step.cuh", r"cudaLaunchAttribute attribute.*?cudaLaunchKernelEx[^\n]*\n", started)
    for name in ("dense_gemm.cu", "plan.cu", "prepare.cu", "repack_blocks.cu", "repack_numbers.cu"):
        edit(name, r"(\w+)<<<(.*?), (\w+), \w+, stream>>>\((.*?)\);", r"emulation::launch(\2, \3, [&] { \1(\4); });")
