// The gradient of the vector rows, for small windows. Included after pool_forward.h. Start reading
// at Scatter::run: rows (NCHW), pixels (channels innermost), or staged (those of other types).
//
// As a gather: an input belongs to few windows, and gets the gradient of those whose index names
// it. The inputs of one stride phase are lanes next to each other, and so are the windows that
// reach them with a given tap: `acc[i] += index[i - m] == tap ? grad[i - m] : 0`, windows in
// ascending order. Nothing is written twice, no task waits for another, and adding +0 where a
// window chose someone else changes no sum that began at +0.

// widen and narrow of the specification for float16 without branches: loops of them are vectors.
inline float widen_float16(Half x) {
  const uint32_t magnitude = x.bits & 0x7fffu, shifted = magnitude << 13;
  const uint32_t rebase = 112u << 23;  // of the exponent, twice for that of infinity and NaN
  const float subnormal =
      static_cast<float>(static_cast<int32_t>(magnitude)) * bits_as<float>(uint32_t{103u << 23});
  const uint32_t bits = magnitude >= 0x7c00u  ? shifted + 2 * rebase
                        : magnitude >= 0x400u ? shifted + rebase
                                              : bits_as<uint32_t>(subnormal);
  return bits_as<float>(bits | uint32_t(x.bits & 0x8000u) << 16);
}
inline Half narrow_float16(float x) {
  const uint32_t bits = bits_as<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  const uint32_t rebased = magnitude - (112u << 23);
  const uint32_t normal = (rebased + 0xfffu + ((rebased >> 13) & 1u)) >> 13;
  // The addition rounds to units of 2^-24.
  const uint32_t subnormal =
      bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - bits_as<uint32_t>(0.5f);
  const uint32_t finite = magnitude >= 0x38800000u ? normal : subnormal;
  const uint32_t number = (magnitude >= 0x47800000u ? 0x7c00u : finite) | (bits >> 16 & 0x8000u);
  return {static_cast<uint16_t>(magnitude > 0x7f800000u ? 0x7e00u : number)};
}

// Gradients to lanes in which they are added, and a finished sum back.
template <class T>
inline Lane<T> to_term(T x) {
  if constexpr (std::is_same_v<T, Half>) {
    return widen_float16(x);
  } else if constexpr (is_half_type<T>) {
    return widen(x);
  } else {
    return static_cast<Lane<T>>(x);
  }
}
template <class T>
inline T from_sum(Lane<T> sum) {
  if constexpr (std::is_same_v<T, Half>) {
    return narrow_float16(sum);
  } else if constexpr (is_half_type<T>) {
    return narrow<T>(sum);
  } else {
    return static_cast<T>(sum);  // add_terms has made NaN canonical
  }
}

template <class T>
void read_terms(const void* from, int64_t stride, int64_t count, Lane<T>* __restrict to) {
  read_as<T>(from, stride, count, to, [](T x) { return to_term(x); });
}
template <class T>
void write_sums(void* to, int64_t stride, int64_t count, const Lane<T>* __restrict from) {
  write_as<T>(to, stride, count, from, [](Lane<T> x) { return from_sum<T>(x); });
}

// A choice is the number of a tap in its window, a byte; this one is no tap's.
constexpr uint8_t nobody = 255;

template <class Index>
void read_choices(const void* from, int64_t stride, int64_t count, uint8_t* __restrict to) {
  const Index* const source = static_cast<const Index*>(from);
  const auto choice = [](Index index) {
    return static_cast<uint8_t>(index >= 0 && index < nobody ? index : nobody);
  };
  if (stride == 1)
    for (int64_t i = 0; i < count; ++i) to[i] = choice(source[i]);
  else
    for (int64_t i = 0; i < count; ++i) to[i] = choice(source[i * stride]);
}
// The same from positions in the plane: window i begins at base + i * step, and tap_of names the
// tap that lies a distance behind that. A position made by hand may be anything: modulo 2^64.
template <class Index>
void read_positions(const void* from, int64_t stride, int64_t count, uint8_t* __restrict to,
                    int64_t base, int64_t step, const std::vector<uint8_t>& tap_of) {
  const Index* const source = static_cast<const Index*>(from);
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t distance = static_cast<uint64_t>(static_cast<int64_t>(source[i * stride])) -
                              static_cast<uint64_t>(base + i * step);
    to[i] = distance < tap_of.size() ? tap_of[distance] : nobody;
  }
}

// `rows` of `columns` elements each; what lies between rows is neither read nor written.
template <class E>
void copy_rows(const E* from, int64_t from_pitch, E* to, int64_t to_pitch, int64_t rows,
               int64_t columns) {
  for (int64_t r = 0; r < rows; ++r, from += from_pitch, to += to_pitch)
    in_parts<line_of<E>>(columns, [&](int64_t i, auto part) {
      __builtin_memcpy(to + i, from + i, part * sizeof(E));
    });
}

// Rows of gradients and choices to rows of lanes and bytes, `pitch` apart; without to_grad, the
// choices alone.
template <class L>
struct Staged {
  const void *grad, *index;
  int64_t grad_pitch, index_pitch, rows, columns;
  L* to_grad;
  uint8_t* to_index;
  int64_t pitch;
};
template <class T, class Index>
void stage_rows(const Staged<Lane<T>>& s) {
  const T* const grad = static_cast<const T*>(s.grad);
  const Index* const index = static_cast<const Index*>(s.index);
  const bool one_run =
      s.grad_pitch == s.columns && s.index_pitch == s.columns && s.pitch == s.columns;
  const int64_t rows = one_run ? 1 : s.rows, columns = one_run ? s.rows * s.columns : s.columns;
  if constexpr (is_lane_type<T>) {
    if (s.to_grad) copy_rows(grad, s.grad_pitch, s.to_grad, s.pitch, rows, columns);
  } else if (s.to_grad) {
    for (int64_t r = 0; r < rows; ++r)
      read_terms<T>(grad + r * s.grad_pitch, 1, columns, s.to_grad + r * s.pitch);
  }
  if constexpr (sizeof(Index) == 1)
    copy_rows(index, s.index_pitch, s.to_index, s.pitch, rows, columns);
  else
    for (int64_t r = 0; r < rows; ++r)
      read_choices<Index>(index + r * s.index_pitch, 1, columns, s.to_index + r * s.pitch);
}

// The other way: rows of sums, `pitch` apart, to rows of the tensor.
template <class L>
struct Unstaged {
  const L* sums;
  int64_t pitch, rows, columns;
  void* to;
  int64_t to_pitch;
};
template <class T>
void unstage_rows(const Unstaged<Lane<T>>& s) {
  T* const to = static_cast<T*>(s.to);
  if constexpr (is_lane_type<T>)
    copy_rows(s.sums, s.pitch, to, s.to_pitch, s.rows, s.columns);
  else
    for (int64_t r = 0; r < s.rows; ++r)
      write_sums<T>(to + r * s.to_pitch, 1, s.columns, s.sums + r * s.pitch);
}

