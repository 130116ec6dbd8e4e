// SPDX-License-Identifier: Apache-2.0
// What TensorRT asks a plugin library for: getCreators and setLoggerFinder. The library needs no
// symbol of TensorRT, so one build of it serves TensorRT and TensorRT-RTX.
#include "registry.h"

#include <cstdint>
#include <deque>

#include "log.h"

namespace deltaweave::trt {
namespace {

std::vector<OpType> op_types() {
  return {plan_type(),  delta_gemm_type(), dense_gemm_type(), rms_norm_type(),     add_bias_type(),
          embed_type(), gate_type(),       gated_lora_type(), weighed_delta_type()};
}

class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  explicit Creator(OpType type) : type_(std::move(type)) {
    for (const FieldSpec& field : type_.fields) {
      const bool number = field.kind == FieldSpec::kNumber;
      fields_.emplace_back(
          field.name, nullptr,
          number ? nvinfer1::PluginFieldType::kFLOAT32 : nvinfer1::PluginFieldType::kINT32, 1);
    }
    collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
  }
  Creator(const Creator&) = delete;
  Creator& operator=(const Creator&) = delete;

  nvinfer1::IPluginV3* createPlugin(const char*, const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override {
    try {
      std::unique_ptr<Op> op = type_.make(type_.name, Fields(type_.fields, fields));
      op->set_phase(phase);
      return op.release();
    } catch (const std::exception& error) {
      report(type_.name, error.what());
      return nullptr;
    }
  }

  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
  const char* getPluginName() const noexcept override { return type_.name; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  OpType type_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_;
};

// Made once, when the library is first asked.
struct Creators {
  Creators() {
    std::vector<OpType> types = op_types();
    for (OpType& type : types) {
      pointers.push_back(&creators.emplace_back(std::move(type)));
    }
  }
  std::deque<Creator> creators;
  std::vector<nvinfer1::IPluginCreatorInterface*> pointers;
};

}  // namespace
}  // namespace deltaweave::trt

#define DELTAWEAVE_EXPORT extern "C" __attribute__((visibility("default")))

DELTAWEAVE_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  deltaweave::trt::set_logger_finder(finder);
}

DELTAWEAVE_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static deltaweave::trt::Creators made;
  count = static_cast<int32_t>(made.pointers.size());
  return made.pointers.data();
}

// For hosts in other languages: the last failure of any op, or an empty text; see log.h.
DELTAWEAVE_EXPORT size_t deltaweave_trt_last_error(char* text, size_t size) {
  return deltaweave::trt::take_last_error(text, size);
}
