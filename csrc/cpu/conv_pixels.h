// Forward and grad_input as a packed product whose rows are pixels. Start reading at
// PixelProduct::run_task; conv_dense.h says what plays which part.
#pragma once

#include "conv_grids.h"
#include "neighbour_tiles.h"

namespace torch_naiveconv::TNC_ISA {

// Stores the totals of multiply_vectors like store_rows: `pixels` elements of each vector, pixel
// after pixel to_pixel apart.
template <class T, int Chains, class S>
bool store_vectors(const T* total, int64_t vectors, int widest, const Target<S, T> target,
                   int64_t to_pixel, int pixels) {
  using V = Vec<T>;
  constexpr int L = V::lanes;
  Results<V> results;
  const int lanes = target.lanes;
  each_wide_run<T, Chains>(lanes, vectors, widest, [&](int64_t v, int64_t tiles, int vecs) {
    for (; tiles > 0; --tiles, v += vecs)
      for (int i = 0; i < lanes; ++i) {
        const V b = V::broadcast(target.bias[i]);
        for (int j = 0; j < vecs; ++j) {
          const V result = results.of(V::load(total + (v * lanes + i * vecs + j) * L) + b);
          S* const to = target.data + i * target.to_lane + target.position[v + j];
          if (to_pixel == 1 && pixels == L) {
            result.store(to);
          } else if (to_pixel == 1) {
            result.store(to, pixels);
          } else {
            S values[L];
            result.store(values);
            for (int l = 0; l < pixels; ++l) to[l * to_pixel] = values[l];
          }
        }
      }
  });
  return results.any_special();
}

// Rows of the result that the stride phases along w fill in turns.
struct Interleaved {
  int64_t per_row;        // vectors, or pixels, of each phase
  int64_t last_elements;  // of the result, in the last of these
};

// Stores the totals of multiply_vectors for `Phases` phases, phase after phase `apart` in memory:
// their pixels take turns in the result.
template <int Phases, class T, int Chains, class S>
bool store_interleaved(const T* total, int64_t apart, int64_t vectors, int widest,
                       const Target<S, T> target, const Interleaved& row) {
  using V = Vec<T>;
  constexpr int L = V::lanes;
  Results<V> results;
  const int lanes = target.lanes;
  each_wide_run<T, Chains>(lanes, vectors, widest, [&](int64_t v, int64_t tiles, int vecs) {
    for (; tiles > 0; --tiles, v += vecs)
      for (int j = 0; j < vecs; ++j) {
        const bool is_last = (v + j + 1) % row.per_row == 0;
        const int64_t elements = is_last ? row.last_elements : Phases * L;
        for (int i = 0; i < lanes; ++i) {
          const T* const from = total + (v * lanes + i * vecs + j) * L;
          const V b = V::broadcast(target.bias[i]);
          V result[Phases];
          for (int k = 0; k < Phases; ++k) result[k] = results.of(V::load(from + k * apart) + b);
          store_in_turns<Phases>(result, target.data + i * target.to_lane + target.position[v + j],
                                 elements);
        }
      }
  });
  return results.any_special();
}

// Stores the totals of multiply_rows like store_rows for two phases, phase after phase `apart` in
// memory: their pixels, row.per_row of them in a row, take turns in the result.
template <class T, class S>
bool store_pairs(const T* total, int64_t apart, int64_t rows, int vecs, const Target<S, T> target,
                 const Interleaved& row) {
  using V = Vec<T>;
  constexpr int L = V::lanes;
  Results<V> results;
  for (int j = 0; j < target.lanes; j += L) {
    const V b = V::load(target.bias + j);
    const int some = static_cast<int>(least(target.lanes - j, L));
    for (int64_t r = 0, run; r < rows; r += run) {
      const int64_t rest = row.per_row - r % row.per_row;  // of the row
      run = least(rest, L);
      const int64_t elements = rest <= L ? 2 * (run - 1) + row.last_elements : 2 * L;
      S* const to = target.data + target.position[r] + j * target.to_lane;
      const S* const ahead =
          target.data + target.position[least(r + L, rows - 1)] + j * target.to_lane;
      for (int k = 0; k < 2 && k * L < elements; ++k) {
        const int stored = static_cast<int>(least(elements - k * L, L));
        V block[L];  // of both phases in turns
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) {
          prefetch_to_write(ahead + i * target.to_lane + k * L);
          const int64_t pixel = (k * L + i) / 2;
          const T* const from = total + i % 2 * apart + (r + pixel) * vecs * L + j;
          block[i] = results.of(pixel < run ? V::load(from) + b : V::zero());
        }
        V::transpose(block);
        for (int i = 0; i < some; ++i)
          if (stored == L)
            block[i].store(to + i * target.to_lane + k * L);
          else
            block[i].store(to + i * target.to_lane + k * L, stored);
      }
    }
  }
  return results.any_special();
}

// One call as a product: its plan, which the threads share, and what a task does. A task is a box
// of pixels for a block of lanes; its steps, from run_task on, follow each other below.
template <class S>
class PixelProduct {
  using K = Kind<S>;
  using T = typename K::T;
  using Size = TileSize<T, K::chains>;
  static constexpr int L = Vec<T>::lanes;
  static constexpr bool widens = !std::is_same_v<S, T>;

 public:
  PixelProduct(const Images<S>& call, const GridAxis (*grid)[3], int phases, bool may_cut)
      : call_(call),
        grid_(grid),
        phases_(phases),
        wide_(has_vectors_of_pixels(call, grid[0])),
        all_taps_(call.kernel[0] * call.kernel[1] * call.kernel[2]),
        cut_{Cut(grid[0][0]), Cut(grid[0][1]), Cut(grid[0][2])} {
    for (int i = 0; i < phases; ++i) {
      const int64_t taps = grid[i][0].taps * grid[i][1].taps * grid[i][2].taps;
      terms_ += call.image_channels * taps;
      most_taps_ = most(most_taps_, taps);
    }
    cut_axes(may_cut && phases == 1);
    cut_boxes();
    choose_layout();
  }

