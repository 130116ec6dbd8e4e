# SPDX-License-Identifier: Apache-2.0
"""The runner: an engine folder, its tenants, and texts of many of them in one batch. Needs no torch.

A step is either prefill (a chunk of one row's prompt, filled up to a power of two) or decode (one token of every row,
in the smallest bucket that holds them). Each bucket's decode step is one CUDA graph, which tenants, requests and
positions change under without its being captured again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from deltaweave.formats import Delta, Fusion, open_tenant
from deltaweave.runtime_plugin.library import ArenaFullError, ArenaStats, Library
from deltaweave.runtime_plugin.requests import ActiveRow, Completion, Request
from deltaweave.runtime_plugin.trt.arena import TenantArena
from deltaweave.runtime_plugin.trt.backend import load_backend
from deltaweave.runtime_plugin.trt.builder import DECODE, PREFILL
from deltaweave.runtime_plugin.trt.errors import EngineError
from deltaweave.runtime_plugin.trt.folder import EngineFolder
from deltaweave.runtime_plugin.trt.memory import ALIGNMENT, DeviceMemory, Stream, compute_capability
from deltaweave.runtime_plugin.trt.sampling import choose
from deltaweave.runtime_plugin.trt.steps import LoadedEngine, Step, runtime_config
from deltaweave.runtime_plugin.trt.tenant import Tenant, load_fusion, load_tenant
from numpy.typing import NDArray
from transformers import AutoConfig

__all__ = ["Engine"]

# Prompts are filled up to a power of two, this one at least, so that few shapes have to be prepared.
SHORTEST_PREFILL = 16
CACHE_FILE = "runtime.{capability}.cache"

Write = Callable[[int, int], None]


class Engine:
    """An engine folder on a GPU. Not thread-safe.

    Attributes:
        folder: what was opened.
        graph: the model's shapes.
        max_batch: rows at a time; further requests wait.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        max_batch: int | None = None,
        arena_bytes: int | None = None,
        graphs: bool = True,
    ) -> None:
        """Loads the plan for the GPU at hand and takes the memory of cache and arena.

        Args:
            folder: that `deltaweave build` wrote.
            max_batch: rows at a time; None for what the engine was built for.
            arena_bytes: device memory for tenants; None for what the engine was built for.
            graphs: capture each bucket's decode step once and replay it.

        Raises:
            EngineError: no engine folder, one for another GPU, TensorRT or plugin, no GPU, or not enough memory.
        """
        self.folder = EngineFolder.open(folder)
        manifest = self.folder.manifest
        self.graph = manifest.graph
        self.max_batch = self._rows(max_batch)
        self._captures = graphs
        backend, capability = load_backend(), compute_capability()
        plan = self.folder.plan(capability, backend)
        logger = backend.logger()
        self._runtime = backend.api.Runtime(logger)
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise backend.failure(f"{self.folder.path}: the plan does not load", logger)
        del plan
        stream, library = Stream(), Library()
        if self.graph.row_bytes % ALIGNMENT:
            raise EngineError(f"a cache row of {self.graph.row_bytes} bytes, expected a multiple of {ALIGNMENT}")
        self._base = AutoConfig.from_pretrained(self.folder.path, local_files_only=True)
        self._arena = TenantArena(library, self.graph, arena_bytes or manifest.capacities.arena_bytes, stream)
        self._cache_file = self.folder.path / CACHE_FILE.format(capability=capability)
        config, self._kernel_cache = runtime_config(backend, engine, self._cache_file)
        self._loaded = LoadedEngine(
            backend=backend,
            logger=logger,
            engine=engine,
            graph=self.graph,
            arena=self._arena,
            cache=DeviceMemory(self.graph.cache_bytes(self.max_batch)),
            rows=self.max_batch,
            stream=stream,
            config=config,
        )
        self._prefill_steps: dict[int, Step] = {}
        self._decode_steps: dict[int, Step] = {}

    def close(self) -> None:
        """Gives graphs and bookkeeping up and keeps what was compiled, if the folder can be written to."""
        for step in (*self._decode_steps.values(), *self._prefill_steps.values()):
            step.close()
        self._save_kernels()
        self._prefill_steps.clear()
        self._decode_steps.clear()
        self._arena.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def tenants(self) -> list[str]:
        """Names of all tenants, resident or not."""
        return self._arena.names

    @property
    def graphs(self) -> list[int]:
        """Buckets whose decode step has been captured."""
        return sorted(bucket for bucket, step in self._decode_steps.items() if step.captured)

    def __getitem__(self, name: str) -> Tenant:
        """A tenant by its name."""
        return self._arena[name]

    def stats(self) -> ArenaStats:
        """Bytes and slots of the arena, free and used."""
        return self._arena.stats()

    def add(self, source: Delta | Fusion | str | Path, name: str | None = None, *, accept_base: bool = False) -> Tenant:
        """Makes a fine-tune or fusion a tenant: bytes go to host memory and, evicting others, to the device.

        Nothing is built or captured again, and steps of others go on.

        Args:
            source: a file; or a delta that is open, or a fusion read by `resolve_fusion` (which may be closed
                afterwards).
            name: what requests call it; None for the file's name without its ending.
            accept_base: take what was made from a base that is not the engine's by its fingerprint.

        Raises:
            EngineError: another base, or the name is taken.
            AttachError: another family, or something that the engine does not serve.
            ArenaFullError: it cannot fit.
        """
        if isinstance(source, Delta):
            return self._add_delta(source, name, accept_base)
        if isinstance(source, Fusion):
            if name is None:
                raise EngineError("a fusion that was read has no name: give it one")
            return self._add_fusion(source, name, Path(name), accept_base)
        with open_tenant(source) as opened:
            if isinstance(opened, Delta):
                return self._add_delta(opened, name, accept_base)
            return self._add_fusion(
                opened, _file_name(Path(source)) if name is None else name, Path(source), accept_base
            )

    def remove(self, name: str) -> None:
        """Forgets a tenant; its bytes are reused once the last step with it is done."""
        self._arena.remove(name)

    def evict(self, name: str) -> None:
        """Takes a tenant off the device; the next request that wants it brings it back."""
        self._arena.evict(name)

    def run(self, requests: Sequence[Request], write: Write | None = None) -> list[Completion]:
        """Continues all requests; those that find no row or no room for their tenant wait for others to end.

        Args:
            requests: in the order in which they are let in.
            write: is handed each new token as it comes: (index of the request, token).

        Returns:
            In the order of the requests.

        Raises:
            EngineError: a request without tokens or too long for the cache, an unknown tenant, or a step that failed.
            ArenaFullError: a tenant that does not fit into the arena even alone.
        """
        for index, request in enumerate(requests):
            self._require_fitting(index, request)
        waiting = deque(enumerate(requests))
        active: dict[int, ActiveRow] = {}
        done: dict[int, Completion] = {}

        def advance(rows: Sequence[ActiveRow], tokens: Sequence[int]) -> None:
            for row, token in zip(rows, tokens, strict=True):
                if completion := row.accept(token, write):
                    done[row.index] = completion
                    active.pop(row.row, None)
                else:
                    active[row.row] = row

        while waiting or active:
            for row in self._admit(waiting, active):
                advance([row], [self._prefill(row)])
            if active:
                rows = [active[row] for row in sorted(active)]
                advance(rows, self._decode(rows))
        return [done[index] for index in range(len(requests))]

    def logits(self, tokens: Sequence[int], tenant: str | None = None) -> NDArray[np.float32]:
        """Logits behind every token of a text, [tokens, vocabulary]; for checks: one decode step a token.

        Raises:
            EngineError: no tokens, too many for the cache, or an unknown tenant.
        """
        if not 0 < len(tokens) <= self.graph.max_sequence:
            raise EngineError(f"{len(tokens)} tokens, expected 1 to {self.graph.max_sequence}")
        found = np.empty((len(tokens), self.graph.vocabulary), np.float32)
        for position in range(len(tokens)):
            row = ActiveRow(0, Request(tokens[: position + 1], tenant), 0)
            found[position] = self._decode_rows([row]).logits()[0]
        return found

    def _add_delta(self, delta: Delta, name: str | None, accept_base: bool) -> Tenant:
        if not accept_base:
            self.folder.require_base(delta.header.base, str(delta.path))
        tenant = load_tenant(self.graph, self._base, delta, _file_name(delta.path) if name is None else name)
        self._arena.add(tenant)
        return tenant

    def _add_fusion(self, fusion: Fusion, name: str, path: Path, accept_base: bool) -> Tenant:
        if not accept_base:
            self.folder.require_base(fusion.base, str(path))
        tenant = load_fusion(self.graph, self._base, fusion, name, path)
        self._arena.add(tenant)
        return tenant

    def _rows(self, wanted: int | None) -> int:
        most = self.folder.manifest.capacities.max_batch
        rows = most if wanted is None else wanted
        if not 1 <= rows <= most:
            raise EngineError(f"max_batch {rows}, the engine was built for 1 to {most}")
        return rows

    def _require_fitting(self, index: int, request: Request) -> None:
        length = len(request.tokens) + request.max_new_tokens
        if not request.tokens or request.max_new_tokens < 1:
            raise EngineError(f"request {index}: expected at least one token and at least one to write")
        if length > self.graph.max_sequence:
            raise EngineError(
                f"request {index}: {len(request.tokens)} tokens and {request.max_new_tokens} to write, the engine's "
                f"cache holds {self.graph.max_sequence}"
            )

    def _admit(self, waiting: deque[tuple[int, Request]], active: dict[int, ActiveRow]) -> list[ActiveRow]:
        """Lets requests in, in their order, while there are rows and their tenants fit beside the active ones."""
        free = [row for row in range(self.max_batch) if row not in active]
        tenants = {row.request.tenant for row in active.values()}
        admitted: list[ActiveRow] = []
        for row in free[: len(waiting)]:
            index, request = waiting[0]
            try:
                self._arena.resident([*tenants, request.tenant])
            except ArenaFullError:
                if not tenants:
                    raise
                break
            waiting.popleft()
            tenants.add(request.tenant)
            admitted.append(ActiveRow(index, request, row))
        return admitted

    def _prefill(self, row: ActiveRow) -> int:
        """The first new token of a row, its prompt gone through in chunks."""
        prompt, most = np.asarray(row.request.tokens, np.int64), self.folder.manifest.capacities.max_tokens
        for start in range(0, len(prompt), most):
            chunk = prompt[start : start + most]
            step = self._prefill_step(len(chunk), self.graph.max_sequence - start)
            step.aim(row.row)
            inputs = step.inputs
            inputs["input_ids"][0] = 0
            inputs["input_ids"][0, : len(chunk)] = chunk
            inputs["positions"][0] = np.arange(start, start + inputs["positions"].shape[1])
            inputs["lengths"][0], inputs["last"][0] = start, len(chunk) - 1
            with self._arena.step([row.request.tenant]) as slots:
                self._choose_slots(step, slots, [row.request.tenant])
                step.run()
            self._loaded.stream.synchronize()
        return self._choose(step, row, 0)

    def _decode(self, rows: Sequence[ActiveRow]) -> list[int]:
        """The next token of rows."""
        step = self._decode_rows(rows)
        return [self._choose(step, row, row.row) for row in rows]

    def _decode_rows(self, rows: Sequence[ActiveRow]) -> Step:
        """The finished decode step of rows; those of its bucket that are idle repeat the base's position 0."""
        step = self._decode_step(rows[-1].row + 1)
        inputs = step.inputs
        for name in ("input_ids", "positions", "lengths"):
            inputs[name][:] = 0
        tenants: list[str | None] = [None] * len(inputs["lengths"])
        for row in rows:
            inputs["input_ids"][row.row] = row.text[-1]
            inputs["positions"][row.row] = inputs["lengths"][row.row] = len(row.text) - 1
            tenants[row.row] = row.request.tenant
        with self._arena.step(tenants) as slots:
            self._choose_slots(step, slots, tenants)
            if self._captures and not step.captured:
                step.capture()
            step.run()
        self._loaded.stream.synchronize()
        return step

    def _choose_slots(self, step: Step, slots: Sequence[int], tenants: Sequence[str | None]) -> None:
        """Whose a step's rows are."""
        step.inputs["row_slots"][:] = slots
        for place in range(self.graph.delta_experts):
            step.inputs["expert_slots"][place] = self._arena.expert_slots(tenants, place)

    def _choose(self, step: Step, row: ActiveRow, place: int) -> int:
        if row.request.sampling.is_greedy:
            return int(step.tokens[place])
        return choose(step.logits()[place], row.chooser, row.text)

    def _prefill_step(self, tokens: int, room: int) -> Step:
        """The step of the smallest power of two that holds the tokens, or what the engine or the cache has room for."""
        most = min(self.folder.manifest.capacities.max_tokens, room)
        bucket = min(max(SHORTEST_PREFILL, 1 << (tokens - 1).bit_length()), most)
        if bucket not in self._prefill_steps:
            self._prefill_steps[bucket] = Step(self._loaded, PREFILL, 1, bucket)
        return self._prefill_steps[bucket]

    def _decode_step(self, rows: int) -> Step:
        """The step of the smallest power of two that holds the rows, or of all rows."""
        bucket = min(1 << (rows - 1).bit_length(), self.max_batch)
        if bucket not in self._decode_steps:
            self._decode_steps[bucket] = Step(self._loaded, DECODE, bucket, 1)
        return self._decode_steps[bucket]

    def _save_kernels(self) -> None:
        if self._kernel_cache is None:
            return
        try:
            self._cache_file.write_bytes(bytes(self._kernel_cache.serialize()))
        except OSError:  # a folder that only others may write to: the next run compiles again
            return


def _file_name(path: Path) -> str:
    """Without any ending."""
    return path.name.partition(".")[0]
