// SPDX-License-Identifier: Apache-2.0
// How a failure reaches the user.
#ifndef DELTAWEAVE_TRT_LOG_H_
#define DELTAWEAVE_TRT_LOG_H_

#include <NvInferRuntime.h>
#include <deltaweave.h>

#include <sstream>
#include <stdexcept>
#include <string>

namespace deltaweave::trt {

// Thrown inside an op and caught where TensorRT called it: no exception crosses that border.
class OpError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Throws an OpError of the parts' text.
template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw OpError(text.str());
}

// Throws libdeltaweave's message if a call failed.
inline void require(dw_status status) {
  if (status != DW_OK) throw OpError(dw_last_error());
}

// Tells "deltaweave: OP: MESSAGE" to the context's error recorder, to TensorRT's logger (stderr
// where there is none that we can call), and keeps it for deltaweave_trt_last_error.
void report(const std::string& op, const char* message,
            nvinfer1::IErrorRecorder* recorder = nullptr) noexcept;

// Copies the last report into `text`, with a zero behind it, and forgets it; returns its length, 0
// if there was none.
size_t take_last_error(char* text, size_t size) noexcept;

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept;

}  // namespace deltaweave::trt

#endif  // DELTAWEAVE_TRT_LOG_H_
