// The table of CPU max-pooling implementations: dispatch, tests, benchmarks and `verify` all read
// it. A new kernel is one file that defines a PoolRow, and one line here.
#include "max_pool.h"

#include <cstring>

namespace torch_naiveconv {

extern const PoolRow pool_avx512, pool_avx2, pool_generic, pool_naive;

const PoolRow* const pool_rows[] = {
#if defined(__x86_64__)
    &pool_avx512,
    &pool_avx2,
#endif
    &pool_generic,
    &pool_naive,
};
const int pool_row_count = sizeof(pool_rows) / sizeof(pool_rows[0]);

bool run_pool(const PoolProblem& problem, const char* first) {
  bool found = std::strcmp(first, "auto") == 0;
  for (const PoolRow* row : pool_rows) {
    if (!row->can_run()) continue;
    found = found || std::strcmp(first, row->name) == 0;
    if (found && row->run(problem)) return true;
  }
  return false;
}

}  // namespace torch_naiveconv
