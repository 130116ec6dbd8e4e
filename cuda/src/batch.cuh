// SPDX-License-Identifier: Apache-2.0
// What the element-wise kernels share: a token's tenant, and eight neighbouring 16-bit values of a
// row at a time, as floats.
#ifndef DELTAWEAVE_SRC_BATCH_CUH_
#define DELTAWEAVE_SRC_BATCH_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "deltaweave.h"

namespace dw {

__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T rounded(float value);
template <>
__device__ __forceinline__ __half rounded(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 rounded(float value) {
  return __float2bfloat16_rn(value);
}

// The directory row of a parameter for a token's tenant; null for the bare base.
__device__ __forceinline__ const int64_t* find_row(const dw_batch& batch, int parameter,
                                                   int token) {
  const int slot = batch.slots[token];
  if (slot < 0 || slot >= batch.slot_count) return nullptr;
  const int64_t row = static_cast<int64_t>(parameter) * batch.slot_count + slot;
  return batch.directory + row * DW_DIRECTORY_FIELDS;
}

__device__ __forceinline__ const unsigned char* find_arena(const dw_batch& batch) {
  return batch.arena_address == nullptr
             ? static_cast<const unsigned char*>(batch.arena)
             : reinterpret_cast<const unsigned char*>(*batch.arena_address);
}

// The values that replace a vector for a token; null to take the base's.
__device__ __forceinline__ const float* find_values(const dw_batch& batch, int parameter,
                                                    int token) {
  const int64_t* row = find_row(batch, parameter, token);
  if (row == nullptr || row[DW_FIELD_KIND] != DW_VALUES + 1) return nullptr;
  return reinterpret_cast<const float*>(find_arena(batch) + row[DW_FIELD_VALUES]);
}

// Whether octets of a row may be moved as one vector.
template <typename T>
__device__ __forceinline__ bool is_wide(const T* at, int first, int features) {
  return first >= 0 && first + 8 <= features && reinterpret_cast<uintptr_t>(at + first) % 16 == 0;
}

template <typename T>
__device__ __forceinline__ void read_octet(const uint4& raw, float (&values)[8]) {
  const T* typed = reinterpret_cast<const T*>(&raw);
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] = to_float(typed[i]);
}
template <typename T>
__device__ __forceinline__ uint4 write_octet(const float (&values)[8]) {
  uint4 raw;
  T* typed = reinterpret_cast<T*>(&raw);
#pragma unroll
  for (int i = 0; i < 8; ++i) typed[i] = rounded<T>(values[i]);
  return raw;
}

// Elements first .. first + 7 of a row; zeros outside [0, features).
template <typename T>
__device__ __forceinline__ void load_octet(const T* row, int first, int features,
                                           float (&values)[8]) {
  if (is_wide(row, first, features)) {
    return read_octet<T>(*reinterpret_cast<const uint4*>(row + first), values);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const bool inside = first + i >= 0 && first + i < features;
    values[i] = inside ? to_float(row[first + i]) : 0.f;
  }
}

// The inverse; nothing outside [0, features) is written.
template <typename T>
__device__ __forceinline__ void store_octet(T* row, int first, int features,
                                            const float (&values)[8]) {
  if (is_wide(row, first, features)) {
    *reinterpret_cast<uint4*>(row + first) = write_octet<T>(values);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (first + i >= 0 && first + i < features) row[first + i] = rounded<T>(values[i]);
  }
}

// A vector parameter's elements for a token: the tenant's, rounded to T as a fine-tune holds them,
// or the base's, or zeros if it has none. `first` is a multiple of 8.
template <typename T>
__device__ __forceinline__ void load_parameter(const float* own, const T* base, int first,
                                               int features, float (&values)[8]) {
  if (own != nullptr && first + 8 <= features) {
    const float4 low = *reinterpret_cast<const float4*>(own + first);
    const float4 high = *reinterpret_cast<const float4*>(own + first + 4);
    const float all[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = to_float(rounded<T>(all[i]));
  } else if (own != nullptr) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      values[i] = first + i < features ? to_float(rounded<T>(own[first + i])) : 0.f;
    }
  } else if (base != nullptr) {
    load_octet(base, first, features, values);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = 0.f;
  }
}

}  // namespace dw

#endif  // DELTAWEAVE_SRC_BATCH_CUH_
