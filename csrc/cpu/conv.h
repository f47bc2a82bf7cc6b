// One convolution call as the CPU rows see it, and the table they stand in (conv.cpp).
#pragma once

#include "implementation.h"

namespace torch_naiveconv {

enum class Direction : int { forward, grad_input, grad_weight, grad_bias };

// The three tensors of the forward map output = conv(input, weight); the one that `direction`
// names is written, the other two are read (grad_bias reads output alone and writes weight.data,
// one element a channel). Views have any strides.
struct ConvProblem {
  Direction direction = Direction::forward;
  DType dtype = DType::float32;
  ConvShape shape;
  RawView input, weight, output;
  const void* bias =
      nullptr;  // forward: [out_channels]; grad_input: [in_channels] (transposed convolution)
  const void* total =
      nullptr;              // weight and bias gradient: the earlier total, contiguous, in Total<T>
  bool keep_total = false;  // weight and bias gradient: write Total<T>, not rounded to T
};

// A row of the table. `run` returns false to decline (a type or shape it is not made for, or
// operands that are not finite where that would change bits); the next row then takes the call
// and overwrites whatever was written.
struct ConvRow {
  const char* name;
  bool (*can_run)();  // does this processor have what the row needs?
  bool (*run)(const ConvProblem&);
  // Does multiply-adds on registers only, for the benchmark; returns how many operations. May be
  // null.
  double (*multiply_adds)(DType dtype, int64_t rounds);
};

// The rows, best first, naive last.
extern const ConvRow* const conv_rows[];
extern const int conv_row_count;

// Runs the first row that takes the call, beginning with the one called `first` ("auto": the top).
// Returns false if no row of that name can run here.
bool run_conv(const ConvProblem& problem, const char* first);

// Operations a second that the first row from `first` on with multiply_adds reaches on all threads;
// 0 if there is none.
double fma_peak(DType dtype, const char* first);

}  // namespace torch_naiveconv
