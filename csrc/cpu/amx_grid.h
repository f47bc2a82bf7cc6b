// forward and grad_input with channels as the rows and the pixels of one grid as the columns. Start
// reading at GridProduct::run.
#pragma once

#include "amx_weights.h"

namespace torch_naiveconv::TNC_ISA {

// Columns are packed from rows of pixels. Rows that do not end in the middle of a tile are cheaper,
// so a short row that nearly fills its tiles is taken to fill them.
inline bool rows_fill_tiles(int64_t width) {
  const int64_t columns = up(width, side) * side;
  return width < 2 * side && 4 * columns <= 5 * width;
}

// Writes the pixels of a grid for the channels that the weights are of. `merged`: the axes of a
// call whose stride phases are rows. The arguments must outlive it.
template <class Unit>
class GridProduct {
 public:
  GridProduct(const Images<BFloat16>& call, const GridAxis (&exact)[3], const Axis* merged,
              const Weights& weights, const MatrixLimits& limits)
      : call_(call),
        exact_(exact),
        merged_(merged),
        weights_(weights),
        grid_{exact[0], exact[1], exact[2]},
        width_(exact[2].count),
        taps_(call.kernel[0] * call.kernel[1] * call.kernel[2]),
        groups_(up(call.image_channels * taps_, depth)),
        row_tiles_(up(weights.rows, side)),
        in_place_(fits_in_place()),
        along_rows_(!merged && exact[2].step * call.target_stride[4] == 1),
        pieces_(grid_, side),
        layout_(grid_, call.image_stride) {
    if (rows_fill_tiles(width_) && row_tiles_ <= 4 && !in_place_)
      grid_[2].count = up(width_, side) * side;
    pixels_ = call.batch * grid_[0].count * grid_[1].count * grid_[2].count;
    cut_boxes(limits);
    cut_strips(limits);
  }

  // Can 32 bits count the elements of a patch?
  bool fits() const { return fits_; }

  // Says whether a NaN was written.
  bool run() {
    list_offsets();
    bool nan = false;
    parallel_for(weights_.groups * row_blocks_ * boxes_, 1, FloatEnvironment::flush,
                 [&](int64_t begin, int64_t end) {
                   Workspace w = workspace();
                   const Unit unit(row_tiles_ == 1 ? static_cast<int>(weights_.rows) : side);
                   for (int64_t task = begin; task < end; ++task) run_task(task, w);
                   if (w.nan) __atomic_store_n(&nan, true, __ATOMIC_RELAXED);
                 });
    return nan;
  }

 private:
  // ---- the plan --------------------------------------------------------------------------------

  bool fits_in_place() const {
    int64_t image_end = (call_.image_channels - 1) * call_.image_stride[1];  // of a sample
    for (int a = 0; a < 3; ++a) image_end += (grid_[a].image_size - 1) * call_.image_stride[a + 2];
    return readable_in_place(exact_, call_.image_stride) && image_end <= INT32_MAX;
  }

  // Boxes of pixels that share a patch; the terms in chunks, if not all channels' patches fit.
  void cut_boxes(const MatrixLimits& limits) {
    const int64_t threads = thread_count();
    const int64_t sharing = up(threads, weights_.groups);  // boxes, equally
    box_pixels_ = up(pixels_, up(up(pixels_, limits.most_pixels), sharing) * sharing);
    box_pixels_ = up(box_pixels_, 2 * side) * 2 * side;
    for (;; box_pixels_ = 4 * side) {
      pieces_ = Pieces(grid_, box_pixels_);
      const Layout patch(grid_, pieces_);
      chunk_ = least(groups_, most(1, limits.panel_bytes / (2 * side * group_bytes)));
      for (;; chunk_ = up(chunk_, 2)) {
        const int64_t channels = least(call_.image_channels, up(chunk_ * depth - 1, taps_) + 1);
        piece_length_ = patch.channel * channels;
        if (chunk_ == 1 ||
            pieces_.count * piece_length_ * int64_t{sizeof(BFloat16)} <= limits.patch_bytes)
          break;
      }
      if (!in_place_) layout_ = patch;
      fits_ = patch.channel * call_.image_channels <= INT32_MAX &&
              pieces_.count * piece_length_ <= INT32_MAX / 8;
      if (!fits_ || chunk_ == groups_ || chunk_ * depth >= 8 * taps_ || box_pixels_ <= 4 * side)
        break;
    }
    boxes_ = up(pixels_, box_pixels_);
    if (boxes_ * weights_.groups < threads)
      row_blocks_ = least(up(threads, boxes_ * weights_.groups), up(row_tiles_, 2));
  }

