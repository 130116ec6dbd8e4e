// SPDX-License-Identifier: Apache-2.0
#ifndef DELTAWEAVE_TRT_PLAN_OP_H_
#define DELTAWEAVE_TRT_PLAN_OP_H_

#include <cstdint>

namespace deltaweave::trt {

// Length of every plan tensor, int32: what a step of the most tokens needs.
int64_t plan_ints();

}  // namespace deltaweave::trt

#endif  // DELTAWEAVE_TRT_PLAN_OP_H_
