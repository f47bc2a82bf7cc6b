// Threads and the floating-point environment of a worker. The kernels below this file do not know
// torch: the library (ops.cpp) and the stand-alone driver each define run_parallel.
#pragma once

#include <atomic>
#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace torch_naiveconv {

// Calls body(context, begin, end) over disjoint pieces of [0, count), each of about `grain` or
// more, and returns when all are done. The pieces decide who computes, never how.
using ParallelBody = void (*)(void* context, int64_t begin, int64_t end);
void run_parallel(int64_t count, int64_t grain, ParallelBody body, void* context);

// Threads that run_parallel may use at this moment.
int thread_count();

// Rounding to nearest, and subnormals kept (gradual) or flushed (results, and bfloat16 operands):
// set for a worker's task, the caller's environment restored after it. FTZ is per thread and is
// switched on by any loaded library built with -ffast-math, so no task may rely on its default.
class FloatEnvironment {
 public:
  enum Mode { gradual, flush };

  explicit FloatEnvironment(Mode mode) : mode_(mode), saved_(read()) {
#if defined(__x86_64__)
    write(mode == flush ? 0x9fc0u : 0x1f80u);  // all exceptions masked; FTZ | DAZ
#elif defined(__aarch64__)
    write(mode == flush ? uint64_t{1} << 24 : 0);  // FZ
    if (mode == flush) __asm__ __volatile__("msr fpsr, xzr" ::: "memory");
#endif
  }
  ~FloatEnvironment() {
    if (mode_ == flush && may_have_flushed_wrong()) doubtful_tasks().fetch_add(1);
    write(saved_);
  }

  // Tasks under `flush` whose results may not be the contract's. x86 flushes as the contract does,
  // by what is tiny after rounding. AArch64 asks before rounding, but leaves a trace if it flushed
  // anything at all; elsewhere nothing is known. Who finds this number changed must decline.
  static std::atomic<int64_t>& doubtful_tasks() {
    static std::atomic<int64_t> count{0};
    return count;
  }

  FloatEnvironment(const FloatEnvironment&) = delete;
  FloatEnvironment& operator=(const FloatEnvironment&) = delete;

 private:
  // volatile and "memory": arithmetic must not be moved across the change of mode.
#if defined(__x86_64__)
  using Register = uint32_t;
  static Register read() {
    Register value;
    __asm__ __volatile__("stmxcsr %0" : "=m"(value)::"memory");
    return value;
  }
  static void write(Register value) { __asm__ __volatile__("ldmxcsr %0" ::"m"(value) : "memory"); }
#elif defined(__aarch64__)
  using Register = uint64_t;
  static Register read() {
    Register value;
    __asm__ __volatile__("mrs %0, fpcr" : "=r"(value)::"memory");
    return value;
  }
  static void write(Register value) {
    __asm__ __volatile__("msr fpcr, %0" ::"r"(value) : "memory");
  }
#else
  using Register = int;
  static Register read() { return 0; }
  static void write(Register) {}
#endif

  static bool may_have_flushed_wrong() {
#if defined(__x86_64__)
    return false;
#elif defined(__aarch64__)
    uint64_t status;
    __asm__ __volatile__("mrs %0, fpsr" : "=r"(status)::"memory");
    return (status & 0x88) != 0;  // underflow, subnormal operand
#else
    return true;
#endif
  }

  const Mode mode_;
  const Register saved_;
};

// for (i in [begin, end)) of parallel pieces, each under the given environment.
template <class Body>
void parallel_for(int64_t count, int64_t grain, FloatEnvironment::Mode mode, const Body& body) {
  if (count <= 0) return;
  struct Context {
    const Body* body;
    FloatEnvironment::Mode mode;
  } context{&body, mode};
  const ParallelBody task = [](void* opaque, int64_t begin, int64_t end) {
    const Context& c = *static_cast<Context*>(opaque);
    FloatEnvironment environment(c.mode);
    (*c.body)(begin, end);
  };
  if (count <= grain)
    task(&context, 0, count);
  else
    run_parallel(count, grain, task, &context);
}

}  // namespace torch_naiveconv
