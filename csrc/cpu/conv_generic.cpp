// Row "generic" of the convolution table.
#include "kernels.h"

#define TNC_ISA generic
#include "vec_generic.h"

#include "conv_kernels.h"

namespace torch_naiveconv {
extern const ConvRow conv_generic;
const ConvRow conv_generic{"generic", [] { return true; }, generic::run};
}  // namespace torch_naiveconv
