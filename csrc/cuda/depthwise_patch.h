// Depthwise convolution of contiguous float32 planes from shared memory: a block copies what it
// needs of a few planes, zeros around it, and every thread sums several results from there.
//
//   PatchBlock   planes, kernels of 3, 5 or 7 squared
//   LineBlock    one axis, any kernel without stride
//
// Forward and input gradient; the weight gradient is in depthwise_groups.h. The input gradient is
// the forward map of mirrored planes, with zeros between their rows and columns if there was a
// stride. A zero times an infinite weight is a NaN that the specification does not know: results
// that are NaN are computed again by it (exact).
#pragma once

#include <algorithm>

#include "tile.h"

namespace torch_naiveconv {

// One axis of the map from `source` to `result`, forward or mirrored.
struct PatchAxis {
  int source, result, pad;
  int spread;  // log2 of how far apart elements of the source stand among zeros

  // The element of the source at place u of the (mirrored) axis with zeros, or -1.
  TNC_HD int source_of(int u, bool mirrored) const {
    const int last = (source - 1) << spread;
    if (u < 0 || u > last) return -1;
    const int place = mirrored ? last - u : u;
    return (place & ((1 << spread) - 1)) != 0 ? -1 : place >> spread;
  }
  TNC_HD int result_of(int o, bool mirrored) const { return mirrored ? result - 1 - o : o; }
};

struct PatchLaunch {
  ConvProblem problem;
  const float *source, *weight, *bias;
  float* result;
  bool mirrored;
  PatchAxis h, w;
  int planes;
  Divider channels;
  // A block: `block_planes` planes, `strips` strips of rows of each; `bands` blocks a plane.
  int block_planes, strips;
  Divider bands, by_strips, by_result_w, by_patch_h;
  int patch_h, patch_w;
};

constexpr int across = 8;  // threads that copy a row of a patch together

// What the map gives for one result: `chain` is the only group.
TNC_HD float finished(float chain, float bias) {
  return OrderedSum<float>(Arithmetic<float>::fold(0.0f, chain)).result(bias);
}

// The specification's result of the input gradient.
TNC_HD float exact(const ConvProblem& p, int plane, int channels, int h, int w) {
  return conv_grad_input_at(p.shape, p.output.as<const float>(), p.weight.as<const float>(),
                            static_cast<const float*>(p.bias), plane / channels, plane % channels,
                            0, h, w);
}

template <int width, int stride>
struct PatchBlock {
  using Launch = PatchLaunch;
  struct Shared {
    alignas(16) float x[4];  // block_planes x patch_h x patch_w
  };
  struct Thread {};
  static constexpr int threads = 256, together = width == 7 ? 2 : 3;
  static constexpr int strip = 7;  // rows of a thread: the planes of many networks are 7 * 2^n high

  template <class Block>
  TNC_HD static void run(Block& block, const Launch& p, Shared& shared, int64_t index) {
    uint32_t rest = static_cast<uint32_t>(index);
    const int first_row = static_cast<int>(p.bands.take(rest)) * p.strips * strip;
    const int first_plane = static_cast<int>(rest) * p.block_planes;
    const int planes =
        p.planes - first_plane < p.block_planes ? p.planes - first_plane : p.block_planes;
    float* const patches = shared.x;
    block.each([&](int thread, Thread&) {
      for (int row = thread / across; row < planes * p.patch_h; row += threads / across) {
        uint32_t plane = static_cast<uint32_t>(row);
        const int y = static_cast<int>(p.by_patch_h.take(plane));
        const int source_y = p.h.source_of(first_row * stride - p.h.pad + y, p.mirrored);
        const float* const source =
            p.source +
            (static_cast<int64_t>(first_plane + static_cast<int>(plane)) * p.h.source + source_y) *
                p.w.source;
        for (int x = thread % across; x < p.patch_w; x += across) {
          const int source_x = p.w.source_of(x - p.w.pad, p.mirrored);
          block.copy(patches + row * p.patch_w + x, source + source_x,
                     source_y >= 0 && source_x >= 0);
        }
      }
    });
    block.barrier();
    block.each([&](int thread, Thread&) {
      for (int item = thread; item < planes * p.strips * p.w.result; item += threads) {
        uint32_t plane = static_cast<uint32_t>(item);
        const int x = static_cast<int>(p.by_result_w.take(plane));
        const int strip_of_block = static_cast<int>(p.by_strips.take(plane));
        const int row = first_row + strip_of_block * strip;
        if (row < p.h.result)
          column(p,
                 patches +
                     (static_cast<int>(plane) * p.patch_h + strip_of_block * strip * stride) *
                         p.patch_w +
                     x * stride,
                 first_plane + static_cast<int>(plane), row, x);
      }
    });
  }

