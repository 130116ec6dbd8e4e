// SPDX-License-Identifier: Apache-2.0
// DeltaweaveDenseGemm(x, y, plan, arena, directory) -> y': lm_head's low-bit or replaced rows of
// each token's tenant.
#include "gemm_op.h"
#include "log.h"
#include "registry.h"

namespace deltaweave::trt {
namespace {

class DenseGemm final : public OpBase<DenseGemm> {
 public:
  DenseGemm(const char* name, const Fields& fields) : OpBase(name, fields, gemm_signature(1)) {}

 private:
  void configure(const Shapes& shapes) override {
    gemm_ = make_gemm(shapes, fields().integers("parameter"), fields().integer("max_rank"));
  }

  size_t workspace_bytes(const Shapes& largest) const override {
    return gemm_workspace_bytes(largest, fields().integers("parameter"),
                                fields().integer("max_rank"));
  }

  void launch(const Pointers& at) override {
    set_pointers(gemm_, at);
    require(dw_dense_gemm(&gemm_, at.stream));
  }

  dw_gemm gemm_ = {};
};

}  // namespace

OpType dense_gemm_type() {
  return make_type<DenseGemm>("DeltaweaveDenseGemm", {{"parameter", FieldSpec::kInteger},
                                                      {"max_rank", FieldSpec::kInteger}});
}

}  // namespace deltaweave::trt
