# SPDX-License-Identifier: Apache-2.0
"""What a server is told beside vLLM's own options: `--additional-config '{"deltaweave": {...}}'`. No vLLM here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from deltaweave.formats import DeltaweaveError
from deltaweave.runtime_plugin.fit import is_vocabulary
from deltaweave.runtime_plugin.library import ParameterKind
from deltaweave.runtime_plugin.vllm.table import RankTable
from pydantic import BaseModel, ConfigDict, Field, ValidationError

__all__ = ["KEY", "OptionError", "Options", "arena_bytes"]

KEY = "deltaweave"
# A projection's delta at 1/16, its grids, singular values and the kernels' padding: the share of the 16-bit weight that
# one takes is 1/14.3 in published bands (formats/SPEC.md).
PROJECTION_SHARE, VOCABULARY_BYTES, VECTOR_BYTES = 2 / 13, 1.1, 4


class OptionError(DeltaweaveError, ValueError):
    """An option that is unknown or has a value that it cannot have, or a setting of vLLM's that is not supported."""


class Options(BaseModel):
    """The options, all of them optional.

    Attributes:
        arena_gib: device memory for tenants on each GPU, in GiB; None for what `max_loras` tenants at 1/16 take.
        fusions: whether tenants may be fusions; their kernels cost every step that has a tenant some time.
        delta_experts: how many experts of a fusion, the first ones, may be deltas.
        max_rank: largest rank of a tenant's record, and of a fusion's LoRAs of a layer together; None for what the
            model's shapes allow.
        accept_base: do not compare the base's weights with those that a file was made from.
        switch_contexts: shorten the gaps between a step's kernels by a second CUDA context, 0.5 GiB of each GPU.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    arena_gib: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    fusions: bool = True
    delta_experts: int = Field(default=0, ge=0, le=8)
    max_rank: int | None = Field(default=None, ge=1, le=4096)
    accept_base: bool = False
    switch_contexts: bool = True

    @classmethod
    def read(cls, additional: Any) -> Options:
        """From vLLM's additional configuration.

        Raises:
            OptionError: an option that is none, or a value that it cannot have.
        """
        own = additional.get(KEY, {}) if isinstance(additional, Mapping) else {}
        try:
            return cls.model_validate(own)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, (KEY, *first["loc"])))
            raise OptionError(
                f"--additional-config: {where}: {first['msg'].lower()}, got {first['input']!r}"
            ) from error


def arena_bytes(options: Options, table: RankTable, tenants: int) -> int:
    """Bytes of an arena for so many tenants at once, a multiple of 256."""
    if options.arena_gib is not None:
        return round(options.arena_gib * (1 << 22)) * 256
    size = 0.0
    for name, shape in zip(table.names, table.shapes(), strict=True):
        values = shape.in_features * shape.out_features
        if shape.kind == ParameterKind.LINEAR and not is_vocabulary(name):
            whole = table[name].shape
            # A rank has all of one factor and its part of the other.
            size += PROJECTION_SHARE * math.prod(whole) * (shape.in_features + shape.out_features) / sum(whole)
        else:
            size += (VOCABULARY_BYTES if is_vocabulary(name) else VECTOR_BYTES) * values
        size += 4096  # headers and padding of a record
    return -(-int(size) * tenants // 256) * 256
