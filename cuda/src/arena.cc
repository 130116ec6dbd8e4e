// SPDX-License-Identifier: Apache-2.0
// The arena: which bytes of the host's buffer belong to which tenant, and when they may be reused.
//
//   FREE --reserve--> LOADING --commit--> RESIDENT --evict--> RETIRED --last step done--> FREE
//
// Host logic alone; it never touches the device. Steps carry rising numbers. A slot remembers the
// open steps that use it by count, and its last step for the least-recently-used order.
#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "allocator.h"
#include "layout.h"
#include "payload.h"
#include "status.h"

namespace dw {
namespace {

struct Record {
  dw_factors factors;
  uint64_t offset, bytes;
};

struct Slot {
  dw_slot_state state = DW_SLOT_FREE;
  std::vector<Record> records;
  int pins = 0;
  int open_steps = 0;
  uint64_t last_use = 0;
};

}  // namespace
}  // namespace dw

struct dw_arena {
  explicit dw_arena(const dw_arena_config& config)
      : allocator(config.bytes),
        projections(config.projections, config.projections + config.projection_count),
        slots(config.slot_count),
        max_rank(config.max_rank) {}

  mutable std::mutex mutex;
  dw::Allocator allocator;
  std::vector<dw_projection> projections;
  std::vector<dw::Slot> slots;
  int max_rank;
  int live_graphs = 0;
  uint64_t clock = 0;                               // of the latest step or commit
  std::map<uint64_t, std::vector<int>> open_steps;  // step -> its distinct slots
};

namespace dw {
namespace {

using Lock = std::lock_guard<std::mutex>;

dw_status check_slot(const dw_arena& arena, int slot) {
  if (slot < 0 || slot >= static_cast<int>(arena.slots.size())) {
    return fail(DW_ERROR_ARGUMENT, "slot ", slot, ", expected 0 to ", arena.slots.size() - 1);
  }
  return DW_OK;
}

dw_status check_records(const dw_arena& arena, const dw_factors* factors, int count) {
  if (factors == nullptr || count < 1) {
    return fail(DW_ERROR_ARGUMENT, "a tenant of ", count, " records, expected at least 1");
  }
  std::vector<bool> seen(arena.projections.size());
  for (int i = 0; i < count; ++i) {
    const int index = factors[i].projection;
    if (index < 0 || index >= static_cast<int>(seen.size())) {
      return fail(DW_ERROR_ARGUMENT, "record ", i, ": projection ", index, ", expected 0 to ",
                  seen.size() - 1);
    }
    if (seen[index]) return fail(DW_ERROR_ARGUMENT, "projection ", index, " comes twice");
    seen[index] = true;
    DW_RETURN_IF_ERROR(check_factors(factors[i], arena.max_rank));
    const dw_projection& projection = arena.projections[index];
    if (factors[i].v_group_offset % kGroup != projection.in_offset ||
        factors[i].u_group_offset % kGroup != projection.out_offset) {
      return fail(DW_ERROR_ARGUMENT, "projection ", index, ": group offsets ",
                  factors[i].v_group_offset, " and ", factors[i].u_group_offset,
                  " do not belong to a shard with offsets ", projection.in_offset, " and ",
                  projection.out_offset);
    }
  }
  return DW_OK;
}

uint64_t payload_bytes(const dw_arena& arena, const dw_factors& factors) {
  return place(factors, arena.projections[factors.projection]).bytes;
}

void free_slot(dw_arena& arena, Slot& slot) {
  for (const Record& record : slot.records) arena.allocator.release(record.offset, record.bytes);
  slot = Slot();
}

// Takes bytes for every record or for none.
dw_status take_records(dw_arena& arena, const dw_factors* factors, int count, Slot& slot) {
  uint64_t wanted = 0;
  for (int i = 0; i < count; ++i) wanted += payload_bytes(arena, factors[i]);
  for (int i = 0; i < count; ++i) {
    const uint64_t bytes = payload_bytes(arena, factors[i]);
    const auto offset = arena.allocator.take(bytes);
    if (!offset) {
      free_slot(arena, slot);
      return fail(DW_ERROR_FULL, "arena full: a tenant of ", wanted, " bytes, ",
                  arena.allocator.free_bytes(), " of ", arena.allocator.total(),
                  " bytes free, the longest range ", arena.allocator.largest_free());
    }
    slot.records.push_back({factors[i], *offset, bytes});
  }
  return DW_OK;
}

dw_status check_config(const dw_arena_config& config) {
  if (config.device_address % DW_ALIGNMENT != 0) {
    return fail(DW_ERROR_ARGUMENT, "arena address ", config.device_address,
                " is not a multiple of ", DW_ALIGNMENT);
  }
  if (config.slot_count < 1 || config.projection_count < 1 || config.projections == nullptr) {
    return fail(DW_ERROR_ARGUMENT, "arena of ", config.slot_count, " slots and ",
                config.projection_count, " projections, expected at least 1 of each");
  }
  if (config.max_rank < 1 || config.max_rank > DW_MAX_RANK) {
    return fail(DW_ERROR_ARGUMENT, "max_rank ", config.max_rank, ", expected 1 to ", DW_MAX_RANK);
  }
  for (int i = 0; i < config.projection_count; ++i) {
    DW_RETURN_IF_ERROR(check_projection(config.projections[i], i));
  }
  return DW_OK;
}

dw_status check_resident(const dw_arena& arena, int slot) {
  DW_RETURN_IF_ERROR(check_slot(arena, slot));
  if (arena.slots[slot].state != DW_SLOT_RESIDENT) {
    return fail(DW_ERROR_ARGUMENT, "slot ", slot, " holds no resident tenant");
  }
  return DW_OK;
}

}  // namespace
}  // namespace dw

