// SPDX-License-Identifier: Apache-2.0
// What a fusion adds to up to four linears that read the same x, weighed by what DeltaweaveGate
// gave:
//
//   DeltaweaveGatedLora(x, y_0 .., plan, arena, directory, weights) -> y'_0 ..
//     y_s += sum_e weights[t, e] scale_e B_e (A_e x) of each token's fusion
//   DeltaweaveWeighedDelta(the same), attribute `expert`
//     y_s += weights[t, expert] * the delta of the token's slot in plan, which is of the deltas
//     that are the experts at that place
#include "gemm_op.h"
#include "log.h"
#include "registry.h"

namespace deltaweave::trt {
namespace {

Signature weighed_signature(size_t slices) {
  Signature signature = gemm_signature(slices);
  signature.inputs.push_back(Type::kFloat32);
  return signature;
}

template <bool kLora>
class Weighed final : public OpBase<Weighed<kLora>> {
 public:
  Weighed(const char* name, const Fields& fields)
      : OpBase<Weighed<kLora>>(name, fields,
                               weighed_signature(fields.integers("parameters").size())) {}

 private:
  void configure(const Shapes& shapes) override {
    const Fields& fields = this->fields();
    gemm_ = make_gemm(shapes, fields.integers("parameters"), fields.integer("max_rank"));
    const Dims& weights = shapes.inputs[gemm_.slice_count + 4];
    if (leading(weights) != gemm_.token_count || last(weights) != DW_MAX_EXPERTS) {
      fail("weights of shape ", to_string(weights), " for ", gemm_.token_count, " tokens of ",
           DW_MAX_EXPERTS, " experts");
    }
    gemm_.weights_stride = DW_MAX_EXPERTS;
    if (kLora) return;
    expert_ = fields.integer("expert");
    if (expert_ < 0 || expert_ >= DW_MAX_EXPERTS) {
      fail("expert ", expert_, ", expected 0 to ", DW_MAX_EXPERTS - 1);
    }
  }

  size_t workspace_bytes(const Shapes& largest) const override {
    return gemm_workspace_bytes(largest, this->fields().integers("parameters"),
                                this->fields().integer("max_rank"));
  }

  void launch(const Pointers& at) override {
    set_pointers(gemm_, at);
    gemm_.weights = static_cast<const float*>(at.inputs[gemm_.slice_count + 4]) + expert_;
    require(kLora ? dw_gated_lora(&gemm_, at.stream) : dw_delta_gemm(&gemm_, at.stream));
  }

  dw_gemm gemm_ = {};
  int32_t expert_ = 0;
};

}  // namespace

OpType gated_lora_type() {
  return make_type<Weighed<true>>("DeltaweaveGatedLora", {{"parameters", FieldSpec::kIntegers},
                                                          {"max_rank", FieldSpec::kInteger}});
}

OpType weighed_delta_type() {
  return make_type<Weighed<false>>("DeltaweaveWeighedDelta", {{"parameters", FieldSpec::kIntegers},
                                                              {"max_rank", FieldSpec::kInteger},
                                                              {"expert", FieldSpec::kInteger}});
}

}  // namespace deltaweave::trt
