// SPDX-License-Identifier: Apache-2.0
// What every op of the plugin shares: TensorRT's interfaces around a signature and three functions.
//
// An op keeps libdeltaweave's argument struct. `configure` fills its sizes, whenever shapes change,
// and throws if they do not fit; `launch` puts the addresses in and calls the library. TensorRT
// clones an op for every execution context, so nothing is shared between contexts.
#ifndef DELTAWEAVE_TRT_OP_H_
#define DELTAWEAVE_TRT_OP_H_

#include <NvInferRuntime.h>
#include <deltaweave.h>

#include <memory>
#include <string>
#include <vector>

#include "fields.h"

namespace deltaweave::trt {

inline constexpr const char* kVersion = "1";
inline constexpr const char* kNamespace = "deltaweave";

// Element types of inputs and outputs. Activations are FP16 or BF16, all of one op the same.
enum class Type { kActivation, kInt32, kInt64, kFloat32 };

struct Signature {
  std::vector<Type> inputs;
  std::vector<Type> outputs;
  // Input that output i is written over; -1 if it is memory of its own.
  std::vector<int32_t> aliases;
};

using Dims = nvinfer1::Dims;

// Shapes of a call and the activations' dtype.
struct Shapes {
  std::vector<Dims> inputs;
  std::vector<Dims> outputs;
  dw_dtype dtype;
};

// Addresses of a call.
struct Pointers {
  const void* const* inputs;
  void* const* outputs;
  void* workspace;
  cudaStream_t stream;
};

class Op : public nvinfer1::IPluginV3,
           public nvinfer1::IPluginV3OneCore,
           public nvinfer1::IPluginV3OneBuildV2,
           public nvinfer1::IPluginV3OneRuntime {
 public:
  Op(const char* name, const Fields& fields, Signature signature)
      : name_(name), fields_(fields), signature_(std::move(signature)) {}

  // Ops are made in a build or from a plan; in a build they never launch anything, since TensorRT
  // may time them there on memory that holds no directory.
  void set_phase(nvinfer1::TensorRTPhase phase) { phase_ = phase; }

  nvinfer1::IPluginCapability* getCapabilityInterface(
      nvinfer1::PluginCapabilityType type) noexcept final;
  nvinfer1::IPluginV3* clone() noexcept final;

  const char* getPluginName() const noexcept final { return name_; }
  const char* getPluginVersion() const noexcept final { return kVersion; }
  const char* getPluginNamespace() const noexcept final { return kNamespace; }

  int32_t getNbOutputs() const noexcept final {
    return static_cast<int32_t>(signature_.outputs.size());
  }
  int32_t getAliasedInput(int32_t output) noexcept final { return signature_.aliases[output]; }
  int32_t getOutputDataTypes(nvinfer1::DataType* outputs, int32_t output_count,
                             const nvinfer1::DataType* inputs,
                             int32_t input_count) const noexcept final;
  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count,
                          const nvinfer1::DimsExprs* shape_inputs, int32_t shape_input_count,
                          nvinfer1::DimsExprs* outputs, int32_t output_count,
                          nvinfer1::IExprBuilder& builder) noexcept final;
  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                 int32_t input_count, int32_t output_count) noexcept final;
  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t input_count,
                          const nvinfer1::DynamicPluginTensorDesc* outputs,
                          int32_t output_count) noexcept final;
  size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t input_count,
                          const nvinfer1::DynamicPluginTensorDesc* outputs,
                          int32_t output_count) const noexcept final;

  int32_t onShapeChange(const nvinfer1::PluginTensorDesc* inputs, int32_t input_count,
                        const nvinfer1::PluginTensorDesc* outputs,
                        int32_t output_count) noexcept final;
  int32_t enqueue(const nvinfer1::PluginTensorDesc* input_descs,
                  const nvinfer1::PluginTensorDesc* output_descs, const void* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept final;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept final;
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept final {
    return fields_.collection();
  }

 protected:
  const Fields& fields() const { return fields_; }

  // A copy with its own argument struct.
  virtual std::unique_ptr<Op> copy() const = 0;
  // Shapes of the outputs; those of their aliased inputs unless an op says otherwise.
  virtual void shape(const nvinfer1::DimsExprs* inputs, nvinfer1::DimsExprs* outputs,
                     nvinfer1::IExprBuilder& builder) const;
  // Fills the argument struct's sizes; throws OpError if the shapes do not fit each other.
  virtual void configure(const Shapes& shapes) = 0;
  // Bytes that any call within these largest shapes may need.
  virtual size_t workspace_bytes(const Shapes&) const { return 0; }
  virtual void launch(const Pointers& at) = 0;

 private:
  template <typename Call>
  int32_t guarded(Call call) const noexcept;
  Shapes largest_shapes(const nvinfer1::DynamicPluginTensorDesc* inputs,
                        const nvinfer1::DynamicPluginTensorDesc* outputs) const;
  void require_counts(int32_t input_count, int32_t output_count) const;
  void copy_aliased(const nvinfer1::PluginTensorDesc* output_descs, const Pointers& at) const;

  const char* name_;
  Fields fields_;
  Signature signature_;
  nvinfer1::TensorRTPhase phase_ = nvinfer1::TensorRTPhase::kRUNTIME;
  nvinfer1::IErrorRecorder* recorder_ = nullptr;
};

// copy() for every op.
template <typename Derived>
class OpBase : public Op {
 public:
  using Op::Op;

 protected:
  std::unique_ptr<Op> copy() const final {
    return std::make_unique<Derived>(static_cast<const Derived&>(*this));
  }
};

// One kind of op, for its creator.
struct OpType {
  const char* name;
  std::vector<FieldSpec> fields;
  std::unique_ptr<Op> (*make)(const char* name, const Fields&);
};

// ---- Shapes that ops share; all throw OpError
// -----------------------------------------------------

std::string to_string(const Dims& dims);
int64_t volume(const Dims& dims);
int32_t last(const Dims& dims);
// Product of all dimensions but the last: [.., features] holds so many tokens.
int32_t leading(const Dims& dims);
void require_vector(const char* name, const Dims& dims, int64_t length);
// Checks [parameters, slots, DW_DIRECTORY_FIELDS] and that parameters are rows of it.
void require_directory(const Dims& dims, const std::vector<int32_t>& parameters);
// The arena and the tokens of an element-wise op.
dw_batch make_batch(const Dims& slots, const Dims& directory, dw_dtype dtype);

}  // namespace deltaweave::trt

#endif  // DELTAWEAVE_TRT_OP_H_
