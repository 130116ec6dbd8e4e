/* SPDX-License-Identifier: Apache-2.0 */
/* libdeltaweave: whole fine-tunes of one base model, many at a time, on NVIDIA GPUs.
 *
 * A tenant is a set of records, at most one a parameter of the base (formats/SPEC.md):
 *
 *   linear     y += U^ (sigma * (V^ x)) with V^ [rank, in_features] and U^ [rank, out_features] in
 *              bands of 1, 2, 3, 4, 8 or 16 bits; lm_head also dense low-bit rows, or given rows
 *   embedding  dense low-bit rows added to the base's, or rows that replace them
 *   vector     values that replace a norm weight or a bias
 *
 * or, of a fusion of k experts, instead:
 *
 *   linear     y += sum_e w[e] scale_e B_e (A_e x) with A_e [rank_e, in_features] and B_e
 *              [out_features, rank_e] in 16 bits
 *   gate       of a decoder block, w = softmax(W x / temperature) + b with W [k, in_features], x
 * the block's input; or the same w for every token
 *
 * A runtime holds many tenants in one device buffer, the arena, and finds them through the
 * directory, a device tensor int64 [parameter, slot, DW_DIRECTORY_FIELDS].
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

#define DW_ABI_VERSION 8

#define DW_MAX_BANDS 8
#define DW_MAX_EXPERTS 8 /* of a fusion */
#define DW_MAX_SLICES 4
#define DW_MAX_TOKENS 2048
#define DW_BASE_TOKENS 8 /* the most of a call that computes the base too */
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

typedef enum dw_parameter_kind {
  DW_LINEAR = 0,    /* weight [out_features, in_features] */
  DW_EMBEDDING = 1, /* table [out_features rows, in_features] */
  DW_VECTOR = 2,    /* norm weight or bias [in_features]; out_features is 1 */
  DW_GATE = 3,      /* a decoder block's gate: in_features is the hidden size, out_features 1 */
} dw_parameter_kind;

/* A parameter of the base model that tenants may change, or a tensor-parallel shard of it. The
 * offsets say how far the shard's first feature lies behind a multiple of 128 of the whole; 0
 * without tensor parallelism. A tuned vocabulary may differ from the base's: out_features of an
 * embedding or lm_head is the largest that a tenant may bring. */
typedef struct dw_parameter {
  int32_t kind; /* dw_parameter_kind */
  int32_t in_features, out_features;
  int32_t in_offset, out_offset;
} dw_parameter;

typedef struct dw_band {
  int32_t bits; /* 1, 2, 3, 4, 8; 16 means fp16 values */
  int32_t rank;
  int32_t grid; /* dw_grid; DW_GRID_NONE with 16 bits and only then */
} dw_band;

typedef enum dw_record_kind {
  DW_FACTORED = 0, /* of a linear: v, u and sigma */
  DW_DENSE = 1,    /* of a linear or embedding: one band of low-bit rows, added to the base's */
  DW_ROWS = 2,     /* of a linear or embedding: fp16 rows that replace the base's */
  DW_VALUES = 3,   /* of a vector: float32 values that replace the base's */
  DW_LORA = 4,     /* of a linear: the LoRAs of k experts, a 16-bit band each */
  DW_MIX = 5,      /* of a gate: how k experts are weighed */
} dw_record_kind;

/* One tenant's record of one parameter. Group sizes are multiples of 128, or 0 for one grid entry a
 * band; group offsets are the format's `group_offset`. What a kind does not name is 0. */
typedef struct dw_record {
  int32_t parameter; /* index in the arena's table */
  int32_t kind;      /* dw_record_kind */
  int32_t rows;      /* DENSE: of the tuned matrix; ROWS: how many are given; MIX: experts */
  int32_t shares;    /* parameter whose record of the same tenant this one is too (tied embeddings),
                        or -1. All but `parameter` is then ignored, and no bytes are taken */
  int32_t band_count; /* FACTORED: 1 to DW_MAX_BANDS; DENSE: one of 1 to 8 bits, its rank = rows;
                         ROWS: one of 16 bits, its rank = rows; VALUES: 0; LORA: experts, one band
                         of 16 bits each, of rank 0 for an expert that leaves the linear alone, not
                         all; MIX: 1 if it has a gate's weight, 0 if its bias is the weights */
  dw_band bands[DW_MAX_BANDS];
  int32_t v_group_size, v_group_offset;
  int32_t u_group_size, u_group_offset; /* FACTORED */
} dw_record;

