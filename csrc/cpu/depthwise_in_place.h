// Forward and grad_input of channels_last tensors, depthwise or of small square groups: lanes are
// channels, and both tensors are used where they lie. Start reading at map_in_place, at the end.
//
// A task is a row of the result, or two; it goes over them in tiles of up to 8 pixels, all channels
// of a tile before the next, so that memory is touched in its order. What two rows both read is
// loaded once. Taps beyond the tensor are left out, which is exact for finite weights. Of a
// grad_input of stride 2 a tile holds the pixels of both phases, so that a vector of the gradient
// is loaded once for both.
#pragma once

#include "depthwise_geometry.h"

namespace torch_naiveconv::TNC_ISA {

// Which pixels a tile's columns meet, `stride` being that of the layer along w (1 if the columns
// between two pixels are left out):
//   forward     pixel i meets tap k in column i * stride + k
//   grad_input  pixel i meets tap k in column (i - k + length - 1) / stride, if that is exact
//               (length - 1 rounded down to a multiple of the stride)
template <int stride, bool transposed>
struct TileColumns {
  static constexpr int count(int pixels, int length) {
    return transposed ? (pixels - 1) / stride + 1 + (length - 1) / stride
                      : (pixels - 1) * stride + length;
  }
  static constexpr int tap(int pixel, int column, int length) {
    return transposed ? pixel - stride * (column - (length - 1) / stride) : column - pixel * stride;
  }
};

// acc[r][i][k % chains] += `length` taps, for the rows r of the tile from `top` to `bottom`; a
// vector is loaded once for all the pixels that read it. Columns are met in the order in which each
// pixel meets its taps: grad_input from right to left. With `edge` columns outside [first, end) do
// not exist. `lane`: of a group's channel for each lane, if groups have several.
template <class V, class Columns, int length, bool transposed, bool edge, bool grouped, int top,
          int bottom, int height, int pixels, int chains, class T>
TNC_INLINE void add_taps(V (&acc)[height][pixels][chains], const T* source, int64_t pitch,
                         int first, int end, const Total<T>* weights, const int64_t* taps,
                         const int32_t* lane) {
  constexpr int columns = Columns::count(pixels, length);
  V w[height][length];
#pragma GCC unroll 2
  for (int r = top; r < bottom; ++r) {
    const Total<T>* const own = weights + taps[r];
#pragma GCC unroll 8
    for (int k = 0; k < length; ++k) w[r][k] = V::load(own + k * V::lanes);
  }
  if (transposed) source += (columns - 1) * pitch, pitch = -pitch;
#pragma GCC unroll 24
  for (int n = 0; n < columns; ++n, source += pitch) {
    const int column = transposed ? columns - 1 - n : n;
    if (edge && (column < first || column >= end)) continue;
    V x = V::load(source);
    if constexpr (grouped) x = x.permute(lane);
#pragma GCC unroll 2
    for (int r = top; r < bottom; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < pixels; ++i) {
        const int k = Columns::tap(i, column, length);
        if (k >= 0 && k < length) acc[r][i][k % chains] = fma(x, w[r][k], acc[r][i][k % chains]);
      }
  }
}

// Neighbouring taps of a row of the kernel.
struct TapRun {
  int first, length;
  int64_t column;        // the first that a tile reads, counted from the tile's base
  int64_t offset;        // of that column in a row of the tensor,
  int first_there, end;  // and which of the tile's columns lie in it
};

template <class T>
struct InPlacePlan {
  MapAxis axis[3];
  RawView source, written;
  // weights[block][tap][lane]; the last block ends with the last channel.
  const Total<T>*weights, *bias;      // bias: null if there is none
  int64_t channels, planes, numbers;  // planes, numbers: of an element's source channels and terms
  TapRun run[256];                    // of a row of taps, and of one in which a group of terms ends
  int runs[2];
  int32_t lane[Vec<Total<T>>::lanes][Vec<Total<T>>::lanes];  // the lanes' channels for each plane
  int64_t spacing;                        // from one column of a tile to the next
  bool asks_for_source, asks_for_result;  // ahead
};

// The rows of a tile: as many as have their chains in registers, of groups one (two gain little).
template <class T, bool grouped = false>
constexpr int most_height = Vec<Total<T>>::registers == 32 && chains_of<T> == 1 && !grouped ? 2 : 1;

// A row of the tensor that a tile reads.
template <class T>
struct TapRow {
  const T* source;               // its column 0
  int64_t taps[most_height<T>];  // where in a block the first weight is with which each row of the
                                 // tile meets it, or -1
  int number;                    // of that tap of the first row
  int plane;
  bool ends_group;  // between two of its taps
};

// A tile of `height` rows of `pixels` from pixel w on, all channels. `only`: the length of the one
// run of taps that there is, or 0.
template <class T, int stride, bool transposed, bool grouped, int height, int pixels, bool edge,
          int only>
void in_place_tile(const InPlacePlan<T>& plan, const TapRow<T>* rows, int row_count,
                   const TapRun* runs, int64_t w, T* to, const T* ahead) {
  using V = Vec<Total<T>>;
  using Columns = TileColumns<stride, transposed>;
  constexpr int L = V::lanes, line = 64 / sizeof(T), chains = chains_of<T>;
  const int64_t pitch = plan.spacing * plan.source.stride[4];
  const int64_t new_rows = most(1, height * least(plan.axis[1].step, 2) / plan.axis[1].period);
  const int64_t new_elements = pixels * least(plan.axis[2].step, 2) / plan.axis[2].period * L;
  const int64_t out_pixel = plan.written.stride[4], out_row = plan.written.stride[3];
  const int64_t blocks = up(plan.channels, L);
  const int first = edge && w < 0 ? static_cast<int>(-w) : 0;
  const int end = edge ? static_cast<int>(least(pixels, plan.axis[2].written - w)) : pixels;
  to += w * out_pixel;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t channel = least(b * L, plan.channels - L);
    const Total<T>* const weights = plan.weights + b * plan.numbers * L;
    // Two chains have groups that are added to a total; the one chain is all of its terms.
    V acc[height][pixels][chains], total[height][pixels];
    const auto each = [&](const auto& what) __attribute__((always_inline)) {
#pragma GCC unroll 2
      for (int r = 0; r < height; ++r)
#pragma GCC unroll 8
        for (int i = 0; i < pixels; ++i) what(r, i);
    };
    const auto restart = [&](int r, int i) __attribute__((always_inline)) {
#pragma GCC unroll 2
      for (int q = 0; q < chains; ++q) acc[r][i][q] = V::zero();
    };
    const auto fold = [&](int r, int i) __attribute__((always_inline)) {
      total[r][i] = total[r][i] + sum_of(acc[r][i]);
      restart(r, i);
    };
    each(restart);
    each([&](int r, int i) __attribute__((always_inline)) { total[r][i] = V::zero(); });
    // A run of a row of taps, to all rows of the tile that meet it.
    const auto add = [&](const TapRow<T>& row, const TapRun& run,
                         auto length) __attribute__((always_inline)) {
      const T* const from = row.source + channel + run.offset;
      const Total<T>* const taps = weights + run.first * L;
      const auto add_to = [&](auto top, auto bottom) __attribute__((always_inline)) {
        add_taps<V, Columns, length.value, transposed, edge, grouped, top.value, bottom.value>(
            acc, from, pitch, run.first_there, run.end, taps, row.taps, plan.lane[row.plane]);
      };
      const std::integral_constant<int, 0> start;
      const std::integral_constant<int, 1> middle;
      if constexpr (height == 2) {
        const std::integral_constant<int, 2> end;
        if (row.taps[0] < 0)
          add_to(middle, end);
        else if (row.taps[1] < 0)
          add_to(start, middle);
        else
          add_to(start, end);
      } else {
        add_to(start, middle);
      }
    };
    int group = 0, even = 0;  // `even`: the parity of the terms whose chain is the first
    for (int r = 0; r < row_count; ++r) {
      const TapRow<T>& row = rows[r];
      // Row by row: more at once, and what is read now would have to wait.
      if (plan.asks_for_source && r < new_rows)
        for (int64_t i = 0; i < new_elements; i += line)
          prefetch(ahead + r * plan.source.stride[3] + b * new_elements + i);
      if constexpr (only != 0) {
        add(row, runs[0], std::integral_constant<int, only>{});
        continue;
      }
      // Not in a lambda: there GCC keeps the chains in memory.
      const bool ends = chains == 2 && row.ends_group;
      for (int j = ends ? plan.runs[0] : 0; j < plan.runs[ends]; ++j) {
        const TapRun& run = runs[j];
        if constexpr (chains == 2) {
          const int number = row.number + run.first;
          if (number / group_length<T> != group) each(fold), group = number / group_length<T>;
          if (number % 2 != even) {
            even = number % 2;
            each([&](int r, int i)
                     __attribute__((always_inline)) { std::swap(acc[r][i][0], acc[r][i][1]); });
          }
        }
        if (run.length == 3)
          add(row, run, std::integral_constant<int, 3>{});
        else if (run.length == 5)
          add(row, run, std::integral_constant<int, 5>{});
        else if (run.length == 4)
          add(row, run, std::integral_constant<int, 4>{});
        else if (V::registers == 32 && run.length == 7)
          add(row, run, std::integral_constant<int, 7>{});
        else
          add(row, run, std::integral_constant<int, 1>{});
      }
    }
    each([&](int r, int i) __attribute__((always_inline)) {
      V& sum = acc[r][i][0];
      sum = sum_of(acc[r][i]);
      if constexpr (chains == 2) sum = total[r][i] + sum;
    });
    // Of two groups a total may be flushed to -0, which +0 for a bias makes +0.
    if (plan.bias || chains == 2) {
      const V bias = plan.bias ? V::load(plan.bias + channel) : V::zero();
      each([&](int r, int i)
               __attribute__((always_inline)) { acc[r][i][0] = acc[r][i][0] + bias; });
    }
    each([&](int r, int i) __attribute__((always_inline)) {
      if (edge && (i < first || i >= end)) return;
      T* const at = to + channel + r * out_row + i * out_pixel;
      if (plan.asks_for_result) prefetch(at + height * out_row);
      if constexpr (chains == 2)
        acc[r][i][0].store(at);  // which makes a NaN the canonical one
      else
        settled(acc[r][i][0]).store(at);
    });
  }
}

