// SPDX-License-Identifier: Apache-2.0
// DeltaweaveAddBias(y_0 .., bias_0 .., slots, arena, directory) -> y'_0 ..: adds the bias of each
// token's tenant, for up to four linears.
#include "log.h"
#include "registry.h"

namespace deltaweave::trt {
namespace {

Signature bias_signature(size_t slices) {
  Signature signature;
  signature.inputs.assign(2 * slices, Type::kActivation);
  signature.inputs.insert(signature.inputs.end(), {Type::kInt32, Type::kInt64, Type::kInt64});
  signature.outputs.assign(slices, Type::kActivation);
  for (size_t s = 0; s < slices; ++s) signature.aliases.push_back(static_cast<int32_t>(s));
  return signature;
}

class AddBias final : public OpBase<AddBias> {
 public:
  AddBias(const char* name, const Fields& fields)
      : OpBase(name, fields, bias_signature(fields.integers("parameters").size())) {}

 private:
  void configure(const Shapes& shapes) override {
    const std::vector<int32_t>& parameters = fields().integers("parameters");
    const size_t slices = parameters.size();
    if (slices > DW_MAX_SLICES) fail(slices, " parameters, expected at most ", DW_MAX_SLICES);
    const Dims& directory = shapes.inputs[2 * slices + 2];
    require_directory(directory, parameters);
    bias_ = {};
    bias_.batch = make_batch(shapes.inputs[2 * slices], directory, shapes.dtype);
    bias_.slice_count = static_cast<int32_t>(slices);
    for (size_t s = 0; s < slices; ++s) {
      const Dims& y = shapes.inputs[s];
      require_vector("bias", shapes.inputs[slices + s], last(y));
      if (leading(y) != bias_.batch.token_count) {
        fail("y of shape ", to_string(y), " for ", bias_.batch.token_count, " tokens");
      }
      bias_.slices[s].parameter = parameters[s];
      bias_.slices[s].features = last(y);
      bias_.slices[s].y_stride = last(y);
    }
  }

  void launch(const Pointers& at) override {
    const int32_t slices = bias_.slice_count;
    for (int32_t s = 0; s < slices; ++s) {
      bias_.slices[s].y = at.outputs[s];
      bias_.slices[s].bias = at.inputs[slices + s];
    }
    bias_.batch.slots = static_cast<const int32_t*>(at.inputs[2 * slices]);
    bias_.batch.arena = at.inputs[2 * slices + 1];
    bias_.batch.directory = static_cast<const int64_t*>(at.inputs[2 * slices + 2]);
    require(dw_add_bias(&bias_, at.stream));
  }

  dw_bias bias_ = {};
};

}  // namespace

OpType add_bias_type() {
  return make_type<AddBias>("DeltaweaveAddBias", {{"parameters", FieldSpec::kIntegers}});
}

}  // namespace deltaweave::trt
