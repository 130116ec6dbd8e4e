// SPDX-License-Identifier: Apache-2.0
#include "gemm_op.h"

#include <algorithm>

#include "log.h"
#include "plan_op.h"

namespace deltaweave::trt {

Signature gemm_signature(size_t slices) {
  Signature signature;
  signature.inputs.assign(1 + slices, Type::kActivation);
  signature.inputs.insert(signature.inputs.end(), {Type::kInt32, Type::kInt64, Type::kInt64});
  signature.outputs.assign(slices, Type::kActivation);
  for (size_t s = 0; s < slices; ++s) signature.aliases.push_back(static_cast<int32_t>(1 + s));
  return signature;
}

dw_gemm make_gemm(const Shapes& shapes, const std::vector<int32_t>& parameters, int32_t max_rank) {
  const size_t slices = parameters.size();
  if (slices > DW_MAX_SLICES) fail(slices, " parameters, expected at most ", DW_MAX_SLICES);
  const Dims& x = shapes.inputs[0];
  const Dims& directory = shapes.inputs[slices + 3];
  require_directory(directory, parameters);
  require_vector("plan", shapes.inputs[slices + 1], plan_ints());
  dw_gemm gemm = {};
  gemm.parameter_count = static_cast<int32_t>(directory.d[0]);
  gemm.slot_count = static_cast<int32_t>(directory.d[1]);
  gemm.max_rank = max_rank;
  gemm.dtype = shapes.dtype;
  gemm.token_count = leading(x);
  gemm.in_features = last(x);
  gemm.x_stride = gemm.in_features;
  gemm.slice_count = static_cast<int32_t>(slices);
  for (size_t s = 0; s < slices; ++s) {
    const Dims& y = shapes.inputs[1 + s];
    if (leading(y) != gemm.token_count) {
      fail("y of shape ", to_string(y), " for an x of shape ", to_string(x));
    }
    gemm.slices[s].parameter = parameters[s];
    gemm.slices[s].out_features = last(y);
    gemm.slices[s].y_stride = last(y);
  }
  return gemm;
}

size_t gemm_workspace_bytes(const Shapes& largest, const std::vector<int32_t>& parameters,
                            int32_t max_rank) {
  dw_gemm gemm = make_gemm(largest, parameters, max_rank);
  const int32_t most = std::min(gemm.token_count, DW_MAX_TOKENS);
  size_t bytes = 0;
  for (gemm.token_count = 1; gemm.token_count <= most; ++gemm.token_count) {
    size_t needed = 0;
    require(dw_gemm_workspace_bytes(&gemm, &needed));
    bytes = std::max(bytes, needed);
  }
  return bytes;
}

void set_pointers(dw_gemm& gemm, const Pointers& at) {
  const int32_t slices = gemm.slice_count;
  gemm.x = at.inputs[0];
  gemm.plan = at.inputs[1 + slices];
  gemm.arena = at.inputs[2 + slices];
  gemm.directory = static_cast<const int64_t*>(at.inputs[3 + slices]);
  for (int32_t s = 0; s < slices; ++s) gemm.slices[s].y = at.outputs[s];
  gemm.workspace = at.workspace;
  require(dw_gemm_workspace_bytes(&gemm, &gemm.workspace_bytes));
}

}  // namespace deltaweave::trt