// The rows of the tensor that rows [h, h + height) of slice d of the result read, in the order in
// which each of them meets its taps. Returns how many there are.
template <int height, class T>
int list_tap_rows(const InPlacePlan<T>& plan, const T* sample, int64_t d, int64_t h,
                  TapRow<T>* list) {
  const MapAxis &deep = plan.axis[0], &high = plan.axis[1];
  const RawView& source = plan.source;
  const int kernel = static_cast<int>(plan.axis[2].kernel);
  int count = 0, number = 0;
  for (int plane = 0; plane < plan.planes; ++plane)
    for (int64_t kd = 0; kd < deep.kernel; ++kd, number += static_cast<int>(high.kernel) * kernel) {
      const int64_t at_d = deep.base(d) + deep.shift(d % deep.period, kd);
      if (!deep.meets(d % deep.period, kd) || at_d < 0 || at_d >= deep.source) continue;
      int64_t kh[height], at[height];  // each row's next row of taps, and what it reads
      const auto find = [&](int r, int64_t from) {
        const int64_t phase = (h + r) % high.period;
        for (kh[r] = from; kh[r] < high.kernel; ++kh[r]) {
          at[r] = high.base(h + r) + high.shift(phase, kh[r]);
          if (high.meets(phase, kh[r]) && at[r] >= 0 && at[r] < high.source) return;
        }
      };
      for (int r = 0; r < height; ++r) find(r, 0);
      for (;;) {
        int next = -1;  // the row whose turn it is
        for (int r = 0; r < height; ++r)
          if (kh[r] < high.kernel && (next < 0 || high.sign * (at[r] - at[next]) < 0)) next = r;
        if (next < 0) break;
        const int64_t row = at[next];
        const int first = number + static_cast<int>(kh[next]) * kernel;
        TapRow<T>& listed = list[count++];
        listed = {sample + at_d * source.stride[2] + row * source.stride[3],
                  {},
                  first,
                  plane,
                  first < group_length<T> && first + kernel > group_length<T>};
        for (int r = 0; r < height; ++r) {
          const bool meets = kh[r] < high.kernel && at[r] == row;
          listed.taps[r] = meets ? (number + kh[r] * kernel) * Vec<Total<T>>::lanes : -1;
          if (meets) find(r, kh[r] + 1);
        }
      }
    }
  return count;
}