  // Can 32 bits count the elements between the terms of a row?
  bool fits() const {
    return !patched_ || (layout_.elements <= INT32_MAX / 2 &&
                         layout_.channel * call_.image_channels <= INT32_MAX);
  }

  // Says whether an infinity or a NaN was written.
  bool run() {
    list_terms();
    return run_tasks<K>(
        call_.groups * lane_blocks_ * boxes_, work_, [&] { return workspace(); },
        [&](int64_t task, Workspace& w) { run_task(task, w); });
  }

 private:
  // ---- the plan --------------------------------------------------------------------------------

  // Where the terms of a pixel lie side by side, or pixels, rows can be read in place, unless their
  // lines crowd few sets of the first cache. Then padding has to be cut away.
  void cut_axes(bool may_cut) {
    constexpr double if_it_saves[3] = {0.98, 0.98, 0.95}, unless_it_costs[3] = {1, 1, 1};
    constexpr double always[3] = {HUGE_VAL, HUGE_VAL, HUGE_VAL};
    const bool in_place = !widens && phases_ == 1 && !wide_;
    terms_in_place_ = in_place && call_.image_stride[1] == 1;
    // Neighbours share most of the pixels that their taps read, unless these are dilated.
    const int64_t spread = std::llabs(grid_[0][2].shift_step) > 1 ? 2 : 1;
    taps_in_place_ = all_taps_ > 1 && (terms_in_place_ ? spread * pixel_pitch() <= pixel_bytes
                                                       : in_place && call_.image_stride[4] == 1 &&
                                                             !channels_crowd());
    if (may_cut && taps_in_place_)
      choose_cuts(call_, grid_[0], wide_, terms_in_place_ ? always : unless_it_costs, cut_);
    for (int a = 0; a < 3; ++a)
      taps_in_place_ = taps_in_place_ && (cut_[a].count > 1 || !grid_[0][a].reads_padding());
    if (may_cut && !taps_in_place_) choose_cuts(call_, grid_[0], wide_, if_it_saves, cut_);
    for (int a = 0; a < 3; ++a) reach_[a] = Reach(grid_, phases_, a, cut_[a].count > 1);
  }
  int64_t pixel_pitch() const {  // bytes
    return std::llabs(call_.image_stride[4]) * int64_t{sizeof(S)};
  }
  // Of the channels of a group, do several begin at one position of the 4096 bytes that the sets of
  // a first cache take turns over?
  bool channels_crowd() const {
    const int64_t apart = std::llabs(call_.image_stride[1]) * int64_t{sizeof(S)};
    return apart == 0 || 4096 / least(4096, apart & -apart) < channels_in_group();
  }
  bool channels_last() const { return call_.image_stride[1] == 1 && call_.image_stride[4] != 1; }
  int64_t channels_in_group() const {
    return least(call_.image_channels, (K::group - 1) / all_taps_ + 2);
  }

  // The pixels into boxes of about rows_of_task, or half of them if the channels of one group fill
  // a patch; the lanes where that is not enough to share.
  void cut_boxes() {
    const int64_t pixels = reach_[0].count * reach_[1].count * reach_[2].count;
    const int64_t threads = thread_count(), lane_vecs = up(call_.lanes, L);
    work_ = call_.batch * call_.groups * pixels * terms_ * call_.lanes;
    if (!wide_ && call_.batch * pixels * call_.groups < threads * rows_of_task / 2 &&
        work_ > worthwhile_products)
      lane_blocks_ = least(threads, up(lane_vecs, Size::vecs));
    const int64_t pixels_of_patch = patch_bytes / (int64_t{sizeof(T)} * channels_in_group());
    int64_t target = least(rows_of_task, most(rows_of_task / 2, pixels_of_patch));
    target = least(target, most(64, box_total_bytes / (int64_t{sizeof(T)} * call_.lanes)));
    if (phases_ > 1) {
      const int64_t lanes = wide_ ? call_.lanes : least(call_.lanes, Size::vecs * L);
      target = least(target, most(64, phase_total_bytes / (int64_t{sizeof(T)} * lanes * phases_)));
      // All channels in one patch, or the totals of all lanes are kept.
      if (!wide_)
        target = least(target, most(64, phase_bytes / (int64_t{sizeof(T)} * call_.image_channels)));
    }
    if (channels_last() && all_taps_ > 1) {  // some channels are read at a time, lines hold more
      const int64_t pixel = call_.image_channels * int64_t{sizeof(S)} * reach_[0].step *
                            reach_[1].step * reach_[2].step;
      target = least(target, most(source_bytes / pixel, rows_of_task / 4));
    }
    const int64_t wanted = up(threads, lane_blocks_ * call_.groups);
    if (wanted > 1) target = least(target, most(up(call_.batch * pixels, wanted), 32));
    piece_[0] = call_.batch;
    if (pixels <= target) {
      piece_[0] = up(call_.batch, most(target / most(pixels, 1), 1));
    } else {
      int64_t inner = pixels;
      for (int a = 0; a < 3 && inner > target; ++a) {
        const int64_t slice = inner / reach_[a].count;
        piece_[a + 1] = slice >= target ? reach_[a].count : up(reach_[a].count, target / slice);
        inner = slice;
      }
    }
    boxes_ = piece_[0] * piece_[1] * piece_[2] * piece_[3];
    keeps_panels_ =
        boxes_ > threads && most_terms() * most_lanes() * int64_t{sizeof(T)} <= kept_bytes;
    box_samples_ = up(call_.batch, piece_[0]);
    box_rows_ = box_samples_;
    for (int a = 0; a < 3; ++a) {
      const int64_t count = up(reach_[a].count, piece_[a + 1]);
      box_rows_ *= a == 2 && wide_ ? up(count, L) : count;
    }
  }

