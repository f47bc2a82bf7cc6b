// Convolutions of few channels per group: depthwise, ResNeXt, small odd groups. Start reading at
// conv_depthwise, at the end.
//
// The lanes of a vector are channels of the tensor that is written, of as many groups as fit, so no
// lane is wasted however few channels a group has. Sources are first copied into a panel
// [source channel of the group][d][h][w][lane], zero-padded, in which lane l holds what its own
// group reads: NCHW is transposed on the way, channels_last copied, 16-bit types are widened. After
// that every tap of every direction is one aligned vector at a fixed distance:
//
//   forward, grad_input   chain[pixel] = fma(panel[pixel + tap], weight[tap], chain[pixel])
//   grad_weight           chain[tap]   = fma(panel[pixel + tap], grad[pixel], chain[tap])
//
// A strided grad_input is a set of stride-1 maps, one per phase (position modulo stride), each
// with the taps that meet it. Groups of terms and the two chains of 16-bit types are those of
// spec/arithmetic.h; the worker's floating-point environment does the flushing.
#pragma once

namespace torch_naiveconv::TNC_ISA {

TNC_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
TNC_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
TNC_INLINE int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

template <class T>
constexpr int chains_of = is_half_type<T> ? 2 : 1;
template <class T>
constexpr FloatEnvironment::Mode environment_of =
    is_half_type<T> ? FloatEnvironment::flush : FloatEnvironment::gradual;

constexpr int64_t panel_bytes = 256 << 10;      // a panel's share of the L2 cache
constexpr int64_t panel_limit = 2 << 20;        // what a thread may take at most
constexpr int64_t widest_map_box = 128;         // pixels of a row, so that several rows fit
constexpr int64_t worthwhile_products = 50000;  // multiply-adds for which a thread is woken

// Memory that a thread keeps from call to call, one block a slot: 0 for what a call prepares and
// all its threads read, 1 for what each thread works in.
template <class E>
E* scratch(int slot, int64_t count) {
  struct Block {
    void* data = nullptr;
    size_t size = 0;
    ~Block() { std::free(data); }
  };
  static thread_local Block blocks[2];
  Block& block = blocks[slot];
  const size_t size = (count * sizeof(E) + 63) / 64 * 64;
  if (size > block.size) {
    std::free(block.data);
    block.data = std::aligned_alloc(64, size);
    block.size = block.data ? size : 0;
  }
  return static_cast<E*>(block.data);
}

template <class T>
TNC_INLINE Total<T> widened(const T* p) {
  if constexpr (is_half_type<T>) {
    Total<T> x;
    Vec<Total<T>>::load(p, 1).store(&x, 1);
    return x;
  } else {
    return *p;
  }
}
template <class T>
TNC_INLINE void put_narrowed(const Total<T>* from, T* to) {
  Vec<Total<T>>::load(from, 1).store(to, 1);
}

// ---- lanes: which channel each reads, and how they are fetched and stored
// ------------------------

template <class T>
struct ChannelLanes {
  using E = Total<T>;
  static constexpr int L = Vec<E>::lanes;
  enum Kind { planes, adjacent, permuted, scattered };

  Kind kind = scattered;
  int count = 0;      // lanes in use
  int64_t offset[L];  // of each lane's channel, in elements; unused lanes repeat the first
  int64_t w_stride = 0;
  int span = 0;      // permuted: channels from the first lane's to the last lane's
  int32_t index[L];  // permuted: channel of each lane, counted from the first lane's

  // channel_of(l) for l < count must not descend.
  template <class ChannelOf>
  ChannelLanes(int count, int64_t channel_stride, int64_t w_stride, ChannelOf channel_of)
      : count(count), w_stride(w_stride) {
    bool consecutive = true;
    const int64_t first = channel_of(0);
    for (int l = 0; l < L; ++l) {
      const int64_t channel = l < count ? channel_of(l) : first;
      offset[l] = channel * channel_stride;
      if (l < count) consecutive = consecutive && channel == first + l;
    }
    span = static_cast<int>(smaller(channel_of(count - 1) - first + 1, L + 1));
    if (channel_stride == 1 && consecutive)
      kind = adjacent;
    else if (w_stride == 1)
      kind = planes;
    else if (channel_stride == 1 && span <= L)
      kind = permuted;
    if (kind == permuted)
      for (int l = 0; l < L; ++l) index[l] = static_cast<int32_t>(offset[l] - offset[0]);
  }

