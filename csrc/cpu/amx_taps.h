// grad_weight: the taps of input channels are the rows and output channels the columns. Start
// reading at TapProduct::run.
#pragma once

#include "amx_weights.h"

namespace torch_naiveconv::TNC_ISA {

// The gradient of `channels` output channels at the pixels [first, first + terms) of a sample, as
// the columns of one tile; +0 where there is none.
inline void pack_gradient(BFloat16* to, const BFloat16* grad, const int64_t* grad_stride,
                          const Axis (&axis)[3], bool consecutive, int64_t channels, int64_t first,
                          int64_t terms) {
  BFloat16 column[side][depth];
  if (consecutive && channels == side && terms == depth)
    return pack_transposed(to, grad + first * grad_stride[4], grad_stride[1]);
  int64_t at[3], rest = first;
  for (int a = 2; a >= 0; --a) at[a] = rest % axis[a].out, rest /= axis[a].out;
  zero_words(column[0], tile_words);
  BFloat16 row[depth][side] = {};
  for (int64_t t = 0; t < terms; ++t) {
    const BFloat16* const from =
        grad + at[0] * grad_stride[2] + at[1] * grad_stride[3] + at[2] * grad_stride[4];
    if (grad_stride[1] == 1)
      copy_words(row[t], from, 1, channels);
    else
      for (int64_t c = 0; c < channels; ++c) column[c][t] = from[c * grad_stride[1]];
    for (int a = 2; a >= 0 && ++at[a] == axis[a].out; --a) at[a] = 0;
  }
  if (grad_stride[1] != 1) return pack_transposed(to, column[0], depth);
  using V = Vec<float>;
  for (int k = 0; k < depth / 2; ++k)
    for (int i = 0; i < side; i += V::lanes)
      V::pairs(row[2 * k] + i, row[2 * k + 1] + i)
          .store(reinterpret_cast<float*>(to) + k * side + i);
}

template <class Unit>
class TapProduct {
 public:
  TapProduct(const ConvProblem& problem, const MatrixLimits& limits)
      : p_(problem),
        s_(problem.shape),
        image_stride_(problem.input.stride),
        grad_stride_(problem.output.stride),
        weight_stride_(problem.weight.stride),
        grid_{forward_axis(s_.axis[0]), forward_axis(s_.axis[1]), forward_axis(s_.axis[2])},
        pixels_(s_.outputs()),
        taps_(s_.taps()),
        filter_tiles_(up(s_.group_out(), side)),
        in_place_(readable_in_place(grid_, image_stride_)),
        taps_outside_(weight_stride_[1] == 1),
        pieces_(grid_, depth),
        layout_(grid_, image_stride_) {
    cut_blocks(limits);
    const Axis &d = s_.axis[0], &h = s_.axis[1], &w = s_.axis[2];
    consecutive_ = grad_stride_[4] == 1 && (h.out == 1 || grad_stride_[3] == w.out) &&
                   (d.out == 1 || grad_stride_[2] == h.out * w.out);
  }

  // Can 32 bits count the elements of a patch?
  bool fits() const { return fits_; }

  void run() const {
    parallel_for(s_.groups * channel_blocks_ * filter_blocks_, 1, FloatEnvironment::flush,
                 [&](int64_t begin, int64_t end) {
                   const Workspace w = workspace();
                   const Unit unit;
                   for (int64_t task = begin; task < end; ++task) run_task(task, w);
                 });
  }

 private:
  // Blocks of the gradient, some input channels x some output channels, whose operands for a chunk
  // of pixels and whose totals fit the second cache.
  void cut_blocks(const MatrixLimits& limits) {
    constexpr int64_t usual_groups = 16;
    const int64_t threads = thread_count();
    const int64_t panel_bytes = most(1, limits.panel_bytes / 2);  // there are two panels
    const int64_t group_bytes = depth * int64_t{sizeof(BFloat16)};
    int64_t channels =
        most(1, least(s_.group_in(), panel_bytes / (usual_groups * group_bytes) / taps_));
    chunk_ = most(1, least(least(2 * usual_groups, up(pixels_, depth)),
                           panel_bytes / (group_bytes * up(channels * taps_, side) * side)));
    pieces_ = Pieces(grid_, chunk_ * depth);
    const Layout patch(grid_, pieces_);
    if (!in_place_) layout_ = patch;
    const int64_t patch_words = pieces_.count * patch.channel;
    fits_ = patch_words <= INT32_MAX / 8;
    channels =
        most(1, least(channels, limits.patch_bytes / (patch_words * int64_t{sizeof(BFloat16)})));
    channel_blocks_ = up(s_.group_in(), channels);
    const int64_t most_filters =
        least(512, limits.patch_bytes / (channels * taps_ * int64_t{sizeof(float)}) / side * side);
    filter_blocks_ = up(s_.group_out(), most(most_filters, side));
    if (s_.groups * channel_blocks_ * filter_blocks_ < threads)
      channel_blocks_ = least(s_.group_in(), up(threads, s_.groups * filter_blocks_));
    if (s_.groups * channel_blocks_ * filter_blocks_ < threads)
      filter_blocks_ = least(filter_tiles_, up(threads, s_.groups * channel_blocks_));
    block_channels_ = up(s_.group_in(), channel_blocks_);
    piece_length_ = patch.channel * block_channels_;
  }