  // Does a row point into the image or into a patch? What a single tap reads serves no other tap,
  // so it is not worth a copy where pixels, or the terms of a pixel, lie side by side.
  void choose_layout() {
    int64_t size[3], extent = call_.image_channels * std::llabs(call_.image_stride[1]);
    bool padding = false;
    for (int a = 0; a < 3; ++a) {
      size[a] = reach_[a].most_size(up(reach_[a].count, piece_[a + 1]));
      padding = padding || reach_[a].padding;
      extent += size[a] * reach_[a].hop * std::llabs(call_.image_stride[a + 2]);
    }
    const bool whole_vectors = reach_[2].count >= piece_[3] * L;
    const bool pixels_in_place = call_.image_stride[4] == 1 && (!wide_ || whole_vectors);
    // Whole images without padding that stay in the cache are as good as a copy.
    const bool whole_images =
        pixels_in_place && boxes_ == piece_[0] &&
        box_samples_ * std::llabs(call_.image_stride[0]) * int64_t{sizeof(T)} <= patch_bytes;
    // Each tile of lanes widens them again, which costs less than a copy unless there are many.
    const bool widens_in_place = wide_ && call_.lanes <= 8 * Size::wide_rows;
    const bool tap_in_place =
        (all_taps_ == 1 || (whole_images && !widens)) && reach_[2].step == 1 &&
        ((pixels_in_place && (!widens || widens_in_place)) || terms_in_place_);
    // Vectors of few channels' pixels, whose terms lie side by side, are turned in registers.
    const bool cut = cut_[0].count * cut_[1].count * cut_[2].count > 1;
    turned_ = wide_ && !widens && all_taps_ == 1 && phases_ == 1 && !padding && !cut &&
              call_.image_stride[1] == 1 && call_.lanes <= rows_turned &&
              call_.image_channels % L == 0 &&
              (call_.image_channels <= K::group || call_.image_channels % K::group == 0) &&
              extent <= INT32_MAX && whole_vectors;
    patched_ = !turned_ &&
               (phases_ > 1 || !(tap_in_place || taps_in_place_) || padding || extent > INT32_MAX);
    if (!patched_ && terms_in_place_ && pixel_pitch() >= 64) asks_ = Asks::row_apart;
    // Few filters wait for the memory, which is faster with fewer and longer runs.
    if (wide_ && tap_in_place && !patched_ && !turned_ && !widens && all_taps_ == 1 &&
        call_.lanes <= rows_turned && call_.image_channels <= K::group)
      run_terms_ = 8;

    const int64_t plane = box_samples_ * size[0] * size[1] * size[2] * int64_t{sizeof(T)};
    const int64_t limit = phases_ > 1 && !wide_ ? 2 * phase_bytes : patch_bytes;
    patch_channels_ = least(call_.image_channels, most(limit / plane, channels_in_group()));
    one_chunk_ = turned_ || patch_channels_ == call_.image_channels;
    // Vectors of pixels that a stride of 2 steps through: every second element of a row side by
    // side.
    const bool halves = wide_ && reach_[2].step == 2 && reach_[2].hop == 1;
    if (patched_) {
      layout_ = channels_last() && !wide_ ? PatchLayout::by_pixel(patch_channels_, size)
                                          : PatchLayout::of(patch_channels_, size, halves);
    } else {
      layout_.channel = call_.image_stride[1];
      for (int a = 0; a < 3; ++a) layout_.axis[a] = call_.image_stride[a + 2];
    }
    for (int a = 0; a < 3; ++a)
      row_step_[a] = reach_[a].step / (patched_ ? reach_[a].hop : 1) * layout_.axis[a];
    if (halves) row_step_[2] = 1;
    // Phases along w are stored together.
    const int64_t stride = grid_[0][2].step;
    if (call_.target_stride[4] == 1 && (stride == 2 || (wide_ && stride == 4)) &&
        phases_ >= stride && grid_[stride - 1][2].first == stride - 1)
      in_turns_ = static_cast<int>(stride);
  }

  // The tables of the panels and their parts.
  void list_terms() {
    groups_ = up(call_.image_channels * all_taps_, K::group);
    const bool few_terms = terms_ < K::group / 2 * groups_ * phases_;  // in a group
    chains_held_ = few_terms ? K::chains : 1;
    panels_ = wide_ ? phases_ : 1;
    parts_ = cut_[0].count * cut_[1].count * cut_[2].count * grids_of_panel();
    const int64_t terms_of_parts =
        phases_ > 1 ? terms_
                    : call_.image_channels * cut_[0].taps() * cut_[1].taps() * cut_[2].taps();
    constexpr size_t rounding = Arena::bytes_for<char>(64);  // of one piece more
    Arena& plan = plan_arena();
    plan.reset(Arena::bytes_for<PanelTerms>(panels_) + Arena::bytes_for<int32_t>(most_terms()) +
               Arena::bytes_for<Term>(terms_of_parts) +
               panels_ * (Arena::bytes_for<Part>(parts_) + rounding) +
               panels_ * (parts_ + 1) *
                   (Arena::bytes_for<int32_t>(groups_ + 1) + rounding +
                    Arena::bytes_for<int32_t>(groups_ * K::chains)) +
               Arena::bytes_for<int32_t>(call_.image_channels * all_taps_) +
               3 * Arena::bytes_for<int64_t>(all_taps_));
    panel_ = plan.take<PanelTerms>(panels_);
    int32_t* const packed = plan.take<int32_t>(call_.image_channels * all_taps_);
    Taps taps(plan, all_taps_);
    for (int i = 0; i < panels_; ++i) {
      list_panel(panel_[i], grid_[i], plan, taps, packed);
      panel_[i].first = i == 0 ? 0 : panel_[i - 1].first + panel_[i - 1].start[groups_];
      panel_[i].parts = 0;
      panel_[i].part = plan.take<Part>(parts_);
      for (int k = i; k < i + grids_of_panel(); ++k)
        list_parts(panel_[i], grid_[k], plan, taps, packed);
    }
  }
  int grids_of_panel() const { return wide_ ? 1 : phases_; }
  int64_t most_terms() const {  // that the panels hold
    return most(terms_, call_.image_channels * all_taps_);
  }

