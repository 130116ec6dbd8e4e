/* SPDX-License-Identifier: Apache-2.0 */
/* libdeltaweave: multi-tenant delta products on NVIDIA GPUs.
 *
 * A tenant's projection is y += U^ (sigma * (V^ x)) with V^ [rank, in_features] and U^ [rank,
 * out_features] in bands of 1, 2, 3, 4, 8 or 16 bits (formats/SPEC.md, record kind `factored`). A
 * runtime holds many tenants in one device buffer, the arena, and finds them through the directory,
 * a device tensor int64 [projection, slot, DW_DIRECTORY_FIELDS].
 *
 * Conventions: sizes count elements unless a name says bytes; strides are explicit, in elements;
 * every function returns a dw_status and leaves a one-line message for dw_last_error(); nothing
 * synchronizes with the device; structs are plain C and must be zeroed before they are filled.
 * `stream` is a cudaStream_t.
 */
#ifndef DELTAWEAVE_H_
#define DELTAWEAVE_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#ifdef DW_BUILDING
#define DW_API __attribute__((visibility("default")))
#else
#define DW_API
#endif

#define DW_ABI_VERSION 1

#define DW_MAX_BANDS 8
#define DW_MAX_SLICES 4
#define DW_MAX_TOKENS 2048
#define DW_MAX_RANK 4096
#define DW_MAX_IN_FEATURES 32768
#define DW_MAX_OUT_FEATURES 262144
#define DW_ALIGNMENT 256

typedef enum dw_status {
  DW_OK = 0,
  DW_ERROR_ARGUMENT = 1,    /* a value outside its contract */
  DW_ERROR_UNSUPPORTED = 2, /* a valid format that the kernels refuse by name */
  DW_ERROR_FULL = 3,        /* no slot or no bytes left in the arena */
  DW_ERROR_BUSY = 4,        /* refused while graphs or steps are in flight */
  DW_ERROR_CUDA = 5,        /* a CUDA call failed, or the library has no CUDA */
} dw_status;

typedef enum dw_dtype { DW_FLOAT16 = 0, DW_BFLOAT16 = 1 } dw_dtype;
typedef enum dw_grid { DW_GRID_NONE = 0, DW_GRID_AFFINE = 1, DW_GRID_CODEBOOK = 2 } dw_grid;

/* The message of this thread's last failed call. */
DW_API const char* dw_last_error(void);
DW_API int32_t dw_abi_version(void);
/* 1 if the library was built with CUDA kernels, 0 if it holds the host logic alone. */
DW_API int32_t dw_has_cuda(void);

/* ---- Shapes
 * --------------------------------------------------------------------------------------------------
 */

/* One linear layer of the base model, or a tensor-parallel shard of it. The offsets say how far the
 * shard's first feature lies behind a multiple of 128 of the whole layer; 0 without tensor
 * parallelism. */
typedef struct dw_projection {
  int32_t in_features, out_features;
  int32_t in_offset, out_offset;
} dw_projection;

typedef struct dw_band {
  int32_t bits; /* 1, 2, 3, 4, 8; 16 means fp16 values */
  int32_t rank;
  int32_t grid; /* dw_grid; DW_GRID_NONE with 16 bits and only then */
} dw_band;

/* One tenant's factored record of one projection. Group sizes are multiples of 128, or 0 for one
 * grid entry a band; group offsets are the format's `group_offset`. */
typedef struct dw_factors {
  int32_t projection;
  int32_t band_count;
  dw_band bands[DW_MAX_BANDS];
  int32_t v_group_size, v_group_offset;
  int32_t u_group_size, u_group_offset;
} dw_factors;

/* ---- The directory
 * ------------------------------------------------------------------------------------------- */

/* Fields of directory[projection][slot]. Offsets are bytes from the arena's device address,
 * multiples of 256. A row of zeros is a slot without a delta for that projection. */
