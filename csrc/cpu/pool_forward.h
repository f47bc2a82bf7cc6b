// The forward pass of the vector rows. Included inside a row's namespace and target region.
//
// Everything is made of one step, `challenge`, and one loop, `fold`: the winner among a few taps
// that lie at fixed distances in memory. A window is separable in the order of the specification:
// first the winners along the width, then those of rows, then those of planes; the earlier one
// keeps its place in every step, so ties, NaN and the sign of a zero come out as in one scan.
//
// Two ways through it, Forward::pool chooses:
//   direct   small windows: every tap is loaded from the input itself; in NCHW the winners along
//            the width of a few rows are kept in a small buffer, so that every row is read once
//            and rows one after another, as the processor's prefetching likes it; rows of another
//            type than the lanes are converted a few at a time
//   staged   the input of a tile is copied to lanes, padded with the lowest value and with the
//            columns of one stride phase side by side; long windows by doubling
//
// Lowest values can stand for padding because they win no comparison; only where the maximum
// itself is the lowest value may the index be that of padding, and such a window is done again by
// the specification (`repair`).

// ---- elements: reading to lanes, writing from lanes ---------------------------------------------

// Elements [0, count) of a row in parts of a known length, whose loops are a few vectors: a line of
// memory each, or the half, the quarter ... where there are less. The last part overlaps the one
// before it.
template <int64_t part, class Visit>
inline void in_parts(int64_t count, Visit visit) {
  if constexpr (part > 1)
    if (count < part) return in_parts<part / 2>(count, visit);
  for (int64_t i = 0; i < count; i += part) {
    i = std::min(i, count - part);
    visit(i, std::integral_constant<int64_t, part>{});
  }
}
template <class T>
constexpr int64_t line_of = line_bytes / int64_t(sizeof(T));

template <int64_t part, class From, class To, class Convert>
inline void convert_part(const From* __restrict from, To* __restrict to, Convert convert) {
  constexpr int64_t peeled = 16;  // compilers unroll so short a loop before they see its vectors
  if constexpr (std::is_same_v<From, To>)
    __builtin_memcpy(to, from, part * sizeof(To));
  else if constexpr (part > peeled)
    for (int64_t i = 0; i < part; ++i) to[i] = convert(from[i]);
  else
#pragma GCC unroll 1
    for (int64_t i = 0; i < part; ++i) to[i] = convert(from[i]);
}

// to[i] = convert(from[i * stride])
template <class T, class Convert>
inline void read_as(const void* from, int64_t stride, int64_t count, Lane<T>* __restrict to,
                    Convert convert) {
  const T* const source = static_cast<const T*>(from);
  if (stride == 1)
    in_parts<line_of<T>>(count, [&](int64_t i, auto part) {
      prefetch(source + i, line_bytes);
      convert_part<part>(source + i, to + i, convert);
    });
  else
    for (int64_t i = 0; i < count; ++i) to[i] = convert(source[i * stride]);
}
// to[i * stride] = convert(from[i])
template <class T, class Convert>
inline void write_as(void* to, int64_t stride, int64_t count, const Lane<T>* __restrict from,
                     Convert convert) {
  T* const target = static_cast<T*>(to);
  if (stride == 1)
    in_parts<line_of<T>>(count, [&](int64_t i, auto part) {
      prefetch(target + i, line_bytes);
      convert_part<part>(from + i, target + i, convert);
    });
  else
    for (int64_t i = 0; i < count; ++i) target[i * stride] = convert(from[i]);
}

template <class T>
void read_strided(const void* from, int64_t stride, int64_t count, Lane<T>* __restrict to) {
  read_as<T>(from, stride, count, to, [](T x) { return to_lane(x); });
}
// to[phase * pitch + i] = from[i * phases + phase]
template <class T, int phases>
void read_split(const void* from, int64_t count, Lane<T>* __restrict to, int64_t pitch) {
  const T* const source = static_cast<const T*>(from);
  for (int64_t i = 0; i < count; ++i)
    for (int phase = 0; phase < phases; ++phase)
      to[phase * pitch + i] = to_lane(source[i * phases + phase]);
}
template <class T>
void write_strided(void* to, int64_t stride, int64_t count, const Lane<T>* __restrict from) {
  write_as<T>(to, stride, count, from, [](Lane<T> x) { return from_lane<T>(x); });
}
// to[i * stride] = from[i] + base + i * step
template <class Index, class I>
void write_indices(void* to, int64_t stride, int64_t count, const I* __restrict from, int64_t base,
                   int64_t step) {
  Index* const target = static_cast<Index*>(to);
  if (step == 0 && stride == 1)
    for (int64_t i = 0; i < count; ++i) target[i] = static_cast<Index>(from[i] + base);
  else
    for (int64_t i = 0; i < count; ++i)
      target[i * stride] = static_cast<Index>(from[i] + base + i * step);
}

// What the kernels need to know of an element type and an index type, beside its lane.
template <class L>
struct Codec {
  using Split = void (*)(const void*, int64_t, L*, int64_t);
  L lowest;
  int64_t size, index_size;
  bool is_lane;
  void (*read)(const void*, int64_t, int64_t, L*);
  Split split[5];  // by the number of phases; null: phase after phase
  void (*write)(void*, int64_t, int64_t, const L*);
  void (*write_index)(void*, int64_t, int64_t, const LaneIndex<L>*, int64_t, int64_t);

