# SPDX-License-Identifier: Apache-2.0
"""Tables in Markdown and plots of a finished run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .tables import OURS, Results, Step

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["LABELS", "draw", "markdown"]

LABELS = {
    "deltaweave": "deltaweave",
    "base": "base model (cuBLAS)",
    "merged-loop": "a merged model a tenant, loop",
    "merged-bmm": "a merged model a tenant, bmm",
    "torch-loop": "PyTorch loop, bf16 factors",
    "torch-bmm": "PyTorch bmm, bf16 factors",
    "dequantize": "dequantize, then cuBLAS",
    "bitdelta": "BitDelta, 1-bit bmm",
    "vllm-lora": "vLLM LoRA kernels, defaults",
    "vllm-lora-tuned": "vLLM LoRA kernels, tuned",
    "humming": "humming-kernels, grouped",
    "gemlite": "gemlite, loop",
}


def markdown(content: dict[str, Any]) -> str:
    """All tables."""
    results = Results(content)
    head = (
        f"{content['date']}, {content['device']}, driver {content['driver']}, {_versions(content)}. "
        f"Copy rate of this run {results.rate / 1e12:.2f} TB/s, read plus written. `{content['command']}`"
    )
    parts = [head, _goals(results), *(_model_table(results, model) for model in results.models())]
    parts += [_band_table(results), _sweep_table(results), _error_table(results), _missing(results)]
    return "\n\n".join(part for part in parts if part)


def _versions(content: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in content["versions"].items())


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _goals(results: Results) -> str:
    verdict = {True: "reached", False: "missed", None: ""}
    rows = [(goal.name, goal.wanted, goal.got, verdict[goal.reached]) for goal in results.goals()]
    return "Goals:\n\n" + _table(("goal", "wanted", "measured", ""), rows)


def _model_table(results: Results, model: str) -> str:
    steps = results.steps("models")
    rows = []
    for name in _ordered(results, "models"):
        times = [results.model_ms(model, name, step) for step in steps]
        if any(time is not None for time in times):
            ours = [results.model_ms(model, OURS, step) for step in steps]
            rows.append([LABELS[name], *(_against(time, own) for time, own in zip(times, ours, strict=True))])
    if not rows:
        return ""
    shares = [results.model_share(model, OURS, step) for step in steps]
    rows.append(["deltaweave, share of the copy rate", *(f"{share:.0%}" if share else "-" for share in shares)])
    head = ["ms (times deltaweave's)", *(_step_name(step) for step in steps)]
    return f"{model}, all linears of a step:\n\n" + _table(head, rows)


def _ordered(results: Results, table: str) -> list[str]:
    """Its contenders, in the order of the labels."""
    return [name for name in LABELS if name in results.contenders(table)]


def _step_name(step: Step) -> str:
    tokens, tenants = step
    return f"{tenants} tenant{'s' * (tenants > 1)}" if tokens == tenants else f"prefill {tokens}"


def _against(time: float | None, ours: float | None) -> str:
    if time is None:
        return "-"
    return f"{_digits(time)}" + (f" ({_digits(time / ours)})" if ours and time != ours else "")


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _band_table(results: Results) -> str:
    names, steps = _ordered(results, "bands"), results.steps("bands")
    models = list(dict.fromkeys(row["model"] for row in results.rows if row["table"] == "bands"))
    rows = []
    for model in models:
        for name in names:
            cells = [results.cell("bands", model, "4096x4096", name, step) for step in steps]
            if any(cells):
                ours = [results.cell("bands", model, "4096x4096", OURS, step) for step in steps]
                pairs = zip(cells, ours, strict=True)
                times = [_against(a["us"] if a else None, b["us"] if b else None) for a, b in pairs]
                shares = "/".join(f"{cell['share']:.0%}" if cell else "-" for cell in cells)
                rows.append([model, LABELS[name], *times, shares])
    if not rows:
        return ""
    head = ["band", "us (times deltaweave's)", *(_step_name(step) for step in steps), "share of the copy rate"]
    return "One band of rank 1024 of a projection 4096 x 4096:\n\n" + _table(head, rows)


def _sweep_table(results: Results) -> str:
    names = _ordered(results, "sweep")
    points = list(dict.fromkeys((row["model"], row["tokens"]) for row in results.rows if row["table"] == "sweep"))
    rows = []
    for hidden, tenants in points:
        cells = [results.cell("sweep", hidden, f"{hidden}x{hidden}", name, (tenants, tenants)) for name in names]
        rows.append([hidden, str(tenants), *(_digits(cell["us"]) if cell else "-" for cell in cells)])
    if not rows:
        return ""
    head = ["hidden", "tenants", *(LABELS[name] + ", us" for name in names)]
    return "Square projections, preset 8+3+2:\n\n" + _table(head, rows)


def _error_table(results: Results) -> str:
    names = list(dict.fromkeys(row["contender"] for row in results.rows if "us" in row))
    rows = [(LABELS[name], f"{results.worst_error(name):.1e}") for name in names]
    return "Largest relative error against float64 with the same weights:\n\n" + _table(("contender", "error"), rows)


def _missing(results: Results) -> str:
    lines = []
    for reason, rows in results.missing().items():
        names = list(dict.fromkeys(LABELS[row["contender"]] for row in rows))
        first, last = (f"{row['model']} {row['group']} {row['tokens']}/{row['tenants']}" for row in (rows[0], rows[-1]))
        span = first if first == last else f"{first} to {last}"
        lines.append(f"- {reason}: {len(rows)} measurements, {span} ({', '.join(names)})")
    return "Not measured:\n\n" + "\n".join(lines) if lines else ""


def draw(content: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Plots of what was measured, beside the JSON; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = Results(content)
    models, swept = len(results.models()), any(row["table"] == "sweep" for row in results.rows)
    plots: dict[str, tuple[int, Callable[[Results, Any], None]]] = {
        "tenants": (models, _draw_tenants),
        "share": (models, _draw_share),
        "sweep": (2 * swept, _draw_sweep),
    }
    written = []
    for name, (columns, paint) in plots.items():
        if not columns:
            continue
        figure, axes = plt.subplots(1, columns, figsize=(7.5 * columns, 4.5), layout="constrained", squeeze=False)
        paint(results, axes[0])
        figure.suptitle(f"{content['device']}, {content['date']}", fontsize=9)
        path = folder / f"{stem}_{name}.png"
        figure.savefig(path, dpi=110)
        plt.close(figure)
        written.append(path)
    return written


def _draw_tenants(results: Results, axes: Sequence[Axes]) -> None:
    """Time of a decode step's linears against tenants, a model beside the other."""
    for model, each in zip(results.models(), axes, strict=True):
        for name in _ordered(results, "models"):
            _line(each, name, [(n, results.model_ms(model, name, (n, n))) for n in _tenants(results)])
        _finish(each, f"{model}, one token a tenant", "tenants", "ms a step, linears")


