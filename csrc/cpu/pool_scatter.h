// The gradient of the vector rows, for small windows. Included after pool_forward.h. Start reading
// at Scatter::run: rows (NCHW), pixels (channels innermost), or staged for the rest.
//
// As a gather: an input belongs to few windows, and gets the gradient of those whose index names
// it. The inputs of one stride phase are lanes next to each other, and so are the windows that
// reach them with a given tap: `acc[i] += index[i - m] == tap ? grad[i - m] : 0`, windows in
// ascending order. Nothing is written twice, no task waits for another, and adding +0 where a
// window chose someone else changes no sum that began at +0.

// Gradients to lanes in which they are added, and a finished sum back.
template <class T>
inline Lane<T> to_term(T x) {
  if constexpr (is_half_type<T>) {
    return widen(x);
  } else {
    return static_cast<Lane<T>>(x);
  }
}
template <class T>
inline T from_sum(Lane<T> sum) {
  if constexpr (is_half_type<T>) {
    return narrow<T>(sum);
  } else {
    return static_cast<T>(sum);  // add_terms has made NaN canonical
  }
}

template <class T>
void read_terms(const void* from, int64_t stride, int64_t count, Lane<T>* __restrict to) {
  const T* const source = static_cast<const T*>(from);
  if (stride == 1)
    for (int64_t i = 0; i < count; ++i) to[i] = to_term(source[i]);
  else
    for (int64_t i = 0; i < count; ++i) to[i] = to_term(source[i * stride]);
}
template <class T>
void write_sums(void* to, int64_t stride, int64_t count, const Lane<T>* __restrict from) {
  T* const target = static_cast<T*>(to);
  if (stride == 1)
    for (int64_t i = 0; i < count; ++i) target[i] = from_sum<T>(from[i]);
  else
    for (int64_t i = 0; i < count; ++i) target[i * stride] = from_sum<T>(from[i]);
}
// to[i * phases + phase] = from[phase * pitch + i]
template <class T, int phases>
void write_joined(void* to, int64_t count, const Lane<T>* __restrict from, int64_t pitch) {
  T* const target = static_cast<T*>(to);
  for (int64_t i = 0; i < count; ++i)
    for (int phase = 0; phase < phases; ++phase)
      target[i * phases + phase] = from_sum<T>(from[phase * pitch + i]);
}
// to[i] = from[i * stride] - base - i * step, or -1 where that fits no lane.
template <class Index, class I>
void read_indices(const void* from, int64_t stride, int64_t count, I* __restrict to, int64_t base,
                  int64_t step) {
  const Index* const source = static_cast<const Index*>(from);
  const auto lane = [](int64_t index) {
    return index == static_cast<I>(index) ? static_cast<I>(index) : I(-1);
  };
  // A hand-made index may be anything: subtract modulo 2^64.
  const auto less = [](int64_t index, int64_t origin) {
    return static_cast<int64_t>(static_cast<uint64_t>(index) - static_cast<uint64_t>(origin));
  };
  if (base == 0 && step == 0 && stride == 1)
    for (int64_t i = 0; i < count; ++i) to[i] = lane(source[i]);
  else
    for (int64_t i = 0; i < count; ++i) to[i] = lane(less(source[i * stride], base + i * step));
}

// Rows of gradients and indices as they are to rows of lanes, `pitch` apart; without to_grad, the
// indices alone.
template <class L>
struct Staged {
  const void *grad, *index;
  int64_t grad_pitch, index_pitch, rows, columns;
  L* to_grad;
  LaneIndex<L>* to_index;
  int64_t pitch;
};
template <class T, class Index>
void stage_rows(const Staged<Lane<T>>& s) {
  using L = Lane<T>;
  using I = LaneIndex<L>;
  constexpr int V = lanes<L>;
  for (int64_t r = 0; r < s.rows; ++r) {
    const T* const grad = static_cast<const T*>(s.grad) + r * s.grad_pitch;
    const Index* const index = static_cast<const Index*>(s.index) + r * s.index_pitch;
    L* const to_grad = s.to_grad + r * s.pitch;
    I* const to_index = s.to_index + r * s.pitch;
    if constexpr (is_lane_type<T> && sizeof(I) == 4 && sizeof(Index) == 1) {
      if (s.columns >= V) {  // the last vector overlaps the one before it
        for (int64_t i = 0; i < s.columns; i += V) {
          i = std::min(i, s.columns - V);
          store(to_index + i, (VecIndex<L>)Masked::widen(index + i));
          if (s.to_grad)
            store(to_grad + i, load(grad + i));
          else
            __builtin_prefetch(grad + i);
        }
        continue;
      }
    }
    if (s.to_grad) read_terms<T>(grad, 1, s.columns, to_grad);
    read_indices<Index>(index, 1, s.columns, to_index, 0, 0);
  }
}

template <class L>
struct SumCodec {
  int64_t size, index_size;
  bool is_lane;
  void (*read)(const void*, int64_t, int64_t, L*);
  void (*write)(void*, int64_t, int64_t, const L*);
  void (*join[5])(void*, int64_t, const L*, int64_t);  // by the number of phases
  void (*read_index)(const void*, int64_t, int64_t, LaneIndex<L>*, int64_t, int64_t);
  void (*stage)(const Staged<L>&);

