// SPDX-License-Identifier: Apache-2.0
// DeltaweaveRmsNorm(x, weight, slots, arena_address, directory) -> y: the norm with the weight of
// each token's tenant. x [.., features] has one row a token, or several (heads: q and k norms).
#include "log.h"
#include "registry.h"

namespace deltaweave::trt {
namespace {

class RmsNorm final : public OpBase<RmsNorm> {
 public:
  RmsNorm(const char* name, const Fields& fields)
      : OpBase(name, fields,
               {{Type::kActivation, Type::kActivation, Type::kInt32, Type::kInt64, Type::kInt64},
                {Type::kActivation},
                {-1}}) {}

 private:
  void shape(const nvinfer1::DimsExprs* inputs, nvinfer1::DimsExprs* outputs,
             nvinfer1::IExprBuilder&) const override {
    outputs[0] = inputs[0];
  }

  void configure(const Shapes& shapes) override {
    const Dims& x = shapes.inputs[0];
    require_directory(shapes.inputs[4], fields().integers("parameter"));
    require_vector("weight", shapes.inputs[1], last(x));
    require_vector("arena_address", shapes.inputs[3], 1);
    norm_ = {};
    norm_.batch = make_batch(shapes.inputs[2], shapes.inputs[4], shapes.dtype);
    norm_.parameter = fields().integer("parameter");
    norm_.features = last(x);
    norm_.epsilon = fields().number("epsilon");
    const int32_t rows = leading(x), tokens = norm_.batch.token_count;
    if (tokens < 1 || rows % tokens != 0) {
      fail("x of shape ", to_string(x), " for ", tokens, " tokens");
    }
    norm_.rows_per_token = rows / tokens;
    norm_.x_row_stride = norm_.y_row_stride = norm_.features;
    norm_.x_token_stride = norm_.y_token_stride =
        static_cast<int64_t>(norm_.rows_per_token) * norm_.features;
  }

  void launch(const Pointers& at) override {
    norm_.x = at.inputs[0];
    norm_.weight = at.inputs[1];
    norm_.batch.slots = static_cast<const int32_t*>(at.inputs[2]);
    norm_.batch.arena_address = static_cast<const int64_t*>(at.inputs[3]);
    norm_.batch.directory = static_cast<const int64_t*>(at.inputs[4]);
    norm_.y = at.outputs[0];
    require(dw_rms_norm(&norm_, at.stream));
  }

  dw_norm norm_ = {};
};

}  // namespace

OpType rms_norm_type() {
  return make_type<RmsNorm>("DeltaweaveRmsNorm",
                            {{"parameter", FieldSpec::kInteger}, {"epsilon", FieldSpec::kNumber}});
}

}  // namespace deltaweave::trt