template <class L>
struct SumCodec {
  int64_t size, index_size;
  bool is_lane;
  void (*read)(const void*, int64_t, int64_t, L*);
  void (*write)(void*, int64_t, int64_t, const L*);
  void (*read_index)(const void*, int64_t, int64_t, uint8_t*);
  void (*read_position)(const void*, int64_t, int64_t, uint8_t*, int64_t, int64_t,
                        const std::vector<uint8_t>&);
  void (*stage)(const Staged<L>&);
  void (*unstage)(const Unstaged<L>&);

  template <class T>
  static SumCodec of(IndexType type) {
    SumCodec codec{sizeof(T),     0,       is_lane_type<T>, read_terms<T>,
                   write_sums<T>, nullptr, nullptr,         nullptr};
    const auto set = [&](auto tag) {
      using Index = decltype(tag);
      codec.index_size = sizeof(Index);
      codec.read_index = read_choices<Index>;
      codec.read_position = read_positions<Index>;
      codec.stage = stage_rows<T, Index>;
      codec.unstage = unstage_rows<T>;
    };
    switch (type) {
      case IndexType::uint8: set(uint8_t{}); break;
      case IndexType::int16: set(int16_t{}); break;
      case IndexType::int32: set(int32_t{}); break;
      case IndexType::int64: set(int64_t{}); break;
    }
    return codec;
  }
};

template <class L>
inline Vec<L> canonical_sum(Vec<L> sum) {
  if constexpr (std::is_floating_point_v<L>)
    return Masked::replace_nan<L>(sum, broadcast(canonical_nan<L>()));
  else
    return sum;
}

// What windows next to each other chose, as the row's instructions compare it.
template <class L>
using Choices = decltype(Masked::choice<L>(0));

// A window that reaches an input: where its gradient and its choice lie, and the tap that is the
// input.
struct Term {
  int64_t grad, index, own;
};

// to[r][p][i] = the sum of the terms of phase p that chose input (r, p, i), in their order, from
// +0; term_ends says where those of a phase end. Unless `exact`, up to a vector behind every row is
// read and written.
template <class L>
struct Sums {
  L* to;
  const L* grad;
  const uint8_t* index;
  int64_t to_pitch, grad_pitch, index_pitch;
};
template <bool exact, class L>
void add_terms(const Sums<L>& s, int64_t rows, int64_t phases, int64_t count, const Term* all_terms,
               const int64_t* term_ends) {
  constexpr int V = lanes<L>;
  L* to = s.to;
  for (int64_t row = 0, phase = 0; row < rows; to += s.to_pitch) {
    const L* const grad = s.grad + row * s.grad_pitch;
    const uint8_t* const index = s.index + row * s.index_pitch;
    const Term* const terms = all_terms + (phase == 0 ? 0 : term_ends[phase - 1]);
    const Term* const terms_end = all_terms + term_ends[phase];
    if (++phase == phases) phase = 0, ++row;
    const auto sums = [&](int64_t i, auto vectors, bool whole) {
      constexpr int n = decltype(vectors)::value;
      Vec<L> sum[n];
#pragma GCC unroll 4
      for (int v = 0; v < n; ++v) sum[v] = Vec<L>{};
      // The last window is the one that inputs before these have not asked.
      if (exact && terms != terms_end) prefetch(grad + terms_end[-1].grad + i, n * vector_bytes);
      for (const Term* term = terms; term != terms_end; ++term) {
        const Term& t = *term;
        const Choices<L> own = Masked::choice<L>(t.own);
#pragma GCC unroll 4
        for (int v = 0; v < n; ++v) {
          const L* const g = grad + t.grad + i + v * V;
          const uint8_t* const chosen = index + t.index + i + v * V;
          if (whole)
            sum[v] =
                Masked::add<L>(sum[v], Masked::equal<L>(Masked::choices<L>(chosen), own), load(g));
          else
            sum[v] =
                Masked::add<L>(sum[v], Masked::equal<L>(Masked::choices<L>(chosen, count - i), own),
                               load_clipped(g, 0, count - i, L(0)));
        }
      }
#pragma GCC unroll 4
      for (int v = 0; v < n; ++v) {
        if (exact) prefetch(to + i + v * V, vector_bytes);
        if (whole)
          store(to + i + v * V, canonical_sum<L>(sum[v]));
        else
          store_clipped(to, i, count, canonical_sum<L>(sum[v]));
      }
    };
    int64_t i = 0;
    for (; i + 4 * V <= count; i += 4 * V) sums(i, std::integral_constant<int, 4>{}, true);
    for (; i + V <= count || (!exact && i < count); i += V)
      sums(i, std::integral_constant<int, 1>{}, true);
    if (i < count) sums(i, std::integral_constant<int, 1>{}, false);
  }
}

// A row of windows, or a plane of them by its first row: `own` is the first tap that meets the
// inputs there, in all lanes, followed by the others.
template <class L>
struct GradRow {
  const L* grad;
  const uint8_t* index;
  const Choices<L>* own;
};

// The same with channels innermost; `own` as in Term, for the first tap of the width.
template <class L>
struct PixelRow {
  const L* grad;
  const uint8_t* index;
  int64_t own;
};

// What the windows next to each other do to `stride` inputs each: input i + phase is tap
// phase + shift - m * stride of the m-th window from i / stride + pad / stride on, where shift is
// pad % stride.
template <int stride, int kernel, int shift>
struct Reached {
  static constexpr int first = -((kernel - 1 - shift) / stride);
  static constexpr int last = (stride - 1 + shift) / stride;
  static constexpr int count = last - first + 1;
};

// Element i of every phase side by side: what lies next to each other in a row.
template <int stride, class L>
inline void join(const Vec<L>* phase, Vec<L>* out) {
  if constexpr (stride == 1) {
    out[0] = phase[0];
  } else if constexpr (stride == 2) {
    out[0] = zip_low<L>(phase[0], phase[1]), out[1] = zip_high<L>(phase[0], phase[1]);
  } else {
    static_assert(stride == 4, "no other strides");
    const Vec<L> even[2] = {zip_low<L>(phase[0], phase[2]), zip_high<L>(phase[0], phase[2])};
    const Vec<L> odd[2] = {zip_low<L>(phase[1], phase[3]), zip_high<L>(phase[1], phase[3])};
    for (int half = 0; half < 2; ++half) {
      out[2 * half] = zip_low<L>(even[half], odd[half]);
      out[2 * half + 1] = zip_high<L>(even[half], odd[half]);
    }
  }
}