  template <class T>
  static SumCodec of(IndexType type) {
    SumCodec codec{sizeof(T),
                   0,
                   is_lane_type<T>,
                   read_terms<T>,
                   write_sums<T>,
                   {nullptr, nullptr, write_joined<T, 2>, write_joined<T, 3>, write_joined<T, 4>},
                   nullptr,
                   nullptr};
    const auto set = [&](auto tag) {
      using Index = decltype(tag);
      codec.index_size = sizeof(Index);
      codec.read_index = read_indices<Index, LaneIndex<L>>;
      codec.stage = stage_rows<T, Index>;
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
    return sum == sum ? sum : broadcast(canonical_nan<L>());
  else
    return sum;
}

// sum + x where chosen.
template <class L>
inline void add_where(Vec<L>& sum, VecIndex<L> chosen, Vec<L> x) {
  if constexpr (vector_bytes == 64)
    sum = chosen ? sum + x : sum;  // one masked instruction
  else
    sum += chosen ? x : Vec<L>{};
}

// A window that reaches an input: where its gradient and its index lie, and the index that names
// the input.
template <class I>
struct Term {
  int64_t grad, index;
  I own;
};

// to[r][i] = the sum of the terms that chose input (r, i), in their order, from +0. `own` grows by
// own_step from row to row. Unless `exact`, up to a vector behind every row is read and written.
template <class L>
struct Sums {
  L* to;
  const L* grad;
  const LaneIndex<L>* index;
  int64_t to_pitch, grad_pitch, index_pitch, own_step;
};
template <bool exact, class L>
void add_terms(const Sums<L>& s, int64_t rows, int64_t count, const Term<LaneIndex<L>>* terms,
               int64_t term_count) {
  using I = LaneIndex<L>;
  constexpr int V = lanes<L>;
  for (int64_t r = 0; r < rows; ++r) {
    const L* const grad = s.grad + r * s.grad_pitch;
    const I* const index = s.index + r * s.index_pitch;
    L* const to = s.to + r * s.to_pitch;
    const auto sums = [&](int64_t i, auto vectors, bool whole) {
      constexpr int n = decltype(vectors)::value;
      Vec<L> sum[n] = {};
      for (int64_t k = 0; k < term_count; ++k) {
        const Term<I>& t = terms[k];
        const VecIndex<L> own = broadcast(static_cast<I>(t.own + r * s.own_step));
        for (int v = 0; v < n; ++v) {
          const int64_t at = i + v * V;
          const Vec<L> g = whole ? load(grad + t.grad + at)
                                 : load_clipped(grad + t.grad + at, 0, count - at, L(0));
          add_where<L>(sum[v], load(index + t.index + at) == own, g);
        }
      }
      for (int v = 0; v < n; ++v) {
        if (whole)
          store(to + i + v * V, canonical_sum<L>(sum[v]));
        else
          store_clipped(to, i + v * V, count, canonical_sum<L>(sum[v]));
      }
    };
    int64_t i = 0;
    for (; i + 4 * V <= count; i += 4 * V) sums(i, std::integral_constant<int, 4>{}, true);
    for (; i + V <= count || (!exact && i < count); i += V)
      sums(i, std::integral_constant<int, 1>{}, true);
    if (i < count) sums(i, std::integral_constant<int, 1>{}, false);
  }
}

// A row of windows that reach a row of inputs, and for each tap of its width the index that names
// it, in all lanes.
template <class L>
struct GradRow {
  const L* grad;
  const LaneIndex<L>* index;
  const VecIndex<L>* own;
};

// The same with channels innermost; `own` as in Term, for the first tap of the width.
template <class L>
struct PixelRow {
  const L* grad;
  const LaneIndex<L>* index;
  LaneIndex<L> own;
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

// Windows that do not overlap, in one row: `height` rows of inputs, each chosen by one at most. The
// sum of one gradient is that gradient added to +0.
template <int stride, class L>
void expand_row(const L* grad, const LaneIndex<L>* index, int64_t windows, const VecIndex<L>* own,
                int64_t height, L* to, int64_t pitch) {
  constexpr int V = lanes<L>;
  for (int64_t o = 0; o < windows; o += V) {
    o = std::min(o, windows - V);  // the last vector overlaps the one before it
    const Vec<L> sum = canonical_sum<L>(load(grad + o) + Vec<L>{});
    const VecIndex<L> chosen = load(index + o);
    for (int64_t kh = 0; kh < height; ++kh) {
      Vec<L> phase[stride], out[stride];
      for (int k = 0; k < stride; ++k) phase[k] = chosen == own[kh * stride + k] ? sum : Vec<L>{};
      join<stride, L>(phase, out);
      for (int v = 0; v < stride; ++v) store(to + kh * pitch + o * stride + v * V, out[v]);
    }
  }
}

// The same with channels innermost, for one window in `channels` planes: `own` is that of its first
// tap here, for `height` rows of `width` inputs.
template <class L>
void expand_pixel(const L* grad, const LaneIndex<L>* index, int64_t channels,
                  const VecIndex<L>* own, int64_t height, int64_t width, L* to, int64_t pitch,
                  int64_t pixel) {
  constexpr int V = lanes<L>;
  for (int64_t c = 0; c < channels; c += V) {
    c = std::min(c, channels - V);  // the last vector overlaps the one before it
    const Vec<L> sum = canonical_sum<L>(load(grad + c) + Vec<L>{});
    const VecIndex<L> chosen = load(index + c);
    for (int64_t kh = 0; kh < height; ++kh)
      for (int64_t kw = 0; kw < width; ++kw)
        store(to + kh * pitch + kw * pixel + c, chosen == own[kh * width + kw] ? sum : Vec<L>{});
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
  const LaneIndex<L>* row_index[held];
  VecIndex<L> own[held][kernel];
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
      const LaneIndex<L>* const indices = (known ? row_index[r] : rows[r].index) + window;
#pragma GCC unroll 8
      for (int n = 0; n < Windows::count; ++n) {
        const Vec<L> grad = load(grads + n);
        const VecIndex<L> index = load(indices + n);
#pragma GCC unroll 4
        for (int phase = 0; phase < stride; ++phase) {
          const int tap = phase + shift - (Windows::first + n) * stride;
          if (tap < 0 || tap >= kernel) continue;
          add_where<L>(sum[phase], index == (known ? own[r][tap] : rows[r].own[tap]), grad);
        }
      }
    }
    for (auto& phase : sum) phase = canonical_sum<L>(phase);
    Vec<L> out[stride];
    join<stride, L>(sum, out);
    if (i <= whole) {
      for (int v = 0; v < stride; ++v) store(to + i + v * V, out[v]);
    } else {
      L part[stride * V];
      for (int v = 0; v < stride; ++v) store(part + v * V, out[v]);
      for (int64_t j = 0; j < size - i; ++j) to[i + j] = part[j];
    }
  }
}

// A block of rows of inputs at once, where the height has the stride, kernel and shift of the
// width: a gradient that is loaded goes to all the inputs that its window may have chosen. `rows`
// holds, for each plane of windows, the rows that reach the block; `own` that of the plane's first
// tap.
template <int stride, int kernel, int shift>
struct Block {
  static constexpr int slots = stride == 1 ? 4 : 1;  // rows of inputs, in strides
  static constexpr int rows = slots * stride;
  static constexpr int windows = Reached<stride, kernel, shift>::count + slots - 1;
};
template <int stride, int kernel, int shift, class L>
void scatter_block(const GradRow<L>* rows, int64_t planes, int64_t size, L* to, int64_t pitch) {
  using Windows = Reached<stride, kernel, shift>;
  using B = Block<stride, kernel, shift>;
  constexpr int V = lanes<L>;
  const int64_t whole = size - stride * V;
  const bool overlap = whole >= 0 && size % stride == 0;  // as in scatter_row
  for (int64_t i = 0; i < size; i += stride * V) {
    if (overlap) i = std::min(i, whole);
    const int64_t window = static_cast<int64_t>(static_cast<uint64_t>(i) / stride);
    Vec<L> sum[B::rows][stride] = {};
    for (int64_t p = 0; p < planes; ++p) {
      const GradRow<L>* const plane = rows + p * B::windows;
      const VecIndex<L>* const own = plane->own;
#pragma GCC unroll 8
      for (int m = 0; m < B::windows; ++m) {
        const L* const grads = plane[m].grad + window;
        const LaneIndex<L>* const indices = plane[m].index + window;
#pragma GCC unroll 8
        for (int n = 0; n < Windows::count; ++n) {
          const Vec<L> grad = load(grads + n);
          const VecIndex<L> index = load(indices + n);
#pragma GCC unroll 4
          for (int r = 0; r < B::rows; ++r) {
#pragma GCC unroll 4
            for (int phase = 0; phase < stride; ++phase) {
              const int kh = r + shift - (Windows::first + m) * stride;
              const int kw = phase + shift - (Windows::first + n) * stride;
              if (kh < 0 || kh >= kernel || kw < 0 || kw >= kernel) continue;
              add_where<L>(sum[r][phase], index == own[kh * kernel + kw], grad);
            }
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < B::rows; ++r) {
      for (auto& phase : sum[r]) phase = canonical_sum<L>(phase);
      Vec<L> out[stride];
      join<stride, L>(sum[r], out);
      L* const row = to + r * pitch + i;
      if (i <= whole) {
        for (int v = 0; v < stride; ++v) store(row + v * V, out[v]);
      } else {
        L part[stride * V];
        for (int v = 0; v < stride; ++v) store(part + v * V, out[v]);
        for (int64_t j = 0; j < size - i; ++j) row[j] = part[j];
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
    const Axis &d = s_.axis[0], &h = s_.axis[1], &w = s_.axis[2];
    for (int64_t phase = 0; phase < w.stride; ++phase) {
      phase_start_.push_back(phase_taps_.size());
      for (int64_t k = w.kernel - 1; k >= 0; --k)
        if (k * w.dilation >= phase && (k * w.dilation - phase) % w.stride == 0)
          phase_taps_.push_back({(k * w.dilation - phase) / w.stride, k});
    }
    phase_start_.push_back(phase_taps_.size());
    channels_last_ = p_.input.stride[1] == 1 && p_.output.stride[1] == 1 &&
                     p_.index.stride[1] == 1 && s_.channels > 1 && p_.input.stride[4] != 1;
    const bool flat = p_.kind == IndexKind::flat;
    weight_[2] = flat ? w.dilation : 1;
    weight_[1] = flat ? h.dilation * w.in : w.kernel;
    weight_[0] = flat ? d.dilation * h.in * w.in : w.kernel * h.kernel;

    if (channels_last_)
      direct_ = codec_.is_lane, disjoint_ = windows_are_disjoint() && !flat;
    else if (w.dilation == 1)
      choose_rows();

    group_ = !channels_last_ ? 1 : s_.channels <= (disjoint_ ? 1024 : 256) ? s_.channels : 128;
    blocks_ = up(s_.channels, group_);
    if (!rows_way_) margin_ = (w.kernel - 1) * w.dilation / w.stride, lead_ = -margin_;
    // The tile: slots of the width (a slot is `stride` inputs), rows of one plane.
    const int64_t all = up(rows_way_ ? w.in : w.in + w.pad, w.stride);
    const int64_t budget = (direct_ ? 65536 : rows_way_ ? 16384 : 8192) / int64_t(sizeof(L));
    slots_ = std::clamp<int64_t>(std::max(budget / group_, 2 * margin_), 1, all);
    slots_ = up(all, up(all, slots_));
    strips_ = up(all, slots_);
    const int64_t planes = planes_of_outputs();
    const int64_t row = (slots_ + margin_) * group_ * planes;
    rows_ = std::clamp<int64_t>(std::max(budget / row, reach(h) / h.stride) * h.stride, 1, h.in);
    bands_ = up(h.in, rows_);
    staged_rows_ = std::min(h.out, (rows_ + reach(h)) / h.stride + 2) * planes;
    grads_ = 1 + (s_.batch - 1) * p_.output.stride[0] + (s_.channels - 1) * p_.output.stride[1];
    for (int a = 0; a < 3; ++a) grads_ += (s_.axis[a].out - 1) * p_.output.stride[2 + a];
    pitch_ = (slots_ + margin_) * group_;
    phase_size_ = slots_ * group_ + lanes<L>;
  }

  void run() const {
    const int64_t outputs = rows_ * slots_ * group_;
    parallel_for(s_.batch * blocks_ * s_.axis[0].in * bands_ * strips_, 1 + 16384 / (outputs + 1),
                 FloatEnvironment::gradual, [&](int64_t begin, int64_t end) {
                   const int64_t size = staged_rows_ * pitch_ + 2 * lanes<L>;
                   const int64_t sums = direct_ ? 0 : s_.axis[2].stride * phase_size_;
                   Scratch scratch((2 * size + sums) * int64_t(sizeof(L) + sizeof(I)) +
                                   (s_.taps() + 1) * int64_t(sizeof(Term<I>) + sizeof(PixelRow<L>) +
                                                             sizeof(VecIndex<L>)) +
                                   row_room() * int64_t(sizeof(GradRow<L>)) +
                                   (pitch_ + lanes<L>)*int64_t(sizeof(I)) + 2048);
                   Buffers b;
                   b.index = scratch.take<I>(size);
                   b.terms = scratch.take<Term<I>>(s_.taps() + 1);
                   b.rows = scratch.take<GradRow<L>>(row_room());
                   b.nobody = scratch.take<I>(pitch_ + lanes<L>);
                   std::fill_n(b.nobody, pitch_ + lanes<L>, I(-1));
                   b.pixels = scratch.take<PixelRow<L>>(s_.taps() + 1);
                   b.own = scratch.take<VecIndex<L>>(s_.taps() + 1);
                   list_own(b.own);
                   if (!direct_) {
                     b.grad = scratch.take<L>(size);
                     b.sums = scratch.take<L>(sums);
                   }
                   if (rows_way_) {
                     Buffers next = b;
                     next.grad = scratch.take<L>(size), next.index = scratch.take<I>(size);
                     return scatter_rows(begin, end, b, next);
                   }
                   for (int64_t task = begin; task < end; ++task)
                     direct_ ? scatter_pixels(tile_of(task), b) : scatter(tile_of(task), b);
                 });
  }

 private:
  using I = LaneIndex<L>;

  // Inputs of rows [row, end) and slots [slot, slot + slots) of plane id, for `lanes` channels.
  struct Tile {
    int64_t n, channel, lanes, id, row, end, slot, slots;
    int64_t od, od_end, oh, oh_end;  // the outputs that reach them
  };
  struct Buffers {
    L *grad = nullptr, *sums = nullptr;
    I *index = nullptr, *nobody = nullptr;  // nobody: a row of windows that do not exist
    Term<I>* terms = nullptr;
    GradRow<L>* rows = nullptr;
    PixelRow<L>* pixels = nullptr;
    VecIndex<L>* own = nullptr;  // by the offset of a tap
  };
  using RowKernel = void (*)(const GradRow<L>*, int64_t, int64_t, L*);
  using BlockKernel = void (*)(const GradRow<L>*, int64_t, int64_t, L*, int64_t);

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
    rows_way_ = true;
    disjoint_ = stride > 1 && windows_are_disjoint();
    margin_ = Windows::count - 1;
    lead_ = s_.axis[2].pad / stride + Windows::first;
    const Axis& h = s_.axis[1];
    if constexpr (stride <= 2) {
      if (h.stride == stride && h.kernel == kernel && h.pad % stride == shift && h.dilation == 1 &&
          codec_.is_lane && p_.input.stride[4] == 1) {
        using B = Block<stride, kernel, shift>;
        block_kernel_ = scatter_block<stride, kernel, shift, L>;
        block_rows_ = B::rows, block_windows_ = B::windows;
        block_lead_ = h.pad / stride + Windows::first;
      }
    }
  }

  bool windows_are_disjoint() const {
    for (const Axis& a : s_.axis)
      if (a.pad != 0 || a.stride != a.kernel || a.dilation != 1) return false;
    return true;
  }

  static int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }
  static int64_t reach(const Axis& a) { return (a.kernel - 1) * a.dilation + 1; }
  int64_t planes_of_outputs() const {
    return std::min(s_.axis[0].out, reach(s_.axis[0]) / s_.axis[0].stride + 1);
  }

  Tile tile_of(int64_t task) const {
    const Axis &d = s_.axis[0], &h = s_.axis[1];
    Tile t;
    t.slot = task % strips_ * slots_, task /= strips_;
    t.row = task % bands_ * rows_, task /= bands_;
    t.id = task % d.in, task /= d.in;
    t.channel = task % blocks_ * group_;
    t.n = task / blocks_;
    t.lanes = std::min(group_, s_.channels - t.channel);
    t.end = std::min(t.row + rows_, h.in);
    const Axis& w = s_.axis[2];
    t.slots = std::min(slots_, up(rows_way_ ? w.in : w.in + w.pad, w.stride) - t.slot);
    t.od = d.first_output(t.id), t.od_end = d.last_output(t.id) + 1;
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

  int64_t row_room() const { return std::max(s_.taps() + 1, s_.axis[0].kernel * block_windows_); }

  void list_own(VecIndex<L>* own) const {
    for (int64_t kd = 0; kd < s_.axis[0].kernel; ++kd)
      for (int64_t kh = 0; kh < s_.axis[1].kernel; ++kh)
        for (int64_t kw = 0; kw < s_.axis[2].kernel; ++kw)
          own[s_.offset_of(kd, kh, kw)] =
              broadcast(static_cast<I>(kd * weight_[0] + kh * weight_[1] + kw * weight_[2]));
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
      scatter_rows(t, b);
      t = following;
      std::swap(b, next);
    }
  }

  void scatter_rows(const Tile& t, const Buffers& b) const {
    const Axis& w = s_.axis[2];
    const int64_t height = t.oh_end - t.oh;
    const int64_t first = t.slot * w.stride, size = std::min(t.slots * w.stride, w.in - first);
    const int64_t stride = p_.input.stride[4];
    const bool in_place = codec_.is_lane && stride == 1;
    const RowGrads grads = row_grads(t, b);
    const auto row_of = [&](int64_t od, int64_t oh) {
      return GradRow<L>{grads.data + (od - t.od) * grads.plane + (oh - t.oh) * grads.pitch,
                        b.index + ((od - t.od) * height + oh - t.oh) * (t.slots + margin_),
                        nullptr};
    };
    char* to = static_cast<char*>(p_.input.data) +
               offset(p_.input, t.n, t.channel, t.id, t.row, first) * codec_.size;
    for (int64_t ih = t.row; ih < t.end; ++ih, to += p_.input.stride[3] * codec_.size) {
      int64_t rows = expand(t, ih, grads.data, b, to);
      if (rows == 0 && block_kernel_ && ih % w.stride == 0 && ih + block_rows_ <= t.end) {
        rows = block_rows_;
        const int64_t top = ih / w.stride + block_lead_;
        int64_t count = 0, planes = 0;
        for (const Reach* d = of_plane_.begin(t.id); d != of_plane_.end(t.id); ++d, ++planes) {
          const VecIndex<L>* const own = b.own + s_.offset_of(d->k, 0, 0);
          const GradRow<L> first_row = row_of(d->o, t.oh);
          for (int64_t r = top - t.oh; r < top - t.oh + block_windows_; ++r)
            b.rows[count++] = r >= 0 && r < height
                                  ? GradRow<L>{first_row.grad + r * grads.pitch,
                                               first_row.index + r * (t.slots + margin_), own}
                                  : GradRow<L>{b.grad, b.nobody, own};
        }
        prefetch_behind(to, block_rows_ * size * int64_t(sizeof(L)));
        block_kernel_(b.rows, planes, size, reinterpret_cast<L*>(to), p_.input.stride[3]);
      }
      if (rows > 0) {
        ih += rows - 1, to += (rows - 1) * p_.input.stride[3] * codec_.size;
        continue;
      }
      int64_t count = 0;
      for_each_row(t, ih, [&](int64_t od, int64_t kd, int64_t oh, int64_t kh) {
        GradRow<L>& row = b.rows[count++];
        row = row_of(od, oh);
        row.own = b.own + s_.offset_of(kd, kh, 0);
      });
      const RowKernel kernel = rows_kernel_[count <= 3 ? count : 0];
      if (in_place) {
        kernel(b.rows, count, size, reinterpret_cast<L*>(to));
      } else {
        kernel(b.rows, count, size, b.sums);
        codec_.write(to, stride, size, b.sums);
      }
    }
  }

  // The gradients of a tile, from window t.slot + lead_ of its first row on: staged, or in place.
  struct RowGrads {
    const L* data;
    int64_t pitch, plane;
  };
  RowGrads row_grads(const Tile& t, const Buffers& b) const {
    if (is_one_run(t) || grads_in_place(t))
      return {static_cast<const L*>(p_.output.data) + first_grad(t), p_.output.stride[3],
              p_.output.stride[2]};
    const int64_t pitch = t.slots + margin_;
    return {b.grad, pitch, (t.oh_end - t.oh) * pitch};
  }
  int64_t first_grad(const Tile& t) const {
    return offset(p_.output, t.n, t.channel, t.od, t.oh, t.slot + lead_);
  }
  // What a kernel reads of windows that do not exist is never added, but it must be memory of the
  // tensor: that of other rows.
  bool grads_in_place(const Tile& t) const {
    if (!codec_.is_lane || p_.output.stride[4] != 1 || p_.kind != IndexKind::offset ||
        p_.index.stride[4] != 1 || t.od >= t.od_end || t.oh >= t.oh_end)
      return false;
    const int64_t last = first_grad(t) + (t.od_end - 1 - t.od) * p_.output.stride[2] +
                         (t.oh_end - 1 - t.oh) * p_.output.stride[3];
    return first_grad(t) >= 0 && last + t.slots + margin_ + lanes<L> <= grads_;
  }

  // The rows of inputs from `ih` on that belong to one row of windows and to no other, or 0.
  int64_t expand(const Tile& t, int64_t ih, const L* grad, const Buffers& b, char* to) const {
    const Axis &d = s_.axis[0], &h = s_.axis[1], &w = s_.axis[2];
    if (!disjoint_ || !is_one_run(t) || t.od_end - t.od != 1 || ih % h.stride != 0) return 0;
    const int64_t oh = ih / h.stride, row = (oh - t.oh) * w.out;
    if (oh >= h.out || ih + h.stride > t.end) return 0;
    const VecIndex<L>* const own = b.own + s_.offset_of(t.id - t.od * d.stride, 0, 0);
    prefetch_behind(to, h.stride * w.in * int64_t(sizeof(L)));
    (w.stride == 2 ? expand_row<2, L> : expand_row<4, L>)(grad + row, b.index + row, w.out, own,
                                                          h.stride, reinterpret_cast<L*>(to),
                                                          p_.input.stride[3]);
    return h.stride;
  }

  // ---- direct: channels innermost, indices as lanes, gradients and sums where they are in memory

  void scatter_pixels(const Tile& t, const Buffers& b) const {
    const Axis& w = s_.axis[2];
    const int64_t start = std::clamp<int64_t>(t.slot - margin_, 0, w.out);
    const int64_t columns = std::min(t.slot + t.slots, w.out) - start;
    const int64_t height = t.oh_end - t.oh, pitch = columns * t.lanes;
    if (columns > 0)
      for (int64_t od = t.od; od < t.od_end; ++od)
        stage_index(t, od, start, columns, b.index + (od - t.od) * height * pitch);
    const int64_t* const grad_stride = p_.output.stride;
    const L* const grad =
        static_cast<const L*>(p_.output.data) + offset(p_.output, t.n, t.channel, 0, 0, 0);
    L* to = static_cast<L*>(p_.input.data) + offset(p_.input, t.n, t.channel, t.id, t.row, 0);
    for (int64_t ih = t.row; ih < t.end; ++ih, to += p_.input.stride[3]) {
      if (expand_pixels(t, ih, columns, to, b)) {
        const int64_t rows = s_.axis[1].stride;
        ih += rows - 1, to += (rows - 1) * p_.input.stride[3];
        continue;
      }
      int64_t count = 0;
      if (columns > 0)
        for_each_row(t, ih, [&](int64_t od, int64_t kd, int64_t oh, int64_t kh) {
          b.pixels[count++] = {
              grad + od * grad_stride[2] + oh * grad_stride[3],
              b.index + ((od - t.od) * height + oh - t.oh) * pitch - start * t.lanes,
              static_cast<I>(kd * weight_[0] + kh * weight_[1])};
        });
      scatter_columns(t, count, s_.flat_of(t.id, ih, 0), to, b);
    }
  }

  // The rows of inputs from `ih` on that belong to one row of windows: are there such, and done?
  bool expand_pixels(const Tile& t, int64_t ih, int64_t columns, L* to, const Buffers& b) const {
    const Axis &d = s_.axis[0], &h = s_.axis[1], &w = s_.axis[2];
    const int64_t oh = ih / h.stride;
    if (!disjoint_ || t.lanes < lanes<L> || t.od_end - t.od != 1 || ih % h.stride != 0 ||
        oh >= h.out || ih + h.stride > t.end)
      return false;
    const int64_t pitch = p_.input.stride[3], pixel = p_.input.stride[4];
    const L* const grad =
        static_cast<const L*>(p_.output.data) + offset(p_.output, t.n, t.channel, t.od, oh, t.slot);
    const I* const index = b.index + (oh - t.oh) * columns * t.lanes;
    const VecIndex<L>* const own = b.own + s_.offset_of(t.id - t.od * d.stride, 0, 0);
    L* const row = to + t.slot * w.stride * pixel;
    for (int64_t j = 0; j < columns; ++j)
      expand_pixel<L>(grad + j * p_.output.stride[4], index + j * t.lanes, t.lanes, own, h.stride,
                      w.stride, row + j * w.stride * pixel, pitch, pixel);
    // What no window reaches, to the right of the last.
    const int64_t end = std::min((t.slot + t.slots) * w.stride, w.in);
    for (int64_t r = 0; r < h.stride; ++r)
      for (int64_t iw = (t.slot + columns) * w.stride; iw < end; ++iw)
        std::fill_n(to + r * pitch + iw * pixel, t.lanes, L(0));
    return true;
  }

  void stage_index(const Tile& t, int64_t od, int64_t start, int64_t columns, I* to) const {
    const RawView& view = p_.index;
    const int64_t height = t.oh_end - t.oh;
    const char* const from = static_cast<const char*>(view.data) +
                             offset(view, t.n, t.channel, od, t.oh, start) * codec_.index_size;
    const auto read = [&](int64_t r, int64_t j, int64_t count) {
      codec_.read_index(from + (r * view.stride[3] + j * view.stride[4]) * codec_.index_size, 1,
                        count, to + (r * columns + j) * t.lanes, 0, 0);
    };
    if (view.stride[4] == t.lanes && view.stride[3] == columns * t.lanes)
      return read(0, 0, height * columns * t.lanes);
    for (int64_t r = 0; r < height; ++r)
      if (view.stride[4] == t.lanes)
        read(r, 0, columns * t.lanes);
      else
        for (int64_t j = 0; j < columns; ++j) read(r, j, t.lanes);
  }

  // Channels innermost: inputs of one phase that the same taps reach, whole pixels at a time.
  void scatter_columns(const Tile& t, int64_t row_count, int64_t position, L* to,
                       const Buffers& b) const {
    const Axis& w = s_.axis[2];
    const bool flat = p_.kind == IndexKind::flat;
    const int64_t end_slot = t.slot + t.slots;
    for (int64_t phase = 0; phase < w.stride; ++phase) {
      const auto input_at = [&](int64_t slot) { return slot * w.stride + phase - w.pad; };
      const int64_t last_run = std::min({end_slot, w.out, up(w.in - phase + w.pad, w.stride)});
      int64_t slot = t.slot;
      while (slot < end_slot && input_at(slot) < 0) ++slot;
      while (slot < end_slot && input_at(slot) < w.in) {
        int64_t count = 0, run = 1;
        if (slot >= margin_)  // with all of its taps, or the last ones
          run = std::max<int64_t>(1, last_run - slot);
        for (int64_t r = 0; r < row_count; ++r)
          for_each_tap(phase, [&](int64_t shift, int64_t kw) {
            const int64_t ow = slot - shift;
            if (ow < 0 || ow >= w.out) return;
            b.terms[count++] = {
                b.pixels[r].grad - b.pixels[0].grad + ow * p_.output.stride[4],
                b.pixels[r].index - b.pixels[0].index + ow * t.lanes,
                static_cast<I>(flat ? position + input_at(slot) : b.pixels[r].own + kw)};
          });
        const Sums<L> sums{to + input_at(slot) * p_.input.stride[4],
                           b.pixels[0].grad,
                           b.pixels[0].index,
                           w.stride * p_.input.stride[4],
                           p_.output.stride[4],
                           t.lanes,
                           flat ? w.stride : 0};
        add_terms<true, L>(sums, run, t.lanes, b.terms, count);
        slot += run;
      }
    }
  }

  // ---- staged

  // Rows of gradients and indices, from window slot + lead on, index -1 where there is none.
  void stage(const Tile& t, const Buffers& b) const {
    const Axis& w = s_.axis[2];
    const int64_t start = t.slot + lead_, width = t.slots + margin_;
    const int64_t first = std::clamp<int64_t>(-start, 0, width);
    const int64_t end = std::clamp<int64_t>(w.out - start, first, width);
    const int64_t pixel = channels_last_ ? t.lanes : 1;
    L* grad = b.grad;
    I* index = b.index;
    if (!channels_last_ && p_.kind == IndexKind::offset && p_.output.stride[4] == 1 &&
        p_.index.stride[4] == 1) {
      const int64_t height = t.oh_end - t.oh, ow = std::min(start + first, w.out - 1);
      if (is_one_run(t)) {
        codec_.read_index(static_cast<const char*>(p_.index.data) +
                              offset(p_.index, t.n, t.channel, t.od, t.oh, 0) * codec_.index_size,
                          1, (t.od_end - t.od) * height * width, index, 0, 0);
        return;
      }
      const bool in_place = rows_way_ && grads_in_place(t);
      if (first > 0 || end < width) std::fill_n(index, (t.od_end - t.od) * height * width, I(-1));
      for (int64_t od = t.od; od < t.od_end && first < end; ++od) {
        const int64_t place = (od - t.od) * height * width + first;
        codec_.stage({static_cast<const char*>(p_.output.data) +
                          offset(p_.output, t.n, t.channel, od, t.oh, ow) * codec_.size,
                      static_cast<const char*>(p_.index.data) +
                          offset(p_.index, t.n, t.channel, od, t.oh, ow) * codec_.index_size,
                      p_.output.stride[3], p_.index.stride[3], height, end - first,
                      in_place ? nullptr : grad + place, index + place, width});
      }
      return;
    }
    for (int64_t od = t.od; od < t.od_end; ++od)
      for (int64_t oh = t.oh; oh < t.oh_end; ++oh, grad += width * pixel, index += width * pixel) {
        std::fill_n(index, first * pixel, I(-1));
        std::fill_n(index + end * pixel, (width - end) * pixel, I(-1));
        if (first == end) continue;
        const int64_t ow = start + first, columns = end - first;
        const char* const from = static_cast<const char*>(p_.output.data) +
                                 offset(p_.output, t.n, t.channel, od, oh, ow) * codec_.size;
        const char* const chosen = static_cast<const char*>(p_.index.data) +
                                   offset(p_.index, t.n, t.channel, od, oh, ow) * codec_.index_size;
        int64_t base = 0, step = 0;
        if (p_.kind == IndexKind::flat) {
          base =
              s_.flat_of(s_.axis[0].input_of(od, 0), s_.axis[1].input_of(oh, 0), w.input_of(ow, 0));
          step = w.stride;
        }
        const int64_t grad_stride = p_.output.stride[4], index_stride = p_.index.stride[4];
        if (!channels_last_) {
          codec_.read(from, grad_stride, columns, grad + first);
          codec_.read_index(chosen, index_stride, columns, index + first, base, step);
        } else if (step == 0 && grad_stride == pixel && index_stride == pixel) {
          codec_.read(from, 1, columns * pixel, grad + first * pixel);
          codec_.read_index(chosen, 1, columns * pixel, index + first * pixel, 0, 0);
        } else {
          for (int64_t j = 0; j < columns; ++j) {
            codec_.read(from + j * grad_stride * codec_.size, 1, pixel, grad + (first + j) * pixel);
            codec_.read_index(chosen + j * index_stride * codec_.index_size, 1, pixel,
                              index + (first + j) * pixel, base + j * step, 0);
          }
        }
      }
  }

  // Gradients that can be used where they are: rows without a margin, one behind another, of which
  // only vectors are read that lie in them.
  bool is_one_run(const Tile& t) const {
    const Axis &h = s_.axis[1], &w = s_.axis[2];
    return rows_way_ && margin_ == 0 && lead_ == 0 && codec_.is_lane && strips_ == 1 &&
           p_.kind == IndexKind::offset && w.in == w.out * w.stride && w.out >= lanes<L> &&
           p_.output.stride[4] == 1 && p_.index.stride[4] == 1 && p_.output.stride[3] == w.out &&
           p_.index.stride[3] == w.out &&
           (t.od_end - t.od == 1 ||
            (t.oh_end - t.oh == h.out && bands_ == 1 && p_.output.stride[2] == h.out * w.out &&
             p_.index.stride[2] == h.out * w.out));
  }

  void scatter(const Tile& t, const Buffers& b) const {
    const Axis& w = s_.axis[2];
    const int64_t pixel = channels_last_ ? t.lanes : 1, pitch = (t.slots + margin_) * pixel;
    stage(t, b);
    for (int64_t ih = t.row; ih < t.end; ++ih) {
      for (int64_t phase = 0; phase < w.stride; ++phase) {
        int64_t count = 0;
        for_each_row(t, ih, [&](int64_t od, int64_t kd, int64_t oh, int64_t kh) {
          const int64_t row = (od - t.od) * (t.oh_end - t.oh) + oh - t.oh;
          for_each_tap(phase, [&](int64_t shift, int64_t kw) {
            const int64_t at = row * pitch + (margin_ - shift) * pixel;
            b.terms[count++] = {
                at, at, static_cast<I>(kd * weight_[0] + kh * weight_[1] + kw * weight_[2])};
          });
        });
        add_terms<false, L>({b.sums + phase * phase_size_, b.grad, b.index, 0, 0, 0, 0}, 1,
                            t.slots * pixel, b.terms, count);
      }
      write_row(t, ih, b.sums);
    }
  }

  void write_row(const Tile& t, int64_t ih, const L* sums) const {
    const Axis& w = s_.axis[2];
    const int64_t phases = w.stride, stride = p_.input.stride[4];
    const int64_t pixel = channels_last_ ? t.lanes : 1;
    // Places in the strip that are inputs, and where place 0 would lie.
    const int64_t origin = t.slot * phases - w.pad;
    const int64_t first = std::max<int64_t>(-origin, 0);
    const int64_t end = std::min(w.in - origin, t.slots * phases);
    char* const row = static_cast<char*>(p_.input.data) +
                      offset(p_.input, t.n, t.channel, t.id, ih, origin) * codec_.size;
    const auto at = [&](int64_t e) { return row + e * stride * codec_.size; };
    const auto write = [&](int64_t from, int64_t to) {
      for (int64_t e = from; e < to; ++e)
        codec_.write(at(e), 1, pixel, sums + e % phases * phase_size_ + e / phases * pixel);
    };
    if (channels_last_) {
      if (phases == 1 && stride == pixel)
        codec_.write(at(first), 1, (end - first) * pixel, sums + first * pixel);
      else
        write(first, end);
      return;
    }
    const int64_t group = up(first, phases), groups = end / phases - group;
    if (phases > 1 && phases <= 4 && stride == 1 && groups > 0) {
      write(first, group * phases);
      codec_.join[phases](at(group * phases), groups, sums + group, phase_size_);
      write((group + groups) * phases, end);
    } else {
      for (int64_t phase = 0; phase < phases; ++phase) {
        const int64_t slot = up(std::max<int64_t>(first - phase, 0), phases);
        const int64_t e = slot * phases + phase;
        if (e < end)
          codec_.write(at(e), phases * stride, up(end - e, phases),
                       sums + phase * phase_size_ + slot);
      }
    }
  }

  const PoolProblem& p_;
  const PoolShape& s_;
  const SumCodec<L>& codec_;
  const ReachTable of_plane_, of_row_;
  std::vector<Reach> phase_taps_;  // o: windows back
  std::vector<size_t> phase_start_;
  bool channels_last_ = false, direct_ = false;
  RowKernel rows_kernel_[4] = {};  // by the number of rows; 0: any
  BlockKernel block_kernel_ = nullptr;
  int64_t block_rows_ = 0, block_windows_ = 0, block_lead_ = 0;
  bool rows_way_ = false, disjoint_ = false;
  int64_t weight_[3] = {0, 0, 0};
  int64_t group_ = 1, blocks_ = 1, margin_ = 0, lead_ = 0, slots_ = 1, strips_ = 1, rows_ = 1,
          bands_ = 1;
  int64_t staged_rows_ = 0, pitch_ = 0, phase_size_ = 0;
  int64_t grads_ = 0;  // elements from the first gradient to the last
};
