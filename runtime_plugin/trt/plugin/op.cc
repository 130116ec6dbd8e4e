// SPDX-License-Identifier: Apache-2.0
#include "op.h"

#include <algorithm>
#include <limits>

#include "log.h"

namespace deltaweave::trt {

using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;
using nvinfer1::TensorRTPhase;

namespace {

constexpr int32_t kDone = 0;
constexpr int32_t kFailed = 1;

bool is_activation(DataType type) { return type == DataType::kHALF || type == DataType::kBF16; }

DataType data_type(Type type, DataType activation) {
  switch (type) {
    case Type::kInt32:
      return DataType::kINT32;
    case Type::kInt64:
      return DataType::kINT64;
    case Type::kFloat32:
      return DataType::kFLOAT;
    case Type::kActivation:
      return activation;
  }
  return activation;
}

bool fits(Type type, DataType given, DataType activation) {
  if (type == Type::kActivation && !is_activation(given)) return false;
  return given == data_type(type, activation);
}

const char* type_name(Type type) {
  switch (type) {
    case Type::kInt32:
      return "INT32";
    case Type::kInt64:
      return "INT64";
    case Type::kFloat32:
      return "FP32";
    case Type::kActivation:
      return "FP16 or BF16, the same for all activations";
  }
  return "";
}

dw_dtype dtype_of(DataType type) { return type == DataType::kBF16 ? DW_BFLOAT16 : DW_FLOAT16; }

// The first activation's type decides which all have; FP16 for an op without any.
template <typename TypeOf>
DataType activation_type(const Signature& signature, TypeOf type_of) {
  const auto& inputs = signature.inputs;
  const auto found = std::find(inputs.begin(), inputs.end(), Type::kActivation);
  return found == inputs.end() ? DataType::kHALF : type_of(found - inputs.begin());
}

template <typename Desc, typename DimsOf>
Shapes shapes_of(const Signature& signature, const Desc* inputs, const Desc* outputs,
                 DimsOf dims_of, DataType activation) {
  Shapes shapes = {{}, {}, dtype_of(activation)};
  for (size_t i = 0; i < signature.inputs.size(); ++i) shapes.inputs.push_back(dims_of(inputs[i]));
  for (size_t i = 0; i < signature.outputs.size(); ++i) {
    shapes.outputs.push_back(dims_of(outputs[i]));
  }
  return shapes;
}

size_t element_bytes(DataType type) {
  if (type == DataType::kINT64) return 8;
  return type == DataType::kINT32 || type == DataType::kFLOAT ? 4 : 2;
}

}  // namespace

template <typename Call>
int32_t Op::guarded(Call call) const noexcept {
  try {
    call();
    return kDone;
  } catch (const std::exception& error) {
    report(name_, error.what(), recorder_);
  } catch (...) {
    report(name_, "unknown exception", recorder_);
  }
  return kFailed;
}

nvinfer1::IPluginCapability* Op::getCapabilityInterface(
    nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE:
      return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD:
      return static_cast<nvinfer1::IPluginV3OneBuildV2*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME:
      return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

nvinfer1::IPluginV3* Op::clone() noexcept {
  std::unique_ptr<Op> made;
  guarded([&] { made = copy(); });
  return made.release();
}

nvinfer1::IPluginV3* Op::attachToContext(nvinfer1::IPluginResourceContext* context) noexcept {
  auto* attached = static_cast<Op*>(clone());
  if (attached != nullptr && context != nullptr) attached->recorder_ = context->getErrorRecorder();
  return attached;
}

void Op::require_counts(int32_t input_count, int32_t output_count) const {
  const auto inputs = static_cast<int32_t>(signature_.inputs.size());
  const auto outputs = static_cast<int32_t>(signature_.outputs.size());
  if (input_count != inputs || output_count != outputs) {
    fail(input_count, " inputs and ", output_count, " outputs, expected ", inputs, " and ",
         outputs);
  }
}

int32_t Op::getOutputDataTypes(DataType* outputs, int32_t output_count, const DataType* inputs,
                               int32_t input_count) const noexcept {
  return guarded([&] {
    require_counts(input_count, output_count);
    const DataType activation =
        activation_type(signature_, [&](auto input) { return inputs[input]; });
    for (int32_t i = 0; i < input_count; ++i) {
      if (!fits(signature_.inputs[i], inputs[i], activation)) {
        fail("input ", i, " has data type ", static_cast<int32_t>(inputs[i]), ", expected ",
             type_name(signature_.inputs[i]));
      }
    }
    for (int32_t i = 0; i < output_count; ++i) {
      outputs[i] = data_type(signature_.outputs[i], activation);
    }
  });
}

int32_t Op::getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count,
                            const nvinfer1::DimsExprs*, int32_t, nvinfer1::DimsExprs* outputs,
                            int32_t output_count, nvinfer1::IExprBuilder& builder) noexcept {
  return guarded([&] {
    require_counts(input_count, output_count);
    shape(inputs, outputs, builder);
  });
}

void Op::shape(const nvinfer1::DimsExprs* inputs, nvinfer1::DimsExprs* outputs,
               nvinfer1::IExprBuilder&) const {
  for (size_t i = 0; i < signature_.outputs.size(); ++i) outputs[i] = inputs[signature_.aliases[i]];
}

bool Op::supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors,
                                   int32_t input_count, int32_t output_count) noexcept {
  bool supported = false;
  guarded([&] {
    require_counts(input_count, output_count);
    const PluginTensorDesc& desc = tensors[position].desc;
    const Type type = position < input_count ? signature_.inputs[position]
                                             : signature_.outputs[position - input_count];
    const DataType activation = activation_type(signature_, [&](auto input) {
      return input <= position ? tensors[input].desc.type : desc.type;
    });
    supported = desc.format == TensorFormat::kLINEAR && fits(type, desc.type, activation);
  });
  return supported;
}