  // panel[i][lane] = row[i * w_stride + offset[lane]] for i < n.
  void fetch(const T* row, int64_t n, E* panel) const {
    if (kind == planes) {
      for (int64_t i = 0; i < n; i += L) {
        const int m = static_cast<int>(smaller(L, n - i));
        Vec<E> block[L];
        if (m == L) {
#pragma GCC unroll 16
          for (int l = 0; l < L; ++l) block[l] = Vec<E>::load(row + offset[l] + i);
        } else {
#pragma GCC unroll 16
          for (int l = 0; l < L; ++l) block[l] = Vec<E>::load(row + offset[l] + i, m);
        }
        Vec<E>::transpose(block);
        E* const to = panel + i * L;
        if (m == L) {
#pragma GCC unroll 16
          for (int q = 0; q < L; ++q) block[q].store(to + q * L);
        } else {
#pragma GCC unroll 16
          for (int q = 0; q < L; ++q)
            if (q < m) block[q].store(to + q * L);
        }
      }
    } else if (kind == adjacent) {
      const T* from = row + offset[0];
      if (count == L)
        for (int64_t i = 0; i < n; ++i) Vec<E>::load(from + i * w_stride).store(panel + i * L);
      else
        for (int64_t i = 0; i < n; ++i)
          Vec<E>::load(from + i * w_stride, count).store(panel + i * L);
    } else if (kind == permuted) {
      const T* from = row + offset[0];
      for (int64_t i = 0; i < n; ++i)
        Vec<E>::load(from + i * w_stride, span).permute(index).store(panel + i * L);
    } else {
      for (int64_t i = 0; i < n; ++i)
        for (int l = 0; l < L; ++l) panel[i * L + l] = widened(row + i * w_stride + offset[l]);
    }
  }

  // row[i * w_stride + offset[lane]] = panel[i][lane], rounded to T, for i < n.
  void put(const E* panel, int64_t n, T* row) const {
    if (kind == planes) {
      for (int64_t i = 0; i < n; i += L) {
        const int m = static_cast<int>(smaller(L, n - i));
        Vec<E> block[L];
#pragma GCC unroll 16
        for (int q = 0; q < L; ++q) block[q] = Vec<E>::load(panel + (i + (q < m ? q : 0)) * L);
        Vec<E>::transpose(block);
        if (m == L && count == L) {
#pragma GCC unroll 16
          for (int l = 0; l < L; ++l) block[l].store(row + offset[l] + i);
        } else {
#pragma GCC unroll 16
          for (int l = 0; l < L; ++l)
            if (l < count) block[l].store(row + offset[l] + i, m);
        }
      }
    } else if (kind == adjacent) {
      T* const to = row + offset[0];
      for (int64_t i = 0; i < n; ++i) {
        const Vec<E> x = Vec<E>::load(panel + i * L);
        if (count == L)
          x.store(to + i * w_stride);
        else
          x.store(to + i * w_stride, count);
      }
    } else {
      for (int64_t i = 0; i < n; ++i)
        for (int l = 0; l < count; ++l)
          put_narrowed(panel + i * L + l, row + i * w_stride + offset[l]);
    }
  }
};

// ---- one axis of a map from a source to what is written
// ------------------------------------------

// Written position x reads, with tap k, source position (x * step + sign * (k * dilation - pad)) /
// period, if that division is exact. Forward: period 1. grad_input: step 1, sign -1.
struct MapAxis {
  int64_t written, source, kernel, step, period, sign, dilation, pad;

  static MapAxis of(const Axis& a, bool transposed) {
    return transposed ? MapAxis{a.in, a.out, a.kernel, 1, a.stride, -1, a.dilation, a.pad}
                      : MapAxis{a.out, a.in, a.kernel, a.stride, 1, 1, a.dilation, a.pad};
  }
  int64_t numerator(int64_t k) const { return sign * (k * dilation - pad); }
  int64_t phases() const { return smaller(period, written); }
  bool meets(int64_t phase, int64_t k) const { return (phase + numerator(k)) % period == 0; }
  // The distance from base(x) to the source position, the same for all x of a phase.
  int64_t shift(int64_t phase, int64_t k) const { return (phase + numerator(k)) / period; }
  int64_t base(int64_t x) const { return x / period * step; }

