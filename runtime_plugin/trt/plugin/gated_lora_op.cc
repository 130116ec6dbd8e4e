// SPDX-License-Identifier: Apache-2.0
// DeltaweaveGatedLora(x, y_0 .., plan, arena, directory, weights) -> y'_0 ..: y_s += sum_e
// weights[t, e] scale_e B_e (A_e x) of each token's fusion, for up to four linears that read the
// same x; plan is of the fusions' slots, weights what DeltaweaveGate gave.
#include "gemm_op.h"
#include "log.h"
#include "registry.h"

namespace deltaweave::trt {
namespace {

Signature gated_signature(size_t slices) {
  Signature signature = gemm_signature(slices);
  signature.inputs.push_back(Type::kFloat32);
  return signature;
}

class GatedLora final : public OpBase<GatedLora> {
 public:
  GatedLora(const char* name, const Fields& fields)
      : OpBase(name, fields, gated_signature(fields.integers("parameters").size())) {}

 private:
  void configure(const Shapes& shapes) override {
    gemm_ = make_gemm(shapes, fields().integers("parameters"), fields().integer("max_rank"));
    const Dims& weights = shapes.inputs[gemm_.slice_count + 4];
    if (leading(weights) != gemm_.token_count || last(weights) != DW_MAX_EXPERTS) {
      fail("weights of shape ", to_string(weights), " for ", gemm_.token_count, " tokens of ",
           DW_MAX_EXPERTS, " experts");
    }
    gemm_.weights_stride = DW_MAX_EXPERTS;
  }

  size_t workspace_bytes(const Shapes& largest) const override {
    return gemm_workspace_bytes(largest, fields().integers("parameters"),
                                fields().integer("max_rank"));
  }

  void launch(const Pointers& at) override {
    set_pointers(gemm_, at);
    gemm_.weights = static_cast<const float*>(at.inputs[gemm_.slice_count + 4]);
    require(dw_gated_lora(&gemm_, at.stream));
  }

  dw_gemm gemm_ = {};
};

}  // namespace

OpType gated_lora_type() {
  return make_type<GatedLora>("DeltaweaveGatedLora", {{"parameters", FieldSpec::kIntegers},
                                                      {"max_rank", FieldSpec::kInteger}});
}

}  // namespace deltaweave::trt
