// SPDX-License-Identifier: Apache-2.0
// DeltaweavePlan(slots int32 [tokens], directory) -> plan int32 [plan_ints]: groups a step's tokens
// by slot.
#include "plan_op.h"

#include "log.h"
#include "registry.h"

namespace deltaweave::trt {
namespace {

class Plan final : public OpBase<Plan> {
 public:
  Plan(const char* name, const Fields& fields)
      : OpBase(name, fields, {{Type::kInt32, Type::kInt64}, {Type::kInt32}, {-1}}) {}

 private:
  void shape(const nvinfer1::DimsExprs*, nvinfer1::DimsExprs* outputs,
             nvinfer1::IExprBuilder& builder) const override {
    outputs[0].nbDims = 1;
    outputs[0].d[0] = builder.constant(plan_ints());
  }

  void configure(const Shapes& shapes) override {
    const Dims& slots = shapes.inputs[0];
    require_directory(shapes.inputs[1], {});
    require_vector("slots", slots, volume(slots));
    if (slots.d[0] < 1 || slots.d[0] > DW_MAX_TOKENS) {
      fail("a step of ", slots.d[0], " tokens, expected 1 to ", DW_MAX_TOKENS);
    }
    token_count_ = static_cast<int32_t>(slots.d[0]);
    slot_count_ = static_cast<int32_t>(shapes.inputs[1].d[1]);
  }

  void launch(const Pointers& at) override {
    require(dw_plan_tokens(static_cast<const int32_t*>(at.inputs[0]), token_count_, slot_count_, 0,
                           at.outputs[0], plan_ints() * sizeof(int32_t), at.stream));
  }

  int32_t token_count_ = 0;
  int32_t slot_count_ = 0;
};

}  // namespace

int64_t plan_ints() {
  size_t bytes = 0;
  require(dw_plan_bytes(DW_MAX_TOKENS, &bytes));
  return static_cast<int64_t>(bytes / sizeof(int32_t));
}

OpType plan_type() { return make_type<Plan>("DeltaweavePlan", {}); }

}  // namespace deltaweave::trt