  // In a box strips of two tiles or more, that share packed columns. If two tiles of rows are all,
  // columns are used once, as soon as they are packed: a few groups of them are kept. Else they are
  // kept for a strip of tiles.
  void cut_strips(const MatrixLimits& limits) {
    const int64_t tile_bytes = side * group_bytes;
    block_tiles_ = up(row_tiles_, row_blocks_);
    used_once_ = block_tiles_ <= 2;
    const int64_t strip_bytes = row_tiles_ * chunk_ * tile_bytes <= limits.cached_bytes
                                    ? limits.strip_bytes
                                    : limits.panel_bytes;
    strip_tiles_ =
        used_once_
            ? 4
            : most(2, least(box_pixels_ / side, strip_bytes / (tile_bytes * chunk_) / 2 * 2));
    kept_groups_ =
        used_once_ ? least(chunk_, most(2, limits.first_cache_bytes / (strip_tiles_ * tile_bytes)))
                   : chunk_;
    total_pitch_ = chunk_ < groups_ ? box_pixels_ / side : 4;
  }

  // The offsets of the terms; -1 for those that these pixels have not.
  void list_offsets() {
    Arena& plan = plan_arena();
    plan.reset(Arena::bytes_for<int32_t>(groups_ * depth));
    offset_ = plan.take<int32_t>(groups_ * depth);
    for (int64_t t = 0; t < groups_ * depth; ++t) offset_[t] = -1;
    int64_t taps[3];
    for (int a = 0; a < 3; ++a) taps[a] = merged_ ? merged_[a].kernel : grid_[a].taps;
    for (int64_t d = 0; d < taps[0]; ++d)
      for (int64_t h = 0; h < taps[1]; ++h)
        for (int64_t w = 0; w < taps[2]; ++w) {
          const int64_t tap[3] = {d, h, w};
          int64_t number = 0, at = 0;
          for (int a = 0; a < 3; ++a) {
            const int64_t shift =
                merged_ ? merged_shift(merged_[a], tap[a]) : grid_[a].shift(tap[a]);
            number = number * call_.kernel[a] + (merged_ ? tap[a] : grid_[a].tap(tap[a]));
            at += layout_.tap(a, shift);
          }
          for (int64_t c = 0; c < call_.image_channels; ++c)
            offset_[c * taps_ + number] = static_cast<int32_t>(c * layout_.channel + at);
        }
    while (whole_ < groups_ * depth && offset_[whole_] >= 0) ++whole_;
    whole_ /= depth;
  }

  // ---- a task: some tiles of rows for the pixels of a box ---------------------------------------

  struct Workspace {
    BFloat16 *panel, *patches;
    float* totals;
    Run *run, *target_run;              // of the pixels, where they are read and written
    int32_t *first_run, *first_target;  // by the pair of tiles
    int64_t* position;                  // of the pixels in the target
    float* bias;                        // of the rows, as the next two
    int64_t* channel_at;
    uint8_t *row_bits, *column_bits;  // as store_phases takes them
    bool nan = false;
  };
  Workspace workspace() const {
    Arena& arena = task_arena();
    const int64_t panel_size = strip_tiles_ * kept_groups_ * tile_words + tile_words;
    const int64_t patch_size = in_place_ ? 0 : pieces_.count * piece_length_ + tile_words;
    const int64_t total_size =
        (chunk_ < groups_ ? block_tiles_ : 2) * total_pitch_ * tile_totals + side;
    const int64_t pairs = box_pixels_ / depth + 1, rows = block_tiles_ * side;
    arena.reset(Arena::bytes_for<BFloat16>(panel_size) + Arena::bytes_for<BFloat16>(patch_size) +
                Arena::bytes_for<float>(total_size) + 2 * Arena::bytes_for<Run>(box_pixels_) +
                2 * Arena::bytes_for<int32_t>(pairs) + Arena::bytes_for<int64_t>(box_pixels_) +
                Arena::bytes_for<float>(rows) + Arena::bytes_for<int64_t>(rows) +
                Arena::bytes_for<uint8_t>(rows) + Arena::bytes_for<uint8_t>(box_pixels_));
    Workspace w;
    w.panel = arena.take<BFloat16>(panel_size);
    w.patches = arena.take<BFloat16>(patch_size);
    w.totals = arena.take<float>(total_size);
    w.run = arena.take<Run>(box_pixels_);
    w.first_run = arena.take<int32_t>(pairs);
    w.target_run = arena.take<Run>(box_pixels_);
    w.first_target = arena.take<int32_t>(pairs);
    w.position = arena.take<int64_t>(box_pixels_);
    w.bias = arena.take<float>(rows);
    w.channel_at = arena.take<int64_t>(rows);
    w.row_bits = arena.take<uint8_t>(rows);
    w.column_bits = arena.take<uint8_t>(box_pixels_);
    return w;
  }