  // The terms of a grid, or of all, and where each is packed.
  void list_panel(PanelTerms& p, const GridAxis (&grid)[3], Arena& plan, Taps& taps,
                  int32_t* packed) const {
    GridAxis axis[3];
    for (int a = 0; a < 3; ++a) {
      if (grids_of_panel() == 1)
        axis[a] = grid[a];
      else
        axis[a].taps = call_.kernel[a];
    }
    const int64_t anywhere[3] = {0, 0, 0};
    taps.list(call_, axis,
              {Cut(axis[0]).stretch[0], Cut(axis[1]).stretch[0], Cut(axis[2]).stretch[0]}, anywhere,
              layout_);
    p.start = plan.take<int32_t>(groups_ + 1);
    p.lane = plan.take<int32_t>(call_.image_channels * taps.count);
    int32_t* const length = plan.take<int32_t>(groups_);
    each_term<1>(call_, taps, groups_, p.start, length,
                 [&](int64_t t, int64_t channel, int64_t tap, int64_t number) {
                   p.lane[t] =
                       static_cast<int32_t>(channel * call_.channel_stride + taps.in_weight[tap]);
                   packed[number] = static_cast<int32_t>(t - p.start[number / K::group]);
                 });
  }

  // The parts of one grid.
  void list_parts(PanelTerms& p, const GridAxis (&grid)[3], Arena& plan, Taps& taps,
                  const int32_t* packed) {
    int64_t first_shift[3] = {0, 0, 0};
    for (int a = 0; a < 3 && patched_; ++a) first_shift[a] = reach_[a].first_shift;
    for (int a = 0; a < 3 && phases_ > 1; ++a) cut_[a] = Cut(grid[a]);
    for (int d = 0; d < cut_[0].count; ++d)
      for (int h = 0; h < cut_[1].count; ++h)
        for (int w = 0; w < cut_[2].count; ++w) {
          Part& part = p.part[p.parts++];
          const Stretch* const s[3] = {&cut_[0].stretch[d], &cut_[1].stretch[h],
                                       &cut_[2].stretch[w]};
          part.grid = grid;
          for (int a = 0; a < 3; ++a) part.stretch[a] = *s[a];
          taps.list(call_, grid, part.stretch, first_shift, layout_);
          part.start = plan.take<int32_t>(groups_ + 1);
          part.length = plan.take<int32_t>(groups_ * K::chains);
          part.term = plan.take<Term>(call_.image_channels * taps.count);
          each_term<K::chains>(call_, taps, groups_, part.start, part.length,
                               [&](int64_t t, int64_t channel, int64_t tap, int64_t number) {
                                 const int64_t in_place =
                                     channel * layout_.channel + taps.in_image[tap];
                                 part.term[t] = {static_cast<int32_t>(in_place), packed[number]};
                               });
          part.last_group = 0;
          for (int64_t g = 1; g < groups_; ++g)
            if (part.start[g] < part.start[g + 1]) part.last_group = g;
        }
  }

  // ---- a task ----------------------------------------------------------------------------------

  struct Workspace {
    T *totals, *panel, *patch, *bias;
    const T** row;                // part after part
    const S** narrow;             // instead: 16-bit pixels in place
    int64_t *position, *rows_of;  // of each row in the result; of each part
    int64_t* width_of;            // neighbours in the rows of each part
    int64_t packed_lanes = -1;    // the block whose panels are kept
    bool special = false;         // was an infinity or a NaN stored?
  };
  struct Place {  // of a task: pixels [lower, upper) of n, d, h, w, and what they read
    int64_t group, lane_block, lower[4], upper[4];
    Box box;
    const S* image;
  };

  int64_t lanes_of(const Place& place) const {
    return place.group * lane_blocks_ + place.lane_block;
  }
  int64_t most_lanes() const {
    return wide_ ? call_.lanes : up(up(call_.lanes, L), lane_blocks_) * L;
  }
  // Totals are kept from chunk to chunk, else only those of one tile of lanes.
  int64_t totals_of_panel() const {
    const int64_t all = wide_ ? call_.lanes * L : most_lanes();
    return grids_of_panel() * box_rows_ *
           (one_chunk_ ? least(all, L * (wide_ ? Size::wide_rows : Size::vecs)) : all);
  }

  Workspace workspace() const {
    const int64_t totals = totals_of_panel() * (one_chunk_ ? at_once() : panels_);
    const int64_t panel = keeps_panels_ ? most_terms() * most_lanes()
                                        : K::group * (wide_ ? Size::wide_rows : L * Size::vecs);
    const int64_t patch = patched_ ? box_samples_ * layout_.elements + L : 0;
    const int64_t bias = up(most_lanes(), L) * L, rows = box_rows_ * phases_;
    Arena& arena = task_arena();
    arena.reset(Arena::bytes_for<T>(totals) + Arena::bytes_for<T>(panel) +
                Arena::bytes_for<T>(patch) + Arena::bytes_for<T>(bias) +
                2 * Arena::bytes_for<const T*>(rows) + Arena::bytes_for<int64_t>(rows) +
                2 * Arena::bytes_for<int64_t>(panels_ * parts_));
    Workspace w;
    w.totals = arena.take<T>(totals);
    w.panel = arena.take<T>(panel);
    w.patch = arena.take<T>(patch);
    w.bias = arena.take<T>(bias);
    w.row = arena.take<const T*>(rows);
    w.narrow = arena.take<const S*>(rows);
    w.position = arena.take<int64_t>(rows);
    w.rows_of = arena.take<int64_t>(panels_ * parts_);
    w.width_of = arena.take<int64_t>(panels_ * parts_);
    return w;
  }

