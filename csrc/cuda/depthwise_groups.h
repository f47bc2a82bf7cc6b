// The weight gradient of depthwise convolutions, and of groups of a few channels, from shared
// memory: contiguous float32. A block copies some planes, and every thread sums the terms of one
// group (of 128, the contract's) for a few taps into a workspace, which FoldGroups (depthwise.h)
// adds up.
//
//   GroupBlock       planes, kernels of 3, 5 or 7 squared
//   LineGroupBlock   one axis, any kernel without stride
#pragma once

#include "depthwise_patch.h"

namespace torch_naiveconv {

struct PatchGroupLaunch {
  const float *input, *gradient;
  float* workspace;  // [sample][group of the sample][filter][channel of its filters][kh][kw]
  PatchAxis h, w;    // from the input to the output
  int stride, groups;
  int group_in, group_out;  // channels and filters of a group of the convolution
  int units;                // (sample, group of the convolution)
  Divider conv_groups, by_group_in, by_group_out;
  // A block: `block_units` units, `block_groups` groups of terms of each; `bands` blocks a unit.
  int block_units, block_groups;
  Divider bands, by_block_groups, by_patch_h, by_output_w;
  int patch_h, patch_w;
};

// `each` of the taps of a row of the kernel a thread.
template <int width, int each>
struct GroupBlock {
  using Launch = PatchGroupLaunch;
  static constexpr int threads = 256, together = 3;
  static constexpr int group = group_length<float>;
  static constexpr int pitch = group + 1;  // so that neighbouring groups meet different banks
  struct Shared {
    alignas(16) float x[4];  // block_units x group_in x patch_h x patch_w, then the gradients
  };
  struct Thread {};

  template <class Block>
  TNC_HD static void run(Block& block, const Launch& p, Shared& shared, int64_t index) {
    uint32_t rest = static_cast<uint32_t>(index);
    const int first_group = static_cast<int>(p.bands.take(rest)) * p.block_groups;
    const int first_unit = static_cast<int>(rest) * p.block_units;
    const int units = p.units - first_unit < p.block_units ? p.units - first_unit : p.block_units;
    const int outputs = p.h.result * p.w.result, begin = first_group * group;
    const int first_row = static_cast<int>(p.by_output_w.quotient(static_cast<uint32_t>(begin)));
    float* const patches = shared.x;
    float* const gradients = patches + p.block_units * p.group_in * p.patch_h * p.patch_w;
    const int gradient_pitch = p.block_groups * pitch;
    block.each([&](int thread, Thread&) {
      for (int row = thread / across; row < units * p.group_in * p.patch_h;
           row += threads / across) {
        uint32_t plane = static_cast<uint32_t>(row);
        const int y = static_cast<int>(p.by_patch_h.take(plane));
        const int source_y = first_row * p.stride - p.h.pad + y;
        const int64_t source_plane =
            static_cast<int64_t>(first_unit) * p.group_in + static_cast<int>(plane);
        const float* const source = p.input + (source_plane * p.h.source + source_y) * p.w.source;
        for (int x = thread % across; x < p.patch_w; x += across) {
          const int source_x = x - p.w.pad;
          block.copy(
              patches + row * p.patch_w + x, source + source_x,
              source_y >= 0 && source_y < p.h.source && source_x >= 0 && source_x < p.w.source);
        }
      }
      for (int plane = 0; plane < units * p.group_out; ++plane) {
        const float* const source =
            p.gradient + (static_cast<int64_t>(first_unit) * p.group_out + plane) * outputs + begin;
        for (int i = thread; i < p.block_groups * group; i += threads)
          block.copy(gradients + plane * gradient_pitch + i + i / group, source + i,
                     begin + i < outputs);
      }
    });
    block.barrier();
    block.each([&](int thread, Thread&) {
      const int pairs = units * p.group_out * p.group_in;
      for (int item = thread; item < pairs * width * (width / each) * p.block_groups;
           item += threads) {
        uint32_t pair = static_cast<uint32_t>(item);
        const int own = static_cast<int>(p.by_block_groups.take(pair));
        const int kw = static_cast<int>(pair % (width / each)) * each;
        pair /= width / each;
        const int kh = static_cast<int>(pair % width);
        pair /= width;
        const int position = begin + own * group;
        if (position < outputs)
          sum(p, pair, kh, kw, position, first_unit, first_row, first_group + own, patches,
              gradients + own * pitch, gradient_pitch);
      }
    });
  }