  template <class T>
  static Codec of(IndexType type) {
    Codec codec{to_lane(torch_naiveconv::lowest<T>()),
                sizeof(T),
                0,
                is_lane_type<T>,
                read_strided<T>,
                {nullptr, nullptr, read_split<T, 2>, read_split<T, 3>, read_split<T, 4>},
                write_strided<T>,
                nullptr};
    const auto set = [&](auto tag) {
      using Index = decltype(tag);
      codec.index_size = sizeof(Index);
      codec.write_index = write_indices<Index, LaneIndex<L>>;
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

// ---- the step and the loop ----------------------------------------------------------------------

template <class L>
struct Best {
  Vec<L> value;
  VecIndex<L> index;
};

template <bool indexed, bool last, class L>
inline void challenge(Best<L>& best, const Best<L>& next) {
  const VecIndex<L> won = wins<last, L>(next.value, best.value);
  best.value = won ? next.value : best.value;
  if constexpr (indexed) best.index = won ? next.index : best.index;
}

// Where a tap lies, in elements from the first, and what it adds to the index.
struct Tap {
  int64_t at, index;
};
// The places of those taps that reach what no window before has: what comes there is asked for.
struct Ahead {
  int64_t* at = nullptr;
  int64_t count = 0;
};

// Rows of lanes. No index: every one is 0.
template <class L>
struct Rows {
  L* value = nullptr;
  LaneIndex<L>* index = nullptr;
  int64_t pitch = 0;

  Rows at(int64_t offset) const {
    return {value + offset, index ? index + offset : nullptr, pitch};
  }
};

// to[r][i] = the winner among from[r][i + tap], r < rows, i < count. May work in place on a single
// row. Unless `exact`, up to a vector behind every row is read and written too (of indices always).
template <bool indexed, bool last, bool exact, bool carried, class L>
void fold_as(Rows<L> to, Rows<L> from, int64_t rows, int64_t count, const Tap* taps,
             int64_t tap_count, Ahead ahead = {}) {
  using I = LaneIndex<L>;
  const bool whole = !exact || count >= lanes<L>;
  for (int64_t r = 0; r < rows; ++r) {
    const L* const value = from.value + r * from.pitch;
    const I* const index = carried ? from.index + r * from.pitch : nullptr;
    for (int64_t i = 0; i < count; i += lanes<L>) {
      // The last vector overlaps the one before it rather than being a part of one.
      if (exact && whole) i = std::min(i, count - lanes<L>);
      if (vector_bytes >= line_bytes || i * int64_t(sizeof(L)) % line_bytes == 0)
        for (int64_t k = 0; k < ahead.count; ++k) prefetch(value + i + ahead.at[k], line_bytes);
      const auto tap = [&](const Tap& t) {
        Best<L> best;
        const L* const place = value + i + t.at;
        best.value = whole ? load(place) : load_clipped(place, 0, count - i, L(0));
        if constexpr (indexed) {
          best.index = broadcast(static_cast<I>(t.index));
          if constexpr (carried) best.index += load(index + i + t.at);
        }
        return best;
      };
      Best<L> best = tap(taps[0]);
      for (int64_t k = 1; k < tap_count; ++k) challenge<indexed, last, L>(best, tap(taps[k]));
      L* const target = to.value + r * to.pitch + i;
      if (exact) prefetch(target, vector_bytes);
      if (whole)
        store(target, best.value);
      else
        store_clipped(target, 0, count - i, best.value);
      if constexpr (indexed) store(to.index + r * to.pitch + i, best.index);
    }
  }
}

// ---- small windows, straight from the input -----------------------------------------------------

// What is loaded for V = lanes<L> windows next to each other in one row: vectors that begin at
// these places, none reaching beyond the last window's last tap.
template <int stride, int kernel, int V>
struct Loads {
  static constexpr int count = stride == 1 || kernel == 2 ? kernel : 4;
  static constexpr int place(int n) {
    if (stride == 1) return n;
    return stride == 2 ? n % 2 * V + n / 2 : n * V;
  }
};

// The winners of those windows, `from` the place of the first tap; masks as in across_rows. With a
// stride of 2 their lanes are put in order at the end.
template <int stride, int kernel, bool clipped, bool indexed, bool last, class L>
inline Best<L> row_winners(const L* from, const VecIndex<L>* masks, L low, LaneIndex<L> step) {
  using I = LaneIndex<L>;
  using Parts = Loads<stride, kernel, lanes<L>>;
  Vec<L> part[Parts::count];
#pragma GCC unroll 4
  for (int n = 0; n < Parts::count; ++n)
    part[n] = clipped ? Masked::load(from + Parts::place(n), masks[n], broadcast(low))
                      : load(from + Parts::place(n));
  Vec<L> tap[kernel];
  if constexpr (stride == 1) {
#pragma GCC unroll 4
    for (int k = 0; k < kernel; ++k) tap[k] = part[k];
  } else if constexpr (stride == 2) {
    static_assert(kernel == 2 || kernel == 3, "two or three taps at stride 2");
    tap[0] = every_second_blockwise<0, L>(part[0], part[1]);
    if constexpr (kernel == 2) {
      tap[1] = every_second_blockwise<1, L>(part[0], part[1]);
    } else {
      tap[1] = every_second_blockwise<0, L>(part[2], part[3]);
      tap[2] = every_second_blockwise<1, L>(part[2], part[3]);
    }
  } else {
    static_assert(stride == 4 && kernel == 4, "no other strides");
    const Vec<L> even[2] = {evens<L>(part[0], part[1]), evens<L>(part[2], part[3])};
    const Vec<L> odd[2] = {odds<L>(part[0], part[1]), odds<L>(part[2], part[3])};
    tap[0] = evens<L>(even[0], even[1]);
    tap[1] = evens<L>(odd[0], odd[1]);
    tap[2] = odds<L>(even[0], even[1]);
    tap[3] = odds<L>(odd[0], odd[1]);
  }
  Best<L> best{tap[0], VecIndex<L>{}};
#pragma GCC unroll 4
  for (int k = 1; k < kernel; ++k)
    challenge<indexed, last, L>(best, Best<L>{tap[k], broadcast(static_cast<I>(k * step))});
  if constexpr (stride == 2) {
    best.value = in_order<L>(best.value);
    if constexpr (indexed) best.index = in_order<I>(best.index);
  }
  return best;
}

// The winners along the width of rows of inputs, `pitch` apart. `room` values of a row may be
// written.
template <int stride, int kernel, bool indexed, bool last, class L>
void across_rows(const L* from, int64_t pitch, int64_t rows, const Axis& width, L low,
                 LaneIndex<L> step, Rows<L> to, int64_t room) {
  constexpr int V = lanes<L>;
  using Parts = Loads<stride, kernel, V>;
  const int64_t end = std::max<int64_t>(width.out - V, 0);  // where the last vector begins
  const auto clip = [&](int64_t o, VecIndex<L>* masks) {
    for (int n = 0; n < Parts::count; ++n)
      masks[n] = inside<L>(o * stride - width.pad + Parts::place(n), width.in);
  };
  VecIndex<L> at_start[Parts::count], at_end[Parts::count], between[Parts::count];
  clip(0, at_start), clip(end, at_end);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t o = 0; o < width.out; o += V) {
      o = std::min(o, end);  // the last vector overlaps the one before it
      const int64_t first = o * stride - width.pad;
      const L* const place = from + r * pitch + first;
      prefetch(place, stride * vector_bytes);
      Best<L> best;
      if (first >= 0 && first + (V - 1) * stride + kernel <= width.in) {
        best = row_winners<stride, kernel, false, indexed, last, L>(place, nullptr, low, step);
      } else {
        if (o != 0 && o != end) clip(o, between);
        const VecIndex<L>* const masks = o == 0 ? at_start : o == end ? at_end : between;
        best = row_winners<stride, kernel, true, indexed, last, L>(place, masks, low, step);
      }
      store_clipped(to.value + r * to.pitch, o, room, best.value);
      if constexpr (indexed) store(to.index + r * to.pitch + o, best.index);
    }
  }
}

// ---- a call -------------------------------------------------------------------------------------

// Memory of one task, in lanes of 4 or 8 bytes, a vector of slack behind every part.
class Scratch {
 public:
  explicit Scratch(int64_t bytes)
      : data_(static_cast<char*>(
            ::operator new(static_cast<size_t>(bytes), std::align_val_t{alignment}))) {}
  ~Scratch() { ::operator delete(data_, std::align_val_t{alignment}); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  static int64_t bytes_of(int64_t count, size_t size) {
    return (count * static_cast<int64_t>(size) + 2 * alignment - 1) / alignment * alignment;
  }
  template <class T>
  T* take(int64_t count) {
    T* const part = reinterpret_cast<T*>(data_ + used_);
    used_ += bytes_of(count, sizeof(T));
    return part;
  }

 private:
  static constexpr int64_t alignment = 64;
  char* data_;
  int64_t used_ = 0;
};

template <class L, bool indexed, bool last>
class Forward {
 public:
  Forward(const PoolProblem& problem, const Codec<L>& codec)
      : p_(problem), s_(problem.shape), codec_(codec) {
    channels_last_ = p_.input.stride[1] == 1 && p_.output.stride[1] == 1 && s_.channels > 1 &&
                     p_.input.stride[4] != 1;
    choose_way();
    choose_tile();
  }

