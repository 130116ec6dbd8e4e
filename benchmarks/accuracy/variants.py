# SPDX-License-Identifier: Apache-2.0
"""Variants of the method on one fine-tune that is held in memory: which of them carry, and what an error costs.

    python benchmarks/accuracy/variants.py --base DIR --tuned DIR --calibration FILE.jsonl --skill german --output FILE

Not the converter: moments are measured once, on the fine-tune itself instead of behind compressed layers, and every
variant after the first takes seconds. `two-sided` is the decomposition that no converter has yet: singular vectors in
the metric of the input's second moment H and of the output's Fisher information G, either factor quantized by GPTQ in
its own metric. Beside every variant's KL stands that of the same errors with random signs, one a matrix: it says
how much of the loss comes from errors that add up over the model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
from cells import Work
from deltaweave.converter.allocation import DistortionTable, allocate
from deltaweave.converter.gptq import gptq
from deltaweave.converter.plan import open_pair
from deltaweave.converter.quantize import VectorsAsColumns, VectorsAsRows, bits_of_ranks
from deltaweave.converter.recipe import BandPlan, Recipe
from deltaweave.converter.svd import Factors, truncated_svd
from deltaweave.converter.text import CalibrationData
from deltaweave.formats import factored_bytes
from finetune import encode, score_answers
from problems import SKILLS
from results_file import circumstances, write_result
from torch import nn

from deltaweave.models import load_checkpoint, load_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "fusion"))
from tasks import items

# Relative squared error of a Gaussian on a grid that spans it.
ROUNDING = {1: 0.363, 2: 0.27, 3: 0.05, 4: 0.0115, 8: 1e-4}
MEASURED_WIDTH = 3  # rounding is measured at this width and scaled to the others
GROUP_SIZE = 512
DAMPING = 0.01  # of H and G before their roots are taken, relative to the mean diagonal
TOKENS_AT_ONCE = 4096


@dataclass(frozen=True)
class Variant:
    """One way to compress.

    Attributes:
        ratio: of stored to 16-bit bytes, all projections together.
        decomposition: `plain` singular vectors, or `two-sided`.
        bands: of a recipe for every matrix alike, or `auto`: under one budget.
        corrected: whether U is fitted to what V's quantization left.
        isotropic: share of G that is replaced by the identity at its scale.
        relief: share of rounding's cost that counts, against that of leaving a vector out.
        unbiased: whether sigma makes up for what a quantized vector lost along itself.
    """

    ratio: float = 1 / 16
    decomposition: Literal["plain", "two-sided"] = "plain"
    bands: str = "auto"
    corrected: bool = True
    isotropic: float = 0.3
    relief: float = 1.0
    unbiased: bool = False


PRESET = Variant(bands="8:2,3:32,2:*", corrected=False)
VARIANTS = {
    "preset": PRESET,
    "preset, corrected": replace(PRESET, corrected=True),
    "3 bits alone": replace(PRESET, bands="3:*"),
    "2 bits alone, corrected": replace(PRESET, bands="2:*", corrected=True),
    **{f"plain, relief {relief:g}": Variant(relief=relief) for relief in (1.0, 0.25, 1 / 30)},
    "plain, relief 1/30, unbiased": Variant(relief=1 / 30, unbiased=True),
    **{f"two-sided, relief {relief:g}": Variant(decomposition="two-sided", relief=relief) for relief in (1.0, 1 / 30)},
    "two-sided, relief 1/30, unbiased": Variant(decomposition="two-sided", relief=1 / 30, unbiased=True),
}


@dataclass(frozen=True)
class Matrix:
    """One projection: its delta [out, in], H of its input [in, in] and the Fisher information G of its output."""

    delta: torch.Tensor
    inputs: torch.Tensor
    outputs: torch.Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--tuned", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True, help="text like what the fine-tune will see, .jsonl")
    parser.add_argument("--skill", choices=list(SKILLS), required=True, help="whose held-out items KL is measured on")
    parser.add_argument("--folder", type=Path, required=True, help="finished variants")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--ratios", type=int, nargs="+", default=[16], help="inverse ratios")
    parser.add_argument("--samples", type=int, default=128, help="calibration sequences of 256 tokens")
    parser.add_argument("--items", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=1e9, help="start no variant after this time")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    work, bench, found = Work(arguments.folder, arguments.seconds), Bench(arguments, device), {}
    for inverse in arguments.ratios:
        for name in arguments.variants:
            variant = replace(VARIANTS[name], ratio=1 / inverse)
            result = work.cell(f"{name} 1_{inverse}".replace("/", "_"), lambda variant=variant: bench.measure(variant))
            if result is not None:
                found[f"{name} 1/{inverse}"] = result
    settings = {"skill": arguments.skill, "items": arguments.items, "samples": arguments.samples}
    write_result(arguments.output, {**circumstances(device), "settings": settings, "variants": found})


class Bench:
    """A pair with its moments, ready to be compressed in memory and scored."""

    def __init__(self, arguments: argparse.Namespace, device: str) -> None:
        self.tuned, self.candidate, base = (
            load_checkpoint(folder, torch.float32).to(device).eval()
            for folder in (arguments.tuned, arguments.tuned, arguments.base)
        )
        projections = open_pair(arguments.base, arguments.tuned).projections
        names = [projection.weight.removesuffix(".weight") for projection in projections]
        self.base = {name: base.get_submodule(name).weight.detach() for name in names}
        tokens = CalibrationData.load(arguments.calibration, arguments.tuned, arguments.samples, 256, 0).tokens
        inputs, outputs = moments(self.tuned, names, tokens.to(device))
        self.matrices = {
            name: Matrix(self.tuned.get_submodule(name).weight.detach() - self.base[name], inputs[name], outputs[name])
            for name in names
        }
        tokenizer, make = load_tokenizer(arguments.base), SKILLS[arguments.skill]
        tests = items(lambda source: make(source, held_out=True), arguments.items, "test 0")
        self.tests = [encode(item, tokenizer) for item in tests]

    def measure(self, variant: Variant) -> dict[str, Any]:
        """Compresses, and scores the result and the same errors with random signs."""
        approximations, stored = compressed(self.matrices, variant)
        signs = torch.Generator().manual_seed(0)
        scattered = {}
        for name, matrix in self.matrices.items():
            sign = 1 - 2 * int(torch.randint(2, (1,), generator=signs))
            scattered[name] = matrix.delta - sign * (matrix.delta - approximations[name])
        whole = sum(2 * matrix.delta.numel() for matrix in self.matrices.values())
        random_signs = {f"{key}_random_signs": value for key, value in self._score(scattered).items()}
        return {"ratio": stored / whole, **self._score(approximations), **random_signs, "variant": asdict(variant)}

    @torch.no_grad()
    def _score(self, deltas: dict[str, torch.Tensor]) -> dict[str, float]:
        for name, delta in deltas.items():
            self.candidate.get_submodule(name).weight.copy_(self.base[name] + delta)
        answers, prompts = score_answers(self.tuned, self.candidate, self.tests)
        return {"kl": answers.kl, "kl_prompts": prompts.kl}


def moments(
    model: Any, names: Iterable[str], tokens: torch.Tensor
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """H and G of every projection, per token, for tokens drawn from the model's own predictions."""
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}
    model.requires_grad_(False)

    def watch(name: str) -> Any:
        def forward(_: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            x = arguments[0].detach().flatten(0, -2)
            inputs[name] = inputs.get(name, 0) + x.T @ x / tokens.numel()
            output.register_hook(backward)

        def backward(gradient: torch.Tensor) -> None:
            y = gradient.flatten(0, -2)
            outputs[name] = outputs.get(name, 0) + y.T @ y / tokens.numel()

        return forward

    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    torch.manual_seed(0)
    for piece in tokens.split(max(1, TOKENS_AT_ONCE // tokens.shape[1])):
        embedded = model.get_input_embeddings()(piece).requires_grad_(True)
        logits = model(inputs_embeds=embedded, use_cache=False).logits.flatten(0, 1)
        drawn = torch.multinomial(logits.detach().softmax(-1), 1)[:, 0]
        nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
    for handle in handles:
        handle.remove()
    return inputs, outputs


def compressed(matrices: dict[str, Matrix], variant: Variant) -> tuple[dict[str, torch.Tensor], int]:
    """Every delta as it would be served, and the bytes that this takes."""
    metrics = {name: _isotropic(matrix.outputs, variant.isotropic) for name, matrix in matrices.items()}
    whole = {name: _decomposed(matrix, metrics[name], variant.decomposition) for name, matrix in matrices.items()}
    if variant.bands == "auto":
        tables = {name: _table(whole[name], matrix, metrics[name], variant) for name, matrix in matrices.items()}
        budget = variant.ratio * sum(2 * matrix.delta.numel() for matrix in matrices.values())
        plans, group_size = allocate(tables, tuple(ROUNDING), GROUP_SIZE, budget).bands, GROUP_SIZE
    else:
        recipe = Recipe(bands=variant.bands, ratio=variant.ratio)
        plans = {name: recipe.plan("", tuple(matrix.delta.shape)) for name, matrix in matrices.items()}
        group_size = recipe.group_size
    approximations, stored = {}, 0
    for name, matrix in matrices.items():
        plan = plans[name]
        if not plan.bands:
            approximations[name] = torch.zeros_like(matrix.delta)
            continue
        approximations[name] = _quantized(matrix, metrics[name], whole[name], plan, group_size, variant)
        stored += factored_bytes(tuple(matrix.delta.shape), plan.bands, group_size).total
    return approximations, stored


def _quantized(
    matrix: Matrix, metric: torch.Tensor, whole: Factors, plan: BandPlan, group_size: int, variant: Variant
) -> torch.Tensor:
    factors = whole.select(range(plan.rank) if plan.order is None else plan.order)
    bits = bits_of_ranks(plan.truncated(factors.rank).bands)
    rows = VectorsAsRows(factors.v, bits, group_size)
    gptq(factors.v, matrix.inputs, rows)
    basis = factors.sigma[:, None] * rows.result.values
    hessian = basis @ matrix.inputs @ basis.T
    target = factors.u
    if variant.corrected:
        ridge = 1e-4 * hessian.diagonal().mean()
        damped = hessian.double() + ridge * torch.eye(len(hessian), device=hessian.device)
        products = (matrix.delta @ matrix.inputs @ basis.T + ridge * target).double()
        target = torch.linalg.solve(damped, products.T).T.float()
    if variant.decomposition == "two-sided":
        columns = VectorsAsRows(target.T.contiguous(), bits, group_size)
        gptq(target.T.contiguous(), metric, columns)
        u = columns.result.values
    else:
        ranks = VectorsAsColumns(len(target), bits, group_size, target.device)
        gptq(target, hessian, ranks)
        u = ranks.result.values
    if variant.unbiased:
        u = u * (_energy(target.T, metric) / ((u @ metric) * target.T).sum(1)).clamp(0.5, 2)[:, None]
    return u.T @ basis


def _decomposed(matrix: Matrix, metric: torch.Tensor, kind: str) -> Factors:
    """All singular triplets; `two-sided`: by falling share of tr(G delta H delta^T), of unit length."""
    if kind == "plain":
        return truncated_svd(matrix.delta, min(matrix.delta.shape))
    left, right = _root(metric), _root(matrix.inputs)
    found = truncated_svd((left.T @ matrix.delta.double() @ right).float(), min(matrix.delta.shape))
    v = torch.linalg.solve_triangular(right, found.v.double(), upper=False, left=False)
    u = torch.linalg.solve_triangular(left.T, found.u.double(), upper=True)
    sigma = found.sigma.double() * v.norm(dim=1) * u.norm(dim=0)
    return Factors((u / u.norm(dim=0)).float(), sigma.float(), (v / v.norm(dim=1)[:, None]).float(), found.energy)


def _table(factors: Factors, matrix: Matrix, metric: torch.Tensor, variant: Variant) -> DistortionTable:
    """What each vector costs when it is left out and at every width, after GPTQ in both metrics."""
    bits = torch.full((factors.rank,), MEASURED_WIDTH)
    importance, relative = factors.sigma.double().square(), torch.zeros(factors.rank, dtype=torch.float64)
    for vectors, moment in ((factors.v, matrix.inputs), (factors.u.T.contiguous(), metric)):
        rows = VectorsAsRows(vectors, bits, GROUP_SIZE)
        gptq(vectors, moment, rows)
        energy = _energy(vectors, moment).double().clamp_min(1e-30)
        importance = importance * energy
        relative = relative + (_energy(rows.result.values - vectors, moment).double() / energy).cpu()
    if variant.decomposition == "plain":  # plain vectors share what they do to the output: half trust, see method.md
        importance = factors.sigma.double() * importance.sqrt()
    importance = importance.cpu()
    order = importance.argsort(descending=True, stable=True)
    scales = [variant.relief * relative * rounding / ROUNDING[MEASURED_WIDTH] for rounding in ROUNDING.values()]
    distortion = importance * torch.stack([torch.ones_like(relative), *scales]) / 2
    return DistortionTable(tuple(matrix.delta.shape), order, distortion[:, order], 1)


def _isotropic(moment: torch.Tensor, share: float) -> torch.Tensor:
    identity = torch.eye(len(moment), device=moment.device) * moment.diagonal().mean()
    return (1 - share) * moment + share * identity


def _root(moment: torch.Tensor) -> torch.Tensor:
    damped = moment.double()
    damped.diagonal().add_(DAMPING * damped.diagonal().mean())
    return torch.linalg.cholesky(damped)


def _energy(rows: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    return ((rows @ moment) * rows).sum(1)


if __name__ == "__main__":
    main()
