// The table of CPU convolution implementations: dispatch, tests, benchmarks and `verify` all read
// it. A new kernel is one file that defines a ConvRow, and one line here.
#include "conv.h"

#include <chrono>
#include <cstring>

#include "parallel.h"

namespace torch_naiveconv {

extern const ConvRow conv_amx, conv_avx512, conv_avx2, conv_generic, conv_naive;

const ConvRow* const conv_rows[] = {
#if defined(__x86_64__)
    &conv_amx,     &conv_avx512, &conv_avx2,
#endif
    &conv_generic, &conv_naive,
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

double fma_peak(DType dtype, const char* first) {
  bool found = std::strcmp(first, "auto") == 0;
  for (const ConvRow* row : conv_rows) {
    if (!row->can_run()) continue;
    found = found || std::strcmp(first, row->name) == 0;
    if (!found || !row->multiply_adds) continue;
    double best = 0;
    for (int attempt = 0; attempt < 10; ++attempt) {
      constexpr int64_t rounds = 100000;
      const auto start = std::chrono::steady_clock::now();
      parallel_for(thread_count(), 1, FloatEnvironment::gradual, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) row->multiply_adds(dtype, rounds);
      });
      const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - start;
      const double operations = row->multiply_adds(dtype, 1) * rounds * thread_count();
      if (operations / spent.count() > best) best = operations / spent.count();
    }
    return best;
  }
  return 0;
}

}  // namespace torch_naiveconv