  struct Task {
    int64_t first, last;          // pixels
    int64_t group, tile0, tile1;  // of channels, of tiles of rows
    int64_t rows, tiles;          // tiles of columns
  };
  Task task_of(int64_t number) const {
    Task t;
    t.first = number % boxes_ * box_pixels_, t.last = least(pixels_, t.first + box_pixels_);
    const int64_t row_block = number / boxes_ % row_blocks_;
    t.group = weights_.first_group + number / boxes_ / row_blocks_;
    t.tile0 = cut_at(row_tiles_, row_blocks_, row_block);
    t.tile1 = cut_at(row_tiles_, row_blocks_, row_block + 1);
    t.rows = least(weights_.rows, t.tile1 * side) - t.tile0 * side;
    t.tiles = 2 * up(t.last - t.first, 2 * side);
    return t;
  }

  void run_task(int64_t number, Workspace& w) const {
    const Task t = task_of(number);
    describe_rows(t, w);
    list_runs(t, w);
    for (int64_t g = 0; g < groups_; g += chunk_) {
      const Chunk chunk = chunk_of(t, w, g);
      for (int64_t j = 0, end; j < t.tiles; j = end) {
        end = used_once_ ? t.tiles : least(t.tiles, j + strip_tiles_);
        multiply_strip(t, chunk, j, end, w);
      }
    }
  }

  // Where each row is written, its bias, and on which axes its last pixel does not exist.
  void describe_rows(const Task& t, Workspace& w) const {
    for (int64_t r = 0; r < t.rows; ++r) {
      int64_t channel = t.group * call_.lanes + weights_.first, rest = t.tile0 * side + r;
      w.channel_at[r] = w.row_bits[r] = 0;
      if (merged_ != nullptr) {
        const int64_t inside = rest % weights_.beside;
        rest /= weights_.beside;
        channel += rest % call_.lanes;
        rest = rest / call_.lanes * weights_.beside + inside;
        int64_t phase[3];
        for (int a = 2; a >= 0; --a) phase[a] = rest % merged_[a].stride, rest /= merged_[a].stride;
        for (int a = 0; a < 3; ++a) {
          w.channel_at[r] += phase[a] * call_.target_stride[a + 2];
          if ((exact_[a].count - 1) * exact_[a].step + phase[a] >= merged_[a].in)
            w.row_bits[r] |= static_cast<uint8_t>(1 << a);
        }
      } else {
        channel += rest;
      }
      w.bias[r] = call_.bias ? widened(call_.bias[channel]) : 0.0f;
      w.channel_at[r] += channel * call_.target_stride[1];
    }
  }