  // Source positions that the written range [begin, begin + n) may read.
  int64_t first_source(int64_t begin) const {
    return floor_div(begin * step + smaller(numerator(0), numerator(kernel - 1)), period);
  }
  int64_t source_extent(int64_t n) const {
    return ((n - 1) * step + (kernel - 1) * dilation) / period + (period > 1 ? 2 : 1);
  }
};

// ---- the panel: a box of source rows, [source channel][d][h][w][lane]
// ----------------------------

struct Box {
  int64_t begin[3], size[3];
};

// Numbers the boxes of at most `size` positions that cover a range of `whole`.
struct Boxes {
  int64_t whole[3], size[3], count[3];

  void cut() {
    for (int a = 0; a < 3; ++a) count[a] = (whole[a] + size[a] - 1) / size[a];
  }
  int64_t total() const { return count[0] * count[1] * count[2]; }
  Box box(int64_t i) const {
    const int64_t at[3] = {i / (count[2] * count[1]), i / count[2] % count[1], i % count[2]};
    Box b;
    for (int a = 0; a < 3; ++a) {
      b.begin[a] = at[a] * size[a];
      b.size[a] = smaller(size[a], whole[a] - b.begin[a]);
    }
    return b;
  }
};

struct PanelShape {
  int64_t planes, extent[3], lanes;

  int64_t row_pitch() const { return extent[2] * lanes; }
  int64_t slice_pitch() const { return extent[1] * row_pitch(); }
  int64_t plane_pitch() const { return extent[0] * slice_pitch(); }
  int64_t size() const { return planes * plane_pitch(); }
};

// Fills one plane with source positions first[a] + [0, need[a]); outside the tensor +0.
template <class T>
void fill_plane(const PanelShape& shape, const ChannelLanes<T>& lanes, const T* sample,
                const int64_t* stride, const MapAxis* axis, const int64_t* first,
                const int64_t* need, Total<T>* plane) {
  const int64_t L = shape.lanes;
  const int64_t left = smaller(larger(-first[2], 0), need[2]);
  const int64_t right = smaller(larger(axis[2].source - first[2], left), need[2]);
  for (int64_t d = 0; d < need[0]; ++d)
    for (int64_t h = 0; h < need[1]; ++h) {
      const int64_t sd = first[0] + d, sh = first[1] + h;
      Total<T>* const row = plane + d * shape.slice_pitch() + h * shape.row_pitch();
      if (sd < 0 || sd >= axis[0].source || sh < 0 || sh >= axis[1].source) {
        std::memset(row, 0, need[2] * L * sizeof(*row));
        continue;
      }
      std::memset(row, 0, left * L * sizeof(*row));
      lanes.fetch(sample + sd * stride[0] + sh * stride[1] + (first[2] + left) * stride[2],
                  right - left, row + left * L);
      std::memset(row + right * L, 0, (need[2] - right) * L * sizeof(*row));
    }
}

// ---- forward and grad_input
// ----------------------------------------------------------------------

// A tap of a written position: distances in the panel and in the packed weights.
struct MapTerm {
  int32_t source, weight;
};

// What the positions of one phase add up: terms in chains, a chain (16-bit types: an even and an
// odd one) for each group that has a term.
struct TermLists {
  MapTerm* terms;
  int32_t* chain_end;    // one per chain
  int32_t* phase_begin;  // first chain of each phase, and the end of the last
};

// out[i] = bias + the sum over chains [chain, last), for `pixels` positions.
template <class T, int pixels>
TNC_INLINE void map_tile(const TermLists& lists, int32_t chain, int32_t last,
                         const Total<T>* weights, Vec<Total<T>> bias, const Total<T>* source,
                         int64_t source_step, Total<T>* out, int64_t out_step) {
  using V = Vec<Total<T>>;
  const auto run = [&](V(&acc)[pixels], int32_t c) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int i = 0; i < pixels; ++i) acc[i] = V::zero();
    const MapTerm* const end = lists.terms + lists.chain_end[c];
    for (const MapTerm* t = lists.terms + (c ? lists.chain_end[c - 1] : 0); t < end; ++t) {
      const V w = V::load(weights + t->weight);
      const Total<T>* const from = source + t->source;
#pragma GCC unroll 8
      for (int i = 0; i < pixels; ++i) acc[i] = fma(V::load(from + i * source_step), w, acc[i]);
    }
  };
  V total[pixels];
#pragma GCC unroll 8
  for (int i = 0; i < pixels; ++i) total[i] = V::zero();
  for (; chain < last; chain += chains_of<T>) {
    V acc[pixels];
    run(acc, chain);
    if constexpr (chains_of<T> == 2) {
      V odd[pixels];
      run(odd, chain + 1);
#pragma GCC unroll 8
      for (int i = 0; i < pixels; ++i) acc[i] = acc[i] + odd[i];
    }
#pragma GCC unroll 8
    for (int i = 0; i < pixels; ++i) total[i] = total[i] + acc[i];
  }
