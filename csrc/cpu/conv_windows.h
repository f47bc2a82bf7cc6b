// grad_weight as a packed product whose rows are the windows of taps. Start reading at
// multiply_windows; conv_dense.h says what plays which part.
#pragma once

#include "conv_blocks.h"

namespace torch_naiveconv::TNC_ISA {

// A run of pixels [first, last) of one sample as boxes of the outputs: one box if that is small
// enough, else cut where it crosses from one plane or one row into the next.
struct Bands {
  int count = 0;
  struct Band {
    int64_t first, last;  // pixels
    Box outputs;
  } band[4];
  int64_t size[3] = {0, 0, 0};  // of the largest patch, on each axis

  Bands(const ConvShape& s, int64_t first, int64_t last, int64_t most_elements) {
    add(s, first, last);
    if (elements() <= most_elements) return;
    const int64_t row = s.axis[2].out, plane = row * s.axis[1].out;
    count = 0;
    for (int64_t& extent : size) extent = 0;
    const int64_t next_plane = (first / plane + 1) * plane;
    const bool two_planes = next_plane < last && last <= next_plane + plane;
    const int64_t middle = two_planes ? next_plane : last;
    add_rows(s, first, middle, row);
    if (two_planes) add_rows(s, middle, last, row);
  }
  int64_t elements() const { return count * size[0] * size[1] * size[2]; }

