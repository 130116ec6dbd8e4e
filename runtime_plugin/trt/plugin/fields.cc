// SPDX-License-Identifier: Apache-2.0
#include "fields.h"

#include <limits>
#include <string_view>

#include "log.h"

namespace deltaweave::trt {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

const PluginField& named(const nvinfer1::PluginFieldCollection* given, const char* name) {
  for (int32_t i = 0; given != nullptr && i < given->nbFields; ++i) {
    const PluginField& field = given->fields[i];
    if (field.name != nullptr && std::string_view(field.name) == name) return field;
  }
  fail("field ", name, " is missing");
}

std::vector<int32_t> read_integers(const PluginField& field) {
  std::vector<int32_t> values;
  for (int32_t i = 0; i < field.length; ++i) {
    const int64_t value = field.type == PluginFieldType::kINT64
                              ? static_cast<const int64_t*>(field.data)[i]
                              : static_cast<const int32_t*>(field.data)[i];
    if (value < 0 || value > std::numeric_limits<int32_t>::max()) {
      fail("field ", field.name, " holds ", value, ", expected 0 to 2147483647");
    }
    values.push_back(static_cast<int32_t>(value));
  }
  return values;
}

bool is_integer(const PluginField& field) {
  return field.type == PluginFieldType::kINT32 || field.type == PluginFieldType::kINT64;
}

bool is_number(const PluginField& field) {
  return field.type == PluginFieldType::kFLOAT32 || field.type == PluginFieldType::kFLOAT64;
}

}  // namespace

Fields::Fields(const std::vector<FieldSpec>& specs, const nvinfer1::PluginFieldCollection* given) {
  for (const FieldSpec& spec : specs) {
    const PluginField& field = named(given, spec.name);
    const bool number = spec.kind == FieldSpec::kNumber;
    if (number ? !is_number(field) : !is_integer(field)) {
      fail("field ", spec.name, " has type ", static_cast<int32_t>(field.type), ", expected ",
           number ? "FLOAT32 or FLOAT64" : "INT32 or INT64");
    }
    if (field.data == nullptr || field.length < 1 ||
        (spec.kind != FieldSpec::kIntegers && field.length != 1)) {
      fail("field ", spec.name, " has ", field.data == nullptr ? 0 : field.length,
           " values, expected ", spec.kind == FieldSpec::kIntegers ? "at least one" : "one");
    }
    Value value = {spec.name, spec.kind, {}, 0.0f};
    if (!number) {
      value.integers = read_integers(field);
    } else if (field.type == PluginFieldType::kFLOAT32) {
      value.number = *static_cast<const float*>(field.data);
    } else {
      value.number = static_cast<float>(*static_cast<const double*>(field.data));
    }
    values_.push_back(value);
  }
  collect();
}

Fields::Fields(const Fields& other) : values_(other.values_) { collect(); }

const Fields::Value& Fields::find(const char* name) const {
  for (const Value& value : values_) {
    if (std::string_view(value.name) == name) return value;
  }
  fail("no field ", name);
}

void Fields::collect() {
  for (const Value& value : values_) {
    const bool number = value.kind == FieldSpec::kNumber;
    fields_.emplace_back(value.name,
                         number ? static_cast<const void*>(&value.number) : value.integers.data(),
                         number ? PluginFieldType::kFLOAT32 : PluginFieldType::kINT32,
                         number ? 1 : static_cast<int32_t>(value.integers.size()));
  }
  collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
}

}  // namespace deltaweave::trt