#pragma GCC unroll 8
  for (int i = 0; i < pixels; ++i) canonical(total[i] + bias).store(out + i * out_step);
}

template <class T>
void map_row(int64_t count, const TermLists& lists, int64_t phase, const Total<T>* weights,
             Vec<Total<T>> bias, const Total<T>* source, int64_t source_step, Total<T>* out,
             int64_t out_step) {
  const int32_t begin = lists.phase_begin[phase], end = lists.phase_begin[phase + 1];
  const auto tile = [&](auto pixels) __attribute__((always_inline)) {
    map_tile<T, pixels.value>(lists, begin, end, weights, bias, source, source_step, out, out_step);
    source += pixels.value * source_step;
    out += pixels.value * out_step;
    count -= pixels.value;
  };
  while (count >= 8) tile(std::integral_constant<int, 8>{});
  switch (count) {
    case 7: return tile(std::integral_constant<int, 7>{});
    case 6: return tile(std::integral_constant<int, 6>{});
    case 5: return tile(std::integral_constant<int, 5>{});
    case 4: return tile(std::integral_constant<int, 4>{});
    case 3: return tile(std::integral_constant<int, 3>{});
    case 2: return tile(std::integral_constant<int, 2>{});
    case 1: return tile(std::integral_constant<int, 1>{});
  }
}

// The lists of all phases. A tap that no position of a phase meets keeps its number.
template <class T>
void list_terms(const MapAxis* axis, const int64_t* phases, const PanelShape& panel,
                TermLists& lists) {
  int32_t count = 0, chain = 0;
  int64_t phase = 0;
  lists.phase_begin[0] = 0;
  const int64_t kernel[3] = {axis[0].kernel, axis[1].kernel, axis[2].kernel};
  const int64_t numbers = panel.planes * kernel[0] * kernel[1] * kernel[2];
  for (int64_t qd = 0; qd < phases[0]; ++qd)
    for (int64_t qh = 0; qh < phases[1]; ++qh)
      for (int64_t qw = 0; qw < phases[2]; ++qw) {
        for (int64_t group = 0; group < numbers; group += group_length<T>) {
          const int32_t before = count;
          for (int parity = 0; parity < chains_of<T>; ++parity) {
            for (int64_t number = group + parity;
                 number < smaller(group + group_length<T>, numbers); number += chains_of<T>) {
              const Position k =
                  Position::of(number, panel.planes, kernel[0], kernel[1], kernel[2]);
              if (!axis[0].meets(qd, k.d) || !axis[1].meets(qh, k.h) || !axis[2].meets(qw, k.w))
                continue;
              const int64_t source =
                  k.c * panel.plane_pitch() + axis[0].shift(qd, k.d) * panel.slice_pitch() +
                  axis[1].shift(qh, k.h) * panel.row_pitch() + axis[2].shift(qw, k.w) * panel.lanes;
              lists.terms[count++] = {static_cast<int32_t>(source),
                                      static_cast<int32_t>(number * panel.lanes)};
            }
            lists.chain_end[chain + parity] = count;
          }
          if (count > before) chain += chains_of<T>;  // a group without terms adds nothing
        }
        lists.phase_begin[++phase] = chain;
      }
}

// The largest boxes of written positions whose panel fits: long rows first, then rows, then slices.
// `in_order`: boxes, one after the other, must be the positions in their order; so nothing but the
// first cut axis is longer than one. Returns false if not even one position's panel fits.
inline bool choose_boxes(const MapAxis* axis, int64_t element_bytes, bool in_order, Boxes& boxes,
                         PanelShape& panel) {
  const auto bytes = [&] {
    for (int a = 0; a < 3; ++a) panel.extent[a] = axis[a].source_extent(boxes.size[a]);
    return panel.size() * element_bytes;
  };
  for (int a = 0; a < 3; ++a) boxes.whole[a] = axis[a].written, boxes.size[a] = 1;
  if (bytes() > panel_limit) return false;
  for (int a = 2; a >= 0; --a) {
    int64_t low = 1, high = boxes.whole[a];
    if (a == 2 && !in_order) high = smaller(high, widest_map_box);
    if (in_order && a < 2 && boxes.count[a + 1] > 1) high = 1;
    while (low < high) {
      boxes.size[a] = (low + high + 1) / 2;
      if (bytes() <= panel_bytes)
        low = boxes.size[a];
      else
        high = boxes.size[a] - 1;
    }
    const int64_t pieces = (boxes.whole[a] + low - 1) / low;  // evenly: no sliver at the end
    boxes.size[a] = (boxes.whole[a] + pieces - 1) / pieces;
    boxes.count[a] = pieces;
  }
  bytes();
  return true;
}