  // Where the pixels are read and written.
  void list_runs(const Task& t, Workspace& w) const {
    const int64_t step = grid_[2].step * call_.target_stride[4];
    int64_t* const position = w.position;
    uint8_t* const bits = w.column_bits;
    int32_t target_runs = 0;
    find_runs(grid_, pieces_, layout_, call_.image_stride[0], piece_length_, t.first, t.last, w.run,
              w.first_run, [&](int64_t pixel, int64_t length, int64_t n, const int64_t* where) {
                int64_t to = n * call_.target_stride[0];
                for (int a = 0; a < 3; ++a)
                  to += (grid_[a].first + where[a] * grid_[a].step) * call_.target_stride[a + 2];
                const int64_t column = pixel % depth, some = least(length, width_ - where[2]);
                int32_t& first = w.first_target[pixel / depth];
                if (column == 0) first = target_runs;
                if (some > 0) add_run(w.target_run, first, target_runs, column, some, to);
                if (along_rows_) return;  // then store_rows needs no more
                const int edge = (where[0] + 1 == grid_[0].count) | (where[1] + 1 == grid_[1].count)
                                                                        << 1;
                for (int64_t i = 0; i < length; ++i) position[pixel + i] = to + i * step;
                std::fill_n(bits + pixel, length, static_cast<uint8_t>(edge));
                const int64_t end = width_ - 1 - where[2];
                if (end >= 0 && end < length) bits[pixel + end] |= 1 << 2;
              });
    w.first_target[t.tiles / 2] = target_runs;
  }

  // Groups [begin, end) of terms, and where the task has them.
  struct Chunk {
    int64_t begin, end;
    const BFloat16* source;
    int64_t origin;  // of the offsets
    RowTiles rows;
  };
  Chunk chunk_of(const Task& t, Workspace& w, int64_t begin) const {
    const int64_t end = least(groups_, begin + chunk_);
    const int64_t c0 = begin * depth / taps_;
    const int64_t c1 = least(call_.image_channels, up(end * depth, taps_));
    const BFloat16* const image =
        call_.image + t.group * call_.image_channels * call_.image_stride[1];
    if (!in_place_)
      each_piece(grid_, pieces_, t.first, t.last, [&](int64_t n, const Box& box, int64_t piece) {
        fill_patch(w.patches + piece * piece_length_, layout_, grid_, box,
                   image + n * call_.image_stride[0] + c0 * call_.image_stride[1],
                   call_.image_stride, c1 - c0);
      });
    RowTiles rows = weights_.tiles;
    rows.data += (t.group - weights_.first_group) * weights_.group + begin * rows.group;
    return {begin, end, in_place_ ? image : w.patches, in_place_ ? 0 : -c0 * layout_.channel, rows};
  }

  // Tiles of rows from i and of columns from j on: one or two, and as many as four tiles hold.
  struct Block {
    int64_t i, j, row_tiles, column_tiles;
  };
  void multiply_strip(const Task& t, const Chunk& chunk, int64_t j0, int64_t j1,
                      Workspace& w) const {
    for (int64_t i = t.tile0, row_tiles; i < t.tile1; i += row_tiles) {
      row_tiles = least(2, t.tile1 - i);
      const int64_t step = 4 / row_tiles;
      for (int64_t j = j0; j < j1; j += step) {
        const Block b{i, j, row_tiles, least(step, j1 - j)};
        multiply_block(t, chunk, b,
                       w.panel + (used_once_ ? 0 : (j - j0) * kept_groups_ * tile_words), w);
        if (chunk.end < groups_) continue;
        along_rows_ ? store_rows(t, b, w) : store_tiles(t, b, w);
      }
    }
  }

  float* totals_of(const Task& t, const Block& b, const Workspace& w) const {
    return w.totals + (chunk_ < groups_ ? (b.i - t.tile0) * total_pitch_ + b.j : 0) * tile_totals;
  }

