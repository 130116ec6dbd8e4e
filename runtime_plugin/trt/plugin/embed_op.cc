// SPDX-License-Identifier: Apache-2.0
// DeltaweaveEmbed(ids int64 [..], table, slots, arena_address, directory) -> y [.., features]: rows
// of each token's tenant.
#include "log.h"
#include "registry.h"

namespace deltaweave::trt {
namespace {

class Embed final : public OpBase<Embed> {
 public:
  Embed(const char* name, const Fields& fields)
      : OpBase(name, fields,
               {{Type::kInt64, Type::kActivation, Type::kInt32, Type::kInt64, Type::kInt64},
                {Type::kActivation},
                {-1}}) {}

 private:
  void shape(const nvinfer1::DimsExprs* inputs, nvinfer1::DimsExprs* outputs,
             nvinfer1::IExprBuilder&) const override {
    outputs[0] = inputs[0];
    outputs[0].d[outputs[0].nbDims++] = inputs[1].d[1];
  }

  void configure(const Shapes& shapes) override {
    const Dims &ids = shapes.inputs[0], &table = shapes.inputs[1];
    require_directory(shapes.inputs[4], fields().integers("parameter"));
    if (table.nbDims != 2) fail("table of shape ", to_string(table), ", expected [rows, features]");
    require_vector("arena_address", shapes.inputs[3], 1);
    embedding_ = {};
    embedding_.batch = make_batch(shapes.inputs[2], shapes.inputs[4], shapes.dtype);
    if (volume(ids) != embedding_.batch.token_count) {
      fail("ids of shape ", to_string(ids), " for ", embedding_.batch.token_count, " tokens");
    }
    embedding_.parameter = fields().integer("parameter");
    embedding_.base_rows = static_cast<int32_t>(table.d[0]);
    embedding_.features = static_cast<int32_t>(table.d[1]);
    embedding_.table_stride = embedding_.y_stride = table.d[1];
  }

  void launch(const Pointers& at) override {
    embedding_.ids = static_cast<const int64_t*>(at.inputs[0]);
    embedding_.table = at.inputs[1];
    embedding_.batch.slots = static_cast<const int32_t*>(at.inputs[2]);
    embedding_.batch.arena_address = static_cast<const int64_t*>(at.inputs[3]);
    embedding_.batch.directory = static_cast<const int64_t*>(at.inputs[4]);
    embedding_.y = at.outputs[0];
    require(dw_embed(&embedding_, at.stream));
  }

  dw_embedding embedding_ = {};
};

}  // namespace

OpType embed_type() {
  return make_type<Embed>("DeltaweaveEmbed", {{"parameter", FieldSpec::kInteger}});
}

}  // namespace deltaweave::trt