template <class T>
bool few_channels_map(const ConvProblem& p) {
  using E = Total<T>;
  using V = Vec<E>;
  constexpr int L = V::lanes;
  const ConvShape& s = p.shape;
  const bool transposed = p.direction == Direction::grad_input;
  const int64_t group = transposed ? s.group_in() : s.group_out();  // written channels of a group
  const int64_t planes = transposed ? s.group_out() : s.group_in();
  const int64_t channels = transposed ? s.in_channels : s.out_channels;
  if (group >= L) return false;
  const RawView& source = transposed ? p.output : p.input;
  const RawView& written = transposed ? p.input : p.output;
  const T* const source_data = static_cast<const T*>(source.data);
  T* const written_data = static_cast<T*>(written.data);
  const T* const weight_data = static_cast<const T*>(p.weight.data);
  const T* const bias = static_cast<const T*>(p.bias);

  MapAxis axis[3];
  for (int a = 0; a < 3; ++a) axis[a] = MapAxis::of(s.axis[a], transposed);
  const int64_t phases[3] = {axis[0].phases(), axis[1].phases(), axis[2].phases()};
  const int64_t phase_count = phases[0] * phases[1] * phases[2], numbers = planes * s.taps();
  PanelShape panel{planes, {}, L};
  Boxes boxes;
  if (phase_count > 4096 || numbers > 1 << 16 ||
      !choose_boxes(axis, sizeof(E), false, boxes, panel))
    return false;

  // Packed weights [block of lanes][term number][lane], then the lists.
  const int64_t blocks = (channels + L - 1) / L;
  const int64_t most_chains = chains_of<T> * (numbers / group_length<T> + 1) * phase_count;
  const int64_t list_words = 2 * numbers + most_chains + phase_count + 1;
  E* const weights = scratch<E>(0, blocks * numbers * L + list_words);
  if (!weights) return false;
  TermLists lists;
  lists.terms = reinterpret_cast<MapTerm*>(weights + blocks * numbers * L);
  lists.chain_end = reinterpret_cast<int32_t*>(lists.terms + numbers);
  lists.phase_begin = lists.chain_end + most_chains;
  list_terms<T>(axis, phases, panel, lists);
  const int64_t* const ws = p.weight.stride;
  for (int64_t c = 0; c < blocks * L; ++c) {
    E* const to = weights + c / L * numbers * L + c % L;
    for (int64_t number = 0; number < numbers; ++number) {
      const Position k =
          Position::of(number, planes, axis[0].kernel, axis[1].kernel, axis[2].kernel);
      const int64_t oc = transposed ? c / group * planes + k.c : c;
      const int64_t ic = transposed ? c % group : k.c;
      const T* const from =
          weight_data + oc * ws[0] + ic * ws[1] + k.d * ws[2] + k.h * ws[3] + k.w * ws[4];
      const E x = c < channels ? widened(from) : E(0);
      // Beyond the edge the panel has zeros where the definition of grad_input has no term.
      if (transposed && !(x - x == 0)) return false;
      to[number * L] = x;
    }
  }

  const auto fill = [&](int64_t n, int64_t block, int used, const Box& box, E* values) {
    int64_t first[3], need[3];
    for (int a = 0; a < 3; ++a) {
      first[a] = axis[a].first_source(box.begin[a]);
      need[a] = axis[a].source_extent(box.size[a]);
    }
    for (int64_t j = 0; j < planes; ++j) {
      const ChannelLanes<T> lanes(used, source.stride[1], source.stride[4],
                                  [&](int l) { return (block * L + l) / group * planes + j; });
      fill_plane(panel, lanes, source_data + n * source.stride[0], source.stride + 2, axis, first,
                 need, values + j * panel.plane_pitch());
    }
  };
  const auto work = [&](int64_t begin, int64_t end) {
    E* const values = scratch<E>(1, panel.size() + boxes.size[2] * L);
    E* const staged = values + panel.size();
    for (int64_t piece = begin; piece < end; ++piece) {
      const Box box = boxes.box(piece % boxes.total());
      const int64_t block = piece / boxes.total() % blocks;
      const int64_t n = piece / boxes.total() / blocks;
      const int used = static_cast<int>(smaller(L, channels - block * L));
      fill(n, block, used, box, values);
      const E* const block_weights = weights + block * numbers * L;
      E bias_lanes[L] = {};
      for (int l = 0; bias && l < used; ++l) bias_lanes[l] = widened(bias + block * L + l);
      const V bias_vector = V::load(bias_lanes);
      const ChannelLanes<T> lanes(used, written.stride[1], written.stride[4],
                                  [&](int l) { return block * L + l; });
      for (int64_t d = box.begin[0]; d < box.begin[0] + box.size[0]; ++d)
        for (int64_t h = box.begin[1]; h < box.begin[1] + box.size[1]; ++h) {
          const E* const row =
              values +
              (axis[0].base(d) - axis[0].first_source(box.begin[0])) * panel.slice_pitch() +
              (axis[1].base(h) - axis[1].first_source(box.begin[1])) * panel.row_pitch() -
              axis[2].first_source(box.begin[2]) * L;
          const int64_t period = axis[2].period;
          const int64_t row_phase =
              (d % axis[0].period * phases[1] + h % axis[1].period) * phases[2];
          for (int64_t i = 0; i < smaller(period, box.size[2]); ++i) {
            const int64_t w = box.begin[2] + i;
            map_row<T>((box.size[2] - i + period - 1) / period, lists, row_phase + w % period,
                       block_weights, bias_vector, row + axis[2].base(w) * L, axis[2].step * L,
                       staged + i * L, period * L);
          }
          lanes.put(staged, box.size[2],
                    written_data + n * written.stride[0] + d * written.stride[2] +
                        h * written.stride[3] + box.begin[2] * written.stride[4]);
        }
    }
  };
  const int64_t products = boxes.size[0] * boxes.size[1] * boxes.size[2] * L * numbers;
  parallel_for(s.batch * blocks * boxes.total(), 1 + worthwhile_products / (products + 1),
               environment_of<T>, work);
  return true;
}

