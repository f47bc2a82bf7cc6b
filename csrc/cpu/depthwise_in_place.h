// Forward and grad_input of channels_last tensors, depthwise or of small square groups: lanes are
// channels, and both tensors are used where they lie. Start reading at map_in_place, at the end.
//
// A task is a row of the result; it goes over it in tiles of up to 8 pixels, all channels of a tile
// before the next, so that memory is touched in its order. Taps beyond the tensor are left out,
// which is exact for finite weights. Of a grad_input of stride 2 a tile holds the pixels of both
// phases, so that a vector of the gradient is loaded once for both.
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

// acc[k % chains][i] += `length` taps; a vector is loaded once for all the pixels that read it.
// Columns are met in the order in which each pixel meets its taps: grad_input from right to left.
// With `edge` columns outside [first, end) do not exist. `lane`: of a group's channel for each
// lane, if groups have several.
template <class V, class Columns, int length, bool transposed, bool edge, bool grouped, int chains,
          int pixels, class T>
TNC_INLINE void add_taps(V (&acc)[chains][pixels], const T* source, int64_t pitch, int first,
                         int end, const Total<T>* weights, const int32_t* lane) {
  constexpr int columns = Columns::count(pixels, length);
  V w[length];
#pragma GCC unroll 8
  for (int k = 0; k < length; ++k) w[k] = V::load(weights + k * V::lanes);
  if (transposed) source += (columns - 1) * pitch, pitch = -pitch;
#pragma GCC unroll 24
  for (int n = 0; n < columns; ++n, source += pitch) {
    const int column = transposed ? columns - 1 - n : n;
    if (edge && (column < first || column >= end)) continue;
    V x = V::load(source);
    if constexpr (grouped) x = x.permute(lane);
#pragma GCC unroll 8
    for (int i = 0; i < pixels; ++i) {
      const int k = Columns::tap(i, column, length);
      if (k >= 0 && k < length) acc[k % chains][i] = fma(x, w[k], acc[k % chains][i]);
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
  const Total<T>*weights, *bias;
  int64_t channels, planes, numbers;  // planes, numbers: of an element's source channels and terms
  TapRun run[256];                    // of a row of taps, and of one in which a group of terms ends
  int runs[2];
  int32_t lane[Vec<Total<T>>::lanes][Vec<Total<T>>::lanes];  // the lanes' channels for each plane
  int64_t spacing;  // from one column of a tile to the next
};

// A row of taps that lies in the tensor.
template <class T>
struct TapRow {
  const T* source;  // its column 0
  int number;       // of its first tap
  int plane;
  bool ends_group;  // between two of its taps
};

// A tile of `pixels` from pixel w on, all channels.
template <class T, int stride, bool transposed, bool grouped, int pixels, bool edge>
void in_place_tile(const InPlacePlan<T>& plan, const TapRow<T>* rows, int row_count,
                   const TapRun* runs, int64_t w, T* to, const T* ahead) {
  using V = Vec<Total<T>>;
  using Columns = TileColumns<stride, transposed>;
  constexpr int L = V::lanes, line = 64 / sizeof(T), chains = chains_of<T>;
  const int64_t pitch = plan.spacing * plan.source.stride[4];
  const int64_t new_rows = least(plan.axis[1].step, 2);
  const int64_t new_elements = pixels * least(plan.axis[2].step, 2) / plan.axis[2].period * L;
  const int64_t out_pixel = plan.written.stride[4], out_row = plan.written.stride[3];
  const int64_t blocks = up(plan.channels, L);
  const int first = edge && w < 0 ? static_cast<int>(-w) : 0;
  const int end = edge ? static_cast<int>(least(pixels, plan.axis[2].written - w)) : pixels;
  to += w * out_pixel;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t channel = least(b * L, plan.channels - L);
    const Total<T>* const weights = plan.weights + b * plan.numbers * L;
    for (int64_t r = 0; r < new_rows; ++r)
      for (int64_t i = 0; i < new_elements; i += line)
        prefetch(ahead + r * plan.source.stride[3] + b * new_elements + i);
    for (int64_t i = 0; i < pixels * L; i += line) prefetch(to + out_row + b * pixels * L + i);
    V acc[chains][pixels], total[pixels];
#pragma GCC unroll 8
    for (int i = 0; i < pixels; ++i) {
      total[i] = V::zero();
#pragma GCC unroll 2
      for (int q = 0; q < chains; ++q) acc[q][i] = V::zero();
    }
    const auto fold = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int i = 0; i < pixels; ++i) {
        V group = acc[0][i];
        if constexpr (chains == 2) group = group + acc[1][i];
        total[i] = total[i] + group;
#pragma GCC unroll 2
        for (int q = 0; q < chains; ++q) acc[q][i] = V::zero();
      }
    };
    int group = 0, even = 0;  // `even`: the parity of the terms whose chain is the first
    for (int r = 0; r < row_count; ++r) {
      const bool ends = chains == 2 && rows[r].ends_group;
      for (int j = ends ? plan.runs[0] : 0; j < plan.runs[ends]; ++j) {
        const TapRun& run = runs[j];
        const int number = rows[r].number + run.first;
        if constexpr (chains == 2) {
          if (number / group_length<T> != group) fold(), group = number / group_length<T>;
          if (number % 2 != even) {
            even = number % 2;
#pragma GCC unroll 8
            for (int i = 0; i < pixels; ++i) std::swap(acc[0][i], acc[1][i]);
          }
        }
        const T* const from = rows[r].source + channel + run.offset;
        const Total<T>* const taps = weights + number * L;
        const auto add = [&](auto length) __attribute__((always_inline)) {
          add_taps<V, Columns, length.value, transposed, edge, grouped>(
              acc, from, pitch, run.first_there, run.end, taps, plan.lane[rows[r].plane]);
        };
        if (run.length == 3)
          add(std::integral_constant<int, 3>{});
        else if (run.length == 5)
          add(std::integral_constant<int, 5>{});
        else if (run.length == 4)
          add(std::integral_constant<int, 4>{});
        else if (V::registers == 32 && run.length == 7)
          add(std::integral_constant<int, 7>{});
        else
          add(std::integral_constant<int, 1>{});
      }
    }
    fold();
    const V bias = V::load(plan.bias + channel);
#pragma GCC unroll 8
    for (int i = 0; i < pixels; ++i) {
      if (edge && (i < first || i >= end)) continue;
      result_of<T>(total[i] + bias).store(to + channel + i * out_pixel);
    }
  }
}

