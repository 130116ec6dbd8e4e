// SPDX-License-Identifier: Apache-2.0
// The ops of the plugin. A new op is a file like the others and a line in `op_types`.
#ifndef DELTAWEAVE_TRT_REGISTRY_H_
#define DELTAWEAVE_TRT_REGISTRY_H_

#include <memory>
#include <utility>
#include <vector>

#include "op.h"

namespace deltaweave::trt {

OpType plan_type();
OpType delta_gemm_type();
OpType dense_gemm_type();
OpType rms_norm_type();
OpType add_bias_type();
OpType embed_type();
OpType gate_type();
OpType gated_lora_type();
OpType weighed_delta_type();

// Ops get their name from their type, so that it is written once.
template <typename T>
OpType make_type(const char* name, std::vector<FieldSpec> fields) {
  return {name, std::move(fields), [](const char* op, const Fields& values) {
            return std::unique_ptr<Op>(std::make_unique<T>(op, values));
          }};
}

}  // namespace deltaweave::trt

#endif  // DELTAWEAVE_TRT_REGISTRY_H_
