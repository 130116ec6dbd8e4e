# SPDX-License-Identifier: Apache-2.0
"""The Python API from two checkpoints to text, on a tiny random pair that is made first (so nothing needs fetching).

python examples/python_api.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from tiny_models import write_random_family
from transformers import AutoModelForCausalLM

import deltaweave
from deltaweave import CompressionOptions, Delta, Recipe


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        base = write_random_family(Path(folder), ["tuned"], change=0.1)
        tuned = Path(folder) / "tuned"
        output = Path(folder) / "tuned.safetensors"

        # 1. Compress: half the size of the projections here; 1/16 is the default and wants a model of a real size.
        recipe = Recipe.preset("triple", ratio=1 / 2)
        deltaweave.compress(base, tuned, output, CompressionOptions(recipe, samples=8, sequence_length=64))

        # 2. Look inside: opening maps the file, records are views of it.
        with Delta.open(output) as delta:
            print(f"{output.name}: {delta.byte_count().file:,} bytes, {len(delta.names)} records")
            name = "model.layers.0.mlp.up_proj.weight"
            record = delta.record(name)
            bands = ", ".join(f"{band.rank} ranks of {band.bits} bits" for band in record.bands)
            print(f"{name}: {bands}; relative error {record.quality['weight_error']:.3f}")
            print(f"as a dense matrix: {delta.dequantize(name).shape}")

            # 3. Serve it from the base, without dense weights.
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            tokens = torch.arange(10)[None]
            with torch.no_grad():
                alone = model(tokens).logits
                with deltaweave.attach(model, delta):
                    served = model(tokens).logits
            print(f"the delta moves the logits by {float((served - alone).norm() / alone.norm()):.2f} of their norm")

        # 4. Or write the dense fine-tune out.
        dense = deltaweave.apply(base, output, Path(folder) / "dense")
        with torch.no_grad():
            again = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)(tokens).logits
        print(f"attached and dense agree to {float((served - again).norm() / again.norm()):.0e}")
        assert all(check.passed for check in deltaweave.verify(output, base, tuned))


if __name__ == "__main__":
    main()
