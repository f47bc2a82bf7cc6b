// The gradient of square windows with stride 1 that are too large for the blocks of pool_scatter.h,
// in NCHW. Included after pool_scatter.h. Start reading at Columns::run.
//
// A gather as there: lanes are columns of inputs. A vector of windows is loaded once for all rows
// of inputs that it may have chosen from. In the workspace planes stand side by side, so that
// narrow ones fill vectors too, and so far apart that no window reaches another plane.

template <int kernel, class L>
class Columns {
 public:
  Columns(const PoolProblem& problem, const SumCodec<L>& codec)
      : p_(problem), s_(problem.shape), codec_(codec) {
    const Axis &h = s_.axis[1], &w = s_.axis[2];
    count_ = s_.batch * s_.channels * s_.axis[0].in;
    width_ = w.in + kernel - 1;
    // As many planes side by side as leave the fewest lanes over.
    const auto vectors = [&](int64_t planes) { return up(planes * width_, V); };
    for (int64_t planes = 2; planes <= std::min<int64_t>(count_, 8); ++planes)
      if (vectors(planes) * side_ < vectors(side_) * planes) side_ = planes;
    groups_ = up(count_, side_);
    pitch_ = vectors(side_) * V;
    // Windows between two bands are added twice: bands where a plane is large, or where threads
    // would have none.
    constexpr int64_t budget = 131072 / int64_t(sizeof(L)), least = 4 * kernel;
    const int64_t threads = thread_count(), tasks = threads == 1 ? 1 : 2 * threads;
    const int64_t shared = groups_ < tasks ? up(h.in * groups_, tasks) : h.in;
    rows_ = std::min(std::max(std::min(budget / pitch_ - kernel, shared), least), h.in);
    bands_ = up(h.in, rows_), rows_ = up(h.in, bands_);
  }

  static bool has_way(const PoolProblem& p) {
    const Axis &d = p.shape.axis[0], &h = p.shape.axis[1], &w = p.shape.axis[2];
    const auto is_square = [](const Axis& a) {
      return a.kernel == kernel && a.stride == 1 && a.dilation == 1 && a.pad < kernel;
    };
    const bool is_flat = d.kernel == 1 && d.stride == 1 && d.pad == 0 && d.out == d.in;
    return is_flat && is_square(h) && is_square(w) && w.in >= V && p.kind == IndexKind::offset &&
           p.input.stride[4] == 1 && p.output.stride[4] == 1 && p.index.stride[4] == 1;
  }

  void run() const {
    parallel_for(groups_ * bands_, 1 + 8192 / (side_ * rows_ * width_ + 1),
                 FloatEnvironment::gradual, [&](int64_t begin, int64_t end) {
                   const int64_t size = (rows_ + kernel - 1) * pitch_ + kernel + V;
                   Scratch scratch((3 * size) * int64_t(sizeof(L)) + 2 * size + 2048);
                   Buffers b, next;
                   for (Buffers* each : {&b, &next}) {
                     each->grad = scratch.take<L>(size), each->index = scratch.take<uint8_t>(size);
                     std::fill_n(each->grad, size, L(0));
                     std::fill_n(each->index, size, nobody);
                   }
                   L* const sums = scratch.take<L>(size);
                   Choices<L> own[kernel * kernel];
                   for (int tap = 0; tap < kernel * kernel; ++tap)
                     own[tap] = Masked::choice<L>(tap);
                   // A tile is staged while the one before it is added up, as in pool_scatter.h.
                   stage(tile_of(begin), b);
                   for (int64_t task = begin; task < end; ++task) {
                     const Tile t = tile_of(task);
                     if (task + 1 < end) stage(tile_of(task + 1), next);
                     for (int64_t x = 0; x < t.planes * width_; x += V)
                       add_down(t, {b.grad + x, b.index + x, own}, sums + x);
                     write(t, sums);
                     std::swap(b, next);
                   }
                 });
  }

 private:
  static constexpr int V = lanes<L>;

  // Rows [row, end) of inputs in some planes, and the rows of windows that reach them.
  struct Tile {
    int64_t plane, planes, row, end, oh, oh_end;
  };
  struct Buffers {
    L* grad;
    uint8_t* index;
  };

