// SPDX-License-Identifier: Apache-2.0
// The attributes of a node: read from TensorRT's fields, checked, and handed back when a plan is
// written.
#ifndef DELTAWEAVE_TRT_FIELDS_H_
#define DELTAWEAVE_TRT_FIELDS_H_

#include <NvInferRuntime.h>

#include <cstdint>
#include <string>
#include <vector>

namespace deltaweave::trt {

// One field that an op wants. Integers arrive as INT32 or INT64, a number as FLOAT32 or FLOAT64.
struct FieldSpec {
  enum Kind { kInteger, kIntegers, kNumber };
  const char* name;
  Kind kind;
};

class Fields {
 public:
  // Throws OpError for a field that is missing, or of another type or length than the op wants.
  // Fields that no op asked for are ignored.
  Fields(const std::vector<FieldSpec>& specs, const nvinfer1::PluginFieldCollection* given);
  Fields(const Fields& other);
  Fields& operator=(const Fields&) = delete;

  int32_t integer(const char* name) const { return integers(name).front(); }
  const std::vector<int32_t>& integers(const char* name) const { return find(name).integers; }
  float number(const char* name) const { return find(name).number; }

  // What a plan has to keep; lives as long as this object.
  const nvinfer1::PluginFieldCollection* collection() const { return &collection_; }

 private:
  struct Value {
    const char* name;
    FieldSpec::Kind kind;
    std::vector<int32_t> integers;
    float number;
  };
  const Value& find(const char* name) const;
  void collect();

  std::vector<Value> values_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_;
};

}  // namespace deltaweave::trt

#endif  // DELTAWEAVE_TRT_FIELDS_H_