/* ---- The directory
 * ------------------------------------------------------------------------------------------- */

/* Fields of directory[parameter][slot]. Offsets are bytes from the arena's device address,
 * multiples of 256; field 1 is 0. A row of zeros is a slot that leaves the parameter at the base's.
 * Parameters that share a record have the same row. */
#define DW_FIELD_BAND_COUNT 0
#define DW_FIELD_PADDED_RANK 2 /* FACTORED, LORA: ranks with every band padded to 16 */
#define DW_FIELD_HEADER 3      /* offset of the payload; FACTORED, LORA, MIX: float[64], layout.h */
#define DW_FIELD_SIGMA 4       /* FACTORED, LORA: offset of float[padded rank] */
#define DW_FIELD_KIND 5        /* dw_record_kind + 1 */
#define DW_FIELD_INDICES 6     /* ROWS: offset of int32[rows], strictly rising */
#define DW_FIELD_VALUES 7      /* VALUES: offset of float[in_features]; MIX: of a weight, or 0 */
#define DW_FIELD_ROWS 8        /* DENSE and ROWS; MIX: experts */
#define DW_FIELD_V_GROUP_SIZE 9
#define DW_FIELD_V_GROUP_OFFSET 10
#define DW_FIELD_U_GROUP_SIZE 11
#define DW_FIELD_U_GROUP_OFFSET 12
#define DW_FIELD_BANDS 16 /* DW_MAX_BANDS groups of DW_BAND_FIELDS */
#define DW_BAND_FIELDS 4
#define DW_BAND_SHAPE 0  /* bits | grid << 8 | rank << 16 */
#define DW_BAND_V 1      /* offset of v's blocks; DENSE and ROWS: of the rows, in v's order */
#define DW_BAND_U 2      /* FACTORED, LORA: offset of u's blocks */
#define DW_BAND_LEVELS 3 /* offset of half[2^bits] for a codebook, else 0 */
#define DW_DIRECTORY_FIELDS (DW_FIELD_BANDS + DW_MAX_BANDS * DW_BAND_FIELDS)

/* On a machine without CUDA the arena manages a host buffer and the directory means the same; the
 * bands then keep the file's order: at a band's V (U) its codes, rows as in the file, and at the
 * next multiple of 16 behind them its grid. That fits in what kernel order takes. */

/* ---- The arena: allocator, directory, slot life, least recently used
 * ------------------------------------------ */

typedef struct dw_arena dw_arena;

