// Row "generic" of the convolution table.
#include "kernels.h"

#define TNC_ISA generic
#include "vec_generic.h"

#include "conv_kernels.h"
#include "fma_peak.h"

namespace torch_naiveconv {
extern const ConvRow conv_generic;
const ConvRow conv_generic{"generic", [] { return true; }, generic::run, generic::multiply_adds};
}  // namespace torch_naiveconv