// ---- grad_weight
// ---------------------------------------------------------------------------------

// chain[r][k] += the products of `count` pixels: rows of taps at distances row[r] in the panel, the
// taps of a row k_step apart.
template <class E, int rows, int taps>
void tap_tile(int64_t count, const E* grad, int64_t grad_step, const E* panel, const int64_t* row,
              int64_t k_step, int64_t panel_step, E* chain, int64_t chain_pitch) {
  using V = Vec<E>;
  V acc[rows][taps];
  const E* from[rows];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
    from[r] = panel + row[r];
#pragma GCC unroll 8
    for (int k = 0; k < taps; ++k) acc[r][k] = V::load(chain + r * chain_pitch + k * V::lanes);
  }
  for (int64_t i = 0; i < count; ++i) {
    const V g = V::load(grad);
    grad += grad_step;
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
      for (int k = 0; k < taps; ++k) acc[r][k] = fma(V::load(from[r] + k * k_step), g, acc[r][k]);
      from[r] += panel_step;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int k = 0; k < taps; ++k) acc[r][k].store(chain + r * chain_pitch + k * V::lanes);
}

// Tiles of `rows` x `taps` chains that fit the registers, for the numbers of taps that occur in
// kernels; longer rows are cut.
constexpr int most_chains_of(int registers) { return registers == 32 ? 28 : 12; }

template <class E, int taps, int rows>
TNC_INLINE void tap_rows(int64_t count, const E* grad, int64_t grad_step, const E* panel,
                         const int64_t* row, int64_t row_count, int64_t k_step, int64_t panel_step,
                         E* chain, int64_t chain_pitch) {
  if constexpr (rows > 0) {
    for (; row_count >= rows; row_count -= rows) {
      tap_tile<E, rows, taps>(count, grad, grad_step, panel, row, k_step, panel_step, chain,
                              chain_pitch);
      row += rows;
      chain += rows * chain_pitch;
    }
    tap_rows<E, taps, rows - 1>(count, grad, grad_step, panel, row, row_count, k_step, panel_step,
                                chain, chain_pitch);
  }
}

