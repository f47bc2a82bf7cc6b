// One pooling call as the CPU rows see it, and the table they stand in (max_pool.cpp).
#pragma once

#include "implementation.h"

namespace torch_naiveconv {

enum class PoolDirection : int { forward, scatter, gather };
enum class IndexType : int { uint8, int16, int32, int64 };

// forward: input -> output, and index unless kind is none.
// scatter: output (a gradient), index -> input.   gather: input, index -> output.
// With ties all or split there is no index: `index` holds the input that was pooled.
struct PoolProblem {
  PoolDirection direction = PoolDirection::forward;
  DType dtype = DType::float32;
  PoolShape shape;
  Ties ties = Ties::first;
  IndexKind kind = IndexKind::none;
  IndexType index_type = IndexType::uint8;
  RawView input, output, index;
};

// A row of the table; `run` returns false to decline, and the next row takes the call.
struct PoolRow {
  const char* name;
  bool (*can_run)();
  bool (*run)(const PoolProblem&);
};

extern const PoolRow* const pool_rows[];
extern const int pool_row_count;

// Runs the first row that takes the call, beginning with the one called `first` ("auto": the top).
bool run_pool(const PoolProblem& problem, const char* first);

// One output of a forward call by the specification: for the few windows that a faster row finds
// ambiguous.
void max_pool_forward_at(const PoolProblem& problem, Position output);

// Scatter (ties first and last) and gather by looking up what each window chose. A flat index that
// no forward call of this shape returns may send a gradient to another input of its plane, never
// elsewhere; an offset that names no tap in the input sends it nowhere.
bool run_pool_by_index(const PoolProblem& problem);

// Max-unpooling of planes: output[plane][indices[plane][j]] = input[plane][j], the last j winning,
// the rest +0; and its transpose. Both return false, nothing promised of the output, if an index is
// not in [0, outputs). All tensors contiguous.
struct UnpoolProblem {
  bool transpose = false;  // true: read `output` (a gradient), write `input`
  DType dtype = DType::float32;
  int64_t planes = 0, inputs = 0, outputs = 0;
  void* input = nullptr;
  const int64_t* indices = nullptr;
  void* output = nullptr;
};
bool run_unpool(const UnpoolProblem& problem);

}  // namespace torch_naiveconv