def _draw_share(results: Results, axes: Sequence[Axes]) -> None:
    """Bandwidth of each contender's own bytes, a model beside the other."""
    for model, each in zip(results.models(), axes, strict=True):
        for name in _ordered(results, "models"):
            _line(each, name, [(n, results.model_share(model, name, (n, n))) for n in _tenants(results)])
        each.axhline(0.8, color="gray", linewidth=0.8, linestyle=":")
        _finish(each, f"{model}: own weight bytes over time", "tenants", "share of the copy rate", linear=True)


def _draw_sweep(results: Results, axes: Sequence[Axes]) -> None:
    """Time against PyTorch, over the batch and over the hidden size."""
    rows = [row for row in results.rows if row["table"] == "sweep" and "us" in row]
    for name in _ordered(results, "sweep"):
        own = [row for row in rows if row["contender"] == name]
        _line(axes[0], name, sorted((row["tokens"], row["us"]) for row in own if row["in_features"] == 4096))
        _line(axes[1], name, sorted((row["in_features"], row["us"]) for row in own if row["tokens"] == 8))
    _finish(axes[0], "4096 x 4096", "batch, one tenant a token", "us")
    _finish(axes[1], "8 tokens of 8 tenants", "hidden size", "us")


def _tenants(results: Results) -> list[int]:
    return [tenants for tokens, tenants in results.steps("models") if tokens == tenants]


def _line(axes: Axes, name: str, points: Sequence[tuple[int, float | None]]) -> None:
    known = [(x, y) for x, y in points if y is not None]
    if known:
        color = f"C{list(LABELS).index(name) - 1}"  # the same in every plot
        style = (
            {"color": "black", "linewidth": 2.2, "zorder": 3} if name == OURS else {"color": color, "linewidth": 1.2}
        )
        axes.plot(*zip(*known, strict=True), marker="o", markersize=4, label=LABELS[name], **style)


def _finish(axes: Axes, title: str, x: str, y: str, *, linear: bool = False) -> None:
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if linear:
        axes.set_ylim(0, 1.15)
    else:
        axes.set_yscale("log")
    axes.grid(True, which="both", linewidth=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1.0))