  // `strip` results below each other, from the patch at `from`.
  TNC_HD static void column(const Launch& p, const float* from, int plane, int row, int x) {
    uint32_t sample = static_cast<uint32_t>(plane);
    const int channel = static_cast<int>(p.channels.take(sample));
    float weight[width * width], chain[strip];
    TNC_UNROLL
    for (int k = 0; k < width * width; ++k) weight[k] = p.weight[channel * (width * width) + k];
    TNC_UNROLL
    for (int o = 0; o < strip; ++o) chain[o] = 0.0f;
    TNC_UNROLL
    for (int y = 0; y < (strip - 1) * stride + width; ++y) {
      float values[width];
      TNC_UNROLL
      for (int kw = 0; kw < width; ++kw) values[kw] = from[y * p.patch_w + kw];
      TNC_UNROLL
      for (int o = 0; o < strip; ++o) {
        const int kh = y - o * stride;
        if (kh < 0 || kh >= width) continue;
        TNC_UNROLL
        for (int kw = 0; kw < width; ++kw)
          chain[o] = fused(values[kw], weight[kh * width + kw], chain[o]);
      }
    }
    const float bias = p.bias != nullptr ? p.bias[channel] : 0.0f;
    const int result_x = p.w.result_of(x, p.mirrored);
    float* const results = p.result + static_cast<int64_t>(plane) * p.h.result * p.w.result;
    uint32_t doubtful = 0;
    TNC_UNROLL
    for (int o = 0; o < strip; ++o) {
      if (row + o >= p.h.result) continue;
      const float value = finished(chain[o], bias);
      doubtful |= static_cast<uint32_t>(value != value) << o;
      results[p.h.result_of(row + o, p.mirrored) * p.w.result + result_x] = value;
    }
    if (!p.mirrored) return;
    for (int o = 0; doubtful != 0; ++o, doubtful >>= 1) {
      const int result_y = p.h.result_of(row + o, true);
      if ((doubtful & 1) != 0)
        results[result_y * p.w.result + result_x] =
            exact(p.problem, plane, static_cast<int>(p.channels.divisor), result_y, result_x);
    }
  }
};

// Neighbouring threads are neighbouring planes here, so that each slides along a line by itself.
struct LineBlock {
  using Launch = PatchLaunch;
  static constexpr int threads = 256, together = 3;
  static constexpr int planes = 32, each = 8, band = threads / planes * each;
  static constexpr int pitch = planes + 1;  // so that a line's copies meet no bank twice
  static constexpr int most_taps = 96;      // one group, and no more shared memory than there is
  struct Shared {
    float y[band][pitch];
    float x[1][pitch];  // band + kernel - 1 of them, then the kernels
  };
  struct Thread {};

  TNC_HD static int kernel_of(const Launch& p) { return p.patch_w - band + 1; }
  static int extra(int kernel) {
    return static_cast<int>(sizeof(float)) * pitch * (band + 2 * kernel);
  }

  template <class Block>
  TNC_HD static void run(Block& block, const Launch& p, Shared& shared, int64_t index) {
    uint32_t rest = static_cast<uint32_t>(index);
    const int first = static_cast<int>(p.bands.take(rest)) * band;
    const int first_plane = static_cast<int>(rest) * planes;
    const int kernel = kernel_of(p);
    float* const lines = &shared.x[0][0];
    float* const weights = lines + p.patch_w * pitch;
    block.each([&](int thread, Thread&) {
      for (int i = thread / 32; i < planes; i += threads / 32) {
        const int plane = first_plane + i;
        uint32_t sample = static_cast<uint32_t>(plane);
        const int channel = static_cast<int>(p.channels.take(sample));
        const float* const source = p.source + static_cast<int64_t>(plane) * p.w.source;
        for (int x = thread % 32; x < p.patch_w; x += 32) {
          const int source_x = p.w.source_of(first - p.w.pad + x, p.mirrored);
          block.copy(lines + x * pitch + i, source + source_x, plane < p.planes && source_x >= 0);
        }
        for (int k = thread % 32; k < kernel; k += 32)
          block.copy(weights + k * pitch + i, p.weight + channel * kernel + k, plane < p.planes);
      }
    });
    block.barrier();
    block.each([&](int thread, Thread&) {
      const int begin = thread / planes * each;
      slide(lines + begin * pitch + thread % planes, weights + thread % planes, kernel,
            &shared.y[begin][thread % planes]);
    });
    block.barrier();
    block.each([&](int thread, Thread&) {
      for (int i = thread / 32; i < planes && first_plane + i < p.planes; i += threads / 32) {
        const int plane = first_plane + i;
        uint32_t sample = static_cast<uint32_t>(plane);
        const int channel = static_cast<int>(p.channels.take(sample));
        const float bias = p.bias != nullptr ? p.bias[channel] : 0.0f;
        for (int x = thread % 32; x < band && first + x < p.w.result; x += 32) {
          const int result_x = p.w.result_of(first + x, p.mirrored);
          float value = finished(shared.y[x][i], bias);
          if (p.mirrored && value != value)
            value = exact(p.problem, plane, static_cast<int>(p.channels.divisor), 0, result_x);
          p.result[static_cast<int64_t>(plane) * p.w.result + result_x] = value;
        }
      }
    });
  }