  void run_task(int64_t task, Workspace& w) const {
    const Place place = place_of(task);
    find_rows(place, w);
    int64_t chunk_channel = 0;  // what channel the row pointers stand at
    for (int64_t g0 = 0, g1; g0 < groups_; g0 = g1) {
      // A chunk: the groups whose channels fit into the patch.
      g1 = groups_;
      if (!one_chunk_) {
        const int64_t first_channel = g0 * K::group / all_taps_;
        if (first_channel + patch_channels_ < call_.image_channels)
          g1 = least(groups_,
                     most(g0 + 1, (first_channel + patch_channels_) * all_taps_ / K::group));
        const int64_t move = (first_channel - chunk_channel) * layout_.channel;
        for (int64_t r = 0; r < phases_ * box_rows_ && patched_; ++r) w.row[r] -= move;
        chunk_channel = first_channel;
      }
      if (patched_) {
        const int64_t end = least(up(g1 * K::group, all_taps_), call_.image_channels);
        fill_patch(place, w.patch, chunk_channel, end - chunk_channel);
      }
      multiply_groups(place, w, g0, g1);
    }
    // A phase without pixels in the box has packed nothing.
    if (keeps_panels_ && w.packed_lanes != lanes_of(place))
      w.packed_lanes = each_panel_has_rows(w) ? lanes_of(place) : -1;
  }

  int64_t rows_of_panel(const Workspace& w, int i) const {
    int64_t rows = 0;
    for (int64_t j = 0; j < parts_; ++j) rows += w.rows_of[i * parts_ + j];
    return rows;
  }
  bool each_panel_has_rows(const Workspace& w) const {
    bool yes = true;
    for (int i = 0; i < panels_; i += at_once()) yes = yes && rows_of_panel(w, i) > 0;
    return yes;
  }

  Place place_of(int64_t task) const {
    Place place;
    int64_t rest = task % boxes_;
    place.lane_block = task / boxes_ % lane_blocks_;
    place.group = task / boxes_ / lane_blocks_;
    place.image = call_.image + place.group * call_.image_channels * call_.image_stride[1];
    for (int a = 3; a >= 0; --a) {
      const int64_t count = a ? reach_[a - 1].count : call_.batch;
      place.lower[a] = cut_at(count, piece_[a], rest % piece_[a]);
      place.upper[a] = cut_at(count, piece_[a], rest % piece_[a] + 1);
      rest /= piece_[a];
    }
    for (int a = 0; a < 3; ++a) {
      place.box.from[a] = reach_[a].from(place.lower[a + 1]);
      place.box.to[a] = most(reach_[a].to(place.upper[a + 1]), place.box.from[a]);
    }
    return place;
  }

  // The rows of each part, and where they will be stored.
  void find_rows(const Place& place, Workspace& w) const {
    const int64_t *const lower = place.lower, *const upper = place.upper;
    int64_t shift = 0;  // of a row's pointer, where the box begins later than its reads would
    for (int a = 0; a < 3; ++a)
      shift += (lower[a + 1] * reach_[a].step + reach_[a].first_shift - place.box.from[a]) *
               layout_.axis[a];
    int64_t next = 0;
    for (int64_t i = 0; i < panels_ * parts_; ++i) {
      const Part& part = panel_[i / parts_].part[i % parts_];
      const GridAxis* const grid = part.grid;
      int64_t from_pixel[3], to_pixel[3];
      for (int a = 0; a < 3; ++a) {
        from_pixel[a] = most(lower[a + 1], part.stretch[a].from);
        to_pixel[a] = least(upper[a + 1], part.stretch[a].to);
      }
      // A phase with a pixel less has it nevertheless; it is not stored.
      if (in_turns_ > 1) to_pixel[2] = upper[3];
      if (i % parts_ == 0) next = i / parts_ * box_rows_;
      const int64_t first = next, width = to_pixel[2] - from_pixel[2];
      for (int64_t n = lower[0]; n < upper[0]; ++n)
        for (int64_t d = from_pixel[0]; d < to_pixel[0]; ++d)
          for (int64_t h = from_pixel[1]; h < to_pixel[1]; ++h) {
            const int64_t at[3] = {d, h, from_pixel[2]};
            int64_t to = n * call_.target_stride[0];
            int64_t from =
                patched_ ? (n - lower[0]) * layout_.elements + shift : n * call_.image_stride[0];
            for (int a = 0; a < 3; ++a) {
              to += (grid[a].first + at[a] * grid[a].step) * call_.target_stride[a + 2];
              from += (at[a] - (patched_ ? lower[a + 1] : 0)) * row_step_[a];
            }
            for (int64_t x = 0; x < width; x += wide_ ? L : 1) {
              // The last vector of a row that is not a multiple overlaps the one before.
              if (wide_ && x + L > width) x = most(width - L, 0);
              const int64_t at_x = from + x * row_step_[2];
              if constexpr (widens) {
                if (patched_)
                  w.row[next] = w.patch + at_x;
                else
                  w.narrow[next] = place.image + at_x;
              } else {
                w.row[next] = (patched_ ? w.patch : place.image) + at_x;
              }
              w.position[next++] = to + x * grid[2].step * call_.target_stride[4];
            }
          }
      w.rows_of[i] = next - first;
      w.width_of[i] = width;
    }
  }