// Rows [h, h + height) of slice d of sample n of the result.
template <class T, int stride, bool transposed, bool grouped, int height>
void in_place_row(const InPlacePlan<T>& plan, int64_t n, int64_t d, int64_t h, TapRun* runs) {
  using Columns = TileColumns<stride, transposed>;
  constexpr bool phases = transposed && stride > 1;
  const MapAxis* const axis = plan.axis;
  const RawView &source = plan.source, &written = plan.written;
  const T* const sample = static_cast<const T*>(source.data) + n * source.stride[0];
  TapRow<T> rows[height * 128];
  const int row_count = list_tap_rows<height>(plan, sample, d, h, rows);
  T* const to = static_cast<T*>(written.data) + n * written.stride[0] + d * written.stride[2] +
                h * written.stride[3];
  // The processor does not see rows coming that are read a few channels at a time: those that the
  // next row of the result reads first are fetched ahead.
  const T* const ahead =
      sample + axis[0].base(d) * source.stride[2] +
      (axis[1].base(h + height - 1) + 1 +
       most(axis[1].numerator(0), axis[1].numerator(axis[1].kernel - 1)) / axis[1].period) *
          source.stride[3];
  const auto tile = [&](auto constant, int64_t w) {
    constexpr int pixels = constant.value;
    const int64_t base = phases ? (w + axis[2].pad) / stride : axis[2].base(w);
    bool edge = w < 0 || w + pixels > axis[2].written;
    for (int j = 0; j < plan.runs[1]; ++j) {
      const int64_t column = base + runs[j].column, spacing = plan.spacing;
      const int columns = Columns::count(pixels, runs[j].length);
      runs[j].offset = column * source.stride[4];
      runs[j].first_there = 0, runs[j].end = columns;
      if (column >= 0 && column + (columns - 1) * spacing < axis[2].source) continue;
      edge = true;
      const int64_t first_there = most(0, -floor_div(column, spacing));
      const int64_t end = -floor_div(column - axis[2].source, spacing);
      runs[j].first_there = static_cast<int>(least(first_there, columns));
      runs[j].end = static_cast<int>(most(0, least(end, columns)));
    }
    const auto run = [&](auto only) {
      constexpr int length = decltype(only)::value;
      const auto tile =
          edge ? in_place_tile<T, stride, transposed, grouped, height, pixels, true, length>
               : in_place_tile<T, stride, transposed, grouped, height, pixels, false, length>;
      tile(plan, rows, row_count, runs, w, to, ahead + base * source.stride[4]);
    };
    // The usual length has a tile of its own: of few products, asking for it is a large part.
    constexpr int usual = chains_of<T> == 1 ? 3 : 0;
    if (usual != 0 && plan.runs[1] == 1 && runs[0].length == usual)
      run(std::integral_constant<int, usual>{});
    else
      run(std::integral_constant<int, 0>{});
  };
  // Stride phases: a tile begins where tap 0 meets a column.
  int64_t w = phases ? -(axis[2].pad % stride) : 0;
  const int64_t span = axis[2].written - w;
  const bool sevens = !phases && (span + 6) / 7 * 7 < (span + 7) / 8 * 8;
  while (w < axis[2].written) {
    if (axis[2].written - w <= 4)
      tile(std::integral_constant<int, 4>{}, w), w += 4;
    else if (!sevens)
      tile(std::integral_constant<int, 8>{}, w), w += 8;
    else if constexpr (!phases)
      tile(std::integral_constant<int, 7>{}, w), w += 7;
  }
}

