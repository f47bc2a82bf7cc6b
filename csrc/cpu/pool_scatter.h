// The gradient of the vector rows, for small windows. Included after pool_forward.h.
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
  } else if constexpr (std::is_floating_point_v<T>) {
    return sum == sum ? sum : canonical_nan<T>();
  } else {
    return static_cast<T>(sum);
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
  if (sizeof(Index) <= sizeof(I) && base == 0 && step == 0 && stride == 1) {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<I>(source[i]);
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t relative = static_cast<int64_t>(source[i * stride]) - base - i * step;
    to[i] = relative == static_cast<I>(relative) ? static_cast<I>(relative) : I(-1);
  }
}

template <class L>
struct SumCodec {
  int64_t size, index_size;
  void (*read)(const void*, int64_t, int64_t, L*);
  void (*write)(void*, int64_t, int64_t, const L*);
  void (*join[5])(void*, int64_t, const L*, int64_t);  // by the number of phases
  void (*read_index)(const void*, int64_t, int64_t, LaneIndex<L>*, int64_t, int64_t);

  template <class T>
  static SumCodec of(IndexType type) {
    SumCodec codec{sizeof(T),
                   0,
                   read_terms<T>,
                   write_sums<T>,
                   {nullptr, nullptr, write_joined<T, 2>, write_joined<T, 3>, write_joined<T, 4>},
                   nullptr};
    const auto set = [&](auto tag) {
      using Index = decltype(tag);
      codec.index_size = sizeof(Index);
      codec.read_index = read_indices<Index, LaneIndex<L>>;
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

// A window that reaches an input: where its gradient and index lie, the index that names the input.
template <class I>
struct Term {
  int64_t at;
  I own;
};

// to[i] = the sum of the terms that chose input i, in their order, from +0.
template <class L>
void add_terms(L* to, const L* grad, const LaneIndex<L>* index, int64_t count,
               const Term<LaneIndex<L>>* terms, int64_t term_count) {
  for (int64_t i = 0; i < count; i += lanes<L>) {
    Vec<L> sum{};
    for (int64_t k = 0; k < term_count; ++k) {
      const VecIndex<L> chosen = load(index + i + terms[k].at) == broadcast(terms[k].own);
      sum += chosen ? load(grad + i + terms[k].at) : Vec<L>{};
    }
    store(to + i, sum);
  }
}

template <class L>
class Scatter {
 public:
  Scatter(const PoolProblem& problem, const SumCodec<L>& codec)
      : p_(problem), s_(problem.shape), codec_(codec) {
    const Axis &d = s_.axis[0], &h = s_.axis[1], &w = s_.axis[2];
    channels_last_ = p_.input.stride[1] == 1 && p_.output.stride[1] == 1 &&
                     p_.index.stride[1] == 1 && s_.channels > 1 && p_.input.stride[4] != 1;
    const bool flat = p_.kind == IndexKind::flat;
    weight_[2] = flat ? w.dilation : 1;
    weight_[1] = flat ? h.dilation * w.in : w.kernel;
    weight_[0] = flat ? d.dilation * h.in * w.in : w.kernel * h.kernel;

    group_ = !channels_last_ ? 1 : s_.channels <= 256 ? s_.channels : 128;
    blocks_ = up(s_.channels, group_);
    margin_ = (w.kernel - 1) * w.dilation / w.stride;
    // The tile: slots of the width (a slot is `stride` inputs), rows of one plane.
    const int64_t all = up(w.in + w.pad, w.stride), budget = 8192 / int64_t(sizeof(L));
    slots_ = std::clamp<int64_t>(std::max(budget / group_, 2 * margin_), 1, all);
    slots_ = up(all, up(all, slots_));
    strips_ = up(all, slots_);
    const int64_t planes = planes_of_outputs();
    const int64_t row = (slots_ + margin_) * group_ * planes;
    rows_ = std::clamp<int64_t>(std::max(budget / row, reach(h) / h.stride) * h.stride, 1, h.in);
    bands_ = up(h.in, rows_);
    staged_rows_ = std::min(h.out, (rows_ + reach(h)) / h.stride + 2) * planes;
    pitch_ = (slots_ + margin_) * group_;
    phase_size_ = slots_ * group_ + lanes<L>;
  }

  void run() const {
    const int64_t outputs = rows_ * slots_ * group_;
    parallel_for(s_.batch * blocks_ * s_.axis[0].in * bands_ * strips_, 1 + 16384 / (outputs + 1),
                 FloatEnvironment::gradual, [&](int64_t begin, int64_t end) {
                   const int64_t size = staged_rows_ * pitch_ + 2 * lanes<L>;
                   const int64_t sums = s_.axis[2].stride * phase_size_;
                   Scratch scratch((size + sums) * int64_t(sizeof(L) + sizeof(I)) +
                                   (s_.taps() + 1) * int64_t(sizeof(Term<I>)) + 1024);
                   Buffers b;
                   b.grad = scratch.take<L>(size);
                   b.index = scratch.take<I>(size);
                   b.sums = scratch.take<L>(sums);
                   b.terms = scratch.take<Term<I>>(s_.taps() + 1);
                   for (int64_t task = begin; task < end; ++task) scatter(tile_of(task), b);
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
    L *grad, *sums;
    I* index;
    Term<I>* terms;
  };

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
    t.slots = std::min(slots_, up(s_.axis[2].in + s_.axis[2].pad, s_.axis[2].stride) - t.slot);
    t.od = d.first_output(t.id), t.od_end = d.last_output(t.id) + 1;
    t.oh = h.first_output(t.row), t.oh_end = h.last_output(t.end - 1) + 1;
    return t;
  }

  static int64_t offset(const RawView& v, int64_t n, int64_t c, int64_t d, int64_t h, int64_t w) {
    return n * v.stride[0] + c * v.stride[1] + d * v.stride[2] + h * v.stride[3] + w * v.stride[4];
  }

  // Rows of gradients and indices, from window slot - margin on, index -1 where there is none.
  void stage(const Tile& t, const Buffers& b) const {
    const Axis& w = s_.axis[2];
    const int64_t start = t.slot - margin_, width = t.slots + margin_;
    const int64_t first = std::clamp<int64_t>(-start, 0, width);
    const int64_t end = std::clamp<int64_t>(w.out - start, first, width);
    const int64_t pixel = channels_last_ ? t.lanes : 1;
    L* grad = b.grad;
    I* index = b.index;
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

  void scatter(const Tile& t, const Buffers& b) const {
    const Axis &d = s_.axis[0], &h = s_.axis[1], &w = s_.axis[2];
    const int64_t pixel = channels_last_ ? t.lanes : 1, pitch = (t.slots + margin_) * pixel;
    stage(t, b);
    for (int64_t ih = t.row; ih < t.end; ++ih) {
      for (int64_t phase = 0; phase < w.stride; ++phase) {
        int64_t count = 0;
        for (int64_t od = t.od; od < t.od_end; ++od) {
          const int64_t kd = d.tap_of(od, t.id);
          if (kd < 0) continue;
          for (int64_t oh = h.first_output(ih); oh <= h.last_output(ih); ++oh) {
            const int64_t kh = h.tap_of(oh, ih);
            if (kh < 0) continue;
            const int64_t row = (od - t.od) * (t.oh_end - t.oh) + oh - t.oh;
            for (int64_t kw = w.kernel - 1; kw >= 0; --kw) {
              const int64_t distance = kw * w.dilation - phase;
              if (distance % w.stride != 0 || distance < 0) continue;
              b.terms[count++] = {
                  row * pitch + (margin_ - distance / w.stride) * pixel,
                  static_cast<I>(kd * weight_[0] + kh * weight_[1] + kw * weight_[2])};
            }
          }
        }
        add_terms<L>(b.sums + phase * phase_size_, b.grad, b.index, t.slots * pixel, b.terms,
                     count);
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
  bool channels_last_ = false;
  int64_t weight_[3] = {0, 0, 0};
  int64_t group_ = 1, blocks_ = 1, margin_ = 0, slots_ = 1, strips_ = 1, rows_ = 1, bands_ = 1;
  int64_t staged_rows_ = 0, pitch_ = 0, phase_size_ = 0;
};
