// SPDX-License-Identifier: Apache-2.0
// DeltaweaveGate(x, slots, arena_address, directory) -> weights FP32 [tokens, 8]: what every token
// gives the experts of its fusion. x [.., hidden_size] is a decoder block's input, before its norm.
#include "log.h"
#include "registry.h"

namespace deltaweave::trt {
namespace {

class GateOp final : public OpBase<GateOp> {
 public:
  GateOp(const char* name, const Fields& fields)
      : OpBase(name, fields,
               {{Type::kActivation, Type::kInt32, Type::kInt64, Type::kInt64},
                {Type::kFloat32},
                {-1}}) {}

 private:
  void shape(const nvinfer1::DimsExprs* inputs, nvinfer1::DimsExprs* outputs,
             nvinfer1::IExprBuilder& builder) const override {
    outputs[0].nbDims = 2;
    outputs[0].d[0] = inputs[1].d[0];
    outputs[0].d[1] = builder.constant(DW_MAX_EXPERTS);
  }

  void configure(const Shapes& shapes) override {
    const Dims& x = shapes.inputs[0];
    require_directory(shapes.inputs[3], fields().integers("parameter"));
    require_vector("arena_address", shapes.inputs[2], 1);
    gate_ = {};
    gate_.batch = make_batch(shapes.inputs[1], shapes.inputs[3], shapes.dtype);
    gate_.parameter = fields().integer("parameter");
    gate_.features = last(x);
    gate_.x_stride = gate_.features;
    gate_.weights_stride = DW_MAX_EXPERTS;
    if (leading(x) != gate_.batch.token_count) {
      fail("x of shape ", to_string(x), " for ", gate_.batch.token_count, " tokens");
    }
  }

  void launch(const Pointers& at) override {
    gate_.x = at.inputs[0];
    gate_.batch.slots = static_cast<const int32_t*>(at.inputs[1]);
    gate_.batch.arena_address = static_cast<const int64_t*>(at.inputs[2]);
    gate_.batch.directory = static_cast<const int64_t*>(at.inputs[3]);
    gate_.weights = static_cast<float*>(at.outputs[0]);
    require(dw_gate_weights(&gate_, at.stream));
  }

  dw_gate gate_ = {};
};

}  // namespace

OpType gate_type() {
  return make_type<GateOp>("DeltaweaveGate", {{"parameter", FieldSpec::kInteger}});
}

}  // namespace deltaweave::trt