  TNC_HD static void slide(const float* x, const float* weight, int kernel, float* y) {
    float values[each], chain[each];
    TNC_UNROLL
    for (int o = 0; o < each; ++o) {
      values[o] = x[o * pitch];
      chain[o] = 0.0f;
    }
    for (int first = 0; first < kernel; first += each) {
      TNC_UNROLL
      for (int t = 0; t < each; ++t) {
        if (first + t >= kernel) break;
        const float w = weight[(first + t) * pitch];
        TNC_UNROLL
        for (int o = 0; o < each; ++o) chain[o] = fused(values[(t + o) % each], w, chain[o]);
        // One past the line at the last tap: still inside of shared memory, and not used.
        values[t] = x[(first + t + each) * pitch];
      }
    }
    TNC_UNROLL
    for (int o = 0; o < each; ++o) y[o * pitch] = chain[o];
  }
};

// ---- which kernel ------------------------------------------------------------------------------

constexpr int64_t patch_bytes = 47 << 10;  // of the 48 KiB of shared memory that any block may have

// Strides of axes of one element do not matter.
inline bool is_contiguous(const RawView& view, int64_t n, int64_t c, const Axis (&axis)[3],
                          int64_t Axis::* size) {
  const int64_t sizes[] = {n, c, axis[0].*size, axis[1].*size, axis[2].*size};
  int64_t stride = 1;
  for (int a = 4; a >= 0; --a) {
    if (sizes[a] != 1 && view.stride[a] != stride) return false;
    stride *= sizes[a];
  }
  return true;
}

// Two axes or one, nothing empty, all contiguous and countable in 31 bits?
inline bool has_planes(const ConvProblem& p) {
  const ConvShape& s = p.shape;
  constexpr int64_t most = int64_t{1} << 29;
  if (p.dtype != DType::float32 || s.batch == 0 || s.group_in() == 0 || s.group_out() == 0)
    return false;
  const Axis& d = s.axis[0];
  return d.in == 1 && d.out == 1 && d.kernel == 1 && d.pad == 0 && s.inputs() > 0 &&
         s.inputs() < most && s.outputs() > 0 && s.outputs() < most &&
         s.batch * s.in_channels < most && s.batch * s.out_channels < most &&
         is_contiguous(p.input, s.batch, s.in_channels, s.axis, &Axis::in) &&
         is_contiguous(p.output, s.batch, s.out_channels, s.axis, &Axis::out) &&
         is_contiguous(p.weight, s.out_channels, s.group_in(), s.axis, &Axis::kernel);
}
inline bool is_depthwise(const ConvShape& s) { return s.group_in() == 1 && s.group_out() == 1; }
inline bool has_patches(const ConvProblem& p) {
  const Axis &h = p.shape.axis[1], &w = p.shape.axis[2];
  return h.kernel == w.kernel && h.stride == w.stride && h.stride <= 2 && h.dilation == 1 &&
         w.dilation == 1 && (w.kernel == 3 || w.kernel == 5 || w.kernel == 7);
}

inline bool has_lines(const ConvProblem& p) {
  const Axis &h = p.shape.axis[1], &w = p.shape.axis[2];
  return h.in == 1 && h.out == 1 && h.kernel == 1 && h.pad == 0 && w.stride == 1 &&
         w.dilation == 1 && w.kernel <= LineBlock::most_taps;
}

// The axis of the map that computes the input gradient, or of the forward map.
inline PatchAxis patch_axis(const Axis& axis, bool mirrored) {
  PatchAxis result{static_cast<int>(axis.in), static_cast<int>(axis.out),
                   static_cast<int>(axis.pad), 0};
  if (!mirrored) return result;
  const int spread = axis.stride == 2 ? 1 : 0;
  const int64_t spread_out = ((axis.out - 1) << spread) + 1;
  return {static_cast<int>(axis.out), static_cast<int>(axis.in),
          static_cast<int>(axis.in + axis.pad - spread_out), spread};
}

inline PatchLaunch patch_launch(const ConvProblem& p) {
  PatchLaunch launch{};
  launch.problem = p;
  launch.mirrored = p.direction == Direction::grad_input;
  const RawView& source = launch.mirrored ? p.output : p.input;
  const RawView& result = launch.mirrored ? p.input : p.output;
  launch.source = static_cast<const float*>(source.data);
  launch.result = static_cast<float*>(result.data);
  launch.weight = static_cast<const float*>(p.weight.data);
  launch.bias = static_cast<const float*>(p.bias);
  launch.h = patch_axis(p.shape.axis[1], launch.mirrored);
  launch.w = patch_axis(p.shape.axis[2], launch.mirrored);
  launch.planes = static_cast<int>(p.shape.batch * p.shape.in_channels);
  launch.channels = Divider(p.shape.in_channels);
  return launch;
}

// Calls visit with the kernel's width.
template <class Visit>
void with_width(int64_t width, const Visit& visit) {
  if (width == 3) return visit(std::integral_constant<int, 3>{});
  if (width == 5) return visit(std::integral_constant<int, 5>{});
  visit(std::integral_constant<int, 7>{});
}

// Returns false to decline.
template <class Launcher>
bool launch_patches(const ConvProblem& p, Launcher& launcher) {
  PatchLaunch launch = patch_launch(p);
  const int64_t width = p.shape.axis[2].kernel;
  const int64_t stride = launch.mirrored ? 1 : p.shape.axis[2].stride;
  const int64_t strips = ceil_div(launch.h.result, 7);
  int64_t block_strips = std::clamp<int64_t>(256 / launch.w.result, 1, strips), bands = 0;
  int64_t block_planes = 0;
  launch.patch_w = static_cast<int>((launch.w.result - 1) * stride + width);
  const auto bytes = [&] { return 4 * block_planes * launch.patch_h * launch.patch_w; };
  for (;; --block_strips) {  // until it fits
    if (block_strips == 0) return false;
    bands = ceil_div(strips, block_strips);
    block_strips = ceil_div(strips, bands);
    launch.patch_h = static_cast<int>((block_strips * 7 - 1) * stride + width);
    block_planes = bands > 1 ? 1 : std::max<int64_t>(1, 256 / (block_strips * launch.w.result));
    while (block_planes > 1 && bytes() > patch_bytes) --block_planes;
    if (bytes() <= patch_bytes) break;
  }
  launch.block_planes = static_cast<int>(block_planes);
  launch.strips = static_cast<int>(block_strips);
  launch.bands = Divider(bands);
  launch.by_strips = Divider(block_strips);
  launch.by_result_w = Divider(launch.w.result);
  launch.by_patch_h = Divider(launch.patch_h);
  const int64_t blocks = ceil_div(launch.planes, block_planes) * bands;
  with_width(width, [&](auto w) {
    const int extra = static_cast<int>(bytes());
    if (stride == 1)
      launcher.template blocks<PatchBlock<w(), 1>>(launch, blocks, extra);
    else
      launcher.template blocks<PatchBlock<w(), 2>>(launch, blocks, extra);
  });
  return true;
}

template <class Launcher>
bool launch_lines(const ConvProblem& p, Launcher& launcher) {
  if (!has_lines(p)) return false;
  const Axis& w = p.shape.axis[2];
  PatchLaunch launch = patch_launch(p);
  const int64_t bands = ceil_div(launch.w.result, LineBlock::band);
  launch.bands = Divider(bands);
  launch.patch_w = static_cast<int>(LineBlock::band + w.kernel - 1);
  launcher.template blocks<LineBlock>(launch, ceil_div(launch.planes, LineBlock::planes) * bands,
                                      LineBlock::extra(static_cast<int>(w.kernel)));
  return true;
}

}  // namespace torch_naiveconv