  void run() const {
    const int64_t outputs = tile_.rows * tile_.columns * group_;
    parallel_for(s_.batch * blocks_ * s_.axis[0].out * bands_ * strips_,
                 1 + 16384 / (outputs * window_cost() + 1), FloatEnvironment::gradual,
                 [&](int64_t begin, int64_t end) {
                   Scratch scratch(scratch_bytes());
                   const Buffers buffers = take_buffers(scratch);
                   for (int64_t task = begin; task < end; ++task) pool(tile_of(task), buffers);
                 });
  }

 private:
  using I = LaneIndex<L>;
  using RowKernel = void (*)(const L*, int64_t, int64_t, const Axis&, L, I, Rows<L>, int64_t);

  // Outputs [row, row + rows) x [column, column + columns) of depth od, for `lanes` channels.
  struct Tile {
    int64_t n = 0, channel = 0, lanes = 1, od = 0, row = 0, rows = 0, column = 0, columns = 0;
  };
  struct InputRow {
    const L* data;
    int64_t index;  // what the row adds to the index
    bool reached_first;
  };
  struct Buffers {
    L* staged;
    Rows<L> across, down, deep;
    InputRow* input_rows;
    Tap* taps;
    int64_t* ahead;
  };

  // ---- the plan

  bool inner_strides(const RawView& view) const {
    return channels_last_ ? view.stride[4] >= s_.channels : view.stride[4] == 1;
  }

  void choose_way() {
    const Axis &h = s_.axis[1], &w = s_.axis[2];
    // Weights of a tap in the index: its flat displacement, or its number in the window.
    const bool flat = p_.kind == IndexKind::flat;
    weight_[2] = flat ? w.dilation : 1;
    weight_[1] = flat ? h.dilation * w.in : w.kernel;
    weight_[0] = flat ? s_.axis[0].dilation * h.in * w.in : w.kernel * h.kernel;

    double_across_ = w.stride == 1 && doublings(w.kernel) < w.kernel - 1;
    double_down_ = h.stride * doublings(h.kernel) < h.kernel - 1;
    if (!inner_strides(p_.input) || !inner_strides(p_.output)) return;
    if (channels_last_) {
      direct_ = codec_.is_lane && (s_.taps() <= 9 || (s_.taps() <= 27 && s_.axis[0].kernel > 1));
    } else if (w.dilation == 1 && rows_of_window() <= 9 &&
               ((rows_of_window() == 1 && codec_.is_lane) || w.out <= longest_buffered)) {
      row_kernel_ = row_kernel(w.stride, w.kernel);
      direct_ = row_kernel_ != nullptr;
    }
  }

