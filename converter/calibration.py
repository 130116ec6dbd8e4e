# SPDX-License-Identifier: Apache-2.0
"""The decoder run block by block over activations that live in a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deltaweave.converter.checkpoint import EMBEDDING, Checkpoint
from deltaweave.converter.errors import CheckpointError, OutputError
from deltaweave.converter.families import Half, Projection
from deltaweave.converter.half_products import HalfProducts
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

__all__ = [
    "Activations",
    "BlockStream",
    "add_gram",
    "compute_dtype",
]

# Tokens per forward: bounds what one block's intermediate activations may take.
CHUNK_TOKENS = {"cpu": 2048, "cuda": 8192}
# Activations stay on a GPU if twice as many take less than this share of what is free there.
RESIDENT_SHARE = 0.3


class Activations:
    """Hidden states [samples, sequence_length, hidden_size]: on a GPU with room for them, else in a mapped file.

    A mapped file costs page cache, not memory.
    """

    def __init__(
        self,
        path: Path,
        device: torch.device,
        tensor: torch.Tensor,
        chunk_tokens: int | None = None,
        *,
        resident: bool,
    ) -> None:
        """Of `create` and `load`; `resident` if `tensor` is no mapped file."""
        self.path, self.device, self.resident = path, device, resident
        self.chunk_tokens = chunk_tokens or CHUNK_TOKENS[device.type]
        self.shape: tuple[int, int, int] = (tensor.shape[0], tensor.shape[1], tensor.shape[2])
        self._tensor = tensor

    @classmethod
    def create(
        cls,
        path: Path,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        chunk_tokens: int | None = None,
    ) -> Activations:
        """Room for activations.

        Args:
            path: where `save` will put them.
            shape: [samples, sequence_length, hidden_size].
            dtype: as computed.
            device: where `chunks` gives them.
            chunk_tokens: about how many tokens a chunk has; None takes what a forward has room for.

        Raises:
            OutputError: no room on the disk for a mapped file.
        """
        if _fits(shape, dtype, device):
            return cls(path, device, torch.empty(shape, dtype=dtype, device=device), chunk_tokens, resident=True)
        return cls(path, device, _claimed(_working(path), shape, dtype), chunk_tokens, resident=False)

    @classmethod
    def load(cls, path: Path, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Activations:
        """What `save` put there, to be read only."""
        saved, resident = _mapped(path, shape, dtype), _fits(shape, dtype, device)
        return cls(path, device, saved.to(device, copy=True) if resident else saved, resident=resident)

    def successor(self, path: Path) -> Activations:
        """What becomes of them, chunk by chunk: on a GPU in their place, else in a file of its own."""
        tensor = self._tensor if self.resident else _claimed(_working(path), self.shape, self._tensor.dtype)
        return Activations(path, self.device, tensor, self.chunk_tokens, resident=self.resident)

    @property
    def pieces(self) -> int:
        """How many pieces `chunks` makes."""
        return -(-self.shape[0] // self._step)

    def chunks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Pieces of whole sequences, on the device."""
        samples, step = self.shape[0], self._step
        for start in range(0, samples, step):
            rows = slice(start, min(start + step, samples))
            yield rows, self._tensor[rows].to(self.device)

    def write(self, rows: slice, values: torch.Tensor) -> None:
        """Stores hidden states of some sequences."""
        self._tensor[rows] = values.to(self._tensor.device, self._tensor.dtype)

    def save(self) -> None:
        """Makes them durable under `path`, whole or not at all. May run in another thread while they are read.

        Raises:
            OutputError: what the system said.
        """
        working = _working(self.path)
        try:
            if self.resident:
                if self.device.type == "cuda":
                    torch.cuda.current_stream(self.device).wait_stream(torch.cuda.default_stream(self.device))
                with working.open("wb") as file:
                    for sequence in self._tensor:
                        file.write(sequence.cpu().view(torch.uint8).numpy().data)
            with working.open("rb") as file:
                os.fsync(file.fileno())
            working.replace(self.path)
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written ({error.strerror})") from error

    @property
    def _step(self) -> int:
        return max(1, self.chunk_tokens // self.shape[1])


class _Recorder(nn.Module):
    """Stands in for a block and keeps the arguments that the model gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {}

    def forward(self, hidden: torch.Tensor, **arguments: Any) -> torch.Tensor:
        self.arguments = arguments
        return hidden


class _InputSeen(Exception):  # noqa: N818 - a signal that leaves a forward early, not an error
    pass


class BlockStream:
    """The tuned model's decoder blocks, one in memory at a time.

    The model is built on the meta device; a block's weights are mapped from the checkpoint when it is loaded. What
    Transformers hands its blocks (masks, rotary embeddings) is recorded from the model's own forward, so every
    family behaves here as it does there.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        sequence_length: int,
        device: torch.device,
        dtype: torch.dtype | None = None,
        *,
        half_products: bool = False,
    ) -> None:
        """Prepares to run blocks of `checkpoint` on sequences of `sequence_length` tokens.

        Args:
            checkpoint: the model.
            sequence_length: tokens of every sequence.
            device: where blocks run.
            dtype: of the arithmetic; None takes `compute_dtype`'s.
            half_products: multiply as `half_products.py` does, with all else in `dtype`, which is float32.
        """
        self.checkpoint, self.device, self.half_products = checkpoint, device, half_products
        config = AutoConfig.from_pretrained(checkpoint.folder)
        self.dtype = dtype or compute_dtype(checkpoint.dtype(checkpoint.resolve(EMBEDDING) or EMBEDDING), device)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=self.dtype, attn_implementation="sdpa")
        self._decoder = model.get_decoder().eval()
        self._blocks: nn.ModuleList = self._decoder.layers
        self._arguments = self._record(config, sequence_length)

    def embed(self, tokens: torch.Tensor, into: Activations, embedding: torch.Tensor | None = None) -> None:
        """Writes the input of block 0 for `tokens` [samples, sequence_length].

        Args:
            tokens: their indices.
            into: the activations.
            embedding: in place of the checkpoint's, [tokens, hidden_size].
        """
        embedding = (self.checkpoint.tensor(EMBEDDING) if embedding is None else embedding).to(self.device)
        for row, sequence in enumerate(tokens.to(self.device)):
            into.write(slice(row, row + 1), embedding[sequence][None])

    def load(self, layer: int, *, without: Collection[str] = ()) -> nn.Module:
        """A block with the tuned weights.

        Args:
            layer: its index.
            without: full names of weights that are left out, to be set before a forward needs them.
        """
        block: nn.Module = self._blocks[layer]
        prefix = f"model.layers.{layer}."
        state = {}
        for name in block.state_dict():
            if prefix + name not in without:
                state[name] = self._rounded(self._weight(prefix + name))
        block.load_state_dict(state, strict=False, assign=True)
        return block

    def set_weight(self, projection: Projection, weight: torch.Tensor) -> None:
        """Replaces a projection's weight in a loaded block, [out_features, in_features] float32."""
        module = self._blocks[projection.layer].get_submodule(projection.module)
        module.weight = nn.Parameter(self._rounded(weight), requires_grad=False)

    def unload(self, layer: int) -> None:
        """Frees a block's weights."""
        self._blocks[layer].to("meta")

    @torch.no_grad()
    def forward(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Runs a loaded block on [samples, sequence_length, hidden_size]."""
        return self.differentiable(layer, hidden)

    def differentiable(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """`forward`, with gradients where they are enabled."""
        with self._products():
            output = self._blocks[layer](hidden, **self._arguments[layer])
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return result

    @torch.no_grad()
    def through_half(self, layer: int, half: Half, hidden: torch.Tensor) -> torch.Tensor:
        """`forward` through one half of the block only; `hidden` is what reaches that half."""
        block = self._blocks[layer]
        inner: nn.Module = block.get_submodule(half.inner)
        arguments = self._arguments[layer] if half.inner == "self_attn" else {}
        with self._products():
            added = inner(block.get_submodule(half.norm)(hidden), **arguments)
            output: torch.Tensor = hidden + (added[0] if isinstance(added, tuple) else added)
            return output

    def final_norm(self) -> nn.Module:
        """The norm behind the last block, with its weights."""
        norm: nn.Module = self._decoder.norm
        state = {name: self._weight(f"model.norm.{name}") for name in norm.state_dict()}
        norm.load_state_dict(state, assign=True)
        return norm

    def second_moment(
        self, projection: Projection, inputs: Activations, report: Callable[[int], None] | None = None
    ) -> torch.Tensor:
        """2/n X X^T of one projection's inputs over all n sequences, [in_features, in_features] float32.

        The forward stops at the projection, whose predecessors in the block already hold compressed weights.

        Args:
            projection: of a loaded block.
            inputs: what reaches its half of the block.
            report: told after each piece of `inputs` how many are done.
        """
        columns = projection.shape[1]
        total = torch.zeros(columns, columns, dtype=torch.float32, device=self.device)
        for done, (_, hidden) in enumerate(inputs.chunks()):
            x = self.input_of(projection, hidden)
            add_gram(total, x.flatten(0, -2), 2 / inputs.shape[0])
            if report:
                report(done + 1)
        return total

    def input_of(self, projection: Projection, hidden: torch.Tensor) -> torch.Tensor:
        """What a projection of a loaded block is given; the forward stops there.

        Args:
            projection: of a loaded block.
            hidden: what reaches its half of the block.
        """
        return self._watched(projection, hidden, stop=True)[0]

    def input_and_output(self, projection: Projection, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What a projection is given, and what its half of the block makes of `hidden`."""
        x, output = self._watched(projection, hidden, stop=False)
        assert output is not None
        return x, output

    def _watched(
        self, projection: Projection, hidden: torch.Tensor, *, stop: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        seen: list[torch.Tensor] = []

        def look(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            seen.append(arguments[0])
            if stop:
                raise _InputSeen

        layer, output = projection.layer, None
        handle = self._blocks[layer].get_submodule(projection.module).register_forward_pre_hook(look)
        try:
            with suppress(_InputSeen):
                output = self.through_half(layer, projection.half, hidden)
        finally:
            handle.remove()
        return seen[0], output

    def _rounded(self, weight: torch.Tensor) -> torch.Tensor:
        """A block's weight as it is multiplied."""
        return weight.half() if self.half_products and weight.dim() == 2 else weight.to(self.dtype)

    def _products(self) -> AbstractContextManager[object]:
        return HalfProducts() if self.half_products else nullcontext()

    def _weight(self, name: str) -> torch.Tensor:
        if name not in self.checkpoint:
            raise CheckpointError(f"{self.checkpoint.folder}: has no tensor {name}")
        return self.checkpoint.tensor(name).to(self.device).to(self.dtype)  # 16-bit values cross the bus

    def _record(self, config: Any, sequence_length: int) -> list[dict[str, Any]]:
        """The keyword arguments that each block receives for an unpadded sequence."""
        blocks, norm = self._decoder.layers, self._decoder.norm
        recorders = [_Recorder() for _ in blocks]
        self._decoder.layers, self._decoder.norm = nn.ModuleList(recorders), nn.Identity()
        self._decoder.rotary_emb = type(self._decoder.rotary_emb)(config=config).to(self.device)
        embeddings = torch.zeros(1, sequence_length, config.hidden_size, dtype=self.dtype, device=self.device)
        with torch.no_grad():
            self._decoder(inputs_embeds=embeddings, use_cache=False)
        self._decoder.layers, self._decoder.norm = blocks, norm
        return [recorder.arguments for recorder in recorders]


def _working(path: Path) -> Path:
    return path.with_suffix(".tmp")


def _fits(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> bool:
    size = 2 * int(np.prod(shape)) * dtype.itemsize  # these, and the fine-tune's own or what is computed from them
    return device.type == "cuda" and size < RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]


def _claimed(file: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> torch.Tensor:
    """A mapped file with room on the disk: a full disk is an error now, not a crash at some later write to the map."""
    size = int(np.prod(shape)) * dtype.itemsize
    try:
        with file.open("ab") as handle:
            handle.truncate(size)
            os.posix_fallocate(handle.fileno(), 0, size)
    except OSError as error:
        raise OutputError(f"{file}: {size} bytes cannot be claimed ({error.strerror})") from error
    return _mapped(file, shape, dtype)


def _mapped(file: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(np.memmap(file, dtype=np.uint8, mode="r+")).view(dtype).view(shape)


def add_gram(total: torch.Tensor, x: torch.Tensor, weight: float) -> None:
    """Adds `weight * x^T x` to `total`.

    16-bit values go to a GPU's tensor cores as they are, ten times as fast as in float32: the product of two of them is
    exact there, and float32 sums cut off at their last bit are about 2e-5 short over 4096 tokens.

    Args:
        total: [features, features] float32.
        x: [tokens, features].
        weight: a factor.
    """
    if x.is_cuda and x.dtype.itemsize == 2:
        total.add_(torch.mm(x.T, x, out_dtype=torch.float32), alpha=weight)
    else:
        wide = x.float()
        total.addmm_(wide.T, wide, alpha=weight)


def compute_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The checkpoint's dtype where the device multiplies it at full speed, else float32."""
    if device.type == "cuda" or (stored == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return stored
    return torch.float32