 private:
  void add_rows(const ConvShape& s, int64_t first, int64_t last, int64_t row) {
    const int64_t next_row = (first / row + 1) * row;
    if (next_row < last && last <= next_row + row) {
      add(s, first, next_row);
      add(s, next_row, last);
    } else {
      add(s, first, last);
    }
  }
  void add(const ConvShape& s, int64_t first, int64_t last) {
    Band& b = band[count++];
    b.first = first;
    b.last = last;
    int64_t lower = first, upper = last - 1, stride = s.outputs();
    for (int a = 0; a < 3; ++a) {
      stride /= s.axis[a].out;
      b.outputs.from[a] = lower / stride;
      b.outputs.to[a] = upper / stride + 1;
      lower %= stride;
      upper %= stride;
      if (b.outputs.size(a) > 1) lower = 0, upper = stride - 1;
      size[a] = most(size[a], (b.outputs.size(a) - 1) * s.axis[a].stride +
                                  (s.axis[a].kernel - 1) * s.axis[a].dilation + 1);
    }
  }
};

// use(pixel, run, at) for the pixels [first, last), cut into runs of a row; `at` is the position.
template <class Use>
void each_run(const ConvShape& s, int64_t first, int64_t last, const Use& use) {
  int64_t at[3], rest = first;
  for (int a = 2; a >= 0; --a) at[a] = rest % s.axis[a].out, rest /= s.axis[a].out;
  for (int64_t pixel = first; pixel < last;) {
    const int64_t run = least(last - pixel, s.axis[2].out - at[2]);
    use(pixel, run, at);
    pixel += run;
    at[2] += run;
    for (int a = 2; a > 0 && at[a] == s.axis[a].out; --a) at[a] = 0, ++at[a - 1];
  }
}

// Lists the pixels [first, last) as terms, group after group: where the window of each begins in
// the image or the patch, and the number in its group. Two chains take turns. With a `tap` (of
// three axes; not with two chains) only those pixels for which it reads inside of the image.
template <int Chains, int64_t Group>
void list_pixels(const ConvShape& s, const Bands& bands, int64_t first, int64_t last,
                 const PatchLayout& layout, bool patched, const int64_t* tap, Term* term,
                 int64_t* terms_of) {
  for (int64_t g = 0; g < up(last - first, Group); ++g) terms_of[g] = 0;
  const Axis& row = s.axis[2];
  for (int b = 0; b < bands.count; ++b) {
    const Bands::Band& band = bands.band[b];
    each_run(s, band.first, band.last, [&](int64_t pixel, int64_t run, const int64_t (&at)[3]) {
      int64_t from = b * layout.elements, i = 0;
      for (int a = 0; a < 3; ++a) {
        const Axis& axis = s.axis[a];
        from += (patched ? (at[a] - band.outputs.from[a]) * axis.stride : axis.input_of(at[a], 0)) *
                layout.axis[a];
        if (tap && a < 2 && !axis.holds_input(axis.input_of(at[a], tap[a]))) run = 0;
      }
      if (tap) {
        const int64_t in = row.input_of(at[2], tap[2]);
        i = up(most(-in, 0), row.stride);
        run = least(run, up(most(row.in - in, 0), row.stride));
      }
      while (i < run) {
        const int64_t g = (pixel + i - first) / Group, group_first = first + g * Group;
        const int64_t end = least(run, group_first + Group - pixel);
        const int64_t odd = up(least(Group, last - group_first), 2);
        const auto step = static_cast<int32_t>(row.stride * layout.axis[2]);
        auto in_place = static_cast<int32_t>(from + i * step);
        auto number = static_cast<int32_t>(pixel + i - group_first);
        Term* const to = term + g * Group;
        int64_t t = terms_of[g];
        for (; i < end; ++i, ++number, in_place += step)
          to[Chains == 1 ? t++ : number / 2 + number % 2 * odd] = {in_place, number};
        terms_of[g] = Chains == 1 ? t : number;
      }
    });
  }
}

// Terms whose input lies in the padding are products with +0; `skip_padding` leaves them out, which
// is exact if the gradient is finite. Then each tap has its own list of terms. Returns false to
// decline; `special` becomes true if an infinity or a NaN was written.
template <class S>
bool multiply_windows(const ConvProblem& p, bool skip_padding, bool& special) {
  using K = Kind<S>;
  using T = typename K::T;
  using Size = TileSize<T, K::chains>;
  constexpr int L = Vec<T>::lanes;
  const ConvShape& s = p.shape;
  const int64_t pixels = s.outputs(), taps = s.taps(), lane_vecs = up(s.group_out(), L);
  const int64_t* const image_stride = p.input.stride;
  const int64_t* const grad_stride = p.output.stride;
  const int64_t* const weight_stride = p.weight.stride;

  // Neighbouring rows should lie side by side in the weight, or share their terms.
  const bool channels_inside = weight_stride[1] == 1;
  const bool taps_first = channels_inside || skip_padding;
  const int64_t lists = skip_padding ? taps : 1;
  const int64_t chunk_groups = most(2048 / K::group / up(lists, 8), 1);

  // Does a row point into the image or into a patch?
  bool patched = is_half_type<S>;
  int64_t image_reach = 0, grad_reach = 0;
  for (int a = 0; a < 3; ++a) {
    const Axis& axis = s.axis[a];
    patched =
        patched || (!skip_padding &&
                    (axis.pad > 0 || axis.input_of(axis.out - 1, axis.kernel - 1) >= axis.in));
    image_reach += axis.in * std::llabs(image_stride[a + 2]);
    grad_reach += axis.out * std::llabs(grad_stride[a + 2]);
  }
  patched = patched || (!skip_padding && image_reach > INT32_MAX);
  if (grad_reach > INT32_MAX || (!patched && image_reach > INT32_MAX)) return false;
  // The chunks of one long row are alike: their terms are listed from the first pixel of each.
  const bool alike = !patched && !skip_padding && s.axis[0].out * s.axis[1].out == 1;

  // Then the terms of a row may lie side by side as well.
  const bool side_by_side = alike && taps == 1 && s.axis[2].stride * image_stride[4] == 1;

  // Cut the gradient into blocks of input channels x lanes that fit the caches and feed all
  // threads. A block's patch must hold at least what one group reads.
  const int64_t threads = thread_count();
  const int64_t work = s.batch * pixels * taps * s.group_in() * s.out_channels;
  int64_t patch_channels = s.group_in();  // at most
  if (patched) {
    const Bands worst(s, 0, least(pixels, K::group), 0);
    patch_channels =
        least(patch_channels, patch_bytes / (int64_t{sizeof(T)} * 2 * worst.elements()));
  }
  int64_t lane_blocks = up(lane_vecs * L, 256);
  // Few rows and lanes, one block of totals, share badly: then blocks of samples are shared. The
  // first block adds its groups up, the others keep the sum of each group, and who is done last
  // adds them in order.
  const int64_t all_rows = s.group_in() * taps, sample_groups = up(pixels, K::group);
  const int64_t sum_size = all_rows * lane_vecs * L;
  int64_t sample_blocks = 1;
  if (work > work_of_task && s.groups == 1 && K::chains == 1 && lists == 1 && p.total == nullptr &&
      lane_blocks == 1 && patch_channels == s.group_in() && s.group_in() < 4 * threads &&
      all_rows > rows_turned && sum_size * int64_t{sizeof(T)} <= total_bytes &&
      up(s.batch, threads) * sample_groups * sum_size * int64_t{sizeof(T)} <= sum_bytes)
    sample_blocks = least(threads, s.batch);
  const bool shared = sample_blocks > 1;
  const int64_t first_kept = cut_at(s.batch, sample_blocks, 1);  // sample
  const int64_t shared_size = (1 + (s.batch - first_kept) * sample_groups) * sum_size;
  Arena& plan = plan_arena();
  if (shared) plan.reset(Arena::bytes_for<T>(shared_size));
  T* const shared_total = shared ? plan.take<T>(shared_size) : nullptr;
  std::atomic<int64_t> blocks_done{0};
  if (work > work_of_task && s.groups < threads && !shared)
    // Few channels would share badly: then vectors of lanes are shared one by one.
    lane_blocks = most(lane_blocks,
                       least(up(threads, s.groups),
                             s.group_in() < 4 * threads ? lane_vecs : up(lane_vecs, Size::vecs)));
  const int64_t block_vecs = up(lane_vecs, lane_blocks);
  int64_t block_channels =
      least(patch_channels, total_bytes / (int64_t{sizeof(T)} * block_vecs * L * taps));
  int64_t channel_blocks = up(s.group_in(), most(1, block_channels));
  if (work > work_of_task && !shared)
    channel_blocks = most(channel_blocks, least(s.group_in(), up(threads, s.groups * lane_blocks)));
  // Rows that share their terms are better whole tiles.
  const int tile_rows =
      Size::rows_of(LaneBlock<T, K::chains>(s.group_out(), 0, lane_blocks).tile(0).vecs);
  const int64_t unit = least(skip_padding ? tile_rows : 1, s.group_in());
  const auto first_channel = [&](int64_t block) {
    return least(s.group_in(), cut_at(up(s.group_in(), unit), channel_blocks, block) * unit);
  };
  channel_blocks = least(channel_blocks, up(s.group_in(), unit));
  block_channels = up(up(s.group_in(), unit), channel_blocks) * unit;
  const int64_t most_rows = block_channels * taps;
  const bool by_pixel =
      image_stride[1] == 1 && image_stride[4] != 1 && (taps_first || block_channels <= 4);
  const int64_t patch_pitch =  // elements of a pixel
      by_pixel ? PatchLayout::by_pixel(block_channels, {1, 1, 1}).axis[2] : block_channels;
  const int64_t patch_limit = patch_bytes / int64_t{sizeof(T)} / patch_pitch;

  const int64_t tasks = s.groups * lane_blocks * channel_blocks * sample_blocks;
  parallel_for(
      tasks, most(1, work_of_task * tasks / most(work, 1)), K::mode,
      [&](int64_t begin, int64_t end) {
        Arena& arena = task_arena();
        // The largest patch of any chunk: at least one group's, else within the limit.
        int64_t patch_size = 0;
        if (patched) {
          for (int64_t g = 0; g * K::group < pixels; ++g) {
            const Bands bands(s, g * K::group, least(pixels, (g + 1) * K::group), patch_limit);
            patch_size = most(patch_size, bands.elements());
          }
          // Each channel of a band is rounded up (PatchLayout), by less than 64 elements.
          constexpr int64_t most_bands = sizeof(Bands::band) / sizeof(Bands::Band);
          patch_size = (most(patch_size, patch_limit) + 64 * most_bands) * patch_pitch + L;
        }
        const int64_t total_size = most_rows * block_vecs * L;
        const int64_t panel_size = K::group * L * Size::vecs;
        const int64_t table_size = chunk_groups * K::group;  // of one list
        arena.reset(Arena::bytes_for<T>(total_size) + Arena::bytes_for<T>(panel_size) +
                    Arena::bytes_for<T>(patch_size) + Arena::bytes_for<T>(block_vecs * L) +
                    Arena::bytes_for<const T*>(most_rows) + Arena::bytes_for<int64_t>(most_rows) +
                    Arena::bytes_for<int32_t>(most_rows) +
                    Arena::bytes_for<Term>(lists * table_size) +
                    Arena::bytes_for<int32_t>(table_size) +
                    Arena::bytes_for<int64_t>(lists * chunk_groups));
        T* const own_totals = arena.take<T>(total_size);
        T* const totals = shared ? shared_total : own_totals;
        T* const panel = arena.take<T>(panel_size);
        T* const patch = arena.take<T>(patch_size);
        T* const no_bias = arena.take<T>(block_vecs * L);
        const T** const row = arena.take<const T*>(most_rows);
        int64_t* const position = arena.take<int64_t>(most_rows);
        int32_t* const order = arena.take<int32_t>(most_rows);
        Term* const term = arena.take<Term>(lists * table_size);
        int32_t* const lane_offset = arena.take<int32_t>(table_size);
        int64_t* const terms_of = arena.take<int64_t>(lists * chunk_groups);
        zero_run(no_bias, block_vecs * L);

        for (int64_t task = begin; task < end; ++task) {
          const int64_t channel_block = task % channel_blocks;
          const int64_t lane_block = task / channel_blocks % lane_blocks;
          const int64_t group = task / channel_blocks / lane_blocks % s.groups;
          const int64_t sample_block = task / channel_blocks / lane_blocks / s.groups;
          const LaneBlock<T, K::chains> block(s.group_out(), lane_block, lane_blocks);
          const int64_t channel0 = first_channel(channel_block);
          const int64_t channel1 = first_channel(channel_block + 1);
          const int64_t channels = channel1 - channel0, rows = channels * taps;
          const S* const image = static_cast<const S*>(p.input.data) +
                                 (group * s.group_in() + channel0) * image_stride[1];
          const S* const grad =
              static_cast<const S*>(p.output.data) + group * s.group_out() * grad_stride[1];

          // Lanes that lie side by side serve a single tile of rows where they are, if the terms
          // are whole rows of a panel apart: so many. Zero: they are packed.
          const int64_t panel_row = block.vecs / block.tiles * L;
          const bool in_place = std::is_same_v<S, T> && alike && grad_stride[1] == 1 &&
                                rows <= tile_rows && block.vecs % block.tiles == 0 &&
                                (block.first_vec + block.vecs) * L <= s.group_out() &&
                                grad_stride[4] % panel_row == 0;
          const int64_t panel_step = in_place ? grad_stride[4] / panel_row : 0;

          // use(r, c, d, h, w) for all rows, tap after tap or channel after channel
          const auto each_row = [&](bool by_tap, const auto& use) {
            int64_t r = 0;
            const int64_t outer = by_tap ? 1 : channels, inner = by_tap ? channels : 1;
            for (int64_t c = 0; c < outer; ++c)
              for (int64_t d = 0; d < s.axis[0].kernel; ++d)
                for (int64_t h = 0; h < s.axis[1].kernel; ++h)
                  for (int64_t w = 0; w < s.axis[2].kernel; ++w)
                    for (int64_t k = 0; k < inner; ++k) use(r++, c + k, d, h, w);
          };

          // The totals begin with the earlier ones.
          const bool resumed = p.total != nullptr;
          if (resumed) {
            const T* const earlier = static_cast<const T*>(p.total);
            T* to = totals;
            for (int64_t i = 0; i < block.tiles; ++i) {
              const LaneTile tile = block.tile(i);
              const int64_t lane0 = group * s.group_out() + tile.first;
              each_row(taps_first, [&](int64_t r, int64_t c, int64_t d, int64_t h, int64_t w) {
                const int64_t tap = (d * s.axis[1].kernel + h) * s.axis[2].kernel + w;
                for (int64_t j = 0; j < tile.vecs * L; ++j) {
                  const int64_t from = ((lane0 + j) * s.group_in() + channel0 + c) * taps + tap;
                  to[r * tile.vecs * L + j] = j < tile.lanes ? earlier[from] : T(0);
                }
              });
              to += rows * tile.vecs * L;
            }
          }

          int64_t known_first = 0, known_last = 0;  // the chunk whose terms are listed
          const int64_t n0 = cut_at(s.batch, sample_blocks, sample_block);
          const int64_t n1 = cut_at(s.batch, sample_blocks, sample_block + 1);
          for (int64_t n = n0; n < n1; ++n)
            for (int64_t first = 0; first < pixels;) {
              // A chunk: the groups whose windows fit into the patch, or in place into the cache,
              // where all tiles of lanes find them.
              int64_t last = least(pixels, first + K::group);
              Bands bands(s, first, last, patch_limit);
              while (last < pixels && last - first < table_size) {
                const int64_t next = least(pixels, last + K::group);
                const Bands more(s, first, next, INT64_MAX);
                if ((patched ? more.elements() : next - first) > patch_limit) break;
                bands = more;
                last = next;
              }

              PatchLayout layout;
              const int64_t origin = alike ? first : 0;  // the pixel where offsets begin
              const S* const sample =
                  image + n * image_stride[0] + origin * s.axis[2].stride * image_stride[4];
              if (patched) {
                layout = by_pixel ? PatchLayout::by_pixel(channels, bands.size)
                                  : PatchLayout::of(channels, bands.size);
                const int64_t image_size[3] = {s.axis[0].in, s.axis[1].in, s.axis[2].in};
                for (int b = 0; b < bands.count; ++b) {
                  Box box;
                  for (int a = 0; a < 3; ++a) {
                    const Axis& axis = s.axis[a];
                    box.from[a] = axis.input_of(bands.band[b].outputs.from[a], 0);
                    box.to[a] = axis.input_of(bands.band[b].outputs.to[a] - 1, axis.kernel - 1) + 1;
                  }
                  copy_patch(patch + b * layout.elements, layout, sample, image_stride[1],
                             image_stride + 2, image_size, box, {1, 1, 1}, channels);
                }
              } else {
                layout.channel = image_stride[1];
                for (int a = 0; a < 3; ++a) layout.axis[a] = image_stride[a + 2];
              }

              // The rows: one tap of one channel each.
              const T* const corner = patched ? patch : reinterpret_cast<const T*>(sample);
              each_row(taps_first, [&](int64_t r, int64_t c, int64_t d, int64_t h, int64_t w) {
                row[r] = corner + c * layout.channel + d * s.axis[0].dilation * layout.axis[0] +
                         h * s.axis[1].dilation * layout.axis[1] +
                         w * s.axis[2].dilation * layout.axis[2];
              });

              if (first - origin != known_first || last - origin != known_last) {
                known_first = first - origin;
                known_last = last - origin;
                if (alike) bands = Bands(s, known_first, known_last, patch_limit);
                each_run(s, known_first, known_last,
                         [&](int64_t pixel, int64_t run, const int64_t (&at)[3]) {
                           const int64_t of = at[0] * grad_stride[2] + at[1] * grad_stride[3] +
                                              at[2] * grad_stride[4];
                           for (int64_t i = 0; i < run; ++i)
                             lane_offset[pixel - known_first + i] =
                                 static_cast<int32_t>(of + i * grad_stride[4]);
                         });
                for (int64_t list = 0; list < lists; ++list) {
                  const int64_t kw = s.axis[2].kernel, kh = s.axis[1].kernel;
                  const int64_t tap[3] = {list / kw / kh, list / kw % kh, list % kw};
                  list_pixels<K::chains, K::group>(s, bands, known_first, known_last, layout,
                                                   patched, skip_padding ? tap : nullptr,
                                                   term + list * table_size,
                                                   terms_of + list * chunk_groups);
                }
                for (int64_t i = 0; i < last - first && panel_step > 0; ++i)
                  term[i].packed *= static_cast<int32_t>(panel_step);
              }

              T* total = totals;
              for (int64_t i = 0; i < block.tiles; ++i) {
                const LaneTile tile = block.tile(i);
                const S* const lanes = grad + n * grad_stride[0] + tile.first * grad_stride[1] +
                                       origin * grad_stride[4];
                int64_t turned = 0;  // terms
                if constexpr (std::is_same_v<S, T>)
                  if (rows <= rows_turned && lists == 1 && tile.lanes == tile.vecs * L &&
                      grad_stride[4] == 1 && alike) {
                    const int64_t groups = (last - first) / K::group;
                    for (int j = 0; j < tile.vecs; ++j)  // long runs of few channels
                      turned_of<T>(rows)(row, s.axis[2].stride * image_stride[4],
                                         lanes + j * L * grad_stride[1], grad_stride[1], 3 * L,
                                         groups, K::group, total + j * L, tile.vecs * L,
                                         resumed || n > 0 || first > 0);
                    turned = groups * K::group;
                  }
                for (int64_t t = turned; t < last - first; t += K::group) {
                  const int64_t left = last - first - t;
                  const bool keeps = sample_block > 0;
                  const bool resume = !keeps && (resumed || n > 0 || first + t > 0);
                  const int64_t kept = (n - first_kept) * sample_groups + (first + t) / K::group;
                  T* const to = total + (keeps ? (1 + kept) * sum_size : 0);
                  const T* packed = panel;
                  if (panel_step > 0)
                    packed = reinterpret_cast<const T*>(lanes) + t * grad_stride[4];
                  else
                    pack_panel(panel, tile.vecs * L, tile.lanes, lanes, grad_stride[1],
                               lane_offset + t, least(left, K::group), 1,
                               lane_offset + t + K::group, least(left - K::group, K::group));
                  if constexpr (std::is_same_v<S, T>)
                    if (side_by_side && panel_step == 0 && left >= K::group) {
                      const int64_t tiles = rows / Size::rows_of(tile.vecs);
                      const int64_t rest = tiles * Size::rows_of(tile.vecs);
                      runs_of<T>(tile.vecs)(tiles, row[0] + term[t].in_place, layout.channel,
                                            K::group, panel, to, resume);
                      const int32_t length[max_chains] = {K::group};
                      if (rest < rows)
                        multiply_rows<T, K::chains>(row + rest, rows - rest, term + t, length,
                                                    panel, tile.vecs, to + rest * tile.vecs * L,
                                                    resume);
                      continue;
                    }
                  for (int64_t list = 0; list < lists; ++list) {
                    const int64_t terms = terms_of[list * chunk_groups + t / K::group];
                    const int32_t length[max_chains] = {static_cast<int32_t>(up(terms, K::chains)),
                                                        static_cast<int32_t>(terms / 2)};
                    const int64_t row0 = rows / lists * list;
                    if (terms > 0 || !resume)
                      multiply_rows<T, K::chains>(row + row0, rows / lists,
                                                  term + list * table_size + t, length, packed,
                                                  tile.vecs, to + row0 * tile.vecs * L, resume);
                  }
                }
                total += rows * tile.vecs * L;
              }
              first = last;
            }

          if (shared) {
            if (blocks_done.fetch_add(1) + 1 < sample_blocks) continue;
            for (int64_t i = 0; i < sum_size; i += L) {
              auto sum = Vec<T>::load(totals + i);
              for (int64_t j = i + sum_size; j < shared_size; j += sum_size)
                sum = sum + Vec<T>::load(totals + j);
              sum.store(totals + i);
            }
          }
          each_row(channels_inside, [&](int64_t r, int64_t c, int64_t d, int64_t h, int64_t w) {
            const int64_t tap = (d * s.axis[1].kernel + h) * s.axis[2].kernel + w;
            order[r] = static_cast<int32_t>(taps_first ? tap * channels + c : c * taps + tap);
            position[r] = (channel0 + c) * weight_stride[1] + d * weight_stride[2] +
                          h * weight_stride[3] + w * weight_stride[4];
          });
          const T* total = totals;
          bool task_special = false;
          for (int64_t i = 0; i < block.tiles; ++i) {
            const LaneTile tile = block.tile(i);
            const int64_t base = (group * s.group_out() + tile.first) * weight_stride[0];
            if (p.keep_total)
              task_special |= store_rows(total, rows, tile.vecs, tile.lanes, no_bias,
                                         static_cast<T*>(p.weight.data) + base, position,
                                         weight_stride[0], order);
            else
              task_special |= store_rows(total, rows, tile.vecs, tile.lanes, no_bias,
                                         static_cast<S*>(p.weight.data) + base, position,
                                         weight_stride[0], order);
            total += rows * tile.vecs * L;
          }
          if (task_special) __atomic_store_n(&special, true, __ATOMIC_RELAXED);
        }
      });
  return true;
}

}  // namespace torch_naiveconv::TNC_ISA