// Windows that do not overlap, rows of them: `height` rows of inputs each, chosen by one at most.
// The sum of one gradient is that gradient added to +0. Reads a vector where there are less.
template <int stride, class L>
void expand_rows(GradRow<L> row, int64_t grad_pitch, int64_t index_pitch, int64_t rows,
                 int64_t windows, int64_t height, L* to, int64_t pitch) {
  constexpr int V = lanes<L>;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t o = 0; o < windows; o += V) {
      // The last vector overlaps the one before it.
      if (windows >= V) o = std::min(o, windows - V);
      const Vec<L> sum = canonical_sum<L>(load(row.grad + o) + Vec<L>{});
      const Choices<L> chosen = Masked::choices<L>(row.index + o);
      for (int64_t kh = 0; kh < height; ++kh) {
        Vec<L> phase[stride], out[stride];
        for (int k = 0; k < stride; ++k)
          phase[k] = Masked::pick<L>(Masked::equal<L>(chosen, row.own[kh * stride + k]), sum);
        join<stride, L>(phase, out);
        L* const row = to + kh * pitch + o * stride;
        prefetch(row, stride * vector_bytes);
        for (int v = 0; v < stride; ++v)
          if (windows >= V)
            store(row + v * V, out[v]);
          else
            store_clipped(row, v * V, windows * stride, out[v]);
      }
    }
    row.grad += grad_pitch, row.index += index_pitch, to += height * pitch;
  }
}

// The same with channels innermost, for one window in `channels` planes: `own` is that of its first
// tap here, for `height` rows of `width` inputs.
template <class L>
void expand_pixel(const L* grad, const uint8_t* index, int64_t channels, const Choices<L>* own,
                  int64_t height, int64_t width, L* to, int64_t pitch, int64_t pixel) {
  constexpr int V = lanes<L>;
  for (int64_t c = 0; c < channels; c += V) {
    c = std::min(c, channels - V);  // the last vector overlaps the one before it
    prefetch(grad + c, vector_bytes);
    const Vec<L> sum = canonical_sum<L>(load(grad + c) + Vec<L>{});
    const Choices<L> chosen = Masked::choices<L>(index + c);
    for (int64_t kh = 0; kh < height; ++kh)
      for (int64_t kw = 0; kw < width; ++kw) {
        L* const target = to + kh * pitch + kw * pixel + c;
        prefetch(target, vector_bytes);
        store(target, Masked::pick<L>(Masked::equal<L>(chosen, own[kh * width + kw]), sum));
      }
  }
}

// One row of inputs, `size` of them. The rows of windows begin with the first that reaches any;
// up to a vector behind them is read too.
// `known` is the number of rows if not 0.
template <int stride, int kernel, int shift, int known, class L>
inline void scatter_row(const GradRow<L>* rows, int64_t any, int64_t size, L* to) {
  using Windows = Reached<stride, kernel, shift>;
  const int64_t row_count = known ? known : any;
  constexpr int V = lanes<L>;
  constexpr int held = known ? known : 1;
  const L* row_grad[held];
  const uint8_t* row_index[held];
  Choices<L> own[held][kernel];
#pragma GCC unroll 3
  for (int r = 0; r < known; ++r) {
    row_grad[r] = rows[r].grad, row_index[r] = rows[r].index;
#pragma GCC unroll 4
    for (int k = 0; k < kernel; ++k) own[r][k] = rows[r].own[k];
  }
  const int64_t whole = size - stride * V;
  // The last vectors overlap those before them rather than being parts.
  const bool overlap = whole >= 0 && size % stride == 0;
  for (int64_t i = 0; i < size; i += stride * V) {
    if (overlap) i = std::min(i, whole);
    const int64_t window = static_cast<int64_t>(static_cast<uint64_t>(i) / stride);
    Vec<L> sum[stride] = {};
#pragma GCC unroll 3
    for (int64_t r = 0; r < row_count; ++r) {
      const L* const grads = (known ? row_grad[r] : rows[r].grad) + window;
      const uint8_t* const indices = (known ? row_index[r] : rows[r].index) + window;
#pragma GCC unroll 8
      for (int n = 0; n < Windows::count; ++n) {
        const Vec<L> grad = load(grads + n);
        const Choices<L> chosen = Masked::choices<L>(indices + n);
#pragma GCC unroll 4
        for (int phase = 0; phase < stride; ++phase) {
          const int tap = phase + shift - (Windows::first + n) * stride;
          if (tap < 0 || tap >= kernel) continue;
          sum[phase] = Masked::add<L>(
              sum[phase], Masked::equal<L>(chosen, known ? own[r][tap] : rows[r].own[tap]), grad);
        }
      }
    }
    for (auto& phase : sum) phase = canonical_sum<L>(phase);
    Vec<L> out[stride];
    join<stride, L>(sum, out);
    prefetch(to + i, stride * vector_bytes);
    for (int v = 0; v < stride; ++v)
      if (i <= whole)
        store(to + i + v * V, out[v]);
      else
        store_clipped(to, i + v * V, size, out[v]);
  }
}

