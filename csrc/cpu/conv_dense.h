// Convolution as a packed implicit matrix product.
#pragma once

namespace torch_naiveconv::TNC_ISA {

inline bool run_dense(const ConvProblem&) { return false; }

}  // namespace torch_naiveconv::TNC_ISA
