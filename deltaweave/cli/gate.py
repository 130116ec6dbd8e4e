# SPDX-License-Identifier: Apache-2.0
"""`deltaweave gate train`, `deltaweave gate baseline` and `deltaweave gate show`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from deltaweave.cli.console import output as console
from deltaweave.cli.console import print_json, progress_bar
from deltaweave.gates.baselines import HubRecipe
from deltaweave.gates.build import BASELINES, DataOptions, Parts, build_baseline, build_gates
from deltaweave.gates.look import look
from deltaweave.gates.training import GateRecipe
from deltaweave.report.gates import save_gate_map, save_loss_curve

__all__ = ["gate_app"]

gate_app = typer.Typer(
    help="Train gates that weigh LoRAs and deltas for every layer and token, and look into them.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


class Dtype(StrEnum):
    """Of base and experts in memory."""

    fp32 = "fp32"
    bf16 = "bf16"


BaseOption = Annotated[Path, typer.Option("--base", help="Hugging Face folder of the base.")]
ExpertOption = Annotated[
    list[Path],
    typer.Option("--lora", help="Expert: PEFT folder, fusion file of one LoRA, or delta file; once for each."),
]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Fusion file to write, NAME.safetensors.")]
TaskOption = Annotated[
    str | None, typer.Option("--task", help="Name of the expert that is on at the start. [default: the last]")
]
ReferenceOption = Annotated[
    bool, typer.Option("--reference", help="Name LoRA files beside the output instead of copying them.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
ChatOption = Annotated[bool, typer.Option("--chat", help="Wrap prompts in the chat template, as `messages` are.")]
LengthOption = Annotated[int, typer.Option("--max-length", min=2, help="Longer examples are left out.")]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Of base and experts in memory; gates are fp32.")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="cpu or cuda. [default: the GPU if there is one]")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@gate_app.command("train")
def train_command(
    base: BaseOption,
    lora: ExpertOption,
    data: Annotated[Path, typer.Option(help="JSONL of `messages`, or of `prompt` and `completion`.")],
    output: OutputOption,
    task: TaskOption = None,
    dev: Annotated[Path | None, typer.Option(help="JSONL; the epoch with the lowest loss on it is kept.")] = None,
    dev_share: Annotated[float, typer.Option(min=0, max=0.9, help="Set so much of the data apart for that.")] = 0.0,
    chat: ChatOption = False,
    max_length: LengthOption = 2048,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data.")] = 5,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples a step.")] = 4,
    learning_rate: Annotated[
        float | None, typer.Option(help="Highest learning rate. [default: 1e-3, from 16 examples a step on 1e-4]")
    ] = None,
    warmup: Annotated[float, typer.Option(min=0, max=1, help="Share of the steps in which the rate rises.")] = 0.2,
    weight_decay: Annotated[float, typer.Option(min=0, help="AdamW's.")] = 0.1,
    clip: Annotated[float, typer.Option(help="Largest norm of a gradient.")] = 1.0,
    temperature: Annotated[float, typer.Option(help="Of the gates' softmax.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the examples' order.")] = 0,
    dtype: DtypeOption = Dtype.fp32,
    device: DeviceOption = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory for more time.")
    ] = False,
    reference: ReferenceOption = False,
    plot: Annotated[Path | None, typer.Option(help="Loss curve, PNG. [default: beside the output]")] = None,
    force: ForceOption = False,
    restart: Annotated[bool, typer.Option("--restart", help="Discard unfinished work.")] = False,
    json_output: JsonOption = False,
) -> None:
    """Train a gate over LoRAs and deltas of one base; LoRA-Flow's published recipe by default.

    An interrupted training goes on where it was when the same command is given again.

    Example: deltaweave gate train --base Llama-2-7b-hf --lora german --lora math --data train.jsonl -o f.safetensors
    """
    recipe = GateRecipe(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        warmup=warmup,
        weight_decay=weight_decay,
        clip=clip,
        temperature=temperature,
        seed=seed,
    )
    with progress_bar() as progress:
        parts = Parts.open(base, lora, output, reference=reference, force=force, progress=progress)
        trained = build_gates(
            parts,
            DataOptions(data, dev, dev_share, chat, max_length),
            recipe,
            task=task,
            dtype=dtype.value,
            device=device,
            checkpointing=gradient_checkpointing,
            force=force,
            restart=restart,
            progress=progress,
        )
    picture = plot or output.with_name(output.name.removesuffix(".safetensors") + ".loss.png")
    save_loss_curve(trained.losses, trained.dev_losses, trained.best_epoch, picture)
    summary: dict[str, Any] = {
        "path": str(output),
        "experts": [expert.lora.name for expert in parts.experts],
        **trained.describe(),
        "resumed_at": trained.resumed_at,
        "seconds": round(trained.seconds, 1),
        "plot": str(picture),
    }
    if json_output:
        print_json(summary | {"losses": trained.losses, "learning_rates": trained.rates})
        return
    console.print(f"{output}: gates over {', '.join(summary['experts'])}", markup=False)
    console.print(
        f"{summary['steps']} steps, loss {trained.losses[0]:.4f} -> {trained.losses[-1]:.4f}, "
        f"gates of epoch {trained.best_epoch}, {trained.seconds:.0f} s; loss curve in {picture}",
        markup=False,
    )


@gate_app.command("baseline")
def baseline_command(
    kind: Annotated[str, typer.Argument(help="average, lorahub or single.")],
    base: BaseOption,
    lora: ExpertOption,
    output: OutputOption,
    task: Annotated[str | None, typer.Option(help="The expert of `single`, by name. [default: the last]")] = None,
    data: Annotated[Path | None, typer.Option(help="Examples of `lorahub`, JSONL.")] = None,
    chat: ChatOption = False,
    max_length: LengthOption = 2048,
    evaluations: Annotated[int, typer.Option(min=1, help="Of the loss, by `lorahub`, at most.")] = 40,
    l1: Annotated[float, typer.Option(min=0, help="Penalty of `lorahub` on the mean absolute weight.")] = 0.05,
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
    dtype: DtypeOption = Dtype.fp32,
    device: DeviceOption = None,
    reference: ReferenceOption = False,
    force: ForceOption = False,
    json_output: JsonOption = False,
) -> None:
    """Write a fusion with the same weights for every layer and token, to compare a gate with.

    Example: deltaweave gate baseline average --base Llama-2-7b-hf --lora german --lora math -o average.safetensors
    """
    if kind not in BASELINES:
        raise typer.BadParameter(f"{kind!r}: expected one of {', '.join(BASELINES)}")
    with progress_bar() as progress:
        parts = Parts.open(base, lora, output, reference=reference, force=force, progress=progress)
        weights = build_baseline(
            parts,
            kind,
            task=task,
            data=None if data is None else DataOptions(data, chat=chat, max_length=max_length),
            recipe=HubRecipe(evaluations=evaluations, l1=l1, seed=seed),
            dtype=dtype.value,
            device=device,
            force=force,
            progress=progress,
        )
    found = {expert.lora.name: weight for expert, weight in zip(parts.experts, weights, strict=True)}
    if json_output:
        print_json({"path": str(output), "weights": found})
        return
    shown = ", ".join(f"{name} {weight:.3f}" for name, weight in found.items())
    console.print(f"{output}: {kind}, weights {shown}", markup=False)


@gate_app.command("show")
def show_command(
    fusion: Annotated[Path, typer.Argument(help="Fusion file.")],
    base: BaseOption,
    prompt: Annotated[str, typer.Option(help="Text that the gates read.")],
    new_tokens: Annotated[int, typer.Option(min=0, help="Go on writing so many tokens, and read them too.")] = 0,
    chat: ChatOption = False,
    picture: Annotated[
        Path | None, typer.Option("--output", "-o", help="Heat map, .png or .html. [default: FUSION.gates.png]")
    ] = None,
    device: DeviceOption = None,
    accept_base: Annotated[bool, typer.Option("--accept-base", help="Take a base with other bytes (a cast).")] = False,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print the weights as JSON; no picture by default.")
    ] = False,
) -> None:
    """Show the weights that a fusion's gates give to a text, by layer and token.

    Example: deltaweave gate show fusion.safetensors --base Llama-2-7b-hf --prompt "Was ist 17 mal 23?" --new-tokens 40
    """
    found = look(fusion, base, prompt, new_tokens=new_tokens, chat=chat, device=device, accept_base=accept_base)
    if picture is None and not json_output:
        picture = fusion.with_name(fusion.name.removesuffix(".safetensors") + ".gates.png")
    if picture is not None:
        save_gate_map(found, picture)
    if json_output:
        print_json(found.to_json())
        return
    console.print(f"{picture}: {len(found.tokens)} tokens, {found.weights.shape[1]} layers", markup=False)
    for name, weights in zip(found.experts, found.weights, strict=True):
        console.print(
            f"{name}: mean {weights.mean():.3f}, from {weights.min():.3f} to {weights.max():.3f}", markup=False
        )