  void fill_patch(const Place& place, T* patch, int64_t first, int64_t channels) const {
    const int64_t image_size[3] = {reach_[0].image_size, reach_[1].image_size,
                                   reach_[2].image_size};
    const int64_t hop[3] = {reach_[0].hop, reach_[1].hop, reach_[2].hop};
    for (int64_t n = place.lower[0]; n < place.upper[0]; ++n)
      copy_patch(patch + (n - place.lower[0]) * layout_.elements, layout_,
                 place.image + n * call_.image_stride[0] + first * call_.image_stride[1],
                 call_.image_stride[1], call_.image_stride + 2, image_size, place.box, hop,
                 channels);
  }

  int at_once() const { return wide_ ? in_turns_ : 1; }  // panels whose results take turns

  // Groups [g0, g1) of one tile of lanes, for panel i or those whose results take turns.
  struct Step {
    int64_t g0, g1;
    int i;
    int64_t rows;
    LaneTile tile;
    const S* weight;
    int64_t lane;    // of the block, that the tile begins with
    bool is_packed;  // by an earlier box
    T* total;
    S* to;
    int64_t to_pixel, width;  // of a row of the result: the distance of its pixels, their number
  };

  // The groups from g0 to g1 for all tiles of lanes, panel after panel.
  void multiply_groups(const Place& place, Workspace& w, int64_t g0, int64_t g1) const {
    const LaneBlock<T, K::chains> block(call_.lanes, place.lane_block, lane_blocks_);
    const int64_t tiles = wide_ ? up(call_.lanes, Size::wide_rows / chains_held_) : block.tiles;
    const int64_t first_lane = wide_ ? 0 : block.first_vec * L;
    for (int i = 0; i < panels_; i += at_once()) {
      const int64_t rows = rows_of_panel(w, i);
      T* total = w.totals + (one_chunk_ ? 0 : i * totals_of_panel());
      for (int64_t j = 0; j < tiles && rows > 0; ++j) {
        const LaneTile tile = wide_ ? tile_of_rows(tiles, j) : block.tile(j);
        const int64_t channel = place.group * call_.lanes + tile.first;
        set_bias(w.bias, channel, tile.lanes);
        const Step step{.g0 = g0,
                        .g1 = g1,
                        .i = i,
                        .rows = rows,
                        .tile = tile,
                        .weight = call_.weight + place.group * call_.group_stride +
                                  tile.first * call_.lane_stride,
                        .lane = tile.first - first_lane,
                        .is_packed = w.packed_lanes == lanes_of(place),
                        .total = total,
                        .to = call_.target + channel * call_.target_stride[1],
                        .to_pixel = grid_[i][2].step * call_.target_stride[4],
                        .width = least(place.upper[3], grid_[i][2].count) - place.lower[3]};
        multiply_tile(place, w, step);
        if (!one_chunk_) total += rows * pitch_of(tile);
      }
    }
  }
  // Of a wide tile, whose rows are the lanes: at most so many vectors of pixels go side by side.
  LaneTile tile_of_rows(int64_t tiles, int64_t j) const {
    const int64_t first = cut_at(call_.lanes, tiles, j);
    const auto rows = static_cast<int>(cut_at(call_.lanes, tiles, j + 1) - first);
    return {first, rows, Size::wide_vecs(rows) / chains_held_};
  }
  int64_t pitch_of(const LaneTile& tile) const {  // of a row's totals, or a vector's
    return int64_t{wide_ ? tile.lanes : tile.vecs} * L;
  }
  void set_bias(T* bias, int64_t channel, int lanes) const {
    for (int64_t l = 0; l < up(lanes, L) * L; ++l) {
      bias[l] = call_.bias && l < lanes ? widened(call_.bias[channel + l]) : T(0);
      if (!is_half_type<S>) bias[l] += T(0);  // +0 instead of -0
    }
  }

  // After the last group the tile is stored.
  void multiply_tile(const Place& place, Workspace& w, const Step& s) const {
    if constexpr (!widens) {
      if (turned_) {
        multiply_turned_rows(w, s);
        return store(place, w, s);
      }
    }
    // Vectors that lie side by side in the result are stored out of the registers.
    const bool stores_lanes = !widens && call_.target_stride[1] == 1;
    const int elements = wide_ ? static_cast<int>(least(s.width, L)) : s.tile.lanes;
    const Finish<T, S> finish{
        s.to, w.position + s.i * box_rows_, call_.target_stride[1], w.bias, elements, &w.special};
    if (in_turns_ == 1 && (wide_ ? s.to_pixel == 1 : stores_lanes))
      return multiply_panel(w, s, s.i, &finish);
    for (int k = s.i; k < s.i + at_once(); ++k)
      multiply_panel(w, s, k, asks_for_result(s.tile) ? &finish : nullptr);
    if (s.g1 == groups_) store(place, w, s);
  }

  // Of phases that take turns the result is stored when all are complete, and asked for before.
  bool asks_for_result(const LaneTile& tile) const {
    return !widens && !wide_ && in_turns_ > 1 && tile.vecs > 1;
  }

  // The groups of panel k on top of the totals of the earlier ones. `finish` takes the totals of a
  // part's last group, or says what that asks for.
  void multiply_panel(const Workspace& w, const Step& s, int k, const Finish<T, S>* finish) const {
    const PanelTerms& all = panel_[k];
    const int width = wide_ ? s.tile.lanes : s.tile.vecs * L;
    for (int64_t g = s.g0; g < s.g1; ++g) {
      if (all.start[g] == all.start[g + 1] && g > 0) continue;
      T* panel = w.panel;
      if (keeps_panels_)  // panel after panel, tile after tile, group after group
        panel += all.first * most_lanes() + all.start[groups_] * s.lane + all.start[g] * width;
      if (!s.is_packed) pack_group(s, all, g, width, panel);
      int64_t row = k * box_rows_;
      const int64_t* const rows = w.rows_of + k * parts_;
      T* total = s.total + (k - s.i) * totals_of_panel();
      Finish<T, S> here = finish ? *finish : Finish<T, S>{};
      for (int64_t i = 0; i < all.parts; ++i) {
        const Part& part = all.part[i];
        if (asks_for_result(s.tile)) {  // one phase from the first lane on, one from the last
          const bool odd = part.grid[2].first != 0;
          here.target = s.to + (odd ? s.tile.lanes - 1 : 0) * call_.target_stride[1];
          here.row_step = odd ? -call_.target_stride[1] : call_.target_stride[1];
        }
        const Finish<T, S>* const closes = finish && g == part.last_group ? &here : nullptr;
        if (rows[i] > 0 && (g == 0 || part.start[g] < part.start[g + 1]))
          multiply_part(w, s.tile, k * parts_ + i, g, row, rows[i], panel, total, closes);
        here.position += rows[i];
        row += rows[i];
        total += rows[i] * pitch_of(s.tile);
      }
    }
  }