  static constexpr int64_t longest_buffered = 16384;  // windows in a row
  int64_t rows_of_window() const { return s_.axis[0].kernel * s_.axis[1].kernel; }

  static RowKernel row_kernel(int64_t stride, int64_t kernel) {
    if (stride == 1 && kernel == 2) return across_rows<1, 2, indexed, last, L>;
    if (stride == 1 && kernel == 3) return across_rows<1, 3, indexed, last, L>;
    if (stride == 2 && kernel == 2) return across_rows<2, 2, indexed, last, L>;
    if (stride == 2 && kernel == 3) return across_rows<2, 3, indexed, last, L>;
    if (stride == 4 && kernel == 4) return across_rows<4, 4, indexed, last, L>;
    return nullptr;
  }

  // Steps of a doubling: winners of 2, 4, 8 ... taps, then two overlapping runs.
  static int64_t doublings(int64_t kernel) {
    int64_t steps = 0, span = 1;
    for (; 2 * span <= kernel; span *= 2) ++steps;
    return steps + (span < kernel ? 1 : 0);
  }

  void choose_tile() {
    const Axis &h = s_.axis[1], &w = s_.axis[2];
    const int64_t budget = 16384 / int64_t(sizeof(L));  // lanes to stage: half of a small L1
    group_ = !channels_last_ ? 1 : direct_ || s_.channels <= 256 ? s_.channels : 128;
    blocks_ = channels_last_ ? up(s_.channels, group_) : s_.channels;
    tile_.columns = w.out;
    if (direct_) {
      const int64_t row = w.out * group_ * s_.taps();
      tile_.rows = std::clamp<int64_t>(16384 / row, 1, h.out);
      // A chunk's winners along the width: few enough that reading the input hardly pauses, or
      // whole planes rather than strips of several in turns.
      const int64_t bytes = s_.axis[0].kernel == 1 ? 4096 : 32768;
      const int64_t slots = bytes / int64_t(sizeof(L)) / (across_pitch() * s_.axis[0].kernel);
      chunk_ = std::max({slots / h.stride, h.extent(1) / h.stride, int64_t{1}});
      chunk_ = rows_of_window() == 1 ? 1 : up(tile_.rows, up(tile_.rows, chunk_));
    } else {
      if (w.extent(w.out) * group_ > budget)
        tile_.columns =
            std::clamp<int64_t>(std::max(budget / group_, 2 * w.extent(1)) / w.stride, 1, w.out);
      const int64_t row = w.extent(tile_.columns) * group_;
      const int64_t rows = std::max(budget / row, std::min(2 * h.extent(1), 16 * budget / row));
      tile_.rows = std::clamp<int64_t>(rows / h.stride, 1, h.out);
    }
    // Tiles of one size, rather than a small one at the end.
    bands_ = up(h.out, tile_.rows), strips_ = up(w.out, tile_.columns);
    tile_.rows = up(h.out, bands_), tile_.columns = up(w.out, strips_);
    bands_ = up(h.out, tile_.rows), strips_ = up(w.out, tile_.columns);

    slots_ = up(w.extent(tile_.columns), w.stride);
    staged_rows_ = h.extent(tile_.rows);
    phase_size_ = staged_rows_ * slots_ * group_;
  }

  // A rough number of vector steps for one output.
  int64_t window_cost() const {
    const auto axis = [](const Axis& a, bool doubled) {
      return doubled ? doublings(a.kernel) : a.kernel;
    };
    return 1 + (axis(s_.axis[1], double_down_) + axis(s_.axis[2], double_across_)) *
                   s_.axis[0].kernel / 4;
  }

  Tile tile_of(int64_t task) const {
    Tile t;
    t.column = task % strips_ * tile_.columns, task /= strips_;
    t.row = task % bands_ * tile_.rows, task /= bands_;
    t.od = task % s_.axis[0].out, task /= s_.axis[0].out;
    t.channel = task % blocks_ * group_;
    t.n = task / blocks_;
    t.lanes = std::min(group_, channels_last_ ? s_.channels - t.channel : 1);
    t.rows = std::min(tile_.rows, s_.axis[1].out - t.row);
    t.columns = std::min(tile_.columns, s_.axis[2].out - t.column);
    return t;
  }

