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

// A record in the arena. One that is shared has its owner's shape and place under its own
// parameter.
struct Record {
  int parameter;
  dw_record shape;
  uint64_t offset, bytes;
  bool owned;
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
        parameters(config.parameters, config.parameters + config.parameter_count),
        slots(config.slot_count),
        max_rank(config.max_rank) {}

  mutable std::mutex mutex;
  dw::Allocator allocator;
  std::vector<dw_parameter> parameters;
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

// For every parameter the tenant's record of it, or null.
using Index = std::vector<const dw_record*>;

dw_status index_records(const dw_arena& arena, const dw_record* records, int count, Index& index) {
  if (count < 0 || (records == nullptr && count > 0)) {
    return fail(DW_ERROR_ARGUMENT, "a tenant of ", count, " records");
  }
  index.assign(arena.parameters.size(), nullptr);
  for (int i = 0; i < count; ++i) {
    const int parameter = records[i].parameter;
    if (parameter < 0 || parameter >= static_cast<int>(index.size())) {
      return fail(DW_ERROR_ARGUMENT, "record ", i, ": parameter ", parameter, ", expected 0 to ",
                  index.size() - 1);
    }
    if (index[parameter]) return fail(DW_ERROR_ARGUMENT, "parameter ", parameter, " comes twice");
    index[parameter] = &records[i];
  }
  return DW_OK;
}

// The record that holds the bytes of `record`: itself, or the one it shares.
dw_status find_owner(const dw_arena& arena, const Index& index, const dw_record& record,
                     const dw_record*& owner) {
  owner = &record;
  const int shares = record.shares;
  if (shares == -1) return DW_OK;
  const bool known = shares >= 0 && shares < static_cast<int>(index.size());
  owner = known ? index[shares] : nullptr;
  if (owner == nullptr || owner->shares != -1) {
    return fail(DW_ERROR_ARGUMENT, "parameter ", record.parameter, " shares the record of ", shares,
                ", which has none of its own in this tenant");
  }
  const dw_parameter& mine = arena.parameters[record.parameter];
  const dw_parameter& theirs = arena.parameters[shares];
  if (mine.in_features == theirs.in_features && mine.in_offset == theirs.in_offset &&
      mine.out_features == theirs.out_features && mine.out_offset == theirs.out_offset) {
    return DW_OK;
  }
  return fail(DW_ERROR_ARGUMENT, "parameter ", record.parameter, " [", mine.out_features, ", ",
              mine.in_features, "] shares the record of ", shares, " [", theirs.out_features, ", ",
              theirs.in_features, "], expected equal shapes");
}

dw_status check_records(const dw_arena& arena, const dw_record* records, int count) {
  Index index;
  DW_RETURN_IF_ERROR(index_records(arena, records, count, index));
  for (int i = 0; i < count; ++i) {
    const int parameter = records[i].parameter;
    const dw_record* owner;
    DW_RETURN_IF_ERROR(find_owner(arena, index, records[i], owner));
    DW_RETURN_IF_ERROR(
        check_record(*owner, arena.parameters[parameter], parameter, arena.max_rank));
  }
  return DW_OK;
}

uint64_t payload_bytes(const dw_arena& arena, const dw_record& record) {
  return record.shares == -1 ? place(record, arena.parameters[record.parameter]).bytes : 0;
}

uint64_t tenant_bytes(const dw_arena& arena, const dw_record* records, int count) {
  uint64_t bytes = 0;
  for (int i = 0; i < count; ++i) bytes += payload_bytes(arena, records[i]);
  return bytes;
}

void free_slot(dw_arena& arena, Slot& slot) {
  for (const Record& record : slot.records) {
    if (record.owned) arena.allocator.release(record.offset, record.bytes);
  }
  slot = Slot();
}

const Record* find_record(const Slot& slot, int parameter) {
  for (const Record& record : slot.records) {
    if (record.parameter == parameter) return &record;
  }
  return nullptr;
}

// Takes bytes for every record or for none.
dw_status take_records(dw_arena& arena, const dw_record* records, int count, Slot& slot) {
  for (int i = 0; i < count; ++i) {
    if (records[i].shares != -1) continue;
    const uint64_t bytes = payload_bytes(arena, records[i]);
    const auto offset = arena.allocator.take(bytes);
    if (!offset) {
      free_slot(arena, slot);
      return fail(DW_ERROR_FULL, "arena full: a tenant of ", tenant_bytes(arena, records, count),
                  " bytes, ", arena.allocator.free_bytes(), " of ", arena.allocator.total(),
                  " bytes free, the longest range ", arena.allocator.largest_free());
    }
    slot.records.push_back({records[i].parameter, records[i], *offset, bytes, true});
  }
  for (int i = 0; i < count; ++i) {
    if (records[i].shares == -1) continue;
    Record shared = *find_record(slot, records[i].shares);
    shared.parameter = records[i].parameter;
    shared.owned = false;
    slot.records.push_back(shared);
  }
  return DW_OK;
}

dw_status check_config(const dw_arena_config& config) {
  if (config.device_address % DW_ALIGNMENT != 0) {
    return fail(DW_ERROR_ARGUMENT, "arena address ", config.device_address,
                " is not a multiple of ", DW_ALIGNMENT);
  }
  if (config.slot_count < 1 || config.parameter_count < 1 || config.parameters == nullptr) {
    return fail(DW_ERROR_ARGUMENT, "arena of ", config.slot_count, " slots and ",
                config.parameter_count, " parameters, expected at least 1 of each");
  }
  if (config.max_rank < 1 || config.max_rank > DW_MAX_RANK) {
    return fail(DW_ERROR_ARGUMENT, "max_rank ", config.max_rank, ", expected 1 to ", DW_MAX_RANK);
  }
  for (int i = 0; i < config.parameter_count; ++i) {
    DW_RETURN_IF_ERROR(check_parameter(config.parameters[i], i));
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

dw_status dw_arena_tenant_bytes(const dw_arena* arena, const dw_record* records, int32_t count,
                                uint64_t* bytes) {
  const Lock lock(arena->mutex);
  DW_RETURN_IF_ERROR(dw::check_records(*arena, records, count));
  *bytes = dw::tenant_bytes(*arena, records, count);
  return DW_OK;
}

dw_status dw_arena_reserve(dw_arena* arena, const dw_record* records, int32_t count,
                           int32_t* slot) {
  const Lock lock(arena->mutex);
  DW_RETURN_IF_ERROR(dw::check_records(*arena, records, count));
  for (size_t i = 0; i < arena->slots.size(); ++i) {
    Slot& candidate = arena->slots[i];
    if (candidate.state != DW_SLOT_FREE) continue;
    DW_RETURN_IF_ERROR(dw::take_records(*arena, records, count, candidate));
    candidate.state = DW_SLOT_LOADING;
    *slot = static_cast<int32_t>(i);
    return DW_OK;
  }
  return fail(DW_ERROR_FULL, "arena full: all ", arena->slots.size(), " slots are taken");
}

dw_status dw_arena_payload(const dw_arena* arena, int32_t slot, int32_t parameter, uint64_t* offset,
                           uint64_t* bytes) {
  const Lock lock(arena->mutex);
  DW_RETURN_IF_ERROR(check_slot(*arena, slot));
  const dw::Record* record = dw::find_record(arena->slots[slot], parameter);
  if (record == nullptr) {
    return fail(DW_ERROR_ARGUMENT, "slot ", slot, " has no record of parameter ", parameter);
  }
  *offset = record->offset;
  *bytes = record->bytes;
  return DW_OK;
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
  std::fill(rows, rows + arena->parameters.size() * DW_DIRECTORY_FIELDS, 0);
  const Slot& tenant = arena->slots[slot];
  if (tenant.state != DW_SLOT_RESIDENT) return DW_OK;
  for (const dw::Record& record : tenant.records) {
    dw::directory_row(record.shape, arena->parameters[record.parameter], record.offset,
                      rows + static_cast<int64_t>(record.parameter) * DW_DIRECTORY_FIELDS);
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