  // Meanwhile the next group is asked for.
  void pack_group(const Step& s, const PanelTerms& all, int64_t g, int width, T* panel) const {
    // What lies side by side in the weight: the taps of a channel, or the channels of a tap.
    const int64_t step = call_.channel_stride == 1 ? most_taps_ : 1;
    const int32_t* const start = all.start + g;
    pack_panel(panel, width, s.tile.lanes, s.weight, call_.lane_stride, all.lane + start[0],
               start[1] - start[0], step, s.weight, all.lane + start[1],
               g + 1 < s.g1 ? start[2] - start[1] : 0);
  }

  void multiply_part(const Workspace& w, const LaneTile& tile, int64_t i, int64_t g, int64_t row,
                     int64_t rows, const T* panel, T* total, const Finish<T, S>* finish) const {
    const Part& part = panel_[i / parts_].part[i % parts_];
    const Term* const terms = part.term + part.start[g];
    const int32_t* const length = part.length + g * K::chains;
    const auto multiply_wide = [&](const auto* const* vector) {
      multiply_vectors<T, K::chains>(vector, rows, terms, length, panel, tile.lanes, total, g > 0,
                                     tile.vecs, run_terms_, finish);
    };
    if (wide_ && (patched_ || !widens)) return multiply_wide(w.row + row);
    if (wide_) return multiply_wide(w.narrow + row);
    const T* const* const first = w.row + row;
    if constexpr (widens) {
      multiply_rows<T, K::chains>(first, rows, terms, length, panel, tile.vecs, total, g > 0);
    } else {
      if constexpr (has_neighbour_tiles<T>)
        if (const int some = neighbours_of(tile, part, w.width_of[i]); some > 0)
          return multiply_image_rows(some, w.width_of[i], part, g, first, rows, panel, total,
                                     finish);
      const Asks asks = finish && asks_for_result(tile) ? Asks::result : asks_;
      multiply_rows<T, K::chains>(first, rows, terms, length, panel, tile.vecs, total, g > 0, asks,
                                  finish);
    }
  }

  // So many pixels side by side share what they read; 0 if tiles of any pixels are as good.
  int neighbours_of(const LaneTile& tile, const Part& part, int64_t width) const {
    const GridAxis& axis = part.grid[2];
    const int64_t taps = part.stretch[2].taps;
    const bool some_taps = taps == 3 || taps == 5 || taps == 7;
    const bool neighbours = axis.image_step == 1 && std::llabs(axis.shift_step) == 1;
    return tile.vecs == 1 && some_taps && neighbours ? neighbour_rows_of(width) : 0;
  }

  // Image row after image row, `some` neighbours at a time.
  void multiply_image_rows(int some, int64_t width, const Part& part, int64_t g,
                           const T* const* row, int64_t rows, const T* panel, T* total,
                           const Finish<T>* finish) const {
    const Term* const terms = part.term + part.start[g];
    const int32_t* const length = part.length + g;
    const auto multiply = neighbour_tiles_of<T>(some, part.stretch[2].taps);
    const int64_t onward = part.grid[2].shift_step;  // as the taps move
    const int64_t tiles = width / some, rest = width % some;
    for (int64_t first = 0; first < rows; first += width) {
      const int64_t begin = onward > 0 ? first : first + width - 1;
      multiply(tiles,
               {row[begin], onward * row_step_[2], total + begin * L, onward * L,
                finish ? finish->position + begin : nullptr},
               terms, *length, panel, g > 0, finish);
      if (rest == 0) continue;
      const int64_t left = onward > 0 ? first + width - rest : first;
      Finish<T> here = finish ? *finish : Finish<T>{};
      here.position += left;
      multiply_rows<T, 1>(row + left, rest, terms, length, panel, 1, total + left * L, g > 0, asks_,
                          finish ? &here : nullptr);
    }
  }

  void multiply_turned_rows(const Workspace& w, const Step& s) const {
    const int lanes = s.tile.lanes;
    const T* filter[rows_turned];
    for (int l = 0; l < lanes; ++l) filter[l] = s.weight + l * call_.lane_stride;
    each_wide_run<T, 1>(lanes, s.rows, s.tile.vecs, [&](int64_t v, int64_t run, int vecs) {
      for (int64_t k = 0; k < run * vecs; ++k)
        turned_of<T, T, 1>(lanes)(
            filter, call_.channel_stride, w.row[v + k] + panel_->part->term->in_place(),
            row_step_[2], L * row_step_[2], groups_, call_.image_channels / groups_,
            s.total + ((v + k / vecs * vecs) * lanes + k % vecs) * L, vecs * L, false);
    });
  }

  int64_t row_size(int i) const {  // of the result, if phases from i on take turns
    int64_t size = 0;
    for (int k = i; k < i + in_turns_; ++k) size += grid_[k][2].count;
    return size;
  }

