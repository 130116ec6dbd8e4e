# SPDX-License-Identifier: Apache-2.0
"""Texts of many tenants in one batch: requests join and leave between steps, and each step serves all rows at once.

A step is either prefill (some rows' prompts, at most 2048 tokens) or decode (one token of every row). Decode steps have
as many rows as the smallest bucket that holds the active ones; on a GPU each bucket's step is one CUDA graph, which
tenants, requests and positions change under without its being captured again. The first fusion in the arena, and the
first that has a delta as an expert at some place, bring work of another kind: their steps are graphs of their own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from deltaweave.formats import DeltaweaveError
from deltaweave.runtime_plugin.library import MAX_TOKENS, ArenaFullError
from deltaweave.runtime_plugin.pytorch.arena import FusionWork
from deltaweave.runtime_plugin.pytorch.cache import RowCache, attention_masks
from deltaweave.runtime_plugin.pytorch.sampling import choose
from deltaweave.runtime_plugin.pytorch.serve import ServingAttachment
from deltaweave.runtime_plugin.requests import ActiveRow, Completion, Request
from torch import nn

__all__ = ["Decoder"]

WARMUP_STEPS = 2


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor


class Decoder:
    """A model with an arena, a static cache, and the graphs of its decode steps."""

    def __init__(
        self,
        model: nn.Module,
        attachment: ServingAttachment,
        *,
        max_batch: int = 32,
        max_length: int = 2048,
        graphs: bool = True,
    ) -> None:
        """Takes the cache's memory.

        Args:
            model: with `attachment` on it, in evaluation mode.
            attachment: what `attach(model, arena)` gave.
            max_batch: rows at a time; further requests wait.
            max_length: tokens of prompt and continuation together.
            graphs: on a GPU, capture each bucket's decode step once and replay it.

        Raises:
            DeltaweaveError: a model whose attention is not PyTorch's.
        """
        config: Any = model.config
        if config._attn_implementation != "sdpa":
            raise DeltaweaveError(f"attention {config._attn_implementation!r}; load the model with 'sdpa'")
        weight = next(model.parameters())
        self.cache = RowCache(config, max_batch, max_length, weight.dtype, weight.device)
        self._model: Any = model
        self._config = config
        self._attachment = attachment
        self._device = weight.device
        self._max_batch = max_batch
        self._inputs = torch.zeros(2, max_batch, dtype=torch.int64, device=weight.device)  # token, position
        self._graphs: dict[tuple[int, FusionWork], _Graph] = {}
        self._captures = graphs and weight.is_cuda
        self._pool: Any = torch.cuda.graph_pool_handle() if self._captures else None

    def close(self) -> None:
        """Gives the graphs up, so that the arena may change its memory again."""
        while self._graphs:
            self._graphs.popitem()
            self._attachment.arena.release_graph()

    def __enter__(self) -> Decoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def graphs(self) -> list[int]:
        """Buckets whose decode step has been captured."""
        return sorted({bucket for bucket, _ in self._graphs})

    @torch.no_grad()
    def run(self, requests: Sequence[Request], write: Callable[[int, int], None] | None = None) -> list[Completion]:
        """Continues all requests; those that find no row or no room for their tenant wait for others to end.

        Args:
            requests: in the order in which they are let in.
            write: is handed each new token as it comes: (index of the request, token).

        Returns:
            In the order of the requests.

        Raises:
            DeltaweaveError: a request without tokens or too long for the cache, or an unknown tenant.
            ArenaFullError: a tenant that does not fit into the arena even alone.
        """
        for index, request in enumerate(requests):
            self._require_fitting(index, request)
        waiting = deque(enumerate(requests))
        active: dict[int, ActiveRow] = {}
        done: dict[int, Completion] = {}

        def advance(rows: Sequence[ActiveRow], logits: torch.Tensor) -> None:
            tokens = choose(logits, [row.chooser for row in rows], [row.text for row in rows])
            for row, token in zip(rows, tokens, strict=True):
                if completion := row.accept(token, write):
                    done[row.index] = completion
                    active.pop(row.row, None)
                else:
                    active[row.row] = row

        while waiting or active:
            for rows, logits in self._prefill(self._admit(waiting, active)):
                advance(rows, logits)
            if active:
                rows = [active[row] for row in sorted(active)]
                advance(rows, self._decode(rows)[[row.row for row in rows]])
        return [done[index] for index in range(len(requests))]

    def _require_fitting(self, index: int, request: Request) -> None:
        length = len(request.tokens) + request.max_new_tokens
        if not request.tokens or request.max_new_tokens < 1:
            raise DeltaweaveError(f"request {index}: expected at least one token and at least one to write")
        if length > self.cache.length:
            raise DeltaweaveError(
                f"request {index}: {len(request.tokens)} tokens and {request.max_new_tokens} to write, the cache holds "
                f"{self.cache.length}"
            )

    def _admit(self, waiting: deque[tuple[int, Request]], active: dict[int, ActiveRow]) -> list[ActiveRow]:
        """Lets requests in, in their order, while there are rows and their tenants fit beside the active ones."""
        free = [row for row in range(self._max_batch) if row not in active]
        tenants = {row.request.tenant for row in active.values()}
        admitted: list[ActiveRow] = []
        for row in free[: len(waiting)]:
            index, request = waiting[0]
            try:
                self._attachment.arena.resident([*tenants, request.tenant])
            except ArenaFullError:
                if not tenants:
                    raise
                break
            waiting.popleft()
            tenants.add(request.tenant)
            admitted.append(ActiveRow(index, request, row))
        return admitted

    def _prefill(self, rows: Sequence[ActiveRow]) -> Iterator[tuple[Sequence[ActiveRow], torch.Tensor]]:
        """Logits behind the prompts, a few rows at a time: short prompts together, long ones in chunks."""
        for group in _groups(rows):
            prompts = [list(row.request.tokens) for row in group]
            longest = max(map(len, prompts))
            for start in range(0, longest, MAX_TOKENS):
                stop = min(start + MAX_TOKENS, longest)
                ids = torch.tensor([(prompt + [0] * longest)[start:stop] for prompt in prompts], device=self._device)
                positions = torch.arange(start, stop, device=self._device).expand(len(group), -1)
                where = torch.tensor([row.row for row in group], device=self._device)
                last = torch.tensor([min(len(prompt), stop) - 1 - start for prompt in prompts], device=self._device)
                with self._attachment.step([row.request.tenant for row in group]):
                    self.cache.aim(where, positions, stop)
                    logits = self._forward(ids, positions, stop, last)
            yield group, logits

    def _decode(self, rows: Sequence[ActiveRow]) -> torch.Tensor:
        """Logits of all rows of the bucket; those that are idle repeat the base's position 0."""
        bucket = self._bucket(rows[-1].row + 1)
        inputs = torch.zeros(2, bucket, dtype=torch.int64, pin_memory=self._device.type == "cuda")
        tenants: list[str | None] = [None] * bucket
        for row in rows:
            inputs[0, row.row], inputs[1, row.row] = row.text[-1], len(row.text) - 1
            tenants[row.row] = row.request.tenant
        self._inputs[:, :bucket].copy_(inputs, non_blocking=True)
        with self._attachment.step(tenants):
            if not self._captures:
                return self._decode_step(bucket)
            key = (bucket, self._attachment.arena.fusion_work)
            if key not in self._graphs:
                self._graphs[key] = self._capture(bucket)
            self._graphs[key].graph.replay()
            return self._graphs[key].logits

    def _decode_step(self, bucket: int) -> torch.Tensor:
        positions = self._inputs[1, :bucket, None]
        self.cache.aim(bucket, positions, self.cache.length)
        return self._forward(self._inputs[0, :bucket, None], positions, self.cache.length, None)

    def _forward(
        self, ids: torch.Tensor, positions: torch.Tensor, seen: int, last: torch.Tensor | None
    ) -> torch.Tensor:
        """Logits [rows, vocabulary] of each row's token `last`, or of its only one."""
        hidden = self._model.model(
            input_ids=ids,
            attention_mask=attention_masks(self._config, positions, seen),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        if last is not None:
            hidden = hidden[torch.arange(len(last), device=last.device), last][:, None]
        logits: torch.Tensor = self._model.lm_head(hidden)
        return logits[:, 0]

    def _capture(self, bucket: int) -> _Graph:
        """Captures a decode step. Warming up computes the very step that follows: it writes what that will write."""
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(WARMUP_STEPS):
                self._decode_step(bucket)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._decode_step(bucket)
        self._attachment.arena.acquire_graph()
        return _Graph(graph, logits)

    def _bucket(self, rows: int) -> int:
        """The smallest power of two that holds so many rows, or all rows."""
        return min(1 << (rows - 1).bit_length(), self._max_batch)


def _groups(rows: Sequence[ActiveRow]) -> Iterator[list[ActiveRow]]:
    """Rows whose prompts, filled up to the longest of them, make at most MAX_TOKENS tokens; a longer one is alone."""
    group: list[ActiveRow] = []
    for row in sorted(rows, key=lambda row: len(row.request.tokens)):
        if group and (len(group) + 1) * len(row.request.tokens) > MAX_TOKENS:
            yield group
            group = []
        group.append(row)
    if group:
        yield group