template <class E>
void all_taps(int64_t count, const E* grad, int64_t grad_step, const E* panel, const int64_t* row,
              int64_t row_count, int64_t kernel, int64_t k_step, int64_t panel_step, E* chain) {
  constexpr int L = Vec<E>::lanes, most = most_chains_of(Vec<E>::registers);
  const int64_t chain_pitch = kernel * L;
  int64_t k = 0;
  const auto rows_of = [&](auto taps) __attribute__((always_inline)) {
    constexpr int fit = most / taps.value < 8 ? most / taps.value : 8;
    tap_rows<E, taps.value, fit>(count, grad, grad_step, panel + k * k_step, row, row_count, k_step,
                                 panel_step, chain + k * L, chain_pitch);
    k += taps.value;
  };
  while (kernel - k >= 7) rows_of(std::integral_constant<int, 7>{});
  while (kernel - k >= 5) rows_of(std::integral_constant<int, 5>{});
  while (kernel - k >= 3) rows_of(std::integral_constant<int, 3>{});
  while (kernel - k >= 1) rows_of(std::integral_constant<int, 1>{});
}

// total += chain (16-bit types: even + odd); the chains start afresh.
template <class T>
void fold_chains(int64_t count, Total<T>* chain, Total<T>* total) {
  using V = Vec<Total<T>>;
  for (int64_t i = 0; i < count; i += V::lanes) {
    V group = V::load(chain + i);
    V::zero().store(chain + i);
    if constexpr (chains_of<T> == 2) {
      group = group + V::load(chain + count + i);
      V::zero().store(chain + count + i);
    }
    (V::load(total + i) + group).store(total + i);
  }
}

// An earlier total that is subnormal has its bits in the definition, and none when flushed.
template <class T>
bool totals_fit(const Total<T>* total, int64_t count) {
  if constexpr (is_half_type<T>)
    for (int64_t i = 0; total && i < count; ++i)
      if (total[i] != 0 && total[i] < smallest_normal && total[i] > -smallest_normal) return false;
  return true;
}

template <class T>
TNC_INLINE void put_total(Total<T> total, bool keep_total, void* data, int64_t offset) {
  using V = Vec<Total<T>>;
  const V result = canonical(V::broadcast(total) + V::zero());
  if (keep_total)
    result.store(static_cast<Total<T>*>(data) + offset, 1);
  else
    result.store(static_cast<T*>(data) + offset, 1);
}