using dw::check_resident;
using dw::check_slot;
using dw::fail;
using dw::Lock;
using dw::Slot;

dw_status dw_arena_create(const dw_arena_config* config, dw_arena** arena) {
  if (config == nullptr || arena == nullptr) return fail(DW_ERROR_ARGUMENT, "null argument");
  DW_RETURN_IF_ERROR(dw::check_config(*config));
  try {
    *arena = new dw_arena(*config);
  } catch (const std::bad_alloc&) {
    return fail(DW_ERROR_ARGUMENT, "no host memory for ", config->slot_count, " slots");
  }
  return DW_OK;
}

void dw_arena_destroy(dw_arena* arena) { delete arena; }

dw_status dw_arena_get_stats(const dw_arena* arena, dw_arena_stats* stats) {
  const Lock lock(arena->mutex);
  *stats = {};
  stats->bytes = arena->allocator.total();
  stats->free_bytes = arena->allocator.free_bytes();
  stats->largest_free_bytes = arena->allocator.largest_free();
  stats->slot_count = static_cast<int32_t>(arena->slots.size());
  for (const Slot& slot : arena->slots) {
    stats->free_slots += slot.state == DW_SLOT_FREE;
    stats->resident_slots += slot.state == DW_SLOT_RESIDENT;
    stats->retired_slots += slot.state == DW_SLOT_RETIRED;
  }
  stats->live_graphs = arena->live_graphs;
  stats->open_steps = arena->open_steps.size();
  return DW_OK;
}

dw_status dw_arena_tenant_bytes(const dw_arena* arena, const dw_factors* factors, int32_t count,
                                uint64_t* bytes) {
  const Lock lock(arena->mutex);
  DW_RETURN_IF_ERROR(dw::check_records(*arena, factors, count));
  *bytes = 0;
  for (int i = 0; i < count; ++i) *bytes += dw::payload_bytes(*arena, factors[i]);
  return DW_OK;
}

dw_status dw_arena_reserve(dw_arena* arena, const dw_factors* factors, int32_t count,
                           int32_t* slot) {
  const Lock lock(arena->mutex);
  DW_RETURN_IF_ERROR(dw::check_records(*arena, factors, count));
  for (size_t i = 0; i < arena->slots.size(); ++i) {
    Slot& candidate = arena->slots[i];
    if (candidate.state != DW_SLOT_FREE) continue;
    DW_RETURN_IF_ERROR(dw::take_records(*arena, factors, count, candidate));
    candidate.state = DW_SLOT_LOADING;
    *slot = static_cast<int32_t>(i);
    return DW_OK;
  }
  return fail(DW_ERROR_FULL, "arena full: all ", arena->slots.size(), " slots are taken");
}

dw_status dw_arena_payload(const dw_arena* arena, int32_t slot, int32_t projection,
                           uint64_t* offset, uint64_t* bytes) {
  const Lock lock(arena->mutex);
  DW_RETURN_IF_ERROR(check_slot(*arena, slot));
  for (const dw::Record& record : arena->slots[slot].records) {
    if (record.factors.projection != projection) continue;
    *offset = record.offset;
    *bytes = record.bytes;
    return DW_OK;
  }
  return fail(DW_ERROR_ARGUMENT, "slot ", slot, " has no record of projection ", projection);
}

dw_status dw_arena_commit(dw_arena* arena, int32_t slot) {
  const Lock lock(arena->mutex);
  DW_RETURN_IF_ERROR(check_slot(*arena, slot));
  Slot& tenant = arena->slots[slot];
  if (tenant.state != DW_SLOT_LOADING) {
    return fail(DW_ERROR_ARGUMENT, "slot ", slot, " is not being loaded");
  }
  tenant.state = DW_SLOT_RESIDENT;
  tenant.last_use = ++arena->clock;
  return DW_OK;
}

dw_status dw_arena_evict(dw_arena* arena, int32_t slot) {
  const Lock lock(arena->mutex);
  DW_RETURN_IF_ERROR(check_slot(*arena, slot));
  Slot& tenant = arena->slots[slot];
  if (tenant.state != DW_SLOT_RESIDENT && tenant.state != DW_SLOT_LOADING) {
    return fail(DW_ERROR_ARGUMENT, "slot ", slot, " holds no tenant to evict");
  }
  if (tenant.pins > 0) return fail(DW_ERROR_BUSY, "slot ", slot, " is pinned");
  tenant.state = DW_SLOT_RETIRED;
  if (tenant.open_steps == 0) dw::free_slot(*arena, tenant);
  return DW_OK;
}

