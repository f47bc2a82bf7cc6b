// The table of CPU convolution implementations: dispatch, tests, benchmarks and `verify` all read
// it. A new kernel is one file that defines a ConvRow, and one line here.
#include "conv.h"

#include <cstring>

namespace torch_naiveconv {

extern const ConvRow conv_avx512, conv_avx2, conv_generic, conv_naive;

const ConvRow* const conv_rows[] = {
#if defined(__x86_64__)
    &conv_avx512,
    &conv_avx2,
#endif
    &conv_generic,
    &conv_naive,
};
const int conv_row_count = sizeof(conv_rows) / sizeof(conv_rows[0]);

bool run_conv(const ConvProblem& problem, const char* first) {
  bool found = std::strcmp(first, "auto") == 0;
  for (const ConvRow* row : conv_rows) {
    if (!row->can_run()) continue;
    found = found || std::strcmp(first, row->name) == 0;
    if (found && row->run(problem)) return true;
  }
  return false;
}

}  // namespace torch_naiveconv