  // One group of terms for one filter, one of its channels and `each` taps.
  TNC_HD static void sum(const Launch& p, uint32_t pair, int kh, int kw, int position,
                         int first_unit, int first_row, int group_of_sample, const float* patches,
                         const float* gradients, int gradient_pitch) {
    const int outputs = p.h.result * p.w.result;
    const int count = outputs - position < group ? outputs - position : group;
    uint32_t unit = pair;
    const int channel = static_cast<int>(p.by_group_in.take(unit));
    const int filter = static_cast<int>(p.by_group_out.take(unit));
    uint32_t rest = static_cast<uint32_t>(position);
    int x = static_cast<int>(p.by_output_w.take(rest));
    const int y = static_cast<int>(rest) - first_row;
    const float* row =
        patches +
        ((static_cast<int>(unit) * p.group_in + channel) * p.patch_h + y * p.stride + kh) *
            p.patch_w +
        kw;
    const float* const gradient =
        gradients + (static_cast<int>(unit) * p.group_out + filter) * gradient_pitch;
    float chain[each];
    TNC_UNROLL
    for (int k = 0; k < each; ++k) chain[k] = 0.0f;
    const float* at = row + x * p.stride;
    for (int i = 0; i < count; ++i) {
      const float g = gradient[i];
      TNC_UNROLL
      for (int k = 0; k < each; ++k) chain[k] = fused(g, at[k], chain[k]);
      at += p.stride;
      if (++x == p.w.result) {
        x = 0;
        row += p.stride * p.patch_w;
        at = row;
      }
    }
    uint32_t sample = static_cast<uint32_t>(first_unit) + unit;
    const int conv_group = static_cast<int>(p.conv_groups.take(sample));
    const int64_t filters = static_cast<int64_t>(p.conv_groups.divisor) * p.group_out;
    const int64_t group_of_all = static_cast<int64_t>(sample) * p.groups + group_of_sample;
    const int64_t filter_of_all =
        group_of_all * filters + static_cast<int64_t>(conv_group) * p.group_out + filter;
    float* const values =
        p.workspace + ((filter_of_all * p.group_in + channel) * width + kh) * width + kw;
    TNC_UNROLL
    for (int k = 0; k < each; ++k) values[k] = chain[k];
  }
};

// One axis: neighbouring threads are neighbouring planes, as in LineBlock, and each slides along
// one group of terms with a few taps.
struct LineGroupLaunch {
  const float *input, *gradient;
  float* workspace;  // [sample][group of the sample][channel][tap]
  PatchAxis w;       // from the input to the output
  int kernel, planes;
  Divider channels, groups;
};

struct LineGroupBlock {
  using Launch = LineGroupLaunch;
  static constexpr int threads = 128, together = 4;
  static constexpr int planes = 32, pitch = planes + 1, each = 8;
  static constexpr int group = group_length<float>;
  struct Shared {
    float gradient[group][pitch];
    float x[1][pitch];  // group + the kernel, rounded up
  };
  struct Thread {};

  TNC_HD static int runs(int kernel) { return (kernel + each - 1) / each; }
  static int extra(int kernel) {
    return static_cast<int>(sizeof(float)) * pitch * (group + each * runs(kernel));
  }

  template <class Block>
  TNC_HD static void run(Block& block, const Launch& p, Shared& shared, int64_t index) {
    uint32_t rest = static_cast<uint32_t>(index);
    const int own = static_cast<int>(p.groups.take(rest)), begin = own * group;
    const int first_plane = static_cast<int>(rest) * planes;
    const int count = p.w.result - begin < group ? p.w.result - begin : group;
    block.each([&](int thread, Thread&) {
      for (int i = thread / 32; i < planes; i += threads / 32) {
        const int64_t plane = first_plane + i;
        const float* const input = p.input + plane * p.w.source;
        const float* const gradient = p.gradient + plane * p.w.result + begin;
        for (int x = thread % 32; x < count; x += 32)
          block.copy(&shared.gradient[x][i], gradient + x, plane < p.planes);
        for (int x = thread % 32; x < count + p.kernel - 1; x += 32) {
          const int source_x = begin - p.w.pad + x;
          block.copy(&shared.x[0][0] + x * pitch + i, input + source_x,
                     plane < p.planes && source_x >= 0 && source_x < p.w.source);
        }
      }
    });
    block.barrier();
    block.each([&](int thread, Thread&) {
      const int plane = first_plane + thread % planes;
      if (plane >= p.planes) return;
      uint32_t sample = static_cast<uint32_t>(plane);
      const int channel = static_cast<int>(p.channels.take(sample));
      const int64_t group_of_all = static_cast<int64_t>(sample) * p.groups.divisor + own;
      float* const values = p.workspace + (group_of_all * p.channels.divisor + channel) * p.kernel;
      for (int run = thread / planes; run < runs(p.kernel); run += threads / planes) {
        float chain[each];
        slide(&shared.x[0][0] + run * each * pitch + thread % planes,
              &shared.gradient[0][0] + thread % planes, count, chain);
        TNC_UNROLL
        for (int k = 0; k < each; ++k)
          if (run * each + k < p.kernel) values[run * each + k] = chain[k];
      }
    });
  }

