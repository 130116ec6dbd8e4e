// SPDX-License-Identifier: Apache-2.0
// What the two products have in common: inputs (x, y_0 .. y_{s-1}, plan, arena, directory), outputs
// the ys.
#ifndef DELTAWEAVE_TRT_GEMM_OP_H_
#define DELTAWEAVE_TRT_GEMM_OP_H_

#include <vector>

#include "op.h"

namespace deltaweave::trt {

// For `slices` ys, every output written over its input.
Signature gemm_signature(size_t slices);

// The sizes of a call; throws OpError if the shapes do not fit each other.
dw_gemm make_gemm(const Shapes& shapes, const std::vector<int32_t>& parameters, int32_t max_rank);

// The most that any call within the largest shapes needs: the workspace does not only grow with the
// number of tokens, since decode and prefill are other kernels.
size_t gemm_workspace_bytes(const Shapes& largest, const std::vector<int32_t>& parameters,
                            int32_t max_rank);

// Puts a call's addresses in; the workspace is as large as gemm_workspace_bytes said.
void set_pointers(dw_gemm& gemm, const Pointers& at);

}  // namespace deltaweave::trt

#endif  // DELTAWEAVE_TRT_GEMM_OP_H_
