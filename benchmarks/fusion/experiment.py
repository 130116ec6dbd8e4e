# SPDX-License-Identifier: Apache-2.0
"""LoRA-Flow against its rivals on a task that needs two skills at once: mathematics, and German.

    python benchmarks/fusion/experiment.py --base DIR --folder WORK --output benchmarks/results/fusion.json

Experts are trained once; every cell (method, seed) draws its own 200 joint examples and its own test items, whose
templates are in none of the examples. Finished cells are files in WORK: the same command goes on from there, and
processes can share the work: `--experts-only --skills maths`, then `--seeds 1`, and the command above at last.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
from cells import Work
from methods import METHODS, Bench, score
from results_file import circumstances, write_result
from rich.console import Console
from rich.table import Table
from skills import SkillRecipe, make_delta, train_lora
from tasks import HELD_OUT, SKILLS, TEMPLATES, items, joint

from deltaweave.models import load_checkpoint, load_tokenizer

CAVEAT = (
    "SmolLM2-135M-Instruct, dequantized from a 4-bit file, on generated word problems: "
    "the papers' results with 7B models are not reproduced by this."
)
SMOKE = SkillRecipe(steps=2, batch_size=4, examples=8, rank=4, alpha=4, ratio=1 / 2, calibration=2)


def main() -> None:
    arguments = _arguments()
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    work = Work(arguments.folder, arguments.seconds)
    recipe = SMOKE if arguments.smoke else SkillRecipe()
    tokenizer = load_tokenizer(arguments.base)
    trained = _experts(work, arguments, recipe, device, tokenizer)
    if arguments.experts_only:
        return
    model = load_checkpoint(arguments.base, torch.bfloat16 if device == "cuda" else torch.float32).to(device)
    epochs, examples = (1, 8) if arguments.smoke else (5, 200)
    bench = Bench(work.folder, arguments.base, model, tokenizer, examples, epochs)
    skills = _skill_cells(work, bench, arguments.items, arguments.new_tokens)
    cells: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.methods or METHODS}
    for seed in arguments.seeds:
        for name, found in cells.items():
            result = work.cell(f"{name} {seed}", lambda n=name, s=seed: _cell(bench, n, s, arguments))
            if result is not None:
                found.append(result)
    result = {
        **circumstances(device),
        "caveat": CAVEAT,
        "settings": {"items": arguments.items, "examples": examples, "epochs": epochs, "recipe": vars(recipe)},
        "held_out_templates": len(HELD_OUT),
        "templates": len(TEMPLATES),
        "experts": trained,
        "skills": skills,
        "methods": {name: {"cells": found, **_summary(found)} for name, found in cells.items() if found},
    }
    write_result(arguments.output, result)
    _print(result)
    if arguments.output is not None:
        from plots import save_plots

        save_plots(result, arguments.output.with_suffix(""))


def _experts(
    work: Work, arguments: argparse.Namespace, recipe: SkillRecipe, device: str, tokenizer: Any
) -> dict[str, Any]:
    found = {}
    for skill in arguments.skills:
        for kind, train, folder in (
            ("lora", train_lora, work.folder / f"{skill}-lora"),
            ("delta", make_delta, work.folder),
        ):
            result = work.cell(
                f"expert {skill} {kind}",
                lambda t=train, s=skill, f=folder: _losses(t(arguments.base, s, f, recipe, device, tokenizer)),
            )
            if result is not None:
                found[f"{skill} {kind}"] = result
    return found


def _losses(losses: list[float]) -> dict[str, Any]:
    tail = losses[-20:]
    return {
        "first_loss": losses[0],
        "last_loss": sum(tail) / len(tail),
        "losses": losses[:: max(1, len(losses) // 100)],
    }


def _skill_cells(work: Work, bench: Bench, count: int, new_tokens: int) -> dict[str, Any]:
    """Whether the experts can do what they were trained on: each kind on its own skill, on new items."""
    found = {}
    for skill, make in SKILLS.items():
        for method in ("base", f"LoRA {skill}", f"delta {skill}"):

            def run(make: Any = make, skill: str = skill, method: str = method) -> dict[str, Any]:
                with METHODS[method](bench, 0) as (model, _):
                    tests = list(items(make, count, f"own {skill}"))
                    return score(model, bench.tokenizer, tests, new_tokens)

            result = work.cell(f"skill {skill} {method}", run)
            if result is not None:
                found[f"{skill}: {method}"] = result
    return found


def _cell(bench: Bench, method: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    tests = list(items(lambda source: joint(source, held_out=True), arguments.items, f"test {seed}"))
    with METHODS[method](bench, seed) as (model, notes):
        return {**score(model, bench.tokenizer, tests, arguments.new_tokens), "notes": notes}


def _summary(cells: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        part: {
            "mean": statistics.mean(cell[part] for cell in cells),
            "spread": statistics.stdev([cell[part] for cell in cells]) if len(cells) > 1 else None,
        }
        for part in ("exact", "number", "german")
    }


def _print(result: dict[str, Any]) -> None:
    console = Console(width=140)
    table = Table("skill: expert", "right", title="experts on their own skill, new items")
    for name, cell in result["skills"].items():
        table.add_row(name, f"{100 * cell['exact']:.1f} %")
    console.print(table)
    seeds = max((len(entry["cells"]) for entry in result["methods"].values()), default=0)
    table = Table("method", "all right", "calculation right", "German sentence")
    table.title = (
        f"joint task, held-out templates: mean and spread of {seeds} seeds, {result['settings']['items']} items"
    )
    for name, entry in result["methods"].items():
        shares = [_share(entry[part]) for part in ("exact", "number", "german")]
        table.add_row(name, *shares)
    console.print(table)
    console.print(result["caveat"])


def _share(part: dict[str, float | None]) -> str:
    spread = "" if part["spread"] is None else f" ± {100 * part['spread']:.1f}"
    return f"{100 * (part['mean'] or 0):.1f}{spread} %"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="Hugging Face folder of SmolLM2-135M-Instruct")
    parser.add_argument("--folder", type=Path, required=True, help="finished experts and cells")
    parser.add_argument("--output", type=Path, help="result as JSON; plots go beside it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--skills", nargs="+", choices=list(SKILLS), default=list(SKILLS), help="experts to train")
    parser.add_argument("--experts-only", action="store_true", help="train experts, and stop")
    parser.add_argument("--items", type=int, default=768, help="test items a cell")
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), help="[default: all]")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no cell after this time")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--smoke", action="store_true", help="two steps of everything: does it run at all?")
    return parser.parse_args()


if __name__ == "__main__":
    main()