dw_status dw_arena_slot_state(const dw_arena* arena, int32_t slot, int32_t* state) {
  const Lock lock(arena->mutex);
  DW_RETURN_IF_ERROR(check_slot(*arena, slot));
  *state = arena->slots[slot].state;
  return DW_OK;
}

dw_status dw_arena_least_recent(const dw_arena* arena, int32_t* slot) {
  const Lock lock(arena->mutex);
  const Slot* oldest = nullptr;
  for (const Slot& tenant : arena->slots) {
    if (tenant.state != DW_SLOT_RESIDENT || tenant.pins > 0) continue;
    if (oldest == nullptr || tenant.last_use < oldest->last_use) oldest = &tenant;
  }
  if (oldest == nullptr) return fail(DW_ERROR_FULL, "no resident tenant that is not pinned");
  *slot = static_cast<int32_t>(oldest - arena->slots.data());
  return DW_OK;
}

dw_status dw_arena_pin(dw_arena* arena, int32_t slot) {
  const Lock lock(arena->mutex);
  DW_RETURN_IF_ERROR(check_resident(*arena, slot));
  ++arena->slots[slot].pins;
  return DW_OK;
}

dw_status dw_arena_unpin(dw_arena* arena, int32_t slot) {
  const Lock lock(arena->mutex);
  DW_RETURN_IF_ERROR(check_slot(*arena, slot));
  if (arena->slots[slot].pins == 0) return fail(DW_ERROR_ARGUMENT, "slot ", slot, " is not pinned");
  --arena->slots[slot].pins;
  return DW_OK;
}

dw_status dw_arena_directory_rows(const dw_arena* arena, int32_t slot, int64_t* rows) {
  const Lock lock(arena->mutex);
  DW_RETURN_IF_ERROR(check_slot(*arena, slot));
  std::fill(rows, rows + arena->projections.size() * DW_DIRECTORY_FIELDS, 0);
  const Slot& tenant = arena->slots[slot];
  if (tenant.state != DW_SLOT_RESIDENT) return DW_OK;
  for (const dw::Record& record : tenant.records) {
    const int index = record.factors.projection;
    dw::directory_row(record.factors, arena->projections[index], record.offset,
                      rows + static_cast<int64_t>(index) * DW_DIRECTORY_FIELDS);
  }
  return DW_OK;
}

dw_status dw_arena_begin_step(dw_arena* arena, const int32_t* slots, int32_t count,
                              uint64_t* step) {
  const Lock lock(arena->mutex);
  std::vector<bool> used(arena->slots.size());
  for (int i = 0; i < count; ++i) {
    if (slots[i] == -1) continue;
    DW_RETURN_IF_ERROR(check_resident(*arena, slots[i]));
    used[slots[i]] = true;
  }
  *step = ++arena->clock;
  std::vector<int>& members = arena->open_steps[*step];
  for (size_t i = 0; i < used.size(); ++i) {
    if (!used[i]) continue;
    members.push_back(static_cast<int>(i));
    ++arena->slots[i].open_steps;
    arena->slots[i].last_use = *step;
  }
  return DW_OK;
}

dw_status dw_arena_end_step(dw_arena* arena, uint64_t step) {
  const Lock lock(arena->mutex);
  const auto found = arena->open_steps.find(step);
  if (found == arena->open_steps.end()) {
    return fail(DW_ERROR_ARGUMENT, "step ", step, " is not open");
  }
  for (const int index : found->second) {
    Slot& tenant = arena->slots[index];
    --tenant.open_steps;
    if (tenant.state == DW_SLOT_RETIRED && tenant.open_steps == 0) dw::free_slot(*arena, tenant);
  }
  arena->open_steps.erase(found);
  return DW_OK;
}

dw_status dw_arena_acquire_graph(dw_arena* arena) {
  const Lock lock(arena->mutex);
  ++arena->live_graphs;
  return DW_OK;
}

dw_status dw_arena_release_graph(dw_arena* arena) {
  const Lock lock(arena->mutex);
  if (arena->live_graphs == 0) return fail(DW_ERROR_ARGUMENT, "no graph is live");
  --arena->live_graphs;
  return DW_OK;
}

dw_status dw_arena_grow(dw_arena* arena, uint64_t device_address, uint64_t bytes) {
  const Lock lock(arena->mutex);
  if (arena->live_graphs > 0 || !arena->open_steps.empty()) {
    return fail(DW_ERROR_BUSY, "the arena cannot grow while ", arena->live_graphs, " graphs and ",
                arena->open_steps.size(), " steps are live");
  }
  if (device_address % DW_ALIGNMENT != 0 || bytes < arena->allocator.total()) {
    return fail(DW_ERROR_ARGUMENT, "growing to ", bytes, " bytes at ", device_address,
                ", expected at least ", arena->allocator.total(), " at a multiple of ",
                DW_ALIGNMENT);
  }
  arena->allocator.extend(bytes);
  return DW_OK;
}
