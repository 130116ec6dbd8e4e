// SPDX-License-Identifier: Apache-2.0
// Greedy tokens from an engine folder, without Python: the bare base, whose rows have slot -1.
//
//   generate ENGINE_FOLDER PLUGIN_LIBRARY COUNT TOKEN...
//
// Compile it with the headers of the TensorRT that built the engine. A fine-tune would be uploaded
// by libdeltaweave (dw_arena_reserve, dw_repack), its directory rows copied, and its slot written
// to row_slots.
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using nvinfer1::Dims;

constexpr int kPrefill = 0, kDecode = 1;
constexpr int64_t kArenaBytes = 1 << 20;  // nobody is in it

class Logger : public nvinfer1::ILogger {
  void log(Severity severity, const char* message) noexcept override {
    if (severity <= Severity::kWARNING) std::cerr << message << std::endl;
  }
};

void require(bool success, const std::string& what) {
  if (!success) throw std::runtime_error(what);
}

void require(cudaError_t status) { require(status == cudaSuccess, cudaGetErrorString(status)); }

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  require(file.good(), path + ": cannot be read");
  std::ostringstream content;
  content << file.rdbuf();
  return content.str();
}

// The numbers behind a key of the manifest: one, or those of a list.
std::vector<double> numbers(const std::string& manifest, const std::string& key) {
  size_t at = manifest.find('"' + key + "\":");
  require(at != std::string::npos, "manifest.json: no " + key);
  at = manifest.find_first_not_of(" \n", at + key.size() + 3);
  const size_t end =
      manifest[at] == '[' ? manifest.find(']', at) : manifest.find_first_of(",}", at);
  std::string text = manifest.substr(at, end - at);
  for (char& letter : text) {
    if (letter == '[' || letter == ',') letter = ' ';
  }
  std::istringstream words(text);
  std::vector<double> found;
  for (double value; words >> value;) found.push_back(value);
  return found;
}

std::string plan_path(const std::string& folder) {
  cudaDeviceProp properties;
  require(cudaGetDeviceProperties(&properties, 0));
  return folder + "/sm" + std::to_string(properties.major) + std::to_string(properties.minor) +
         ".plan";
}