#define DW_FIELD_BAND_COUNT 0
#define DW_FIELD_ROW_BLOCKS 1  /* blocks of 16 ranks (8 in a 16-bit band) over all bands */
#define DW_FIELD_PADDED_RANK 2 /* ranks with every band padded to 16 */
#define DW_FIELD_HEADER 3      /* offset of float[64]: [0] is the largest |scale| of u */
#define DW_FIELD_SIGMA 4       /* offset of float[padded rank] */
#define DW_FIELD_BANDS 8       /* DW_MAX_BANDS groups of DW_BAND_FIELDS */
#define DW_BAND_FIELDS 4
#define DW_BAND_SHAPE 0  /* bits | grid << 8 | rank << 16 */
#define DW_BAND_V 1      /* offset of v's blocks */
#define DW_BAND_U 2      /* offset of u's blocks */
#define DW_BAND_LEVELS 3 /* offset of half[2^bits] for a codebook, else 0 */
#define DW_DIRECTORY_FIELDS (DW_FIELD_BANDS + DW_MAX_BANDS * DW_BAND_FIELDS)

/* ---- The arena: allocator, directory, slot life, least recently used
 * ------------------------------------------ */

typedef struct dw_arena dw_arena;

typedef struct dw_arena_config {
  uint64_t device_address; /* of the buffer, a multiple of 256; used for nothing but the alignment
                              check */
  uint64_t bytes;
  int32_t slot_count;
  int32_t projection_count;
  const dw_projection* projections; /* copied */
  int32_t max_rank;                 /* of a projection, at most DW_MAX_RANK */
} dw_arena_config;

typedef enum dw_slot_state {
  DW_SLOT_FREE = 0,
  DW_SLOT_LOADING = 1,  /* bytes reserved, directory row still zero */
  DW_SLOT_RESIDENT = 2, /* usable by steps */
  DW_SLOT_RETIRED = 3,  /* evicted, bytes held until its last step is done */
} dw_slot_state;

typedef struct dw_arena_stats {
  uint64_t bytes, free_bytes, largest_free_bytes;
  int32_t slot_count, free_slots, resident_slots, retired_slots;
  int32_t live_graphs;
  uint64_t open_steps;
} dw_arena_stats;

DW_API dw_status dw_arena_create(const dw_arena_config* config, dw_arena** arena);
DW_API void dw_arena_destroy(dw_arena* arena);
DW_API dw_status dw_arena_get_stats(const dw_arena* arena, dw_arena_stats* stats);

/* Bytes that a tenant takes, without taking them. */
DW_API dw_status dw_arena_tenant_bytes(const dw_arena* arena, const dw_factors* factors,
                                       int32_t count, uint64_t* bytes);
/* Takes a free slot and bytes for all of a tenant's records; DW_ERROR_FULL says what is missing.
 * Slot: LOADING. */
DW_API dw_status dw_arena_reserve(dw_arena* arena, const dw_factors* factors, int32_t count,
                                  int32_t* slot);
/* Byte offset and length of a reserved record's payload, where dw_repack writes it. */
DW_API dw_status dw_arena_payload(const dw_arena* arena, int32_t slot, int32_t projection,
                                  uint64_t* offset, uint64_t* bytes);
/* LOADING to RESIDENT: steps may use the slot once its directory rows have been copied behind the
 * upload's event. */
DW_API dw_status dw_arena_commit(dw_arena* arena, int32_t slot);
/* RESIDENT or LOADING to RETIRED, and to FREE once no open step uses it. Pinned slots refuse
 * (DW_ERROR_BUSY). */
DW_API dw_status dw_arena_evict(dw_arena* arena, int32_t slot);
DW_API dw_status dw_arena_slot_state(const dw_arena* arena, int32_t slot, int32_t* state);
/* The resident, unpinned slot whose last step is the oldest; DW_ERROR_FULL if there is none. */
DW_API dw_status dw_arena_least_recent(const dw_arena* arena, int32_t* slot);
DW_API dw_status dw_arena_pin(dw_arena* arena, int32_t slot);
DW_API dw_status dw_arena_unpin(dw_arena* arena, int32_t slot);
/* The host's copy of a slot's directory rows, int64 [projection_count, DW_DIRECTORY_FIELDS]. */
DW_API dw_status dw_arena_directory_rows(const dw_arena* arena, int32_t slot, int64_t* rows);