// Tasks [begin, end): most_height rows of the result, or the last row.
template <class T, int stride, bool transposed, bool grouped>
void in_place_rows(const InPlacePlan<T>& plan, int64_t begin, int64_t end) {
  constexpr int height = most_height<T, grouped>;
  const int64_t slices = plan.axis[0].written, all = plan.axis[1].written;
  const int64_t tasks = up(all, height);  // of a slice
  TapRun runs[256];
  for (int j = 0; j < plan.runs[1]; ++j) runs[j] = plan.run[j];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t h = task % tasks * height, d = task / tasks % slices, n = task / tasks / slices;
    const auto row = h + height <= all ? in_place_row<T, stride, transposed, grouped, height>
                                       : in_place_row<T, stride, transposed, grouped, 1>;
    row(plan, n, d, h, runs);
  }
}

// Plans the runs of a row of taps, and of one in which a group of terms ends. Returns the stride
// that the columns of a tile have, 0 to decline.
template <class T>
int plan_runs(InPlacePlan<T>& plan, const Axis& along, bool transposed) {
  using E = Total<T>;
  const int kernel = static_cast<int>(along.kernel);
  const bool phases = transposed && along.stride == 2;
  // Taps slide if neighbouring ones lie in neighbouring columns of the tile.
  const bool every = transposed || (along.stride == 2 && along.dilation == 1);
  const int stride = every ? static_cast<int>(along.stride) : 1;
  plan.spacing = every ? 1 : along.stride;
  const bool sliding = along.dilation == plan.spacing;
  // A run ends with its group of terms.
  const int cut = plan.numbers > group_length<T> ? group_length<T> % kernel : 0;
  if (phases && cut != 0 && kernel != 7) return 0;
  int runs = 0;
  const int ends[] = {kernel, cut};
  for (const int end : ends) {
    for (int k = 0; k < kernel;) {
      const int left = (k < end ? end : kernel) - k;
      const int length = sliding ? static_cast<int>(taps_of_run<Vec<E>>(left)) : 1;
      TapRun& run = plan.run[runs++];
      run = {k, length, k * along.dilation - along.pad, 0, 0, 0};
      if (phases)
        run.column = -k / stride - (length - 1) / stride;
      else if (transposed)
        run.column = along.pad - (k + length - 1) * along.dilation;
      k += length;
    }
    plan.runs[end == kernel ? 0 : 1] = runs;
    if (cut == 0) break;
  }
  if (cut == 0) plan.runs[1] = runs;
  return stride;
}

