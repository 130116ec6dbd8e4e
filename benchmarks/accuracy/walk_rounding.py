# SPDX-License-Identifier: Apache-2.0
"""How far two models that are walked side by side stray from each other by rounding alone, and what that costs.

    python benchmarks/accuracy/walk_rounding.py --base SMOLLM2 --fine-tune LAB/german-0 --output walks.json

`correct_drift` fits layers to how far the compressed model has strayed from the fine-tune. The fine-tune is compressed
with recipe `corrected`, the walks once in float32 and once in a GPU's 11 bits (converter/half_products.py), computed
here on the CPU; KL of both to the fine-tune on held-out items. Then the fine-tune and the model that was compressed in
float32 are walked over calibration text with products rounded to 11 bits, to bfloat16, and to 11 bits in linear layers
or in attention alone: the energy of the error of their difference, over the energy of that difference.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from deltaweave.converter import Checkpoint, CompressionOptions, Policies, Recipe, compress, tuned_names, tuned_tensor
from deltaweave.converter.text import CalibrationData
from deltaweave.formats import Delta
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from deltaweave.models import load_checkpoint, load_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "fusion"))

from finetune import encode, score_answers
from problems import SKILLS
from results_file import circumstances, write_result
from tasks import items

compression = importlib.import_module("deltaweave.converter.compress")
LENGTH, LAYERS_TOLD = 256, 8
Rounding = Callable[[torch.Tensor], torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--fine-tune", type=Path, required=True, help="a folder with tuned/ and calibration.jsonl")
    parser.add_argument("--skill", choices=list(SKILLS), default="german")
    parser.add_argument("--samples", type=int, default=24, help="calibration sequences of 256 tokens")
    parser.add_argument("--walked", type=int, default=6, help="of them, sequences that roundings are compared on")
    parser.add_argument("--items", type=int, default=48, help="held-out items")
    parser.add_argument("--delta", type=Path, help="only walk, with this delta")
    parser.add_argument("--output", type=Path, help="JSON to write")
    arguments = parser.parse_args()
    result: dict[str, Any] = circumstances("cpu")
    delta = arguments.delta
    if delta is None:
        result["kl"] = {}
        for name in ("11 bits", "float32"):
            delta = compressed(arguments, name)
            result["kl"][name] = scored(arguments, delta)
            print(name, result["kl"][name], flush=True)
    result["error_energy_by_layer"] = strays(arguments, delta)
    write_result(arguments.output, result)


def compressed(arguments: argparse.Namespace, name: str) -> Path:
    """The fine-tune's delta, its walks computed as `name` says."""

    def streams(run: Any, text: CalibrationData) -> Any:
        served, own = (run._stream(text, torch.float32, half_products=name == "11 bits") for _ in range(2))
        return compression.Streams(served, served, own)

    compression._Run._streams = streams
    options = CompressionOptions(
        Recipe.preset("corrected", ratio=1 / 16),
        str(arguments.fine_tune / "calibration.jsonl"),
        samples=arguments.samples,
        sequence_length=LENGTH,
        policies=Policies(embeddings="base", lm_head="base"),
        device="cpu",
    )
    output = arguments.fine_tune / f"walked-{name.replace(' ', '-')}.safetensors"
    return compress(arguments.base, arguments.fine_tune / "tuned", output, options, force=True, restart=True)


def scored(arguments: argparse.Namespace, delta: Path) -> dict[str, float]:
    """KL to the fine-tune on held-out items, in nats a token."""
    tokenizer = load_tokenizer(arguments.base)
    wanted = items(lambda generator: SKILLS[arguments.skill](generator, held_out=True), arguments.items, "test 0")
    examples = [encode(item, tokenizer) for item in wanted]
    answers, prompts = score_answers(exact(arguments), served(arguments, delta), examples)
    return {"answers": answers.kl, "prompts": prompts.kl}


def exact(arguments: argparse.Namespace) -> Any:
    return load_checkpoint(arguments.fine_tune / "tuned", torch.float32).eval()


def served(arguments: argparse.Namespace, path: Path) -> Any:
    """The base with the delta, unrounded."""
    model, base = exact(arguments), Checkpoint.open(arguments.base)
    with Delta.open(path) as delta:
        state = {name: tuned_tensor(base, delta, name, torch.float32) for name in tuned_names(base, delta)}
    model.load_state_dict(state, strict=False)
    return model


class Rounded(TorchFunctionMode):
    """Linear layers and attention with what they are given rounded, attention's result too."""

    def __init__(self, linear: Rounding | None, attention: Rounding | None) -> None:
        super().__init__()
        self.linear, self.attention = linear, attention

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear and self.linear:
            return func(*(self.linear(value) for value in args[:2]), *args[2:], **kwargs)
        if func is functional.scaled_dot_product_attention and self.attention:
            return self.attention(func(*(self.attention(value) for value in args), **kwargs))
        return func(*args, **kwargs)


def strays(arguments: argparse.Namespace, delta: Path) -> dict[str, dict[int, float]]:
    """By rounding and layer: |error of (r* - r)|^2 / |r* - r|^2, r being the stream behind that many layers."""
    text = str(arguments.fine_tune / "calibration.jsonl")
    tokens = CalibrationData.load(text, arguments.fine_tune / "tuned", arguments.walked, LENGTH, 0).tokens
    pair = exact(arguments), served(arguments, delta)

    def eleven(values: torch.Tensor) -> torch.Tensor:
        return values.half().float()

    def eight(values: torch.Tensor) -> torch.Tensor:
        return values.bfloat16().float()

    def difference(mode: Any) -> list[torch.Tensor]:
        with torch.no_grad(), mode:
            mine, other = (model.model(tokens, output_hidden_states=True, use_cache=False) for model in pair)
        return [a - b for a, b in zip(mine.hidden_states, other.hidden_states, strict=True)]

    wanted, found = difference(nullcontext()), {}
    for name, linear, attention in (
        ("11 bits", eleven, eleven),
        ("11 bits in linear layers", eleven, None),
        ("11 bits in attention", None, eleven),
        ("bfloat16", eight, eight),
    ):
        given = difference(Rounded(linear, attention))
        step = max(1, (len(wanted) - 2) // LAYERS_TOLD)
        found[name] = {
            layer: float((given[layer] - wanted[layer]).square().sum() / wanted[layer].square().sum())
            for layer in range(1, len(wanted) - 1, step)
        }
        print(f"{name:26}", *(f"{layer}: {energy:.1e}" for layer, energy in found[name].items()), flush=True)
    return found


if __name__ == "__main__":
    main()
