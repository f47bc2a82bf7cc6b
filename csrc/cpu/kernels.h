// Everything that the vector kernels need and that must NOT be compiled for a newer processor than
// the build's own: standard headers, the specification, the table. Included first by every
// conv_<isa>.cpp, before it switches its target on.
//
// The rest of such a file (vec_<isa>.h and the kernel templates) lives in the namespace
// torch_naiveconv::TNC_ISA, so that the linker never takes one instruction set's copy of a
// function for another's. For the same reason code below the switch calls no function template of
// the outer namespace with types of its own only in part (RawView::as, View::at, canonical, ...):
// such a copy would be shared, and built for whoever came first.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>

#include <unistd.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../spec/conv.h"
#include "conv.h"
#include "parallel.h"

#define TNC_INLINE inline __attribute__((always_inline))