template <class T>
bool map_in_place(const ConvProblem& p) {
  using E = Total<T>;
  constexpr int L = Vec<E>::lanes;
  // Groups of terms: the sign of a total that is zero could show behind the second one.
  constexpr int64_t most_taps = chains_of<T> * group_length<T>;
  const ConvShape& s = p.shape;
  const bool transposed = p.direction == Direction::grad_input;
  InPlacePlan<T> plan;
  plan.source = transposed ? p.output : p.input;
  plan.written = transposed ? p.input : p.output;
  plan.channels = transposed ? s.in_channels : s.out_channels;
  plan.planes = s.group_in();
  plan.numbers = plan.planes * s.taps();
  plan.asks_for_source = exceeds_caches<T>(p, 16 << 20);
  for (int a = 0; a < 3; ++a) plan.axis[a] = MapAxis::of(s.axis[a], transposed);
  const Axis& along = s.axis[2];
  const int kernel = static_cast<int>(along.kernel);
  const bool phases = transposed && along.stride == 2;
  // That of two phases is four times as large as what is read: its lines are soon gone from the
  // nearer caches. A store that waits for memory costs more than asking in vain.
  plan.asks_for_result = phases || exceeds_caches<T>(p, 8 << 20);
  const bool grouped = plan.planes > 1;
  if (s.group_in() != s.group_out() || plan.channels < L || plan.numbers > most_taps ||
      (grouped && (!joins_windows<Vec<E>> || L % plan.planes != 0)) || plan.source.stride[1] != 1 ||
      plan.written.stride[1] != 1)
    return false;
  if (transposed && along.stride > 1 &&
      (!phases || along.dilation > 1 || kernel < 3 || kernel == 6 || kernel > 7))
    return false;

  const int stride = plan_runs(plan, along, transposed);
  if (stride == 0) return false;
  for (int64_t j = 0; grouped && j < plan.planes; ++j)
    for (int64_t l = 0; l < L; ++l)
      plan.lane[j][l] = static_cast<int32_t>(l / plan.planes * plan.planes + j);

  const int64_t blocks = up(plan.channels, L);
  Arena& arena = plan_arena();
  arena.reset(Arena::bytes_for<E>(blocks * plan.numbers * L) + Arena::bytes_for<E>(plan.channels));
  E* const weights = arena.take<E>(blocks * plan.numbers * L);
  E* const bias = p.bias ? arena.take<E>(plan.channels) : nullptr;
  if (!pack_weights<T>(p, plan.channels, plan.planes, plan.planes, L, true, weights)) return false;
  for (int64_t c = 0; bias && c < plan.channels; ++c)
    bias[c] = widened(static_cast<const T*>(p.bias)[c]) + E(0);
  plan.weights = weights;
  plan.bias = bias;

  const auto rows_of = [&](auto grouped) {
    return transposed    ? stride == 2 ? in_place_rows<T, 2, true, grouped.value>
                                       : in_place_rows<T, 1, true, grouped.value>
           : stride == 2 ? in_place_rows<T, 2, false, grouped.value>
                         : in_place_rows<T, 1, false, grouped.value>;
  };
  auto rows = rows_of(std::false_type{});
  if constexpr (joins_windows<Vec<E>>)
    if (grouped) rows = rows_of(std::true_type{});
  const auto work = [&](int64_t begin, int64_t end) { rows(plan, begin, end); };
  const int64_t height = grouped ? most_height<T, true> : most_height<T>;
  const int64_t products = height * plan.axis[2].written * plan.channels * plan.numbers;
  parallel_for(s.batch * plan.axis[0].written * up(plan.axis[1].written, height),
               1 + worthwhile_products / (products + 1), environment_of<T>, work);
  return true;
}

}  // namespace torch_naiveconv::TNC_ISA
