# SPDX-License-Identifier: Apache-2.0
"""Recipes: which bits each singular vector gets, and how a ratio becomes ranks for one matrix shape."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from deltaweave.converter.errors import RecipeError
from deltaweave.converter.quantize import GridFit
from deltaweave.formats import CODE_BITS, MAX_BANDS, Band, factored_bytes
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

__all__ = [
    "DEFAULT_RECIPE",
    "PRESETS",
    "BandPlan",
    "BandSpec",
    "Recipe",
    "Sensitivity",
    "parse_bands",
    "parse_bytes",
]

BITS = (*CODE_BITS, 16)
Rank = int | Literal["*", "full"]
Sensitivity = Literal["balanced", "fisher", "output", "weight"]
AUTO = "auto"
BUDGETS = ("ratio", "max_bytes", "max_kl")
# What costs and times are estimated with while `auto` is not yet known.
STAND_IN = "3:*"


@dataclass(frozen=True)
class BandSpec:
    """One band as a user writes it: a bit width and a rank, `*` (what the ratio leaves) or `full`."""

    bits: int
    rank: Rank

    def __str__(self) -> str:
        return f"{self.bits}:{self.rank}"


@dataclass(frozen=True)
class BandPlan:
    """The bands of one matrix.

    Attributes:
        bands: the bands, every rank at least 1.
        shrunk: whether fixed ranks had to give way to the byte budget.
        order: the singular triplets that the bands hold, one a rank; None takes them by falling singular value.
    """

    bands: tuple[Band, ...]
    shrunk: bool = False
    order: tuple[int, ...] | None = None

    @property
    def rank(self) -> int:
        """All ranks together."""
        return sum(band.rank for band in self.bands)

    def truncated(self, rank: int) -> BandPlan:
        """The same plan with at most `rank` ranks, cut from the cheap end."""
        return BandPlan(_cut(self.bands, rank), self.shrunk, self.order and self.order[:rank])

    @property
    def triplets(self) -> int:
        """How many leading singular triplets must be known."""
        return self.rank if self.order is None else max(self.order, default=-1) + 1


class Recipe(BaseModel):
    """How projections are compressed. Also the schema of a recipe's YAML file.

    Attributes:
        name: what the model card calls it.
        bands: by falling singular value; `*` stands for the rank that the ratio leaves, at most once and last. Or
            `auto`: every singular vector gets the width that serves the whole model best.
        widths: what `auto` chooses from, beside leaving a vector out.
        sensitivity: what `auto` holds errors against. `fisher`: the change of the model's predictions that they are
            expected to make (`sensitivity.py`); `output`: the projection's output; `weight`: the weights; `balanced`:
            between `fisher` and `weight`, their geometric mean with two parts of the first.
        overrides: bands for single kinds of projection (`k_proj`: ...); not beside `auto`.
        ratio: budget as a share of 16-bit bytes, scales, zeros and sigma included: of every projection, or with
            `auto` of all together. Bands without a `*` are taken as they are. At most one of this and the next two.
        max_bytes: budget of all projections in bytes, counted as `ratio` counts; a number, or text such as `900MB`.
        max_kl: the smallest file is looked for whose KL to the fine-tune, measured in nats a token on held-out text,
            is at most this.
        grid: what the grids of codes are fitted to.
        whiten: decompose the delta in the metric of its input's second moment.
        correct_target: fit U to what V's quantization left of the delta before it is quantized.
        correct_drift: fit U also to what the compressed layers before it lost: its projection's target is the
            fine-tune's own output on the fine-tune's own input, and where it is added to the residual stream what that
            stream lacks. A part of `correct_target`; without calibration it does nothing.
        unbiased: lengthen sigma by what each vector of U lost along itself when it was quantized.
        group_size: codes that share one scale and zero.
        damping: GPTQ's `percdamp`, relative to the mean of the Hessian's diagonal.
        activation_order: whether GPTQ visits columns by falling activation energy.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = "custom"
    bands: str
    widths: tuple[int, ...] = (2, 3, 4, 8)
    sensitivity: Sensitivity = "balanced"
    overrides: dict[str, str] = Field(default_factory=dict)
    ratio: float = Field(default=1 / 16, gt=0, le=1)
    max_bytes: int | None = Field(default=None, gt=0)
    max_kl: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    group_size: int = Field(default=128, ge=8, le=65536)
    damping: float = Field(default=0.01, gt=0, lt=1)
    activation_order: bool = True
    grid: GridFit = "min-max"
    whiten: bool = False
    correct_target: bool = False
    correct_drift: bool = False
    unbiased: bool = False

    @field_validator("bands")
    @classmethod
    def _check_bands(cls, bands: str) -> str:
        if bands != AUTO:
            parse_bands(bands)
        return bands

    @field_validator("widths")
    @classmethod
    def _check_widths(cls, widths: tuple[int, ...]) -> tuple[int, ...]:
        if not widths or len(set(widths)) < len(widths) or not set(widths) <= set(CODE_BITS):
            raise ValueError(f"widths {list(widths)}, expected different ones of {', '.join(map(str, CODE_BITS))}")
        return widths

    @field_validator("max_bytes", mode="before")
    @classmethod
    def _check_max_bytes(cls, max_bytes: object) -> object:
        return parse_bytes(max_bytes) if isinstance(max_bytes, str) else max_bytes

    @model_validator(mode="after")
    def _check_together(self) -> Recipe:
        if self.allocated and self.overrides:
            raise ValueError("overrides have no place beside bands: auto")
        if self.correct_drift and not self.correct_target:
            raise ValueError("correct_drift is a part of correct_target, which is off")
        given = [name for name in BUDGETS if name in self.model_fields_set and getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are budgets of one thing, expected one of them")
        every = [self.bands, *self.overrides.values()]
        if given and given != ["ratio"] and not any(bands == AUTO or "*" in bands for bands in every):
            raise ValueError(f"{given[0]}: bands {self.bands!r} leave nothing to it, expected `*` or auto in them")
        return self

    @field_validator("overrides")
    @classmethod
    def _check_overrides(cls, overrides: dict[str, str]) -> dict[str, str]:
        for bands in overrides.values():
            parse_bands(bands)
        return overrides

    @classmethod
    def preset(cls, name: str, **options: Any) -> Recipe:
        """A shipped recipe by name; `options` replace its fields.

        Raises:
            RecipeError: an unknown name or a bad option.
        """
        if name not in PRESETS:
            raise RecipeError(f"recipe {name!r}: unknown, expected one of {', '.join(PRESETS)} or a YAML file")
        return cls.checked(_merged({"name": name, **PRESETS[name]}, options), f"recipe {name!r}")

    @classmethod
    def from_yaml(cls, path: str | Path, **options: Any) -> Recipe:
        """A recipe from a YAML file; `options` replace its fields.

        Raises:
            RecipeError: naming the file and the key that is wrong.
        """
        path = Path(path)
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise RecipeError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from error
        if not isinstance(content, dict):
            raise RecipeError(f"{path}: holds {type(content).__name__}, expected keys such as `bands` and `ratio`")
        return cls.checked(_merged({"name": path.stem, **content}, options), str(path))

    @classmethod
    def checked(cls, fields: dict[str, Any], where: str) -> Recipe:
        """Builds a recipe, turning validation errors into one line that starts with `where`."""
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            message = first["msg"].removeprefix("Value error, ")
            raise RecipeError(f"{where}: {key}: {message}" if key else f"{where}: {message}") from error

    @property
    def allocated(self) -> bool:
        """Whether bands are `auto`: known only when the pair has been measured."""
        return self.bands == AUTO

    @property
    def lossless(self) -> bool:
        """Whether projections keep full rank at 16 bits, so that nothing else should be the coarser part."""
        return (
            not self.allocated
            and not self.overrides
            and all(spec == BandSpec(16, "full") for spec in parse_bands(self.bands))
        )

    def at(self, ratio: float) -> Recipe:
        """The same recipe with a budget of `ratio` and no other."""
        fields = self.model_dump(exclude={"max_bytes", "max_kl"})
        return Recipe.checked({**fields, "ratio": ratio}, f"recipe {self.name!r}")

    def settled(self, dense_bytes: int) -> Recipe:
        """The same recipe with `max_bytes` as a ratio of `dense_bytes`, the projections' 16-bit bytes.

        Raises:
            RecipeError: more bytes than that.
        """
        if self.max_bytes is None:
            return self
        if self.max_bytes > dense_bytes:
            raise RecipeError(
                f"max_bytes {self.max_bytes}: the projections take {dense_bytes} bytes in 16 bits, expected fewer"
            )
        return self.at(self.max_bytes / dense_bytes)

    def plan(self, kind: str, shape: tuple[int, int]) -> BandPlan:
        """Solves the bands of one projection; where they are `auto`, bands of like size that stand in for them.

        Args:
            kind: the projection's short name, such as `q_proj`.
            shape: (out_features, in_features).

        Raises:
            RecipeError: when not even rank 1 fits the ratio.
        """
        specs = parse_bands(STAND_IN if self.allocated else self.overrides.get(kind, self.bands))
        limit = min(shape)
        if specs[-1].rank != "*":
            fixed = [_band(spec.bits, limit if spec.rank == "full" else int(spec.rank)) for spec in specs]
            return BandPlan(_cut(tuple(fixed), limit))
        budget = self.ratio * 2 * shape[0] * shape[1]

        def fits(bands: tuple[Band, ...]) -> bool:
            return not bands or factored_bytes(shape, bands, self.group_size).total <= budget

        fixed = [_band(spec.bits, int(spec.rank)) for spec in specs[:-1]]
        plan = (
            _fill(fixed, specs[-1].bits, limit, fits)
            if fits(tuple(fixed)) or not fixed
            else _shrink(fixed, specs[-1].bits, limit, fits)
        )
        if not plan.bands and self.allocated:
            return BandPlan((_band(specs[-1].bits, 1),))
        if not plan.bands:
            need = factored_bytes(shape, (_band(specs[-1].bits, 1),), self.group_size).total
            raise RecipeError(
                f"ratio {self.ratio:g}: {kind} of shape {list(shape)} has a budget of {int(budget)} bytes, "
                f"and rank 1 at {specs[-1].bits} bits takes {need}"
            )
        return plan


DEFAULT_RECIPE = "optimal"
PRESETS: dict[str, dict[str, Any]] = {
    "optimal": {"bands": AUTO, "correct_target": True, "correct_drift": True, "unbiased": True},
    "corrected": {"bands": "8:2,3:32,2:*", "correct_target": True, "correct_drift": True, "unbiased": True},
    "triple": {"bands": "8:2,3:32,2:*"},
    "double": {"bands": "8:2,3:*"},
    "single": {"bands": "3:*"},
    "low-rank": {"bands": "16:*"},
}


def parse_bands(text: str) -> list[BandSpec]:
    """Parses a band list such as `8:2,3:32,2:*`.

    Raises:
        RecipeError: naming the part that is wrong.
    """
    specs = [_parse_band(part.strip(), text) for part in text.split(",")]
    if len(specs) > MAX_BANDS:
        raise RecipeError(f"bands {text!r}: {len(specs)} bands, expected at most {MAX_BANDS}")
    if any(spec.rank in ("*", "full") for spec in specs[:-1]):
        raise RecipeError(f"bands {text!r}: `*` and `full` may stand in the last band only")
    return specs


def parse_bytes(text: str) -> int:
    """A size such as `900MB`, `1.5 GB`, `512MiB` or `900000000`.

    Raises:
        RecipeError: anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMGT]?i?B?)", text.strip())
    unit = match[2].removesuffix("B") if match else ""
    if not match or unit == "i":
        raise RecipeError(f"{text!r} is no size, expected one such as 900MB, 1.5GiB or a number of bytes")
    base, power = (1024 if unit.endswith("i") else 1000), " kMGT".index(unit[:1].replace("K", "k") or " ")
    return int(float(match[1]) * base**power)


def _merged(fields: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """`fields` with `options` in their place; a budget among these replaces whatever budget there was."""
    if any(options.get(name) is not None for name in BUDGETS):
        fields = {key: value for key, value in fields.items() if key not in BUDGETS}
    return {**fields, **options}


def _parse_band(part: str, text: str) -> BandSpec:
    match = re.fullmatch(r"(\d{1,2}):(\d{1,6}|\*|full)", part)
    if not match:
        raise RecipeError(f"bands {text!r}: {part!r} is not BITS:RANK, BITS:* or BITS:full")
    bits, rank = int(match[1]), match[2]
    if bits not in BITS:
        raise RecipeError(f"bands {text!r}: {bits} bits, expected one of {', '.join(map(str, BITS))}")
    if rank in ("*", "full"):
        return BandSpec(bits, "*" if rank == "*" else "full")
    if int(rank) == 0:
        raise RecipeError(f"bands {text!r}: rank 0 in {part!r}")
    return BandSpec(bits, int(rank))


def _band(bits: int, rank: int) -> Band:
    return Band(bits, rank, "none" if bits == 16 else "affine")


def _fill(
    fixed: list[Band],
    last_bits: int,
    limit: int,
    fits: Callable[[tuple[Band, ...]], bool],
    shrunk: bool = False,
) -> BandPlan:
    """Fixed bands, then the largest rank of the last band that still fits."""
    fixed_bands = _cut(tuple(fixed), limit)
    most = limit - sum(band.rank for band in fixed_bands)
    rank = _largest(most, lambda rank: fits((*fixed_bands, _band(last_bits, rank))))
    return BandPlan((*fixed_bands, _band(last_bits, rank)) if rank else fixed_bands, shrunk)


def _shrink(fixed: list[Band], last_bits: int, limit: int, fits: Callable[[tuple[Band, ...]], bool]) -> BandPlan:
    """Fixed ranks scaled down together until they fit, then the last band takes what is left."""
    steps = max(band.rank for band in fixed)

    def scaled(step: int) -> list[Band]:
        ranks = [band.rank * step // steps for band in fixed]
        return [_band(band.bits, rank) for band, rank in zip(fixed, ranks, strict=True) if rank]

    step = _largest(steps, lambda step: fits(tuple(scaled(step))))
    return _fill(scaled(step), last_bits, limit, fits, shrunk=True)


def _largest(upper: int, fits: Callable[[int], bool]) -> int:
    """The largest number in [0, upper] that fits, 0 if none does; fitting must be monotone."""
    low, high = 0, upper
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _cut(bands: tuple[Band, ...], limit: int) -> tuple[Band, ...]:
    kept: list[Band] = []
    for band in bands:
        rank = min(band.rank, limit - sum(earlier.rank for earlier in kept))
        if rank:
            kept.append(Band(band.bits, rank, band.grid, band.levels))
    return tuple(kept)
