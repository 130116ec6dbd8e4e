// SPDX-License-Identifier: Apache-2.0
#include "log.h"

#include <dlfcn.h>

#include <atomic>
#include <iostream>
#include <mutex>

namespace deltaweave::trt {
namespace {

using nvinfer1::ILogger;

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};
std::mutex last_error_mutex;
std::string last_error;

bool is_loaded(const char* name) {
  void* library = dlopen(name, RTLD_LAZY | RTLD_NOLOAD);
  if (library != nullptr) dlclose(library);
  return library != nullptr;
}

// TensorRT's logger, if it is the ILogger of our headers: TensorRT 11 and TensorRT-RTX put other
// functions before log(), and calling it by the old layout would destroy the logger.
ILogger* find_logger() noexcept {
  nvinfer1::ILoggerFinder* finder = logger_finder;
  const bool ours = is_loaded("libnvinfer.so.10") || is_loaded("libnvinfer_lean.so.10");
  return finder != nullptr && ours ? finder->findLogger() : nullptr;
}

}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept { logger_finder = finder; }

void report(const std::string& op, const char* message,
            nvinfer1::IErrorRecorder* recorder) noexcept {
  const std::string text = "deltaweave: " + op + ": " + message;
  {
    const std::lock_guard<std::mutex> lock(last_error_mutex);
    last_error = text;
  }
  if (recorder != nullptr) {
    recorder->reportError(nvinfer1::ErrorCode::kINVALID_ARGUMENT, text.c_str());
  }
  if (ILogger* logger = find_logger()) {
    logger->log(ILogger::Severity::kERROR, text.c_str());
  } else {
    std::cerr << text << std::endl;
  }
}

size_t take_last_error(char* text, size_t size) noexcept {
  const std::lock_guard<std::mutex> lock(last_error_mutex);
  const size_t length = last_error.size();
  if (size > 0) text[last_error.copy(text, size - 1)] = '\0';
  last_error.clear();
  return length;
}

}  // namespace deltaweave::trt