typedef struct dw_arena_config {
  uint64_t device_address; /* of the buffer, a multiple of 256; used for nothing but the alignment
                              check */
  uint64_t bytes;
  int32_t slot_count;
  int32_t parameter_count;
  const dw_parameter* parameters; /* copied */
  int32_t max_rank; /* of a factored record, and of a fusion's experts in a linear together; at most
                       DW_MAX_RANK */
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
DW_API dw_status dw_arena_tenant_bytes(const dw_arena* arena, const dw_record* records,
                                       int32_t count, uint64_t* bytes);
/* Takes a free slot and bytes for all of a tenant's records; DW_ERROR_FULL says what is missing.
 * A tenant may have no records. Slot: LOADING. */
DW_API dw_status dw_arena_reserve(dw_arena* arena, const dw_record* records, int32_t count,
                                  int32_t* slot);
/* Byte offset and length of a reserved record's payload, where dw_repack writes it; a shared record
 * lies where its owner does. */
DW_API dw_status dw_arena_payload(const dw_arena* arena, int32_t slot, int32_t parameter,
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
/* The host's copy of a slot's directory rows, int64 [parameter_count, DW_DIRECTORY_FIELDS]. */
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
 * codebook bands' levels one after another. DENSE: `v_codes`, `v_grid`, `levels` are the record's
 * codes, grid and levels. ROWS: `indices`, and `values` fp16 [rows, in_features]. VALUES: `values`
 * float [in_features]. LORA: as FACTORED, a band an expert: `v_codes` are A's rows and `u_codes`
 * B's columns, fp16, `sigma` the expert's scale at each of its ranks. MIX: `values` float [rows,
 * in_features], `sigma` float [9]: the bias, zeros up to DW_MAX_EXPERTS, and the temperature.
 * What a record lacks is NULL. `payload` is the arena's device address plus
 * dw_arena_payload's offset. */
typedef struct dw_repack_args {
  dw_record record; /* `shares` -1 */
  dw_parameter parameter;
  const void *v_codes, *v_grid, *u_codes, *u_grid;
  const float* sigma;
  const float* levels;
  const int32_t* indices;
  const void* values;
  void* payload;
  uint64_t payload_bytes;
} dw_repack_args;
DW_API dw_status dw_repack(const dw_repack_args* args, void* stream);

/* Groups a step's tokens by slot. `slots` is device int32 [token_count], -1 for the bare base; a
 * slot outside [-1, slot_count) counts as -1 and is reported in the plan's second int32. `plan` is
 * device memory of dw_plan_bytes(), 16-byte aligned, and serves every product of the step.
 * chunk_tokens chooses the kernels: 8 for few tokens a tenant (bound by bytes); 128 for prefill
 * (bound by the tensor cores), where the factors of slots with 128 tokens or more are unpacked to
 * 16 bits in the workspace first, and the others are computed as with 8; or 0 for the default of
 * the token count, 8 up to 256 tokens. A product whose chunk_tokens are not the plan's leaves y as
 * it is.
 */
DW_API dw_status dw_plan_bytes(int32_t token_count, size_t* bytes);
DW_API dw_status dw_plan_tokens(const int32_t* slots, int32_t token_count, int32_t slot_count,
                                int32_t chunk_tokens, void* plan, size_t plan_bytes, void* stream);

typedef struct dw_slice {
  int32_t parameter; /* row of the directory */
  int32_t out_features, out_offset;
  void* y; /* [token_count, out_features], read and written; with a base only written */
  int64_t y_stride;
  const void* base; /* of dw_delta_gemm and its halves: NULL, or the base's weight of these outputs,
                       [out_features, in_features] of dtype, in all slices of a call or in none.
                       Then y_s[t] = base_s x[t] + the delta, whatever y held. For at most
                       DW_BASE_TOKENS tokens; x and base aligned to 16 bytes, in_features and both
                       strides multiples of 8 */
  int64_t base_stride;
} dw_slice;

/* y_s[t] += weights[t] * U^_s (sigma_s * (V^_s x[t])) for every slice s and every token t whose
 * slot has a factored record; with the base's weights y_s[t] = base_s x[t] + that, for every token.
 * The base's product and stage 1 run at the same time then, as one stream's kernels; they count in
 * the plan how far they are, so calls with one plan must follow each other. */
typedef struct dw_gemm {
  const void* arena;        /* device, 256-byte aligned */
  const int64_t* directory; /* device [parameter_count, slot_count, DW_DIRECTORY_FIELDS] */
  int32_t parameter_count, slot_count;
  int32_t max_rank; /* the arena's */
  int32_t dtype;    /* dw_dtype of x and y */
  int32_t token_count, in_features, in_offset;
  int32_t chunk_tokens; /* as in dw_plan_tokens */
  const void* x;        /* [token_count, in_features] */
  int64_t x_stride;
  const void* plan; /* only calls with a base write to it */
  int32_t slice_count;
  dw_slice slices[DW_MAX_SLICES];
  void* workspace; /* 256-byte aligned; its content need not be kept between calls */
  size_t workspace_bytes;
  const float* weights; /* of token t at t * weights_stride; NULL for ones */
  int64_t weights_stride;
} dw_gemm;
/* Reads sizes alone: pointers may be NULL. In prefill the workspace has room for 16-bit images of
 * the tokens, by tiles of 128 a slot. */
DW_API dw_status dw_gemm_workspace_bytes(const dw_gemm* args, size_t* bytes);
DW_API dw_status dw_delta_gemm(const dw_gemm* args, void* stream);
/* The same in two calls with the same arguments: dw_delta_shrink reads x, and may have y NULL
 * unless it computes the base's product; dw_delta_expand adds to y, and needs the workspace as the
 * first left it. Not for prefill. For measuring a stage alone, and for what must lie between the
 * two. */
DW_API dw_status dw_delta_shrink(const dw_gemm* args, void* stream);
DW_API dw_status dw_delta_expand(const dw_gemm* args, void* stream);

/* lm_head of tenants whose record is not factored, for one slice and the same plan and workspace:
 * DENSE: y[t, r] += row r . x[t]; ROWS: y[t, indices[r]] = row r . x[t], whatever y held. A host
 * calls dw_delta_gemm and this one on the same y; each leaves the other's tenants alone. It takes
 * no weights. */
DW_API dw_status dw_dense_gemm(const dw_gemm* args, void* stream);

/* y_s[t] += sum_e weights[t, e] scale_e B_e (A_e x[t]) for every slice s and every token t whose
 * slot has a LORA record, e over its experts. `weights` float [token_count, DW_MAX_EXPERTS], a
 * token's at t
 * * weights_stride, required: what dw_gate_weights wrote. All else, plan and workspace too, as in
 * dw_delta_gemm; each leaves the other's tenants alone. */
DW_API dw_status dw_gated_lora(const dw_gemm* args, void* stream);

/* What the element-wise kernels below share. They need no plan; a slot outside [-1, slot_count)
 * counts as -1. */
typedef struct dw_batch {
  const void* arena;        /* device, 256-byte aligned */
  const int64_t* directory; /* device [parameter_count, slot_count, DW_DIRECTORY_FIELDS] */
  const int32_t* slots;     /* device [token_count] */
  int32_t parameter_count, slot_count;
  int32_t token_count;
  int32_t dtype; /* dw_dtype of all activations and of the base's parameters */
  /* device, or NULL: where the arena's address lies, for hosts that hand out copies of large
   * tensors; arena is ignored then. */
  const int64_t* arena_address;
} dw_batch;

/* y[t, i] = cast(x[t, i] * rsqrt(mean(x[t, i]^2) + epsilon)) * weight, rounded as Hugging Face's
 * LlamaRMSNorm does; weight is the VALUES of the token's slot, rounded to dtype, or the base's.
 * rows_per_token is 1 for a hidden state, the number of heads for q and k norms. y may be x. */
typedef struct dw_norm {
  dw_batch batch;
  int32_t parameter;
  int32_t rows_per_token, features;
  float epsilon;
  const void* x; /* [token_count, rows_per_token, features] */
  int64_t x_token_stride, x_row_stride;
  void* y; /* as x */
  int64_t y_token_stride, y_row_stride;
  const void* weight; /* the base's, [features] */
} dw_norm;
DW_API dw_status dw_rms_norm(const dw_norm* args, void* stream);

typedef struct dw_bias_slice {
  int32_t parameter, features;
  void* y; /* [token_count, features], read and written */
  int64_t y_stride;
  const void* bias; /* the base's, [features]; NULL for zeros */
} dw_bias_slice;

/* y_s[t] += the VALUES of the token's slot, or the base's bias, for every slice s. */
typedef struct dw_bias {
  dw_batch batch;
  int32_t slice_count;
  dw_bias_slice slices[DW_MAX_SLICES];
} dw_bias;
DW_API dw_status dw_add_bias(const dw_bias* args, void* stream);

/* y[t] = row ids[t] of the tenant's table: the base's row, plus the DENSE record's, or the ROWS
 * record's instead. Rows that neither has (ids beyond base_rows, negative ids) are zeros. */
typedef struct dw_embedding {
  dw_batch batch;
  int32_t parameter;
  int32_t base_rows, features, in_offset;
  const int64_t* ids; /* device [token_count] */
  const void* table;  /* the base's, [base_rows, features] */
  int64_t table_stride;
  void* y; /* [token_count, features] */
  int64_t y_stride;
} dw_embedding;
DW_API dw_status dw_embed(const dw_embedding* args, void* stream);

/* weights[t, e] = softmax_e(W x[t] / temperature) + b[e], or b[e] without W, for experts of the MIX
 * record of the token's slot; zeros for experts that it lacks, and without such a record. In fp32.
 */
typedef struct dw_gate {
  dw_batch batch;
  int32_t parameter, features;
  const void* x; /* [token_count, features] */
  int64_t x_stride;
  float* weights; /* [token_count, DW_MAX_EXPERTS] */
  int64_t weights_stride;
} dw_gate;
DW_API dw_status dw_gate_weights(const dw_gate* args, void* stream);

#ifdef __cplusplus
}
#endif

#endif /* DELTAWEAVE_H_ */
