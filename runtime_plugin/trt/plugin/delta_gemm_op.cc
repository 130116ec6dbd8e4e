// SPDX-License-Identifier: Apache-2.0
// DeltaweaveDeltaGemm(x, y_0 .., plan, arena, directory) -> y'_0 ..: y_s += U^_s (sigma (V^_s x))
// of each token's tenant, for up to four linears that read the same x.
#include "gemm_op.h"
#include "log.h"
#include "registry.h"

namespace deltaweave::trt {
namespace {

class DeltaGemm final : public OpBase<DeltaGemm> {
 public:
  DeltaGemm(const char* name, const Fields& fields)
      : OpBase(name, fields, gemm_signature(fields.integers("parameters").size())) {}

 private:
  void configure(const Shapes& shapes) override {
    gemm_ = make_gemm(shapes, fields().integers("parameters"), fields().integer("max_rank"));
  }

  size_t workspace_bytes(const Shapes& largest) const override {
    return gemm_workspace_bytes(largest, fields().integers("parameters"),
                                fields().integer("max_rank"));
  }

  void launch(const Pointers& at) override {
    set_pointers(gemm_, at);
    require(dw_delta_gemm(&gemm_, at.stream));
  }

  dw_gemm gemm_ = {};
};

}  // namespace

OpType delta_gemm_type() {
  return make_type<DeltaGemm>("DeltaweaveDeltaGemm", {{"parameters", FieldSpec::kIntegers},
                                                      {"max_rank", FieldSpec::kInteger}});
}

}  // namespace deltaweave::trt