/* A step that uses `slots` (-1 entries are skipped) begins; `step` numbers rise from 1. */
DW_API dw_status dw_arena_begin_step(dw_arena* arena, const int32_t* slots, int32_t count,
                                     uint64_t* step);
/* The device has finished `step`: slots retired meanwhile are freed. Steps may end in any order. */
DW_API dw_status dw_arena_end_step(dw_arena* arena, uint64_t step);

/* A captured graph holds the arena's address; while one lives the buffer may not change. */
DW_API dw_status dw_arena_acquire_graph(dw_arena* arena);
DW_API dw_status dw_arena_release_graph(dw_arena* arena);
/* The host replaced the buffer by a larger one with the same content. Refused while graphs or steps
 * live. */
DW_API dw_status dw_arena_grow(dw_arena* arena, uint64_t device_address, uint64_t bytes);

/* ---- Kernels
 * ---------------------------------------------------------------------------------------------------
 */

/* File order to kernel order, on the GPU. All pointers are device memory in the format's layout:
 * codes with bands at multiples of 16 bytes, grids fp16, sigma float [rank]; `levels` float, the
 * codebook bands' levels one after another, or NULL. `payload` is the arena's device address plus
 * dw_arena_payload's offset. */
typedef struct dw_repack_args {
  dw_factors factors;
  dw_projection projection;
  const void *v_codes, *v_grid, *u_codes, *u_grid;
  const float* sigma;
  const float* levels;
  void* payload;
  uint64_t payload_bytes;
} dw_repack_args;
DW_API dw_status dw_repack(const dw_repack_args* args, void* stream);

/* Groups a step's tokens by slot. `slots` is device int32 [token_count], -1 for the bare base; a
 * slot outside
 * [-1, slot_count) counts as -1 and is reported in the plan's second int32. `plan` is device memory
 * of dw_plan_bytes(), 16-byte aligned, and serves every dw_delta_gemm of the step. chunk_tokens is
 * 8 (few tokens a tenant), 32 (prefill), or 0 for the default of the token count; results do not
 * depend on it. */
DW_API dw_status dw_plan_bytes(int32_t token_count, size_t* bytes);
DW_API dw_status dw_plan_tokens(const int32_t* slots, int32_t token_count, int32_t slot_count,
                                int32_t chunk_tokens, void* plan, size_t plan_bytes, void* stream);

typedef struct dw_slice {
  int32_t projection; /* row of the directory */
  int32_t out_features, out_offset;
  void* y; /* [token_count, out_features], read and written */
  int64_t y_stride;
} dw_slice;

/* y_s[t] += U^_s (sigma_s * (V^_s x[t])) for every slice s and every token t whose slot is not -1.
 */
typedef struct dw_gemm {
  const void* arena;        /* device, 256-byte aligned */
  const int64_t* directory; /* device [projection_count, slot_count, DW_DIRECTORY_FIELDS] */
  int32_t projection_count, slot_count;
  int32_t max_rank; /* the arena's */
  int32_t dtype;    /* dw_dtype of x and y */
  int32_t token_count, in_features, in_offset;
  int32_t chunk_tokens; /* as in dw_plan_tokens */
  const void* x;        /* [token_count, in_features] */
  int64_t x_stride;
  const void* plan;
  int32_t slice_count;
  dw_slice slices[DW_MAX_SLICES];
  void* workspace; /* 256-byte aligned; its content need not be kept between calls */
  size_t workspace_bytes;
} dw_gemm;
/* Reads sizes alone: pointers may be NULL. */
DW_API dw_status dw_gemm_workspace_bytes(const dw_gemm* args, size_t* bytes);
DW_API dw_status dw_delta_gemm(const dw_gemm* args, void* stream);

#ifdef __cplusplus
}
#endif

#endif /* DELTAWEAVE_H_ */