  TNC_HD static void slide(const float* x, const float* gradient, int count, float (&chain)[each]) {
    float values[each];
    TNC_UNROLL
    for (int k = 0; k < each; ++k) {
      values[k] = x[k * pitch];
      chain[k] = 0.0f;
    }
    for (int first = 0; first < count; first += each) {
      TNC_UNROLL
      for (int t = 0; t < each; ++t) {
        if (first + t >= count) break;
        const float g = gradient[(first + t) * pitch];
        TNC_UNROLL
        for (int k = 0; k < each; ++k) chain[k] = fused(g, values[(t + k) % each], chain[k]);
        values[t] = x[(first + t + each) * pitch];
      }
    }
  }
};

// ---- which kernel ------------------------------------------------------------------------------

// Weight gradients that are summed from patches: also those of groups of a few channels.
inline bool sums_patches(const ConvProblem& p) {
  return p.direction == Direction::grad_weight && p.shape.group_in() * p.shape.group_out() <= 16 &&
         has_planes(p) && has_patches(p);
}

// The groups of the weight gradient into the workspace. Returns false to decline.
template <class Launcher>
bool launch_patch_groups(const ConvProblem& p, float* workspace, Launcher& launcher) {
  const ConvShape& s = p.shape;
  const int64_t width = s.axis[2].kernel, stride = s.axis[2].stride, out_w = s.axis[2].out;
  const int64_t groups = ceil_div(s.outputs(), group_length<float>);
  const int64_t pairs = s.group_in() * s.group_out();
  PatchGroupLaunch launch{};
  launch.input = static_cast<const float*>(p.input.data);
  launch.gradient = static_cast<const float*>(p.output.data);
  launch.workspace = workspace;
  launch.h = patch_axis(s.axis[1], false);
  launch.w = patch_axis(s.axis[2], false);
  launch.stride = static_cast<int>(stride);
  launch.groups = static_cast<int>(groups);
  launch.group_in = static_cast<int>(s.group_in());
  launch.group_out = static_cast<int>(s.group_out());
  launch.units = static_cast<int>(s.batch * s.groups);
  launch.conv_groups = Divider(s.groups);
  launch.by_group_in = Divider(s.group_in());
  launch.by_group_out = Divider(s.group_out());
  launch.patch_w = static_cast<int>((out_w - 1) * stride + width);
  int64_t block_groups = std::clamp<int64_t>(256 / (width * pairs), 1, groups);
  int64_t block_units = 0, bytes = 0;
  for (;; block_groups /= 2) {  // until it fits
    if (block_groups == 0) return false;
    const int64_t rows =
        std::min(s.axis[1].out, ceil_div(block_groups * group_length<float> - 1, out_w) + 1);
    launch.patch_h = static_cast<int>((rows - 1) * stride + width);
    const int64_t unit_bytes = 4 * (s.group_in() * launch.patch_h * launch.patch_w +
                                    s.group_out() * block_groups * (group_length<float> + 1));
    const int64_t wanted = block_groups < groups ? 1 : 256 / (width * pairs * block_groups);
    block_units = std::min(patch_bytes / unit_bytes, std::max<int64_t>(1, wanted));
    bytes = block_units * unit_bytes;
    if (block_units > 0) break;
  }
  const int64_t bands = ceil_div(groups, block_groups);
  launch.block_units = static_cast<int>(block_units);
  launch.block_groups = static_cast<int>(block_groups);
  launch.bands = Divider(bands);
  launch.by_block_groups = Divider(block_groups);
  launch.by_patch_h = Divider(launch.patch_h);
  launch.by_output_w = Divider(out_w);
  const int64_t blocks = ceil_div(launch.units, block_units) * bands;
  const bool few = block_units * pairs * width * block_groups <= 128;  // threads would be idle
  with_width(width, [&](auto w) {
    const int extra = static_cast<int>(bytes);
    if (few)
      launcher.template blocks<GroupBlock<w(), 1>>(launch, blocks, extra);
    else
      launcher.template blocks<GroupBlock<w(), w()>>(launch, blocks, extra);
  });
  return true;
}

template <class Launcher>
bool launch_line_groups(const ConvProblem& p, float* workspace, Launcher& launcher) {
  if (p.direction != Direction::grad_weight || !is_depthwise(p.shape) || !has_planes(p) ||
      !has_lines(p))
    return false;
  const ConvShape& s = p.shape;
  LineGroupLaunch launch{};
  launch.input = static_cast<const float*>(p.input.data);
  launch.gradient = static_cast<const float*>(p.output.data);
  launch.workspace = workspace;
  launch.w = patch_axis(s.axis[2], false);
  launch.kernel = static_cast<int>(s.axis[2].kernel);
  launch.planes = static_cast<int>(s.batch * s.in_channels);
  launch.channels = Divider(s.in_channels);
  const int64_t groups = ceil_div(s.axis[2].out, group_length<float>);
  launch.groups = Divider(groups);
  launcher.template blocks<LineGroupBlock>(launch,
                                           ceil_div(launch.planes, LineGroupBlock::planes) * groups,
                                           LineGroupBlock::extra(launch.kernel));
  return true;
}

}  // namespace torch_naiveconv