  // The first rows pack the columns for those after them.
  void multiply_block(const Task& t, const Chunk& chunk, const Block& b, BFloat16* columns,
                      Workspace& w) const {
    RowTiles rows = chunk.rows;
    rows.data += b.i * rows.tile;
    const ColumnTiles from{columns, kept_groups_ * tile_words, kept_groups_};
    const auto multiply = [&](const auto& pack) {
      multiply_tiles<Unit>(b.row_tiles, b.column_tiles, rows, from, chunk.end - chunk.begin,
                           totals_of(t, b, w), total_pitch_, chunk.begin > 0, pack);
    };
    if (b.i > t.tile0) return multiply(NoPack{});
    const int64_t pairs = b.column_tiles / 2;
    const Run *begin[2], *end[2];
    for (int64_t y = 0; y < 2; ++y) {
      const int32_t* const of_pair = w.first_run + b.j / 2 + least(y, pairs - 1);
      begin[y] = w.run + of_pair[0], end[y] = w.run + of_pair[1];
    }
    // Copies, which stores of vectors cannot be thought to change.
    const int32_t* const offset = offset_ + chunk.begin * depth;
    const int64_t whole = whole_ - chunk.begin, kept = kept_groups_, origin = chunk.origin;
    const BFloat16* const source = chunk.source;
    with_gather(std::max(gather_of(begin[0], end[0]), gather_of(begin[1], end[1])), [&](auto n) {
      const Gather<n> gather[] = {{begin[0], end[0]}, {begin[1], end[1]}};
      multiply([&](int64_t g, int64_t place) __attribute__((always_inline)) {
        for (int64_t y = 0; y < pairs; ++y)
          pack_columns(columns + (2 * y * kept + place) * tile_words, from.tile, gather[y], source,
                       origin, offset + g * depth, g < whole);
      });
    });
  }

  // Pixels lie along the memory.
  void store_rows(const Task& t, const Block& b, Workspace& w) const {
    for (int64_t x = 0; x < b.row_tiles; ++x)
      for (int64_t y = 0; y < b.column_tiles / 2; ++y) {
        const int64_t r = (b.i + x - t.tile0) * side;
        const float* const pair = totals_of(t, b, w) + (x * total_pitch_ + 2 * y) * tile_totals;
        const int32_t* const of_pair = w.first_target + b.j / 2 + y;
        w.nan |= store_runs(pair, pair + tile_totals, static_cast<int>(least(t.rows - r, side)),
                            w.bias + r, call_.target, w.channel_at + r, w.target_run + of_pair[0],
                            w.target_run + of_pair[1]);
      }
  }
  void store_tiles(const Task& t, const Block& b, Workspace& w) const {
    for (int64_t x = 0; x < b.row_tiles; ++x)
      for (int64_t y = 0; y < b.column_tiles; ++y) {
        const int64_t r = (b.i + x - t.tile0) * side, c = (b.j + y) * side;
        const int rows = static_cast<int>(least(t.rows - r, side));
        const int64_t in_row = (t.first + c) % grid_[2].count;
        const int64_t end = grid_[2].count == width_ ? side : width_ - in_row;
        const int columns = static_cast<int>(least(least(end, side), t.last - t.first - c));
        if (columns <= 0) continue;
        const float* const pair = totals_of(t, b, w) + (x * total_pitch_ + y / 2 * 2) * tile_totals;
        const auto tile = [&](int r, int c) {
          return Vec<float>::unwoven(pair + r * side, pair + tile_totals + r * side,
                                     static_cast<int>(y % 2) * side + c);
        };
        w.nan |= merged_ ? store_phases(tile, rows, columns, w.bias + r, call_.target,
                                        w.channel_at + r, w.position + c, w.row_bits + r,
                                        w.column_bits + c, weights_.beside)
                         : store_tile(tile, rows, columns, w.bias + r, call_.target,
                                      w.channel_at + r, w.position + c);
      }
  }

  static constexpr int64_t group_bytes = depth * int64_t{sizeof(BFloat16)};

  const Images<BFloat16>& call_;
  const GridAxis (&exact_)[3];
  const Axis* const merged_;
  const Weights& weights_;
  GridAxis grid_[3];  // with rows that fill their tiles
  const int64_t width_, taps_, groups_, row_tiles_;
  const bool in_place_, along_rows_;  // is read in place, is written in rows
  Pieces pieces_;
  Layout layout_;
  bool fits_ = false;
  int64_t pixels_ = 0, box_pixels_ = 0, boxes_ = 0;
  int64_t chunk_ = 0, piece_length_ = 0;  // groups of terms; of the patch of a piece
  int64_t row_blocks_ = 1, block_tiles_ = 0;
  bool used_once_ = false;
  int64_t strip_tiles_ = 0, kept_groups_ = 0, total_pitch_ = 0;
  int32_t* offset_ = nullptr;
  int64_t whole_ = 0;  // the first so many groups, of which all terms exist
};

}  // namespace torch_naiveconv::TNC_ISA