  int64_t tap_room() const {
    return direct_ ? s_.taps()
                   : std::max(s_.axis[2].kernel, std::max<int64_t>(s_.axis[1].kernel, 2));
  }
  // Lanes behind the staged rows that the last of them reads with its last tap.
  int64_t staged_size() const {
    const Axis& w = s_.axis[2];
    return w.stride * (phase_size_ + (w.kernel - 1) * w.dilation / w.stride * group_) + lanes<L>;
  }
  int64_t result_size() const { return tile_.rows * tile_.columns * group_ + lanes<L>; }
  int64_t across_size() const {
    if (channels_last_ || rows_of_window() == 1) return 0;
    return s_.axis[0].kernel * s_.axis[1].extent(chunk_) * across_pitch();
  }
  int64_t direct_indices() const {
    return (channels_last_ ? tile_.columns * group_ : chunk_ * tile_.columns) + lanes<L>;
  }
  // Rows of inputs as lanes, and values of outputs, where the tensors hold another type.
  int64_t direct_inputs() const {
    if (codec_.is_lane) return 0;
    return (rows_of_window() == 1 ? 1 : s_.axis[1].extent(chunk_)) * s_.axis[2].in;
  }
  int64_t direct_values() const { return codec_.is_lane ? 0 : direct_indices(); }
  int64_t scratch_bytes() const {
    const int64_t both = sizeof(L) + sizeof(I), slack = 1024;
    int64_t bytes = s_.axis[0].kernel * s_.axis[1].kernel * int64_t(sizeof(InputRow)) +
                    tap_room() * int64_t(sizeof(Tap) + sizeof(int64_t)) + slack;
    if (direct_)
      return bytes + across_size() * both + direct_indices() * int64_t(sizeof(I)) +
             (direct_inputs() + direct_values()) * int64_t(sizeof(L)) + slack;
    return bytes + staged_size() * both + (phase_size_ + lanes<L>)*both + 2 * result_size() * both;
  }
  Buffers take_buffers(Scratch& scratch) const {
    Buffers b{};
    b.input_rows = scratch.take<InputRow>(s_.axis[0].kernel * s_.axis[1].kernel);
    b.taps = scratch.take<Tap>(tap_room());
    b.ahead = scratch.take<int64_t>(tap_room());
    if (direct_) {
      b.across.value = scratch.take<L>(across_size());
      b.across.index = scratch.take<I>(across_size());
      b.down.index = scratch.take<I>(direct_indices());
      b.down.value = scratch.take<L>(direct_values());
      b.staged = scratch.take<L>(direct_inputs());
      return b;
    }
    const auto rows = [&](int64_t size) {
      Rows<L> r;
      r.value = scratch.take<L>(size);
      r.index = scratch.take<I>(size);
      return r;
    };
    b.staged = scratch.take<L>(staged_size());
    b.across = rows(phase_size_ + lanes<L>);
    b.down = rows(result_size());
    b.deep = rows(result_size());
    return b;
  }

  // ---- places in the tensors

  static int64_t offset(const RawView& v, int64_t n, int64_t c, int64_t d, int64_t h, int64_t w) {
    return n * v.stride[0] + c * v.stride[1] + d * v.stride[2] + h * v.stride[3] + w * v.stride[4];
  }
  const char* input_at(const Tile& t, int64_t id, int64_t ih, int64_t iw) const {
    return static_cast<const char*>(p_.input.data) +
           offset(p_.input, t.n, t.channel, id, ih, iw) * codec_.size;
  }
  char* output_at(const Tile& t, int64_t oh, int64_t ow) const {
    return static_cast<char*>(p_.output.data) +
           offset(p_.output, t.n, t.channel, t.od, oh, ow) * codec_.size;
  }
  char* index_at(const Tile& t, int64_t oh, int64_t ow) const {
    return static_cast<char*>(p_.index.data) +
           offset(p_.index, t.n, t.channel, t.od, oh, ow) * codec_.index_size;
  }
  // Does tap k reach inputs that no window before has reached? (With dilation, not all of them.)
  static bool is_reached_first(const Axis& a, int64_t k) { return k >= a.kernel - a.stride; }
  // Do all taps of output o exist?
  static bool whole(const Axis& a, int64_t o) {
    return a.holds_input(a.input_of(o, 0)) && a.holds_input(a.input_of(o, a.kernel - 1));
  }

  void write_row_index(const Tile& t, int64_t oh, const I* index) const {
    const Axis& w = s_.axis[2];
    int64_t base = 0, step = 0;
    if (p_.kind == IndexKind::flat) {
      base = s_.flat_of(s_.axis[0].input_of(t.od, 0), s_.axis[1].input_of(oh, 0),
                        w.input_of(t.column, 0));
      step = w.stride;
    }
    const int64_t outer = p_.index.stride[4];
    prefetch(index_at(t, oh, t.column), t.columns * t.lanes * codec_.index_size);
    if (!channels_last_)
      return codec_.write_index(index_at(t, oh, t.column), outer, t.columns, index, base, step);
    if (step == 0 && outer == t.lanes && p_.index.stride[1] == 1)
      return codec_.write_index(index_at(t, oh, t.column), 1, t.columns * t.lanes, index, 0, 0);
    for (int64_t j = 0; j < t.columns; ++j)
      codec_.write_index(index_at(t, oh, t.column + j), p_.index.stride[1], t.lanes,
                         index + j * t.lanes, base + j * step, 0);
  }

  // Does windows [first, end) of a row again where the value is the one that stands for padding.
  void repair(const Tile& t, int64_t oh, int64_t first, int64_t end, const L* value) const {
    for (int64_t ow = first; ow < end; ++ow)
      for (int64_t c = 0; c < t.lanes; ++c)
        if (value[(ow - t.column) * t.lanes + c] == codec_.lowest)
          max_pool_forward_at(p_, {t.n, t.channel + c, t.od, oh, ow});
  }
  void repair_row(const Tile& t, int64_t oh, bool whole_rows, const L* value) const {
    const Axis& w = s_.axis[2];
    const int64_t end = t.column + t.columns;
    if (!whole_rows) return repair(t, oh, t.column, end, value);
    int64_t left = t.column, right = end;
    while (left < end && !whole(w, left)) ++left;
    while (right > left && !whole(w, right - 1)) --right;
    repair(t, oh, t.column, left, value);
    repair(t, oh, right, end, value);
  }