// A build fails here, rather than a step later, if an op does not fit the profile's largest shapes.
int32_t Op::configurePlugin(const DynamicPluginTensorDesc* inputs, int32_t input_count,
                            const DynamicPluginTensorDesc* outputs, int32_t output_count) noexcept {
  return guarded([&] {
    require_counts(input_count, output_count);
    configure(largest_shapes(inputs, outputs));
  });
}

size_t Op::getWorkspaceSize(const DynamicPluginTensorDesc* inputs, int32_t,
                            const DynamicPluginTensorDesc* outputs, int32_t) const noexcept {
  size_t bytes = 0;
  guarded([&] { bytes = workspace_bytes(largest_shapes(inputs, outputs)); });
  return bytes;
}

Shapes Op::largest_shapes(const DynamicPluginTensorDesc* inputs,
                          const DynamicPluginTensorDesc* outputs) const {
  const DataType activation =
      activation_type(signature_, [&](auto input) { return inputs[input].desc.type; });
  const auto largest = [](const DynamicPluginTensorDesc& tensor) { return tensor.max; };
  return shapes_of(signature_, inputs, outputs, largest, activation);
}

int32_t Op::onShapeChange(const PluginTensorDesc* inputs, int32_t input_count,
                          const PluginTensorDesc* outputs, int32_t output_count) noexcept {
  return guarded([&] {
    require_counts(input_count, output_count);
    const DataType activation =
        activation_type(signature_, [&](auto input) { return inputs[input].type; });
    const auto now = [](const PluginTensorDesc& tensor) { return tensor.dims; };
    configure(shapes_of(signature_, inputs, outputs, now, activation));
  });
}

int32_t Op::enqueue(const PluginTensorDesc*, const PluginTensorDesc* output_descs,
                    const void* const* inputs, void* const* outputs, void* workspace,
                    cudaStream_t stream) noexcept {
  if (phase_ == TensorRTPhase::kBUILD) return kDone;
  return guarded([&] {
    const Pointers at = {inputs, outputs, workspace, stream};
    copy_aliased(output_descs, at);
    launch(at);
  });
}

// Where the builder did not alias an output, it begins as a copy of its input.
void Op::copy_aliased(const PluginTensorDesc* output_descs, const Pointers& at) const {
  for (size_t i = 0; i < signature_.outputs.size(); ++i) {
    if (signature_.aliases[i] < 0) continue;
    const void* source = at.inputs[signature_.aliases[i]];
    if (source == at.outputs[i]) continue;
    const size_t bytes = volume(output_descs[i].dims) * element_bytes(output_descs[i].type);
    const cudaError_t status =
        cudaMemcpyAsync(at.outputs[i], source, bytes, cudaMemcpyDeviceToDevice, at.stream);
    if (status != cudaSuccess) fail("copy of output ", i, ": ", cudaGetErrorString(status));
  }
}

std::string to_string(const Dims& dims) {
  std::string text = "[";
  for (int32_t i = 0; i < dims.nbDims; ++i) {
    text += (i ? ", " : "") + std::to_string(dims.d[i]);
  }
  return text + "]";
}

int64_t volume(const Dims& dims) {
  int64_t product = 1;
  for (int32_t i = 0; i < dims.nbDims; ++i) product *= dims.d[i];
  return product;
}

int32_t last(const Dims& dims) {
  if (dims.nbDims < 1) fail("a scalar, expected at least one dimension");
  return static_cast<int32_t>(dims.d[dims.nbDims - 1]);
}

int32_t leading(const Dims& dims) {
  const int32_t features = last(dims);
  return features == 0 ? 0 : static_cast<int32_t>(volume(dims) / features);
}

void require_vector(const char* name, const Dims& dims, int64_t length) {
  if (dims.nbDims != 1 || dims.d[0] != length) {
    fail(name, " of shape ", to_string(dims), ", expected [", length, "]");
  }
}

void require_directory(const Dims& dims, const std::vector<int32_t>& parameters) {
  if (dims.nbDims != 3 || dims.d[1] < 1 || dims.d[2] != DW_DIRECTORY_FIELDS) {
    fail("directory of shape ", to_string(dims), ", expected [parameters, slots, ",
         DW_DIRECTORY_FIELDS, "]");
  }
  for (const int32_t parameter : parameters) {
    if (parameter >= dims.d[0]) fail("parameter ", parameter, ", the directory has ", dims.d[0]);
  }
}

dw_batch make_batch(const Dims& slots, const Dims& directory, dw_dtype dtype) {
  require_vector("slots", slots, volume(slots));
  dw_batch batch = {};
  batch.parameter_count = static_cast<int32_t>(directory.d[0]);
  batch.slot_count = static_cast<int32_t>(directory.d[1]);
  batch.token_count = static_cast<int32_t>(slots.d[0]);
  batch.dtype = dtype;
  return batch;
}

}  // namespace deltaweave::trt