  void store(const Place& place, Workspace& w, const Step& s) const {
    const LaneTile& tile = s.tile;
    const T* total = s.total;
    Target<S, T> to{s.to, w.position + s.i * box_rows_, call_.target_stride[1], w.bias, tile.lanes};
    const int pixels = static_cast<int>(least(s.width, L));
    if (in_turns_ > 1 && wide_) {
      const int64_t last = place.lower[3] + most(s.width - L, 0);  // pixel of the last vector
      const Interleaved order{up(s.width, L),
                              least(in_turns_ * pixels, row_size(s.i) - last * in_turns_)};
      const auto store = in_turns_ == 2 ? store_interleaved<2, T, K::chains, S>
                                        : store_interleaved<4, T, K::chains, S>;
      w.special |= store(total, totals_of_panel(), s.rows, tile.vecs, to, order);
    } else if (in_turns_ > 1) {
      const Interleaved order{s.width,
                              least(2, row_size(s.i) - 2 * (place.lower[3] + s.width - 1))};
      for (int64_t k = 0; k < parts_; k += 2) {
        const int64_t some = w.rows_of[k], apart = some * tile.vecs * L;
        w.special |= store_pairs(total, apart, some, tile.vecs, to, order);
        total += 2 * apart;
        to.position += 2 * some;
      }
    } else if (wide_) {
      for (int64_t k = 0; k < parts_; ++k) {
        const int64_t some = w.rows_of[s.i * parts_ + k];
        w.special |= store_vectors<T, K::chains>(total, some, tile.vecs, to, s.to_pixel, pixels);
        total += some * tile.lanes * L;
        to.position += some;
      }
    } else {
      w.special |= store_rows(total, s.rows, tile.vecs, to);
    }
  }

  const Images<S>& call_;
  const GridAxis (*const grid_)[3];
  const int phases_;
  const bool wide_;         // are vectors of pixels the lanes?
  const int64_t all_taps_;  // of the kernel
  int64_t terms_ = 0, most_taps_ = 0;
  Cut cut_[3];
  Reach reach_[3];
  bool terms_in_place_, taps_in_place_;
  int64_t work_, lane_blocks_ = 1, boxes_, box_samples_, box_rows_;
  int64_t piece_[4] = {1, 1, 1, 1};  // so many of n, d, h, w
  PatchLayout layout_;
  bool patched_, turned_;
  Asks asks_ = Asks::tile;
  int64_t run_terms_ = K::group;  // multiplied at a time
  int chains_held_ = 1;  // in the registers of a wide tile; the first of two may wait in memory
  bool one_chunk_;
  bool keeps_panels_;  // of a block of lanes, from box to box
  int64_t patch_channels_;
  int64_t row_step_[3];  // from pixel to pixel, in the image or the patch
  int in_turns_ = 1;     // phases along w that are stored together
  int panels_;           // one for each phase, or one that all of them share
  int64_t groups_, parts_;
  PanelTerms* panel_;
};

// Writes the pixels of the grids: of one, or of the stride phases of one call. Returns false to
// decline; `special` becomes true if an infinity or a NaN was written. With `may_cut`, products
// with padding may be left out, which is exact unless a weight is not finite.
template <class S>
bool multiply_images(const Images<S>& call, const GridAxis (*grid)[3], int phases, bool may_cut,
                     bool& special) {
  PixelProduct<S> product(call, grid, phases, may_cut);
  if (!product.fits()) return false;
  special |= product.run();
  return true;
}

// Writes the bias, or +0, to every pixel of a grid: the result where no tap meets the image.
template <class S>
void store_bias(const Images<S>& call, const GridAxis (&grid)[3]) {
  using T = typename Kind<S>::T;
  constexpr int L = Vec<T>::lanes;
  const int64_t channels = call.groups * call.lanes, width = grid[2].count;
  const int64_t planes = grid[0].count * grid[1].count;
  Arena& plan = plan_arena();
  plan.reset(Arena::bytes_for<S>(channels) + 2 * Arena::bytes_for<T>(up(channels, L) * L));
  S* const value = plan.take<S>(channels);
  T* const bias = plan.take<T>(up(channels, L) * L);
  T* const total = plan.take<T>(up(channels, L) * L);
  {
    FloatEnvironment environment(Kind<S>::mode);
    zero_run(total, channels);
    zero_run(bias, channels);
    for (int64_t c = 0; c < channels && call.bias; ++c) bias[c] = widened(call.bias[c]);
    const int64_t start = 0;
    store_rows(total, 1, static_cast<int>(up(channels, L)),
               Target<S, T>{value, &start, 1, bias, static_cast<int>(channels)});
  }
  parallel_for(call.batch * planes, up(16384, width * channels), Kind<S>::mode,
               [&](int64_t begin, int64_t end) {
                 const int64_t to_channel = call.target_stride[1];
                 const int64_t to_pixel = grid[2].step * call.target_stride[4];
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t d = i % planes / grid[1].count, h = i % grid[1].count;
                   S* const row = call.target + i / planes * call.target_stride[0] +
                                  (grid[0].first + d * grid[0].step) * call.target_stride[2] +
                                  (grid[1].first + h * grid[1].step) * call.target_stride[3] +
                                  grid[2].first * call.target_stride[4];
                   if (to_channel == 1)
                     for (int64_t w = 0; w < width; ++w)
                       __builtin_memcpy(row + w * to_pixel, value,
                                        static_cast<size_t>(channels) * sizeof(S));
                   else if (to_pixel == 1)  // known to the compiler
                     for (int64_t c = 0; c < channels; ++c)
                       for (int64_t w = 0; w < width; ++w) row[c * to_channel + w] = value[c];
                   else
                     for (int64_t c = 0; c < channels; ++c)
                       for (int64_t w = 0; w < width; ++w)
                         row[c * to_channel + w * to_pixel] = value[c];
                 }
               });
}

}  // namespace torch_naiveconv::TNC_ISA