  void pool(const Tile& t, const Buffers& b) const {
    if (!direct_) return pool_staged(t, b);
    if (!channels_last_) return pool_rows(t, b);
    for (int64_t oh = t.row; oh < t.row + t.rows; ++oh) pool_pixels(t, oh, b);
  }

  // ---- direct

  void pool_by_specification(const Tile& t, int64_t oh) const {
    for (int64_t ow = t.column; ow < t.column + t.columns; ++ow)
      for (int64_t c = 0; c < t.lanes; ++c)
        max_pool_forward_at(p_, {t.n, t.channel + c, t.od, oh, ow});
  }

  void pool_rows(const Tile& t, const Buffers& b) const {
    const Axis& h = s_.axis[1];
    for (int64_t row = t.row; row < t.row + t.rows; row += chunk_) {
      Tile chunk = t;
      chunk.row = row, chunk.rows = std::min(chunk_, t.row + t.rows - row);
      const bool found = pool_chunk(chunk, b);
      if (found && !codec_.is_lane) write_rows(chunk, b.down.value);
      for (int64_t oh = row; oh < row + chunk.rows; ++oh) {
        if (!found) {
          pool_by_specification(t, oh);
        } else if constexpr (indexed) {
          write_row_index(t, oh, b.down.index + (oh - row) * index_pitch());
          const L* const value = codec_.is_lane ? reinterpret_cast<const L*>(output_at(t, oh, 0))
                                                : b.down.value + (oh - row) * t.columns;
          repair_row(t, oh, whole(h, oh), value);
        }
      }
    }
  }

  // Rows one behind another are long enough to be converted at the speed of vectors.
  void read_rows(const char* from, int64_t rows, L* to) const {
    const int64_t width = s_.axis[2].in, pitch = p_.input.stride[3];
    if (pitch == width) return codec_.read(from, 1, rows * width, to);
    for (int64_t r = 0; r < rows; ++r)
      codec_.read(from + r * pitch * codec_.size, 1, width, to + r * width);
  }
  void write_rows(const Tile& t, const L* value) const {
    if (p_.output.stride[3] == t.columns)
      return codec_.write(output_at(t, t.row, 0), 1, t.rows * t.columns, value);
    for (int64_t r = 0; r < t.rows; ++r)
      codec_.write(output_at(t, t.row + r, 0), 1, t.columns, value + r * t.columns);
  }

  // Rows of the output, and their indices without the position of the window: false if there is no
  // plane of inputs.
  bool pool_chunk(const Tile& t, const Buffers& b) const {
    const Axis &d = s_.axis[0], &h = s_.axis[1], &w = s_.axis[2];
    const int64_t first = h.input_of(t.row, 0), rows = h.extent(t.rows), pitch = across_pitch();
    const int64_t top = std::clamp<int64_t>(-first, 0, rows);
    const int64_t bottom = std::clamp<int64_t>(h.in - first, top, rows);
    const Rows<L> to{codec_.is_lane ? reinterpret_cast<L*>(output_at(t, t.row, 0)) : b.down.value,
                     b.down.index, index_pitch()};
    const int64_t to_pitch = codec_.is_lane ? p_.output.stride[3] : w.out;
    Rows<L> across{b.across.value, indexed ? b.across.index : nullptr, pitch};
    const auto pool = [&](int64_t id, int64_t ih, int64_t rows, Rows<L> to, int64_t room) {
      const char* const from = input_at(t, id, ih, 0);
      if (!codec_.is_lane) read_rows(from, rows, b.staged);
      row_kernel_(codec_.is_lane ? reinterpret_cast<const L*>(from) : b.staged,
                  codec_.is_lane ? p_.input.stride[3] : w.in, rows, w, codec_.lowest,
                  static_cast<I>(weight_[2]), to, room);
    };
    if (rows_of_window() == 1) {
      const bool found = d.holds_input(d.input_of(t.od, 0)) && h.holds_input(first);
      if (found) pool(d.input_of(t.od, 0), first, 1, to, w.out);
      return found;
    }
    int64_t tap_count = 0;
    for (int64_t kd = 0; kd < d.kernel; ++kd) {
      const int64_t id = d.input_of(t.od, kd);
      if (!d.holds_input(id)) continue;
      const Rows<L> plane = across.at(tap_count / h.kernel * rows * pitch);
      std::fill_n(plane.value, top * pitch, codec_.lowest);
      std::fill_n(plane.value + bottom * pitch, (rows - bottom) * pitch, codec_.lowest);
      pool(id, first + top, bottom - top, plane.at(top * pitch), pitch);
      for (int64_t kh = 0; kh < h.kernel; ++kh)
        b.taps[tap_count++] = {(plane.value - across.value) + kh * h.dilation * pitch,
                               kd * weight_[0] + kh * weight_[1]};
    }
    across.pitch = h.stride * pitch;
    if (tap_count > 0)
      fold_rows<indexed>(to, to_pitch, across, t.rows, t.columns, b.taps, tap_count);
    return tap_count > 0;
  }

  // Winners along the width in a row of the buffer, and indices of a row of outputs.
  int64_t across_pitch() const { return up(s_.axis[2].out, lanes<L>) * lanes<L>; }
  int64_t index_pitch() const { return s_.axis[2].out; }