  Tile tile_of(int64_t task) const {
    const Axis& h = s_.axis[1];
    Tile t;
    t.plane = task / bands_ * side_, t.planes = std::min(side_, count_ - t.plane);
    t.row = task % bands_ * rows_, t.end = std::min(t.row + rows_, h.in);
    t.oh = std::clamp<int64_t>(t.row + h.pad - (kernel - 1), 0, h.out);
    t.oh_end = std::clamp<int64_t>(t.end + h.pad, t.oh, h.out);
    return t;
  }

  // Visits the planes of a tile: the number in the tile, and n, c, d in the tensor.
  template <class Visit>
  void for_each_plane(const Tile& t, Visit visit) const {
    const int64_t depth = s_.axis[0].in, channel = t.plane / depth;
    int64_t n = channel / s_.channels, c = channel % s_.channels, d = t.plane % depth;
    for (int64_t i = 0; i < t.planes; ++i) {
      visit(i, n, c, d);
      if (++d == depth) d = 0, ++c;
      if (c == s_.channels) c = 0, ++n;
    }
  }
  static int64_t offset(const RawView& v, int64_t n, int64_t c, int64_t d, int64_t h) {
    return n * v.stride[0] + c * v.stride[1] + d * v.stride[2] + h * v.stride[3];
  }

  // What windows may reach column iw of a plane lie at iw ... iw + kernel - 1, rows from t.oh on.
  // What lies around them is nobody's.
  void stage(const Tile& t, const Buffers& b) const {
    const RawView &g = p_.output, &x = p_.index;
    const int64_t lead = kernel - 1 - s_.axis[2].pad, rows = t.oh_end - t.oh;
    const int64_t columns = std::min(s_.axis[2].out, width_ - lead);
    for_each_plane(t, [&](int64_t i, int64_t n, int64_t c, int64_t d) {
      const int64_t to = i * width_ + lead;
      codec_.stage({static_cast<const char*>(g.data) + offset(g, n, c, d, t.oh) * codec_.size,
                    static_cast<const char*>(x.data) + offset(x, n, c, d, t.oh) * codec_.index_size,
                    g.stride[3], x.stride[3], rows, columns, b.grad + to, b.index + to, pitch_});
    });
  }

  // A vector of columns: each row of windows adds to the `kernel` rows of inputs that it reaches,
  // and the first of these is done then. (Inlined, it would lack registers.)
  [[gnu::noinline]] void add_down(const Tile& t, GradRow<L> windows, L* to) const {
    const int64_t pitch = pitch_;
    int64_t rows = t.oh_end - t.oh;
    Vec<L> sum[kernel] = {};
    for (int64_t row = t.oh - s_.axis[1].pad; row < t.end; ++row) {
      if (--rows >= 0) {
#pragma GCC unroll 8
        for (int n = 0; n < kernel; ++n) {
          const Vec<L> grad = Masked::in_register<L>(load(windows.grad + n));
          const Choices<L> chosen = Masked::in_register<L>(Masked::choices<L>(windows.index + n));
#pragma GCC unroll 8
          for (int kh = 0; kh < kernel; ++kh) {
            const Choices<L> own = windows.own[kh * kernel + kernel - 1 - n];
            sum[kh] = Masked::add<L>(sum[kh], Masked::equal<L>(chosen, own), grad);
          }
        }
        windows.grad += pitch, windows.index += pitch;
      }
      if (row >= t.row) store(to, canonical_sum<L>(sum[0])), to += pitch;
#pragma GCC unroll 8
      for (int kh = 1; kh < kernel; ++kh) sum[kh - 1] = sum[kh];
      sum[kernel - 1] = Vec<L>{};
    }
  }

  void write(const Tile& t, const L* sums) const {
    const RawView& v = p_.input;
    for_each_plane(t, [&](int64_t i, int64_t n, int64_t c, int64_t d) {
      char* const to = static_cast<char*>(v.data) + offset(v, n, c, d, t.row) * codec_.size;
      codec_.unstage({sums + i * width_, pitch_, t.end - t.row, s_.axis[2].in, to, v.stride[3]});
    });
  }

  const PoolProblem& p_;
  const PoolShape& s_;
  const SumCodec<L>& codec_;
  int64_t count_, side_ = 1, groups_;  // of planes: in all, side by side, and of those
  int64_t width_, pitch_;              // of a plane in the workspace, and of `side_` of them
  int64_t rows_, bands_;
};