  struct Workspace {
    BFloat16 *rows, *columns, *patches;  // the panels, and the copies of the image
    float* totals;
    int64_t *offset, *row_at, *column_at;  // where a row is read, and rows and columns are written
    float* no_bias;
    Run* run;  // of the pixels of a chunk
    int32_t* first_run;
  };
  Workspace workspace() const {
    const int64_t most_rows = up(block_channels_ * taps_, side) * side;
    const int64_t most_columns = up(filter_tiles_, filter_blocks_) * side;
    const int64_t row_size = (most_rows + side) * chunk_ * depth;
    const int64_t column_size = most_columns * chunk_ * depth;
    const int64_t patch_size = pieces_.count * piece_length_ + tile_words;
    const int64_t total_size = most_rows * most_columns + side;
    Arena& arena = task_arena();
    arena.reset(Arena::bytes_for<BFloat16>(row_size) + Arena::bytes_for<BFloat16>(column_size) +
                Arena::bytes_for<BFloat16>(patch_size) + Arena::bytes_for<float>(total_size) +
                2 * Arena::bytes_for<int64_t>(most_rows) + Arena::bytes_for<float>(side) +
                Arena::bytes_for<int64_t>(most_columns) + Arena::bytes_for<Run>(chunk_ * depth) +
                Arena::bytes_for<int32_t>(chunk_ + 1));
    Workspace w;
    w.rows = arena.take<BFloat16>(row_size);
    w.columns = arena.take<BFloat16>(column_size);
    w.patches = arena.take<BFloat16>(patch_size);
    w.totals = arena.take<float>(total_size);
    w.offset = arena.take<int64_t>(most_rows);
    w.row_at = arena.take<int64_t>(most_rows);
    w.no_bias = arena.take<float>(side);
    w.column_at = arena.take<int64_t>(most_columns);
    w.run = arena.take<Run>(chunk_ * depth);
    w.first_run = arena.take<int32_t>(chunk_ + 1);
    std::fill_n(w.no_bias, side, 0.0f);
    return w;
  }

  // A block: rows are taps of `channels` input channels from `channel` on, and columns output
  // channels from `filter` on, each counted in its group.
  struct Task {
    int64_t group, channel, channels, filter;
    int64_t rows, row_tiles, columns, column_tiles;
  };
  Task task_of(int64_t number) const {
    const int64_t channel_block = number % channel_blocks_;
    const int64_t filter_block = number / channel_blocks_ % filter_blocks_;
    Task t;
    t.group = number / channel_blocks_ / filter_blocks_;
    t.channel = cut_at(s_.group_in(), channel_blocks_, channel_block);
    t.channels = cut_at(s_.group_in(), channel_blocks_, channel_block + 1) - t.channel;
    t.filter = cut_at(filter_tiles_, filter_blocks_, filter_block) * side;
    t.rows = t.channels * taps_, t.row_tiles = up(t.rows, side);
    t.columns =
        least(s_.group_out(), cut_at(filter_tiles_, filter_blocks_, filter_block + 1) * side) -
        t.filter;
    t.column_tiles = up(t.columns, side);
    return t;
  }
  // Of a row, among the taps of the channels: taps outside where rows then lie along the memory.
  int64_t number_of(const Task& t, int64_t row) const {
    return taps_outside_ ? row % t.channels * taps_ + row / t.channels : row;
  }

  void run_task(int64_t number, const Workspace& w) const {
    const Task t = task_of(number);
    list_rows(t, w);
    begin_totals(t, w);
    for (int64_t n = 0; n < s_.batch; ++n)
      for (int64_t first = 0; first < pixels_; first += chunk_ * depth)
        add_chunk(t, n, first, least(pixels_, first + chunk_ * depth), w);
    p_.keep_total ? store_totals<float>(t, w) : store_totals<BFloat16>(t, w);
  }

  void list_rows(const Task& t, const Workspace& w) const {
    for (int64_t r = 0; r < t.rows; ++r) {
      const int64_t c = number_of(t, r) / taps_;
      int64_t rest = number_of(t, r) % taps_;
      w.offset[r] = c * layout_.channel;
      w.row_at[r] = (t.channel + c) * weight_stride_[1];
      for (int a = 2; a >= 0; --a) {
        const int64_t tap = rest % s_.axis[a].kernel;
        rest /= s_.axis[a].kernel;
        w.offset[r] += layout_.tap(a, grid_[a].shift(tap));
        w.row_at[r] += tap * weight_stride_[a + 2];
      }
    }
    for (int64_t c = 0; c < t.columns; ++c)
      w.column_at[c] = (t.group * s_.group_out() + t.filter + c) * weight_stride_[0];
  }