  // Channels innermost: the taps of a window that exist, whole pixels at a time.
  void pool_pixels(const Tile& t, int64_t oh, const Buffers& b) const {
    const Axis &d = s_.axis[0], &h = s_.axis[1], &w = s_.axis[2];
    int64_t row_count = 0;
    for (int64_t kd = 0; kd < d.kernel; ++kd) {
      const int64_t id = d.input_of(t.od, kd);
      if (!d.holds_input(id)) continue;
      for (int64_t kh = 0; kh < h.kernel; ++kh) {
        const int64_t ih = h.input_of(oh, kh);
        if (!h.holds_input(ih)) continue;
        b.input_rows[row_count++] = {reinterpret_cast<const L*>(input_at(t, id, ih, 0)),
                                     kd * weight_[0] + kh * weight_[1],
                                     is_reached_first(d, kd) && is_reached_first(h, kh)};
      }
    }
    if (row_count == 0) return pool_by_specification(t, oh);
    L* const output = reinterpret_cast<L*>(output_at(t, oh, 0));
    const int64_t in_pitch = p_.input.stride[4], out_pitch = p_.output.stride[4];
    // Indices go on to memory a few pixels after their values, not in one burst a row.
    const int64_t most = indexed ? std::max<int64_t>(256 / t.lanes, 1) : w.out;
    for (int64_t ow = 0; ow < w.out;) {
      int64_t first = 0, end = w.kernel;
      while (first < end && !w.holds_input(w.input_of(ow, first))) ++first;
      while (end > first && !w.holds_input(w.input_of(ow, end - 1))) --end;
      int64_t columns = 1;
      if (first == 0 && end == w.kernel)
        while (columns < most && ow + columns < w.out && whole(w, ow + columns)) ++columns;
      int64_t tap_count = 0;
      Ahead ahead{b.ahead};
      for (int64_t r = 0; r < row_count; ++r)
        for (int64_t k = first; k < end; ++k) {
          b.taps[tap_count] = {
              b.input_rows[r].data - b.input_rows[0].data + w.input_of(ow, k) * in_pitch,
              b.input_rows[r].index + k * weight_[2]};
          if (b.input_rows[r].reached_first && is_reached_first(w, k))
            ahead.at[ahead.count++] = b.taps[tap_count].at;
          ++tap_count;
        }
      if (tap_count == 0) {
        for (int64_t c = 0; c < t.lanes; ++c) max_pool_forward_at(p_, {t.n, c, t.od, oh, ow});
      } else {
        const Rows<L> from{const_cast<L*>(b.input_rows[0].data), nullptr, w.stride * in_pitch};
        const Rows<L> to{output + ow * out_pitch, b.down.index, t.lanes};
        fold_rows<false>(to, out_pitch, from, columns, t.lanes, b.taps, tap_count, ahead);
        if constexpr (indexed) {
          Tile part = t;
          part.column = ow, part.columns = columns;
          write_row_index(part, oh, b.down.index);
        }
      }
      ow += columns;
    }
  }

  // fold_as, to rows of values `value_pitch` apart and of indices to.pitch apart.
  template <bool carried>
  void fold_rows(Rows<L> to, int64_t value_pitch, Rows<L> from, int64_t rows, int64_t count,
                 const Tap* taps, int64_t tap_count, Ahead ahead = {}) const {
    constexpr auto* fold = fold_as<indexed, last, true, carried, L>;
    if (!indexed || to.pitch == value_pitch) {
      to.pitch = value_pitch;
      return fold(to, from, rows, count, taps, tap_count, ahead);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const Rows<L> one{to.value + r * value_pitch, to.index + r * to.pitch, 0};
      fold(one, from.at(r * from.pitch), 1, count, taps, tap_count, ahead);
    }
  }

  // ---- staged

  static void fold(Rows<L> to, Rows<L> from, int64_t rows, int64_t count, const Tap* taps,
                   int64_t tap_count) {
    if (from.index)
      fold_as<indexed, last, false, true>(to, from, rows, count, taps, tap_count);
    else
      fold_as<indexed, last, false, false>(to, from, rows, count, taps, tap_count);
  }

  // Winners of `kernel` taps that lie `shift` lanes apart, in place; `index` receives them.
  static void fold_doubling(Rows<L>& rows, I* index, int64_t count, int64_t kernel, int64_t shift,
                            int64_t weight) {
    for (int64_t span = 1; span < kernel;) {
      const int64_t next = std::min(span, kernel - span);
      const Tap taps[2] = {{0, 0}, {next * shift, next * weight}};
      const Rows<L> to{rows.value, index, rows.pitch};
      count -= next * shift;
      fold(to, rows, 1, count, taps, 2);
      if (indexed) rows.index = index;
      span += next;
    }
  }

  // Copies the input of a tile, one plane of it, into lanes: rows of slots, phase after phase.
  void stage(const Tile& t, int64_t id, L* staged) const {
    const Axis &h = s_.axis[1], &w = s_.axis[2];
    const int64_t phases = w.stride, pitch = slots_ * t.lanes;
    const int64_t rows = h.extent(t.rows), columns = w.extent(t.columns);
    const int64_t start = w.input_of(t.column, 0), stride = p_.input.stride[4];
    const int64_t first = std::clamp<int64_t>(-start, 0, columns);
    const int64_t end = std::clamp<int64_t>(w.in - start, first, columns);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t ih = h.input_of(t.row, 0) + r;
      L* const row = staged + r * pitch;
      const auto fill = [&](int64_t from, int64_t to) {
        for (int64_t e = from; e < to; ++e)
          std::fill_n(row + e % phases * phase_size_ + e / phases * t.lanes, t.lanes,
                      codec_.lowest);
      };
      if (!h.holds_input(ih)) {
        fill(0, columns);
        continue;
      }
      fill(0, first);
      fill(end, columns);
      const char* const source = input_at(t, id, ih, start);  // only [first, end) of it is read
      const auto read = [&](int64_t from, int64_t to) {
        for (int64_t e = from; e < to; ++e)
          codec_.read(source + e * stride * codec_.size, 1, t.lanes,
                      row + e % phases * phase_size_ + e / phases * t.lanes);
      };
      if (channels_last_) {
        if (phases == 1 && stride == t.lanes)
          codec_.read(source + first * stride * codec_.size, 1, (end - first) * t.lanes,
                      row + first * t.lanes);
        else
          read(first, end);
        continue;
      }
      // Whole groups of phases at once; what is left at both ends one by one.
      const int64_t group = up(first, phases), groups = end / phases - group;
      if (phases <= 4 && phases > 1 && stride == 1 && groups > 0) {
        read(first, group * phases);
        codec_.split[phases](source + group * phases * codec_.size, groups, row + group,
                             phase_size_);
        read((group + groups) * phases, end);
      } else {
        for (int64_t phase = 0; phase < phases; ++phase) {
          const int64_t slot = up(std::max<int64_t>(first - phase, 0), phases);
          const int64_t e = slot * phases + phase;
          if (e < end)
            codec_.read(source + e * stride * codec_.size, phases * stride, up(end - e, phases),
                        row + phase * phase_size_ + slot);
        }
      }
    }
  }