// Device memory by tensor name, zeros at first.
class Memory {
 public:
  ~Memory() {
    for (auto& [name, address] : addresses_) cudaFree(address);
  }
  void* make(const std::string& name, size_t bytes) {
    require(cudaMalloc(&addresses_[name], bytes));
    require(cudaMemset(addresses_[name], 0, bytes));
    return addresses_[name];
  }
  template <typename T>
  void write(const std::string& name, const std::vector<T>& values) {
    require(cudaMemcpy(at(name), values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  void* at(const std::string& name) const { return addresses_.at(name); }

 private:
  std::map<std::string, void*> addresses_;
};

class Generator {
 public:
  Generator(const std::string& folder, const std::string& plugin) {
    runtime_.reset(nvinfer1::createInferRuntime(logger_));
    require(runtime_ != nullptr, "no TensorRT runtime");
    require(runtime_->getPluginRegistry().loadLibrary(plugin.c_str()) != nullptr, plugin);
    const std::string plan = read_file(plan_path(folder));
    engine_.reset(runtime_->deserializeCudaEngine(plan.data(), plan.size()));
    require(engine_ != nullptr, "the plan does not load");
    context_.reset(engine_->createExecutionContext());
    require(context_ != nullptr, "no execution context");
    require(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    allocate(read_file(folder + "/manifest.json"));
  }
  ~Generator() { cudaStreamDestroy(stream_); }

  // One step over `tokens` that begin at a position; the most likely next one.
  int64_t step(const std::vector<int64_t>& tokens, int64_t position) {
    const auto count = static_cast<int64_t>(tokens.size());
    require(context_->setOptimizationProfileAsync(count == 1 ? kDecode : kPrefill, stream_),
            "profile");
    std::vector<int64_t> positions;
    for (int64_t i = 0; i < count; ++i) positions.push_back(position + i);
    memory_.write("input_ids", tokens);
    memory_.write("positions", positions);
    memory_.write("lengths", std::vector<int64_t>{position});
    memory_.write("last", std::vector<int64_t>{count - 1});
    memory_.write("row_slots", std::vector<int32_t>{-1});
    bind(count);
    require(context_->enqueueV3(stream_), "the step failed");
    int64_t next = 0;
    require(cudaMemcpyAsync(&next, memory_.at("tokens"), sizeof(next), cudaMemcpyDeviceToHost,
                            stream_));
    require(cudaStreamSynchronize(stream_));
    return next;
  }

  int64_t max_tokens() const { return max_tokens_; }

 private:
  void allocate(const std::string& manifest) {
    max_tokens_ = static_cast<int64_t>(numbers(manifest, "max_tokens").front());
    for (int32_t i = 0; i < engine_->getNbIOTensors(); ++i) {
      const std::string name = engine_->getIOTensorName(i);
      if (name.rfind("present_", 0) == 0) continue;  // lies over its past_
      memory_.make(name, name == "arena" ? kArenaBytes : 8 * volume(name, max_tokens_));
    }
    const Dims table = engine_->getTensorShape("inverse_frequencies");
    const std::vector<double> base = numbers(manifest, "inverse_frequencies");
    std::vector<float> frequencies, scale;
    std::vector<int64_t> vocabulary;
    for (int64_t row = 0; row < table.d[0]; ++row) {
      frequencies.insert(frequencies.end(), base.begin(), base.end());
      scale.push_back(static_cast<float>(numbers(manifest, "rotary_scale").front()));
      vocabulary.push_back(static_cast<int64_t>(numbers(manifest, "base_vocabulary").front()));
    }
    memory_.write("inverse_frequencies", frequencies);
    memory_.write("rotary_scale", scale);
    memory_.write("vocabulary", vocabulary);
  }

  // Elements for one row of `tokens` tokens; the names of dynamic dimensions are not in a plan.
  int64_t volume(const std::string& name, int64_t tokens) const {
    const Dims dims = shape(name, tokens);
    int64_t product = 1;
    for (int32_t i = 0; i < dims.nbDims; ++i) product *= dims.d[i];
    return product;
  }

  Dims shape(const std::string& name, int64_t tokens) const {
    Dims dims = engine_->getTensorShape(name.c_str());
    for (int32_t i = 0; i < dims.nbDims; ++i) {
      if (dims.d[i] < 0) dims.d[i] = name == "arena" ? kArenaBytes / 8 : i == 0 ? 1 : tokens;
    }
    return dims;
  }

  void bind(int64_t tokens) {
    for (int32_t i = 0; i < engine_->getNbIOTensors(); ++i) {
      const std::string name = engine_->getIOTensorName(i);
      const bool input = engine_->getTensorIOMode(name.c_str()) == nvinfer1::TensorIOMode::kINPUT;
      const std::string place = name.rfind("present_", 0) == 0 ? "past_" + name.substr(8) : name;
      require(context_->setTensorAddress(name.c_str(), memory_.at(place)), name);
      if (input) require(context_->setInputShape(name.c_str(), shape(name, tokens)), name);
    }
  }

  Logger logger_;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  std::unique_ptr<nvinfer1::IExecutionContext> context_;
  Memory memory_;
  cudaStream_t stream_ = nullptr;
  int64_t max_tokens_ = 0;
};

void generate(const std::string& folder, const std::string& plugin, int count,
              const std::vector<int64_t>& prompt) {
  Generator generator(folder, plugin);
  int64_t next = 0, position = 0;
  while (position < static_cast<int64_t>(prompt.size())) {  // long prompts in chunks
    const int64_t end =
        std::min<int64_t>(position + generator.max_tokens(), static_cast<int64_t>(prompt.size()));
    next = generator.step({prompt.begin() + position, prompt.begin() + end}, position);
    position = end;
  }
  for (int i = 0; i < count; ++i) {
    std::cout << next << (i + 1 < count ? " " : "\n") << std::flush;
    if (i + 1 < count) next = generator.step({next}, position++);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 5) {
    std::cerr << "usage: generate ENGINE_FOLDER PLUGIN_LIBRARY COUNT TOKEN..." << std::endl;
    return 2;
  }
  std::vector<int64_t> prompt;
  for (int i = 4; i < argc; ++i) prompt.push_back(std::strtoll(argv[i], nullptr, 10));
  try {
    generate(argv[1], argv[2], std::atoi(argv[3]), prompt);
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << std::endl;
    return 1;
  }
  return 0;
}
