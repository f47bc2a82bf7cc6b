// Forward and grad_input of so few products that the tables of conv_pixels.h would take longer than
// they do. Lanes are neighbouring pixels of a row; the image is read where it is or, if that meets
// padding, from a padded copy. Loops are few and flat: the branches of a single call are seldom
// predicted.
#pragma once

#include "conv_grids.h"

namespace torch_naiveconv::TNC_ISA {

constexpr double tiny_products = 3072;        // of a vector and a number
constexpr int tiny_lanes = 4, tiny_rows = 2;  // of a tile: chains enough to hide their latency

// Vectors of 16 bytes read a part of one lane by lane.
template <class S>
constexpr bool can_be_tiny = !is_half_type<S> && sizeof(Vec<typename Kind<S>::T>) > 16;

struct TinyTerm {
  int64_t in_image, in_weight;
};
struct TinyRow {  // `pixels` side by side, at most a vector
  int64_t in_image, in_target;
  int pixels;
};

template <class T>
TNC_INLINE void sum_tiny(const T* image, const T* const (&weight)[tiny_lanes],
                         const TinyRow (&row)[tiny_rows], const TinyTerm* term, int64_t terms,
                         Vec<T> (&total)[tiny_lanes][tiny_rows]) {
  using V = Vec<T>;
  for (auto& lane : total)
    for (V& sum : lane) sum = V::zero();
  for (int64_t t = 0; t < terms;) {
    V chain[tiny_lanes][tiny_rows];
    for (auto& lane : chain)
      for (V& sum : lane) sum = V::zero();
    for (const int64_t end = least(t + Kind<T>::group, terms); t < end; ++t) {
      V x[tiny_rows];
      for (int k = 0; k < tiny_rows; ++k)
        x[k] = V::load(image + term[t].in_image + row[k].in_image, row[k].pixels);
      for (int l = 0; l < tiny_lanes; ++l) {
        const V factor = V::broadcast(weight[l][term[t].in_weight]);
        for (int k = 0; k < tiny_rows; ++k) chain[l][k] = fma(x[k], factor, chain[l][k]);
      }
    }
    for (int l = 0; l < tiny_lanes; ++l)
      for (int k = 0; k < tiny_rows; ++k) total[l][k] = total[l][k] + chain[l][k];
  }
}

// Writes the pixels of a grid, whose neighbours along w are neighbours in memory. Returns false to
// decline; `special` becomes true if an infinity or a NaN may have been written.
template <class T>
bool multiply_tiny(const Images<T>& call, const GridAxis (&grid)[3], bool& special) {
  using V = Vec<T>;
  constexpr int L = V::lanes;
  int64_t extent[3], image_size[3], taps = 1;
  Box box;
  bool patched = call.image_stride[4] != 1;
  for (int a = 0; a < 3; ++a) {
    const GridAxis& g = grid[a];
    if (g.image_step != 1 || g.step != 1) return false;
    box.from[a] = g.least_shift();
    box.to[a] = g.count + g.most_shift();
    extent[a] = box.size(a);
    image_size[a] = g.image_size;
    taps *= g.taps;
    patched = patched || g.reads_padding();
  }
  const int64_t rows = grid[0].count * grid[1].count * up(grid[2].count, L);
  const int64_t terms = call.image_channels * taps;
  const double image =
      double(call.image_channels) * double(extent[0]) * double(extent[1]) * double(extent[2]);
  const double products =
      double(call.batch * call.groups * up(call.lanes, tiny_lanes) * tiny_lanes) * double(rows) *
      double(terms);
  if (call.target_stride[4] != 1 || image > tiny_products * L || products > tiny_products)
    return false;

  PatchLayout layout;
  if (patched) {
    layout = PatchLayout::of(call.image_channels, extent);
  } else {
    layout.channel = call.image_stride[1];
    for (int a = 0; a < 3; ++a) layout.axis[a] = call.image_stride[a + 2];
  }
  Arena& arena = task_arena();
  arena.reset(Arena::bytes_for<T>(layout.elements + L) + Arena::bytes_for<TinyTerm>(terms) +
              Arena::bytes_for<TinyRow>(rows));
  T* const patch = arena.take<T>(layout.elements + L);
  TinyTerm* const term = arena.take<TinyTerm>(terms);
  TinyRow* const row = arena.take<TinyRow>(rows);
  int64_t to_tap[3], to_weight[3], first = 0, i = 0;
  for (int a = 0; a < 3; ++a) {
    to_tap[a] = grid[a].shift_step * layout.axis[a];
    to_weight[a] = grid[a].tap_step * call.weight_stride[a + 2];
    first += (grid[a].first_shift - (patched ? box.from[a] : 0)) * layout.axis[a];
  }
  for (int64_t c = 0; c < call.image_channels; ++c)
    for (int64_t d = 0; d < grid[0].taps; ++d)
      for (int64_t h = 0; h < grid[1].taps; ++h)
        for (int64_t w = 0; w < grid[2].taps; ++w)
          term[i++] = {
              first + c * layout.channel + d * to_tap[0] + h * to_tap[1] + w * to_tap[2],
              c * call.channel_stride + d * to_weight[0] + h * to_weight[1] + w * to_weight[2]};
  i = 0;
  for (int64_t d = 0; d < grid[0].count; ++d)
    for (int64_t h = 0; h < grid[1].count; ++h)
      for (int64_t w = 0; w < grid[2].count; w += L)
        row[i++] = {d * layout.axis[0] + h * layout.axis[1] + w,
                    d * call.target_stride[2] + h * call.target_stride[3] + w,
                    static_cast<int>(least(grid[2].count - w, L))};

  FloatEnvironment environment(Kind<T>::mode);
  Results<V> results;
  for (int64_t n = 0; n < call.batch; ++n)
    for (int64_t g = 0; g < call.groups; ++g) {
      const T* image =
          call.image + n * call.image_stride[0] + g * call.image_channels * call.image_stride[1];
      if (patched) {
        copy_patch(patch, layout, image, call.image_stride[1], call.image_stride + 2, image_size,
                   box, {1, 1, 1}, call.image_channels);
        image = patch;
      }
      for (int64_t lane = 0; lane < call.lanes; lane += tiny_lanes)
        for (int64_t r = 0; r < rows; r += tiny_rows) {
          // The last of each is computed again where a tile has room for more.
          const T* weight[tiny_lanes];
          for (int l = 0; l < tiny_lanes; ++l)
            weight[l] = call.weight + g * call.group_stride +
                        least(lane + l, call.lanes - 1) * call.lane_stride;
          TinyRow row_of[tiny_rows];
          for (int k = 0; k < tiny_rows; ++k) row_of[k] = row[least(r + k, rows - 1)];
          V total[tiny_lanes][tiny_rows];
          sum_tiny(image, weight, row_of, term, terms, total);
          for (int l = 0; l < tiny_lanes; ++l) {
            const int64_t channel = g * call.lanes + least(lane + l, call.lanes - 1);
            const V bias = V::broadcast(call.bias ? call.bias[channel] : T(0));
            for (int k = 0; k < tiny_rows; ++k) {
              results.of(total[l][k] + bias)
                  .store(call.target + n * call.target_stride[0] + channel * call.target_stride[1] +
                             row_of[k].in_target,
                         row_of[k].pixels);
            }
          }
        }
    }
  special |= results.any_special();
  return true;
}

}  // namespace torch_naiveconv::TNC_ISA