  // Winners along the width of every staged row, at its first columns.
  Rows<L> pool_across(const Tile& t, const Buffers& b) const {
    const Axis& w = s_.axis[2];
    Rows<L> rows{b.staged, nullptr, slots_ * t.lanes};
    if (w.kernel == 1) return rows;
    const int64_t staged = s_.axis[1].extent(t.rows);
    if (double_across_) {
      fold_doubling(rows, b.across.index, staged * rows.pitch, w.kernel, w.dilation * t.lanes,
                    weight_[2]);
      return rows;
    }
    for (int64_t k = 0; k < w.kernel; ++k) {
      const int64_t e = k * w.dilation;
      b.taps[k] = {e % w.stride * phase_size_ + e / w.stride * t.lanes, k * weight_[2]};
    }
    const Rows<L> to{b.across.value, indexed ? b.across.index : nullptr, rows.pitch};
    fold(to, rows, 1, (staged - 1) * rows.pitch + t.columns * t.lanes, b.taps, w.kernel);
    return to;
  }

  // Winners of rows, packed into rows of columns.
  void pool_down(const Tile& t, Rows<L> rows, Rows<L> to, int64_t depth_weight,
                 const Buffers& b) const {
    const Axis& h = s_.axis[1];
    int64_t taps = h.kernel;
    for (int64_t k = 0; k < taps; ++k)
      b.taps[k] = {k * h.dilation * rows.pitch, k * weight_[1] + depth_weight};
    if (double_down_) {
      fold_doubling(rows, b.across.index, h.extent(t.rows) * rows.pitch, h.kernel,
                    h.dilation * rows.pitch, weight_[1]);
      taps = 1;
    }
    rows.pitch *= h.stride;
    to.pitch = t.columns * t.lanes;
    fold(to, rows, t.rows, to.pitch, b.taps, taps);
  }

  void pool_staged(const Tile& t, const Buffers& b) const {
    const Axis& d = s_.axis[0];
    const int64_t pitch = t.columns * t.lanes;
    Rows<L> best = b.down;
    bool found = false;
    for (int64_t kd = 0; kd < d.kernel; ++kd) {
      const int64_t id = d.input_of(t.od, kd);
      if (!d.holds_input(id)) continue;
      stage(t, id, b.staged);
      pool_down(t, pool_across(t, b), found ? b.deep : best, kd * weight_[0], b);
      if (found) merge(best, b.deep, t.rows * pitch);
      found = true;
    }
    if (!found) std::fill_n(best.value, t.rows * pitch, codec_.lowest);
    for (int64_t r = 0; r < t.rows; ++r) write_row(t, t.row + r, best.at(r * pitch), found);
  }

  static void merge(Rows<L> best, Rows<L> next, int64_t count) {
    for (int64_t i = 0; i < count; i += lanes<L>) {
      Best<L> a, b;
      a.value = load(best.value + i), b.value = load(next.value + i);
      if constexpr (indexed) a.index = load(best.index + i), b.index = load(next.index + i);
      challenge<indexed, last, L>(a, b);
      store(best.value + i, a.value);
      if constexpr (indexed) store(best.index + i, a.index);
    }
  }

  void write_row(const Tile& t, int64_t oh, Rows<L> best, bool found) const {
    const int64_t stride = p_.output.stride[4];
    if (!channels_last_)
      codec_.write(output_at(t, oh, t.column), stride, t.columns, best.value);
    else if (stride == t.lanes)
      codec_.write(output_at(t, oh, t.column), 1, t.columns * t.lanes, best.value);
    else
      for (int64_t j = 0; j < t.columns; ++j)
        codec_.write(output_at(t, oh, t.column + j), 1, t.lanes, best.value + j * t.lanes);
    if constexpr (indexed) {
      write_row_index(t, oh, best.index);
      repair_row(t, oh, found && whole(s_.axis[1], oh), best.value);
    }
  }

  const PoolProblem& p_;
  const PoolShape& s_;
  const Codec<L>& codec_;
  bool channels_last_ = false, direct_ = false, double_across_ = false, double_down_ = false;
  RowKernel row_kernel_ = nullptr;
  int64_t weight_[3] = {0, 0, 0};
  Tile tile_;
  int64_t group_ = 1, blocks_ = 1, bands_ = 1, strips_ = 1;
  int64_t chunk_ = 1;  // rows of outputs at once, direct in NCHW
  int64_t slots_ = 0, staged_rows_ = 0, phase_size_ = 0;
};