template <class T>
bool few_channels_grad_weight(const ConvProblem& p) {
  using E = Total<T>;
  constexpr int L = Vec<E>::lanes;
  constexpr int64_t G = group_length<T>;
  const ConvShape& s = p.shape;
  const int64_t planes = s.group_in(), kernel = s.axis[2].kernel;
  const int64_t plane_rows = s.axis[0].kernel * s.axis[1].kernel, all_rows = planes * plane_rows;
  const E* const earlier = static_cast<const E*>(p.total);
  const T* const grad_data = static_cast<const T*>(p.output.data);
  const T* const input_data = static_cast<const T*>(p.input.data);
  if (s.group_out() >= L || all_rows * kernel > 1 << 13) return false;
  if (!totals_fit<T>(earlier, s.out_channels * all_rows * kernel)) return false;

  MapAxis axis[3], grad_axis[3];
  for (int a = 0; a < 3; ++a) {
    axis[a] = MapAxis::of(s.axis[a], false);
    grad_axis[a] = {axis[a].written, axis[a].written, 1, 1, 1, 1, 1, 0};
  }
  PanelShape panel{planes, {}, L}, grad_panel{1, {}, L};
  Boxes boxes;
  if (!choose_boxes(axis, sizeof(E), true, boxes, panel)) return false;
  for (int a = 0; a < 3; ++a) grad_panel.extent[a] = boxes.size[a];

  // The distance of each row of taps in the panel.
  int64_t* const row = scratch<int64_t>(0, all_rows);
  if (!row) return false;
  for (int64_t r = 0; r < all_rows; ++r)
    row[r] = r / plane_rows * panel.plane_pitch() +
             r % plane_rows / s.axis[1].kernel * s.axis[0].dilation * panel.slice_pitch() +
             r % s.axis[1].kernel * s.axis[1].dilation * panel.row_pitch();

  // A task is a block of channels, or a part of its rows of taps if there are few blocks.
  const int64_t blocks = (s.out_channels + L - 1) / L, threads = thread_count();
  int64_t parts = 1;
  const auto rounds = [&] { return (blocks * parts + threads - 1) / threads; };
  while (parts < smaller(all_rows, 4) && rounds() * threads * 6 > blocks * parts * 7) ++parts;

  const auto work = [&](int64_t begin, int64_t end) {
    const int64_t sums = all_rows * kernel * L;
    E* const values = scratch<E>(1, panel.size() + grad_panel.size() + (1 + chains_of<T>)*sums);
    E* const grads = values + panel.size();
    E* const total = grads + grad_panel.size();
    E* const chain = total + sums;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task / parts, part = task % parts;
      const int64_t r0 = all_rows * part / parts, r1 = all_rows * (part + 1) / parts;
      const int64_t plane0 = r0 / plane_rows, plane1 = (r1 - 1) / plane_rows + 1;
      const int64_t count = (r1 - r0) * kernel * L;
      const int used = static_cast<int>(smaller(L, s.out_channels - block * L));
      std::memset(chain, 0, chains_of<T> * count * sizeof(E));
      for (int64_t i = 0; i < count; ++i) {
        const int64_t oc = block * L + i % L;
        total[i] =
            earlier && i % L < used ? earlier[oc * all_rows * kernel + r0 * kernel + i / L] : E(0);
      }
      const ChannelLanes<T> grad_lanes(used, p.output.stride[1], p.output.stride[4],
                                       [&](int l) { return block * L + l; });
      for (int64_t n = 0; n < s.batch; ++n) {
        int64_t number = 0;  // of the sample's terms
        for (int64_t i = 0; i < boxes.total(); ++i) {
          const Box box = boxes.box(i);
          int64_t first[3], need[3];
          for (int a = 0; a < 3; ++a) {
            first[a] = axis[a].first_source(box.begin[a]);
            need[a] = axis[a].source_extent(box.size[a]);
          }
          for (int64_t j = plane0; j < plane1; ++j) {
            const ChannelLanes<T> lanes(used, p.input.stride[1], p.input.stride[4], [&](int l) {
              return (block * L + l) / s.group_out() * planes + j;
            });
            fill_plane(panel, lanes, input_data + n * p.input.stride[0], p.input.stride + 2, axis,
                       first, need, values + j * panel.plane_pitch());
          }
          fill_plane(grad_panel, grad_lanes, grad_data + n * p.output.stride[0],
                     p.output.stride + 2, grad_axis, box.begin, box.size, grads);
          for (int64_t d = 0; d < box.size[0]; ++d)
            for (int64_t h = 0; h < box.size[1]; ++h) {
              const E* const grad_row =
                  grads + d * grad_panel.slice_pitch() + h * grad_panel.row_pitch();
              const E* const panel_row = values + axis[0].base(d) * panel.slice_pitch() +
                                         axis[1].base(h) * panel.row_pitch();
              for (int64_t w = 0; w < box.size[2];) {
                const int64_t piece = smaller(box.size[2] - w, G - number % G);
                for (int c = 0; c < chains_of<T>; ++c) {
                  const int64_t at = w + ((number + c) % chains_of<T>);
                  const int64_t pixels = (w + piece - at + chains_of<T> - 1) / chains_of<T>;
                  all_taps<E>(pixels, grad_row + at * L, chains_of<T> * L,
                              panel_row + axis[2].base(at) * L, row + r0, r1 - r0, kernel,
                              s.axis[2].dilation * L, chains_of<T> * axis[2].step * L,
                              chain + c * count);
                }
                w += piece;
                number += piece;
                if (number % G == 0) fold_chains<T>(count, chain, total);
              }
            }
        }
        if (number % G != 0) fold_chains<T>(count, chain, total);
      }
      const int64_t* const ws = p.weight.stride;
      for (int64_t i = 0; i < count; ++i) {
        if (i % L >= used) continue;
        const int64_t number = r0 * kernel + i / L;
        const Position k = Position::of(number, planes, s.axis[0].kernel, s.axis[1].kernel, kernel);
        put_total<T>(
            total[i], p.keep_total, p.weight.data,
            (block * L + i % L) * ws[0] + k.c * ws[1] + k.d * ws[2] + k.h * ws[3] + k.w * ws[4]);
      }
    }
  };
  const int64_t products = s.batch * s.outputs() * L * all_rows * kernel / parts;
  parallel_for(blocks * parts, 1 + worthwhile_products / (products + 1), environment_of<T>, work);
  return true;
}

// ---- which problems are taken
// --------------------------------------------------------------------

inline bool conv_depthwise(const ConvProblem& p) {
  if (p.shape.groups == 1 || p.shape.batch == 0) return false;
  bool taken = false;
  with_float_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    taken = p.direction == Direction::grad_weight ? few_channels_grad_weight<T>(p)
                                                  : few_channels_map<T>(p);
  });
  return taken;
}

}  // namespace torch_naiveconv::TNC_ISA