// Rows [begin, end) of the result.
template <class T, int stride, bool transposed, bool grouped>
void in_place_rows(const InPlacePlan<T>& plan, int64_t begin, int64_t end) {
  using Columns = TileColumns<stride, transposed>;
  constexpr bool phases = transposed && stride > 1;
  const MapAxis* const axis = plan.axis;
  const RawView &source = plan.source, &written = plan.written;
  TapRun runs[256];
  for (int j = 0; j < plan.runs[1]; ++j) runs[j] = plan.run[j];
  for (int64_t piece = begin; piece < end; ++piece) {
    const int64_t h = piece % axis[1].written, d = piece / axis[1].written % axis[0].written;
    const int64_t n = piece / axis[1].written / axis[0].written;
    const T* const sample = static_cast<const T*>(source.data) + n * source.stride[0];
    TapRow<T> rows[128];
    int row_count = 0;
    int number = 0;
    const int kernel = static_cast<int>(axis[2].kernel);
    for (int plane = 0; plane < plan.planes; ++plane)
      for (int64_t kd = 0; kd < axis[0].kernel; ++kd)
        for (int64_t kh = 0; kh < axis[1].kernel; ++kh, number += kernel) {
          if (!axis[0].meets(d % axis[0].period, kd) || !axis[1].meets(h % axis[1].period, kh))
            continue;
          const int64_t at_d = axis[0].base(d) + axis[0].shift(d % axis[0].period, kd);
          const int64_t at_h = axis[1].base(h) + axis[1].shift(h % axis[1].period, kh);
          if (at_d >= 0 && at_d < axis[0].source && at_h >= 0 && at_h < axis[1].source)
            rows[row_count++] = {sample + at_d * source.stride[2] + at_h * source.stride[3], number,
                                 plane,
                                 number < group_length<T> && number + kernel > group_length<T>};
        }
    T* const to = static_cast<T*>(written.data) + n * written.stride[0] + d * written.stride[2] +
                  h * written.stride[3];
    // The processor does not see rows coming that are read a few channels at a time: those that the
    // next row of the result reads first are fetched ahead.
    const T* const ahead =
        sample + axis[0].base(d) * source.stride[2] +
        (axis[1].base(h) + 1 +
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
      const auto run = edge ? in_place_tile<T, stride, transposed, grouped, pixels, true>
                            : in_place_tile<T, stride, transposed, grouped, pixels, false>;
      run(plan, rows, row_count, runs, w, to, ahead + base * source.stride[4]);
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
  for (int a = 0; a < 3; ++a) plan.axis[a] = MapAxis::of(s.axis[a], transposed);
  const Axis& along = s.axis[2];
  const int kernel = static_cast<int>(along.kernel);
  const bool phases = transposed && along.stride == 2;
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
  E* const bias = arena.take<E>(plan.channels);
  if (!pack_weights<T>(p, plan.channels, plan.planes, plan.planes, L, true, weights)) return false;
  for (int64_t c = 0; c < plan.channels; ++c)
    bias[c] = p.bias ? widened(static_cast<const T*>(p.bias)[c]) : E(0);
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
  const int64_t products = plan.axis[2].written * plan.channels * plan.numbers;
  parallel_for(s.batch * plan.axis[0].written * plan.axis[1].written,
               1 + worthwhile_products / (products + 1), environment_of<T>, work);
  return true;
}

}  // namespace torch_naiveconv::TNC_ISA