  // The totals begin with the earlier ones.
  void begin_totals(const Task& t, const Workspace& w) const {
    std::fill_n(w.totals, t.row_tiles * t.column_tiles * tile_totals, 0.0f);
    if (p_.total == nullptr) return;
    const float* const earlier = static_cast<const float*>(p_.total);
    for (int64_t c = 0; c < t.columns; ++c)
      for (int64_t r = 0; r < t.rows; ++r) {
        const int64_t filter = t.group * s_.group_out() + t.filter + c;
        w.totals[(r / side * t.column_tiles + c / side) * tile_totals + r % side * side +
                 c % side] =
            flushed(earlier[(filter * s_.group_in() + t.channel) * taps_ + number_of(t, r)]);
      }
  }

  // Adds what the pixels [first, last) of sample n bring.
  void add_chunk(const Task& t, int64_t n, int64_t first, int64_t last, const Workspace& w) const {
    const int64_t groups = up(last - first, depth), tile = groups * tile_words;
    const BFloat16* const image = static_cast<const BFloat16*>(p_.input.data) +
                                  (t.group * s_.group_in() + t.channel) * image_stride_[1] +
                                  n * image_stride_[0];
    const BFloat16* const grad = static_cast<const BFloat16*>(p_.output.data) +
                                 (t.group * s_.group_out() + t.filter) * grad_stride_[1] +
                                 n * grad_stride_[0];
    find_runs(grid_, pieces_, layout_, image_stride_[0], piece_length_, first, last, w.run,
              w.first_run, [](int64_t, int64_t, int64_t, const int64_t*) {});
    if (!in_place_)
      each_piece(grid_, pieces_, first, last, [&](int64_t, const Box& box, int64_t piece) {
        fill_patch(w.patches + piece * piece_length_, layout_, grid_, box, image, image_stride_,
                   t.channels);
      });

    for (int64_t i = 0; i < t.row_tiles; ++i)
      for (int64_t g = 0; g < groups; ++g)
        pack_rows(w.rows + i * tile + g * tile_words, w.run + w.first_run[g],
                  w.run + w.first_run[g + 1], in_place_ ? image : w.patches, w.offset + i * side,
                  least(t.rows - i * side, side));
    for (int64_t j = 0; j < t.column_tiles; ++j)
      for (int64_t g = 0; g < groups; ++g)
        pack_gradient(w.columns + j * tile + g * tile_words, grad + j * side * grad_stride_[1],
                      grad_stride_, s_.axis, consecutive_, least(t.columns - j * side, side),
                      first + g * depth, least(last - first - g * depth, depth));

    for (int64_t i = 0; i < t.row_tiles; i += 2)
      for (int64_t j = 0; j < t.column_tiles; j += 2)
        multiply_tiles<Unit>(least(2, t.row_tiles - i), least(2, t.column_tiles - j),
                             {w.rows + i * tile, depth, tile, tile_words},
                             {w.columns + j * tile, tile, groups}, groups,
                             w.totals + (i * t.column_tiles + j) * tile_totals, t.column_tiles,
                             true, NoPack{});
  }

  template <class D>
  void store_totals(const Task& t, const Workspace& w) const {
    for (int64_t i = 0; i < t.row_tiles; ++i)
      for (int64_t j = 0; j < t.column_tiles; ++j) {
        const float* const tile = w.totals + (i * t.column_tiles + j) * tile_totals;
        const auto total = [&](int r, int c) { return Vec<float>::load(tile + r * side + c); };
        store_tile(total, static_cast<int>(least(t.rows - i * side, side)),
                   static_cast<int>(least(t.columns - j * side, side)), w.no_bias,
                   static_cast<D*>(p_.weight.data), w.row_at + i * side, w.column_at + j * side);
      }
  }

  const ConvProblem& p_;
  const ConvShape& s_;
  const int64_t *const image_stride_, *const grad_stride_, *const weight_stride_;
  const GridAxis grid_[3];
  const int64_t pixels_, taps_, filter_tiles_;
  const bool in_place_, taps_outside_;
  Pieces pieces_;
  Layout layout_;
  bool consecutive_ = false;  // the pixels of a channel of the gradient
  bool fits_ = false;
  int64_t chunk_ = 0;  // groups of pixels
  int64_t block_channels_ = 0, channel_blocks_ = 0, filter_blocks_ = 0, piece_length_ = 0;
};

}  // namespace torch_naiveconv::TNC_ISA
