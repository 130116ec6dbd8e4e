// SPDX-License-Identifier: Apache-2.0
// Checks of dw_repack and of the element-wise kernels' arguments, all host logic: they run before
// any launch, and in a library without kernels too.
#ifndef DELTAWEAVE_SRC_BATCH_ARGS_H_
#define DELTAWEAVE_SRC_BATCH_ARGS_H_

#include "deltaweave.h"

namespace dw {

dw_status check_repack(const dw_repack_args& args);
dw_status check_norm(const dw_norm& args);
dw_status check_bias(const dw_bias& args);
dw_status check_embedding(const dw_embedding& args);
dw_status check_gate(const dw_gate& args);

}  // namespace dw

#endif  // DELTAWEAVE_SRC_BATCH_ARGS_H_
