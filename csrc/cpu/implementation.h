// What the rows of the implementation tables have in common: a call, type-erased, and a row.
#pragma once

#include <type_traits>

#include "../spec/max_pool.h"
#include "../spec/shape.h"

namespace torch_naiveconv {

// A strided 5-D tensor whose element type is known only to the call's dtype.
struct RawView {
  void* data = nullptr;
  int64_t stride[5] = {0, 0, 0, 0, 0};

  template <class T>
  TNC_HD View<T> as() const {
    return {static_cast<T*>(data), {stride[0], stride[1], stride[2], stride[3], stride[4]}};
  }
};

template <class T>
struct Tag {
  using type = T;
};

// Calls visit(Tag<T>{}) with the element type of dtype.
template <class Visit>
void with_float_type(DType dtype, Visit visit) {
  switch (dtype) {
    case DType::float32: return visit(Tag<float>{});
    case DType::float64: return visit(Tag<double>{});
    case DType::float16: return visit(Tag<Half>{});
    case DType::bfloat16: return visit(Tag<BFloat16>{});
    default: return;
  }
}
template <class Visit>
void with_type(DType dtype, Visit visit) {
  switch (dtype) {
    case DType::int8: return visit(Tag<int8_t>{});
    case DType::int16: return visit(Tag<int16_t>{});
    case DType::int32: return visit(Tag<int32_t>{});
    case DType::int64: return visit(Tag<int64_t>{});
    case DType::boolean:  // pooling reads a bool as the byte it is
    case DType::uint8: return visit(Tag<uint8_t>{});
    case DType::uint16: return visit(Tag<uint16_t>{});
    case DType::uint32: return visit(Tag<uint32_t>{});
    case DType::uint64: return visit(Tag<uint64_t>{});
    default: return with_float_type(dtype, visit);
  }
}

}  // namespace torch_naiveconv