// A block of rows of inputs at once, where the height has the stride, kernel and shift of the
// width: a gradient that is loaded goes to all the inputs that its window may have chosen. `planes`
// are planes of windows, each from the first row on that reaches the first row of inputs.
template <int stride, int kernel, int shift>
struct Block {
  static constexpr int slots = stride == 1 ? 4 : 1;  // rows of inputs, in strides
  static constexpr int rows = slots * stride;
  static constexpr int windows = Reached<stride, kernel, shift>::count + slots - 1;
  // Two vectors side by side where there are registers: additions to one sum wait for each other.
  static constexpr bool pairs = vector_bytes == 64 && stride == 1;
};
template <int stride, int kernel, int shift, class L>
void scatter_blocks(const GradRow<L>* planes, int64_t plane_count, int64_t grad_pitch,
                    int64_t index_pitch, int64_t rows, int64_t size, L* to, int64_t pitch) {
  using Windows = Reached<stride, kernel, shift>;
  using B = Block<stride, kernel, shift>;
  constexpr int V = lanes<L>;
  const int64_t whole = size - stride * V;
  const bool overlap = whole >= 0 && size % stride == 0;  // as in scatter_row
  // Inputs from columns `one` on, and from `other` on.
  const auto block = [&](int64_t row, int64_t one, int64_t other, auto vectors) {
    constexpr int count = decltype(vectors)::value;
    const auto over = [](int64_t i) {
      return static_cast<int64_t>(static_cast<uint64_t>(i) / stride);
    };
    const int64_t first = over(row), window = over(one), apart = over(other) - window;
    Vec<L> sum[count][B::rows][stride] = {};
    for (int64_t p = 0; p < plane_count; ++p) {
      Choices<L> own[kernel * kernel];
#pragma GCC unroll 16
      for (int k = 0; k < kernel * kernel; ++k) own[k] = Masked::in_register<L>(planes[p].own[k]);
      const L* grads = planes[p].grad + first * grad_pitch + window;
      const uint8_t* indices = planes[p].index + first * index_pitch + window;
#pragma GCC unroll 8
      for (int m = 0; m < B::windows; ++m, grads += grad_pitch, indices += index_pitch) {
#pragma GCC unroll 8
        for (int n = 0; n < Windows::count; ++n) {
#pragma GCC unroll 2
          for (int v = 0; v < count; ++v) {
            const int64_t at = n + (v ? apart : 0);
            const Vec<L> grad = Masked::in_register<L>(load(grads + at));
            const Choices<L> chosen = Masked::in_register<L>(Masked::choices<L>(indices + at));
#pragma GCC unroll 4
            for (int r = 0; r < B::rows; ++r) {
#pragma GCC unroll 4
              for (int phase = 0; phase < stride; ++phase) {
                const int kh = r + shift - (Windows::first + m) * stride;
                const int kw = phase + shift - (Windows::first + n) * stride;
                if (kh < 0 || kh >= kernel || kw < 0 || kw >= kernel) continue;
                sum[v][r][phase] = Masked::add<L>(
                    sum[v][r][phase], Masked::equal<L>(chosen, own[kh * kernel + kw]), grad);
              }
            }
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < B::rows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < count; ++v) {
        const int64_t i = v ? other : one;
        for (auto& phase : sum[v][r]) phase = canonical_sum<L>(phase);
        Vec<L> out[stride];
        join<stride, L>(sum[v][r], out);
        L* const target = to + (row + r) * pitch;
        prefetch(target + i, stride * vector_bytes);
        for (int part = 0; part < stride; ++part)
          if (count > 1 || i <= whole)
            store(target + i + part * V, out[part]);
          else
            store_clipped(target, i + part * V, size, out[part]);
      }
    }
  };
  for (int64_t row = 0; row < rows; row += B::rows) {
    row = std::min(row, rows - B::rows);  // the last block overlaps the one before it
    for (int64_t i = 0; i < size; i += stride * V) {
      if (overlap) i = std::min(i, whole);
      if (B::pairs && overlap && i < whole) {
        const int64_t other = std::min(i + stride * V, whole);
        block(row, i, other, std::integral_constant<int, 2>{});
        i = other;
      } else {
        block(row, i, i, std::integral_constant<int, 1>{});
      }
    }
  }
}

// Output o reaches an input with tap k.
struct Reach {
  int64_t o, k;
};
// For every input of an axis, the outputs that reach it, ascending: divisions done once a call.
class ReachTable {
 public:
  explicit ReachTable(const Axis& a) {
    for (int64_t i = 0; i < a.in; ++i) {
      start_.push_back(reaches_.size());
      for (int64_t o = a.first_output(i); o <= a.last_output(i); ++o)
        if (const int64_t k = a.tap_of(o, i); k >= 0) reaches_.push_back({o, k});
    }
    start_.push_back(reaches_.size());
  }
  const Reach* begin(int64_t i) const { return reaches_.data() + start_[i]; }
  const Reach* end(int64_t i) const { return reaches_.data() + start_[i + 1]; }

 private:
  std::vector<size_t> start_;
  std::vector<Reach> reaches_;
};

template <class L>
class Scatter {
 public:
  Scatter(const PoolProblem& problem, const SumCodec<L>& codec)
      : p_(problem),
        s_(problem.shape),
        codec_(codec),
        of_plane_(problem.shape.axis[0]),
        of_row_(problem.shape.axis[1]) {
    const Axis &h = s_.axis[1], &w = s_.axis[2];
    for (int64_t phase = 0; phase < w.stride; ++phase) {
      phase_start_.push_back(phase_taps_.size());
      for (int64_t k = w.kernel - 1; k >= 0; --k)
        if (k * w.dilation >= phase && (k * w.dilation - phase) % w.stride == 0)
          phase_taps_.push_back({(k * w.dilation - phase) / w.stride, k});
    }
    phase_start_.push_back(phase_taps_.size());
    channels_last_ = is_channels_last(p_);
    if (p_.kind == IndexKind::flat) list_positions();
    if (channels_last_)
      direct_ = codec_.is_lane, disjoint_ = windows_are_disjoint();
    else
      in_place_ = codec_.is_lane && p_.input.stride[4] == 1, choose_rows();

    group_ = !channels_last_ ? 1 : s_.channels <= (disjoint_ ? 1024 : 256) ? s_.channels : 128;
    blocks_ = up(s_.channels, group_);
    if (channels_last_) margin_ = (w.kernel - 1) * w.dilation / w.stride, lead_ = -margin_;
    // The tile: slots of the width (a slot is `stride` inputs), rows of one plane.
    const int64_t all = slots_of(w);
    const int64_t bytes = direct_ ? 65536 : channels_last_ ? 8192 : in_place_ ? 16384 : 4096;
    const int64_t budget = bytes / int64_t(sizeof(L));
    slots_ = std::clamp<int64_t>(std::max(budget / group_, 2 * margin_), 1, all);
    slots_ = up(all, up(all, slots_));
    strips_ = up(all, slots_);
    const int64_t row = (slots_ + margin_) * group_;
    const auto rows_of = [&](int64_t planes) { return budget / (row * outputs_of(planes)); };
    // A plane of windows belongs to several of inputs, and is staged once for those of a tile.
    const bool shared = !channels_last_ && !disjoint_;
    while (shared && planes_ < s_.axis[0].in && rows_of(planes_ + 1) * h.stride >= h.in) ++planes_;
    slices_ = up(s_.axis[0].in, planes_), planes_ = up(s_.axis[0].in, slices_);
    const int64_t rows = std::max(rows_of(planes_), h.extent(1) / h.stride);
    rows_ = std::clamp<int64_t>(rows * h.stride, 1, h.in);
    bands_ = up(h.in, rows_);
    staged_rows_ =
        (std::min(h.out, (rows_ + h.extent(1)) / h.stride + 2) + 2 * above_) * outputs_of(planes_);
    grads_ = span(p_.output, s_), indices_ = span(p_.index, s_);
    pitch_ = (slots_ + margin_) * group_;
    phase_size_ = slots_ * group_ + lanes<L>;
    if (channels_last_ && !direct_) sums_ = w.stride * phase_size_;
    if (!channels_last_ && !in_place_) sums_ = rows_ * slots_ * w.stride + lanes<L>;
  }

  // Is there a way for the call? In NCHW, looking up is faster than a gather of other windows than
  // those of the row kernels.
  static bool has_way(const PoolProblem& p) {
    const Axis& w = p.shape.axis[2];
    const bool rows = (w.stride <= 2 && (w.kernel == 2 || w.kernel == 3)) ||
                      (w.stride == 4 && w.kernel == 4 && w.pad % 4 == 0);
    return is_channels_last(p) || (rows && w.dilation == 1);
  }

  void run() const {
    const int64_t outputs = planes_ * rows_ * slots_ * group_;
    parallel_for(s_.batch * blocks_ * slices_ * bands_ * strips_, 1 + 16384 / (outputs + 1),
                 FloatEnvironment::gradual, [&](int64_t begin, int64_t end) {
                   const int64_t size = staged_rows_ * pitch_ + 2 * lanes<L>, taps = s_.taps();
                   Scratch scratch((2 * size + sums_) * int64_t(sizeof(L)) + 2 * size +
                                   (taps + 1) * int64_t(sizeof(Term) + sizeof(PixelRow<L>) +
                                                        sizeof(GradRow<L>) + sizeof(Choices<L>)) +
                                   s_.axis[2].stride * int64_t(sizeof(int64_t)) + 2048);
                   Buffers b;
                   b.index = scratch.take<uint8_t>(size);
                   b.terms = scratch.take<Term>(taps + 1);
                   b.term_ends = scratch.take<int64_t>(s_.axis[2].stride);
                   b.rows = scratch.take<GradRow<L>>(taps + 1);
                   b.pixels = scratch.take<PixelRow<L>>(taps + 1);
                   b.own = scratch.take<Choices<L>>(taps + 1);
                   for (int64_t tap = 0; tap < taps; ++tap) b.own[tap] = Masked::choice<L>(tap);
                   if (!direct_) {
                     b.grad = scratch.take<L>(size);
                     b.sums = scratch.take<L>(sums_);
                   }
                   if (!channels_last_) {
                     Buffers next = b;
                     next.grad = scratch.take<L>(size), next.index = scratch.take<uint8_t>(size);
                     return scatter_rows(begin, end, b, next);
                   }
                   for (int64_t task = begin; task < end; ++task)
                     direct_ ? scatter_pixels(tile_of(task), b) : scatter(tile_of(task), b);
                 });
  }

 private:
  // Inputs of planes [id, id_end), rows [row, end) and slots [slot, slot + slots), for `lanes`
  // channels.
  struct Tile {
    int64_t n, channel, lanes, id, id_end, row, end, slot, slots;
    int64_t od, od_end, oh, oh_end;  // the outputs that reach them
  };
  struct Buffers {
    L *grad = nullptr, *sums = nullptr;
    uint8_t* index = nullptr;
    Term* terms = nullptr;
    int64_t* term_ends = nullptr;
    GradRow<L>* rows = nullptr;
    PixelRow<L>* pixels = nullptr;
    Choices<L>* own = nullptr;  // by the number of a tap
  };
  // The windows of a tile, from (t.od, t.oh, t.slot + lead_) on.
  struct TileWindows {
    const L* grad;
    const uint8_t* index;
    int64_t grad_pitch, grad_plane, index_pitch, index_plane;
  };
  using RowKernel = void (*)(const GradRow<L>*, int64_t, int64_t, L*);
  using BlockKernel = void (*)(const GradRow<L>*, int64_t, int64_t, int64_t, int64_t, int64_t, L*,
                               int64_t);

  static bool is_channels_last(const PoolProblem& p) {
    return p.input.stride[1] == 1 && p.output.stride[1] == 1 && p.index.stride[1] == 1 &&
           p.shape.channels > 1 && p.input.stride[4] != 1;
  }
  static int64_t span(const RawView& v, const PoolShape& s) {
    int64_t size = 1 + (s.batch - 1) * v.stride[0] + (s.channels - 1) * v.stride[1];
    for (int a = 0; a < 3; ++a) size += (s.axis[a].out - 1) * v.stride[2 + a];
    return size;
  }

  // The tap that lies a distance in the plane behind a window's first.
  void list_positions() {
    const Axis &d = s_.axis[0], &h = s_.axis[1], &w = s_.axis[2];
    const auto distance = [&](int64_t kd, int64_t kh, int64_t kw) {
      return s_.flat_of(kd * d.dilation, kh * h.dilation, kw * w.dilation);
    };
    tap_of_.assign(distance(d.kernel - 1, h.kernel - 1, w.kernel - 1) + 1, nobody);
    for (int64_t kd = 0; kd < d.kernel; ++kd)
      for (int64_t kh = 0; kh < h.kernel; ++kh)
        for (int64_t kw = 0; kw < w.kernel; ++kw)
          tap_of_[distance(kd, kh, kw)] = static_cast<uint8_t>(s_.offset_of(kd, kh, kw));
  }

  void choose_rows() {
    const Axis& w = s_.axis[2];
    const bool odd = w.pad % 2 == 1;
    if (w.stride == 1 && w.kernel == 2) use_rows<1, 2, 0>();
    if (w.stride == 1 && w.kernel == 3) use_rows<1, 3, 0>();
    if (w.stride == 2 && w.kernel == 2) odd ? use_rows<2, 2, 1>() : use_rows<2, 2, 0>();
    if (w.stride == 2 && w.kernel == 3) odd ? use_rows<2, 3, 1>() : use_rows<2, 3, 0>();
    if (w.stride == 4 && w.kernel == 4 && w.pad % 4 == 0) use_rows<4, 4, 0>();
  }
  template <int stride, int kernel, int shift>
  void use_rows() {
    using Windows = Reached<stride, kernel, shift>;
    rows_kernel_[0] = scatter_row<stride, kernel, shift, 0, L>;
    rows_kernel_[1] = scatter_row<stride, kernel, shift, 1, L>;
    rows_kernel_[2] = scatter_row<stride, kernel, shift, 2, L>;
    rows_kernel_[3] = scatter_row<stride, kernel, shift, 3, L>;
    disjoint_ = stride > 1 && windows_are_disjoint();
    margin_ = Windows::count - 1;
    lead_ = s_.axis[2].pad / stride + Windows::first;
    const Axis& h = s_.axis[1];
    if constexpr (stride <= 2) {
      if (h.stride == stride && h.kernel == kernel && h.pad % stride == shift && h.dilation == 1) {
        using B = Block<stride, kernel, shift>;
        block_kernel_ = scatter_blocks<stride, kernel, shift, L>;
        block_rows_ = B::rows, above_ = Windows::count - 1;
        block_lead_ = h.pad / stride + Windows::first;
      }
    }
  }

  bool windows_are_disjoint() const {
    for (const Axis& a : s_.axis)
      if (a.pad != 0 || a.stride != a.kernel || a.dilation != 1) return false;
    return s_.axis[2].out * s_.axis[2].stride <= s_.axis[2].in;  // none overhangs its row
  }

  int64_t slots_of(const Axis& w) const {
    return up(channels_last_ ? w.in + w.pad : w.in, w.stride);
  }
  // Planes of windows that reach so many planes of inputs.
  int64_t outputs_of(int64_t planes) const {
    const Axis& d = s_.axis[0];
    return std::min(d.out, (d.extent(1) + planes - 1) / d.stride + 1);
  }

  Tile tile_of(int64_t task) const {
    const Axis &d = s_.axis[0], &h = s_.axis[1];
    Tile t;
    t.slot = task % strips_ * slots_, task /= strips_;
    t.row = task % bands_ * rows_, task /= bands_;
    t.id = task % slices_ * planes_, task /= slices_;
    t.id_end = std::min(t.id + planes_, d.in);
    t.channel = task % blocks_ * group_;
    t.n = task / blocks_;
    t.lanes = std::min(group_, s_.channels - t.channel);
    t.end = std::min(t.row + rows_, h.in);
    const Axis& w = s_.axis[2];
    t.slots = std::min(slots_, slots_of(w) - t.slot);
    t.od = d.first_output(t.id), t.od_end = d.last_output(t.id_end - 1) + 1;
    t.oh = h.first_output(t.row), t.oh_end = h.last_output(t.end - 1) + 1;
    return t;
  }

  static int64_t offset(const RawView& v, int64_t n, int64_t c, int64_t d, int64_t h, int64_t w) {
    return n * v.stride[0] + c * v.stride[1] + d * v.stride[2] + h * v.stride[3] + w * v.stride[4];
  }

  // The rows of outputs that reach a row of inputs, ascending.
  template <class Visit>
  void for_each_row(const Tile& t, int64_t ih, Visit visit) const {
    for (const Reach* d = of_plane_.begin(t.id); d != of_plane_.end(t.id); ++d)
      for (const Reach* h = of_row_.begin(ih); h != of_row_.end(ih); ++h)
        visit(d->o, d->k, h->o, h->k);
  }
  // The taps of the width that reach a phase, with how many windows back: windows ascending.
  template <class Visit>
  void for_each_tap(int64_t phase, Visit visit) const {
    for (size_t k = phase_start_[phase]; k < phase_start_[phase + 1]; ++k)
      visit(phase_taps_[k].o, phase_taps_[k].k);
  }

  // ---- rows: gradients and indices as lanes, sums of a row at once

  // A tile is staged while the one before it is added up: a load across two stores has to wait
  // until both are in the cache, and they queue behind the results.
  void scatter_rows(int64_t begin, int64_t end, Buffers b, Buffers next) const {
    Tile t = tile_of(begin);
    stage(t, b);
    for (int64_t task = begin; task < end; ++task) {
      const Tile following = tile_of(std::min(task + 1, end - 1));
      if (task + 1 < end) stage(following, next);
      for (; t.id < t.id_end; ++t.id) scatter_rows(t, b);
      t = following;
      std::swap(b, next);
    }
  }

  void scatter_rows(const Tile& t, const Buffers& b) const {
    const Axis& w = s_.axis[2];
    const int64_t first = t.slot * w.stride, size = std::min(t.slots * w.stride, w.in - first);
    const TileWindows windows = windows_of(t, b);
    char* const target = static_cast<char*>(p_.input.data) +
                         offset(p_.input, t.n, t.channel, t.id, t.row, first) * codec_.size;
    L* const to = in_place_ ? reinterpret_cast<L*>(target) : b.sums;
    const int64_t pitch = in_place_ ? p_.input.stride[3] : size;
    const int64_t done =
        expand(t, windows, b, to, pitch) + scatter_blocks_of(t, windows, b, size, to, pitch);
    for (int64_t ih = t.row + done; ih < t.end; ++ih) {
      int64_t count = 0;
      for_each_row(t, ih, [&](int64_t od, int64_t kd, int64_t oh, int64_t kh) {
        b.rows[count++] = row_of(t, windows, od, oh, b.own + s_.offset_of(kd, kh, 0));
      });
      rows_kernel_[count <= 3 ? count : 0](b.rows, count, size, to + (ih - t.row) * pitch);
    }
    if (!in_place_) write_rows(t.end - t.row, size, b.sums, target);
  }

  // Rows one behind another are long enough to be converted at the speed of vectors.
  void write_rows(int64_t rows, int64_t size, const L* sums, char* to) const {
    const int64_t stride = p_.input.stride[4], pitch = p_.input.stride[3];
    if (pitch == size * stride) return codec_.write(to, stride, rows * size, sums);
    for (int64_t r = 0; r < rows; ++r)
      codec_.write(to + r * pitch * codec_.size, stride, size, sums + r * size);
  }

  // Blocks from the tile's first row on: how many rows are done?
  int64_t scatter_blocks_of(const Tile& t, const TileWindows& windows, const Buffers& b,
                            int64_t size, L* to, int64_t pitch) const {
    const int64_t stride = s_.axis[2].stride, top = t.row / stride + block_lead_;
    if (!block_kernel_ || expands(t) || t.od >= t.od_end || t.oh >= t.oh_end) return 0;
    // Windows are staged, or lie in the tensor, as far as `above_` rows around those of the tile.
    const int64_t rows = std::min((t.end - t.row) / stride, t.oh_end - top) * stride;
    if (rows < block_rows_) return 0;
    int64_t planes = 0;
    for (const Reach* d = of_plane_.begin(t.id); d != of_plane_.end(t.id); ++d)
      b.rows[planes++] = row_of(t, windows, d->o, top, b.own + s_.offset_of(d->k, 0, 0));
    block_kernel_(b.rows, planes, windows.grad_pitch, windows.index_pitch, rows, size, to, pitch);
    return rows;
  }

  TileWindows windows_of(const Tile& t, const Buffers& b) const {
    const int64_t pitch = t.slots + margin_, plane = (t.oh_end - t.oh + 2 * above_) * pitch;
    TileWindows w{b.grad + above_ * pitch, b.index + above_ * pitch, pitch, plane, pitch, plane};
    if (grads_in_place(t)) {
      w.grad = static_cast<const L*>(p_.output.data) + first_window(p_.output, t);
      w.grad_pitch = p_.output.stride[3], w.grad_plane = p_.output.stride[2];
    }
    if (choices_in_place(t)) {
      w.index = static_cast<const uint8_t*>(p_.index.data) + first_window(p_.index, t);
      w.index_pitch = p_.index.stride[3], w.index_plane = p_.index.stride[2];
    }
    return w;
  }
  static GradRow<L> row_of(const Tile& t, const TileWindows& w, int64_t od, int64_t oh,
                           const Choices<L>* own) {
    return {w.grad + (od - t.od) * w.grad_plane + (oh - t.oh) * w.grad_pitch,
            w.index + (od - t.od) * w.index_plane + (oh - t.oh) * w.index_pitch, own};
  }

  int64_t first_window(const RawView& v, const Tile& t) const {
    return offset(v, t.n, t.channel, t.od, t.oh, t.slot + lead_);
  }
  // What a kernel reads of windows that do not exist is never added, but it must be memory of the
  // tensor, which has `size` elements: that of other rows.
  bool in_tensor(const RawView& v, int64_t size, const Tile& t) const {
    const int64_t around = above_ * v.stride[3];
    const int64_t last = first_window(v, t) + (t.od_end - 1 - t.od) * v.stride[2] +
                         (t.oh_end - 1 - t.oh) * v.stride[3] + around;
    return v.stride[4] == 1 && t.od < t.od_end && t.oh < t.oh_end && first_window(v, t) >= around &&
           last + t.slots + margin_ + lanes<L> <= size;
  }
  bool grads_in_place(const Tile& t) const {
    return !channels_last_ && codec_.is_lane && in_tensor(p_.output, grads_, t);
  }
  // Only where no window reaches another row or column, whatever was made by hand.
  bool choices_in_place(const Tile& t) const {
    return expands(t) && grads_in_place(t) && codec_.index_size == 1 &&
           in_tensor(p_.index, indices_, t);
  }

  // Is every row of inputs that of one row of windows, as wide as they?
  bool expands(const Tile& t) const {
    const Axis& w = s_.axis[2];
    return !channels_last_ && disjoint_ && strips_ == 1 && w.in == w.out * w.stride &&
           t.od_end - t.od == 1;
  }
  int64_t expand(const Tile& t, const TileWindows& windows, const Buffers& b, L* to,
                 int64_t pitch) const {
    const Axis &d = s_.axis[0], &h = s_.axis[1], &w = s_.axis[2];
    const int64_t rows = (t.end - t.row) / h.stride, oh = t.row / h.stride;
    if (!expands(t) || oh >= h.out) return 0;
    const int64_t count = std::min(rows, h.out - oh);
    const Choices<L>* const own = b.own + s_.offset_of(t.id - t.od * d.stride, 0, 0);
    (w.stride == 2 ? expand_rows<2, L> : expand_rows<4, L>)(row_of(t, windows, t.od, oh, own),
                                                            windows.grad_pitch, windows.index_pitch,
                                                            count, w.out, h.stride, to, pitch);
    return count * h.stride;
  }

  // ---- direct: channels innermost, choices as bytes, gradients and sums where they are in memory

  // Windows of a tile as they lie in memory; choices that are no bytes there are staged.
  struct Pixels {
    const L* grad;
    const uint8_t* index;
    int64_t index_plane, index_row, index_pixel;
  };
  Pixels pixels_of(const Tile& t, const Buffers& b) const {
    const Axis& w = s_.axis[2];
    const int64_t first = offset(p_.output, t.n, t.channel, t.od, t.oh, 0);
    Pixels pixels{static_cast<const L*>(p_.output.data) + first, nullptr, 0, 0, 0};
    if (codec_.index_size == 1 && p_.kind == IndexKind::offset) {
      const int64_t* const stride = p_.index.stride;
      pixels.index = static_cast<const uint8_t*>(p_.index.data) +
                     offset(p_.index, t.n, t.channel, t.od, t.oh, 0);
      pixels.index_plane = stride[2], pixels.index_row = stride[3], pixels.index_pixel = stride[4];
      return pixels;
    }
    const int64_t start = std::clamp<int64_t>(t.slot - margin_, 0, w.out);
    const int64_t columns = std::min(t.slot + t.slots, w.out) - start;
    pixels.index = b.index - start * t.lanes;
    pixels.index_pixel = t.lanes, pixels.index_row = columns * t.lanes;
    pixels.index_plane = (t.oh_end - t.oh) * pixels.index_row;
    uint8_t* to = b.index;
    for (int64_t od = t.od; od < t.od_end; ++od)
      for (int64_t oh = t.oh; oh < t.oh_end; ++oh)
        for (int64_t ow = start; ow < start + columns; ++ow, to += t.lanes)
          stage_choices(t, od, oh, ow, 1, t.lanes, to);
    return pixels;
  }

  // `count` choices: of windows next to each other (step 1), or of one window's channels (0).
  void stage_choices(const Tile& t, int64_t od, int64_t oh, int64_t ow, int64_t stride,
                     int64_t count, uint8_t* to, int64_t step = 0) const {
    const char* const from = static_cast<const char*>(p_.index.data) +
                             offset(p_.index, t.n, t.channel, od, oh, ow) * codec_.index_size;
    if (p_.kind == IndexKind::offset) return codec_.read_index(from, stride, count, to);
    const int64_t base = s_.flat_of(s_.axis[0].input_of(od, 0), s_.axis[1].input_of(oh, 0),
                                    s_.axis[2].input_of(ow, 0));
    codec_.read_position(from, stride, count, to, base, step * s_.axis[2].stride, tap_of_);
  }

  void scatter_pixels(const Tile& t, const Buffers& b) const {
    const Pixels pixels = pixels_of(t, b);
    L* to = static_cast<L*>(p_.input.data) + offset(p_.input, t.n, t.channel, t.id, t.row, 0);
    for (int64_t ih = t.row; ih < t.end; ++ih, to += p_.input.stride[3]) {
      if (expand_pixels(t, ih, pixels, to, b)) {
        const int64_t rows = s_.axis[1].stride;
        ih += rows - 1, to += (rows - 1) * p_.input.stride[3];
        continue;
      }
      int64_t count = 0;
      for_each_row(t, ih, [&](int64_t od, int64_t kd, int64_t oh, int64_t kh) {
        b.pixels[count++] = {
            pixels.grad + (od - t.od) * p_.output.stride[2] + (oh - t.oh) * p_.output.stride[3],
            pixels.index + (od - t.od) * pixels.index_plane + (oh - t.oh) * pixels.index_row,
            s_.offset_of(kd, kh, 0)};
      });
      scatter_columns(t, count, pixels.index_pixel, to, b);
    }
  }

  // The rows of inputs from `ih` on that belong to one row of windows: are there such, and done?
  bool expand_pixels(const Tile& t, int64_t ih, const Pixels& pixels, L* to,
                     const Buffers& b) const {
    const Axis &d = s_.axis[0], &h = s_.axis[1], &w = s_.axis[2];
    const int64_t oh = ih / h.stride;
    if (!disjoint_ || t.lanes < lanes<L> || t.od_end - t.od != 1 || ih % h.stride != 0 ||
        oh >= h.out || ih + h.stride > t.end)
      return false;
    const int64_t pitch = p_.input.stride[3], pixel = p_.input.stride[4];
    const L* const grad = pixels.grad + (oh - t.oh) * p_.output.stride[3];
    const uint8_t* const index = pixels.index + (oh - t.oh) * pixels.index_row;
    const Choices<L>* const own = b.own + s_.offset_of(t.id - t.od * d.stride, 0, 0);
    const int64_t last = std::min(t.slot + t.slots, w.out);
    for (int64_t ow = t.slot; ow < last; ++ow)
      expand_pixel<L>(grad + ow * p_.output.stride[4], index + ow * pixels.index_pixel, t.lanes,
                      own, h.stride, w.stride, to + ow * w.stride * pixel, pitch, pixel);
    // What no window reaches, to the right of the last.
    const int64_t end = std::min((t.slot + t.slots) * w.stride, w.in);
    for (int64_t r = 0; r < h.stride; ++r)
      for (int64_t iw = std::max(t.slot, last) * w.stride; iw < end; ++iw)
        std::fill_n(to + r * pitch + iw * pixel, t.lanes, L(0));
    return true;
  }

  // Channels innermost: a row of inputs, pixel after pixel as they lie in memory. Between the ends
  // of the row, all slots have the same terms.
  void scatter_columns(const Tile& t, int64_t row_count, int64_t index_pixel, L* to,
                       const Buffers& b) const {
    const Axis& w = s_.axis[2];
    const int64_t pixel = p_.input.stride[4];
    const int64_t inner_end = std::min({t.slot + t.slots, w.out, (w.in + w.pad) / w.stride});
    for (int64_t slot = t.slot; slot < t.slot + t.slots;) {
      const bool inner = slot >= margin_ && slot * w.stride >= w.pad && slot < inner_end;
      int64_t phase = 0, run = inner ? inner_end - slot : 1;
      while (phase < w.stride) {
        const int64_t first = phase, iw = slot * w.stride + phase - w.pad;
        int64_t count = 0;
        do {
          for (int64_t r = 0; r < row_count; ++r)
            for_each_tap(phase, [&](int64_t shift, int64_t kw) {
              const int64_t ow = slot - shift;
              if (ow < 0 || ow >= w.out) return;
              b.terms[count++] = {b.pixels[r].grad - b.pixels[0].grad + ow * p_.output.stride[4],
                                  b.pixels[r].index - b.pixels[0].index + ow * index_pixel,
                                  b.pixels[r].own + kw};
            });
          b.term_ends[phase - first] = count;
        } while (++phase < w.stride && inner);
        if (!w.holds_input(iw)) continue;
        const Sums<L> sums{to + iw * pixel, b.pixels[0].grad,    b.pixels[0].index,
                           pixel,           p_.output.stride[4], index_pixel};
        add_terms<true, L>(sums, run, phase - first, t.lanes, b.terms, b.term_ends);
      }
      slot += run;
    }
  }

  // ---- staged: channels innermost of other types than the lanes

  // Rows of gradients and choices, from window slot + lead on, nobody where there is none.
  void stage(const Tile& t, const Buffers& b) const {
    const Axis& w = s_.axis[2];
    const int64_t start = t.slot + lead_, width = t.slots + margin_;
    const int64_t first = std::clamp<int64_t>(-start, 0, width);
    const int64_t end = std::clamp<int64_t>(w.out - start, first, width);
    const int64_t pixel = channels_last_ ? t.lanes : 1;
    const int64_t height = t.oh_end - t.oh, plane = (height + 2 * above_) * width * pixel;
    if (t.od >= t.od_end || t.oh >= t.oh_end || choices_in_place(t)) return;
    std::fill_n(b.index, (t.od_end - t.od) * plane, nobody);
    if (first == end) return;
    const int64_t ow = start + first, columns = end - first;
    const int64_t grad_stride = p_.output.stride[4], index_stride = p_.index.stride[4];
    for (int64_t od = t.od; od < t.od_end; ++od) {
      int64_t place = (od - t.od) * plane + (above_ * width + first) * pixel;
      const char* from = static_cast<const char*>(p_.output.data) +
                         offset(p_.output, t.n, t.channel, od, t.oh, ow) * codec_.size;
      if (!channels_last_ && p_.kind == IndexKind::offset && grad_stride == 1 &&
          index_stride == 1) {
        codec_.stage({from,
                      static_cast<const char*>(p_.index.data) +
                          offset(p_.index, t.n, t.channel, od, t.oh, ow) * codec_.index_size,
                      p_.output.stride[3], p_.index.stride[3], height, columns,
                      grads_in_place(t) ? nullptr : b.grad + place, b.index + place, width});
        continue;
      }
      for (int64_t oh = t.oh; oh < t.oh_end; ++oh, place += width * pixel) {
        if (channels_last_) {
          const bool one_run =
              grad_stride == pixel && index_stride == pixel && p_.kind == IndexKind::offset;
          const int64_t parts = one_run ? 1 : columns, size = one_run ? columns * pixel : pixel;
          for (int64_t j = 0; j < parts; ++j) {
            codec_.read(from + j * grad_stride * codec_.size, 1, size, b.grad + place + j * pixel);
            stage_choices(t, od, oh, ow + j, 1, size, b.index + place + j * pixel);
          }
        } else {
          codec_.read(from, grad_stride, columns, b.grad + place);
          stage_choices(t, od, oh, ow, index_stride, columns, b.index + place, 1);
        }
        from += p_.output.stride[3] * codec_.size;
      }
    }
  }

  void scatter(const Tile& t, const Buffers& b) const {
    const Axis& w = s_.axis[2];
    const int64_t pixel = t.lanes, pitch = (t.slots + margin_) * pixel;
    stage(t, b);
    for (int64_t ih = t.row; ih < t.end; ++ih) {
      for (int64_t phase = 0; phase < w.stride; ++phase) {
        int64_t count = 0;
        for_each_row(t, ih, [&](int64_t od, int64_t kd, int64_t oh, int64_t kh) {
          const int64_t row = (od - t.od) * (t.oh_end - t.oh) + oh - t.oh;
          for_each_tap(phase, [&](int64_t shift, int64_t kw) {
            const int64_t at = row * pitch + (margin_ - shift) * pixel;
            b.terms[count++] = {at, at, s_.offset_of(kd, kh, kw)};
          });
        });
        add_terms<false, L>({b.sums + phase * phase_size_, b.grad, b.index, 0, 0, 0}, 1, 1,
                            t.slots * pixel, b.terms, &count);
      }
      write_row(t, ih, b.sums);
    }
  }

  void write_row(const Tile& t, int64_t ih, const L* sums) const {
    const Axis& w = s_.axis[2];
    const int64_t phases = w.stride, stride = p_.input.stride[4], pixel = t.lanes;
    // Places in the strip that are inputs, and where place 0 would lie.
    const int64_t origin = t.slot * phases - w.pad;
    const int64_t first = std::max<int64_t>(-origin, 0);
    const int64_t end = std::min(w.in - origin, t.slots * phases);
    char* const row = static_cast<char*>(p_.input.data) +
                      offset(p_.input, t.n, t.channel, t.id, ih, origin) * codec_.size;
    const auto at = [&](int64_t e) { return row + e * stride * codec_.size; };
    if (phases == 1 && stride == pixel)
      return codec_.write(at(first), 1, (end - first) * pixel, sums + first * pixel);
    for (int64_t e = first; e < end; ++e)
      codec_.write(at(e), 1, pixel, sums + e % phases * phase_size_ + e / phases * pixel);
  }

  const PoolProblem& p_;
  const PoolShape& s_;
  const SumCodec<L>& codec_;
  const ReachTable of_plane_, of_row_;
  std::vector<Reach> phase_taps_;  // o: windows back
  std::vector<size_t> phase_start_;
  bool channels_last_ = false, direct_ = false;
  bool in_place_ = false;          // in NCHW, sums of lanes go straight to the tensor
  RowKernel rows_kernel_[4] = {};  // by the number of rows; 0: any
  BlockKernel block_kernel_ = nullptr;
  int64_t block_rows_ = 0, block_lead_ = 0;
  int64_t above_ = 0;            // rows of windows staged around those of a tile
  bool disjoint_ = false;        // every input belongs to one window at most
  std::vector<uint8_t> tap_of_;  // by the distance in the plane, of a flat index
  int64_t group_ = 1, blocks_ = 1, margin_ = 0, lead_ = 0, slots_ = 1, strips_ = 1, rows_ = 1,
          bands_ = 1, planes_ = 1, slices_ = 1;
  int64_t staged_rows_ = 0, pitch_ = 0, phase_size_ = 0, sums_ = 0;
  int64_t grads_ = 0, indices_ = 0;  // elements from the first of them to the last
};
