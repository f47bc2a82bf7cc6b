// grad_weight as a packed product whose rows are the windows of taps. Start reading at
// WindowProduct::run_task; conv_dense.h says what plays which part.
#pragma once

#include "conv_blocks.h"

namespace torch_naiveconv::TNC_ISA {

// A run of pixels [first, last) of one sample, and the boxes of the image that its windows read:
// one box if that is small enough, else the run is cut where it crosses from one plane or one row
// into the next. Without the padding, if only what lies `inside` of the image is read.
struct Bands {
  int count = 0;
  struct Band {
    int64_t first, last;  // pixels
    Box inputs;
  } band[4];
  bool inside;
  int64_t size[3] = {0, 0, 0};  // of the largest patch, on each axis

  Bands(const ConvShape& s, int64_t first, int64_t last, int64_t most_elements, bool inside)
      : inside(inside) {
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
      const int64_t first_output = lower / stride, outputs = upper / stride + 1 - first_output;
      lower %= stride;
      upper %= stride;
      if (outputs > 1) lower = 0, upper = stride - 1;
      const Axis& axis = s.axis[a];
      const int64_t extent = axis.extent(outputs);
      const int64_t from = axis.input_of(first_output, 0), to = from + extent;
      b.inputs.from[a] = inside ? most(from, 0) : from;
      b.inputs.to[a] = inside ? least(to, axis.in) : to;
      size[a] = most(size[a], inside ? least(extent, axis.in) : extent);
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

// Lists the pixels [first, last) as terms, group after group and chain after chain: where the
// window of each begins in the image or the patch, and the number in its group. With a `tap` (of
// three axes) only those pixels for which it reads inside of the image. `length[g * Chains + c]`
// counts.
template <int Chains, int64_t Group>
void list_pixels(const ConvShape& s, const Bands& bands, int64_t first, int64_t last,
                 const PatchLayout& layout, bool patched, const int64_t* tap, Term* term,
                 int32_t* length) {
  constexpr int64_t longest = Group / Chains;  // terms of a chain
  const int64_t groups = up(last - first, Group);
  for (int64_t g = 0; g < groups * Chains; ++g) length[g] = 0;
  const Axis& row = s.axis[2];
  for (int b = 0; b < bands.count; ++b) {
    const Bands::Band& band = bands.band[b];
    each_run(s, band.first, band.last, [&](int64_t pixel, int64_t run, const int64_t (&at)[3]) {
      int64_t from = b * layout.elements, i = 0;
      for (int a = 0; a < 3; ++a) {
        const Axis& axis = s.axis[a];
        from += (axis.input_of(at[a], 0) - (patched ? band.inputs.from[a] : 0)) * layout.axis[a];
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
        const auto step = static_cast<int32_t>(row.stride * layout.axis[2]);
        auto in_place = static_cast<int32_t>(from + i * step);
        auto number = static_cast<int32_t>(pixel + i - group_first);
        Term* const to = term + g * Group;
        int32_t count[Chains];
        for (int c = 0; c < Chains; ++c) count[c] = length[g * Chains + c];
        for (; i < end; ++i, ++number, in_place += step) {
          const int chain = number % Chains;
          to[chain * longest + count[chain]++] = {in_place, number};
        }
        for (int c = 0; c < Chains; ++c) length[g * Chains + c] = count[c];
      }
    });
  }
  if constexpr (Chains == 2)
    for (int64_t g = 0; g < groups; ++g, term += Group, length += Chains)
      for (int32_t i = 0; i < length[1]; ++i) term[length[0] + i] = term[longest + i];
}

// One call as a product: its plan, which the threads share, and what a task does. A task is a block
// of input channels, or of the rows of some, x lanes, for all samples or a block of them; its
// steps, from run_task on, follow each other below.
template <class S>
class WindowProduct {
  using K = Kind<S>;
  using T = typename K::T;
  using Size = TileSize<T, K::chains>;
  using Lanes = LaneBlock<T, K::chains>;
  static constexpr int L = Vec<T>::lanes;
  static constexpr bool widens = !std::is_same_v<S, T>;

 public:
  WindowProduct(const ConvProblem& p, bool skip_padding)
      : p_(p),
        s_(p.shape),
        skip_padding_(skip_padding),
        pixels_(s_.outputs()),
        taps_(s_.taps()),
        lane_vecs_(up(s_.group_out(), L)),
        lists_(skip_padding ? taps_ : 1),
        chunk_groups_(most(2048 / K::group / up(lists_, 8), 1)),
        channels_inside_(p.weight.stride[1] == 1),
        taps_first_(channels_inside_ || skip_padding) {
    choose_layout();
    cut_blocks();
  }

  // Can 32 bits count the elements between terms?
  bool fits() const { return fits_; }

  // Says whether an infinity or a NaN was written.
  bool run() {
    if (shared()) {
      plan_arena().reset(Arena::bytes_for<T>(shared_size_));
      shared_total_ = plan_arena().take<T>(shared_size_);
    }
    return run_tasks<K>(
        s_.groups * lane_blocks_ * channel_blocks_ * row_blocks_ * sample_blocks_, work_,
        [&] { return workspace(); }, [&](int64_t task, Workspace& w) { run_task(task, w); });
  }

 private:
  // ---- the plan --------------------------------------------------------------------------------

  // Does a row point into the image or into a patch?
  void choose_layout() {
    patched_ = widens;
    int64_t image_reach = 0, grad_reach = 0;
    for (int a = 0; a < 3; ++a) {
      const Axis& axis = s_.axis[a];
      patched_ = patched_ || (!skip_padding_ && axis.reads_padding());
      image_reach += axis.in * std::llabs(p_.input.stride[a + 2]);
      grad_reach += axis.out * std::llabs(p_.output.stride[a + 2]);
    }
    patched_ = patched_ || (!skip_padding_ && image_reach > INT32_MAX);
    fits_ = grad_reach <= INT32_MAX && (patched_ || image_reach <= INT32_MAX);
    alike_ = !skip_padding_ && s_.axis[0].out * s_.axis[1].out == 1;
    const int64_t* const grad = p_.output.stride;
    panels_in_place_ =
        !widens && grad[1] == 1 && grad[4] == lane_vecs_ * L && s_.group_out() == grad[4] &&
        lane_vecs_ <= most_vecs<T, K::chains>() &&
        (s_.axis[1].out == 1 || grad[3] == s_.axis[2].out * grad[4]) &&
        (s_.axis[0].out == 1 || grad[2] == s_.axis[1].out * s_.axis[2].out * grad[4]);
    const bool in_place = alike_ && !patched_ && taps_ == 1;
    rows_side_by_side_ = in_place && p_.input.stride[1] == 1;
    side_by_side_ = in_place && s_.axis[2].stride * p_.input.stride[4] == 1;
  }

  // The gradient into blocks of input channels x lanes that fit the caches and feed all threads. A
  // block's patch must hold at least what one group reads.
  void cut_blocks() {
    const int64_t threads = thread_count();
    work_ = s_.batch * pixels_ * taps_ * s_.group_in() * s_.out_channels;
    int64_t patch_channels = s_.group_in();  // at most
    if (patched_) {
      const Bands worst(s_, 0, least(pixels_, K::group), 0, skip_padding_);
      patch_channels =
          least(patch_channels, patch_bytes / (int64_t{sizeof(T)} * 2 * worst.elements()));
    }
    lane_blocks_ = up(lane_vecs_ * L, 256);
    // Rows can be shared, tile by tile, where a thread packs nothing for that, or little.
    const int64_t tasks = work_ > worthwhile_products ? threads : 1;
    const bool few_channels = s_.group_in() < 4 * threads;
    const bool shares_rows = (skip_padding_ && !patched_) || (panels_in_place_ && few_channels &&
                                                              s_.group_in() * taps_ >= 8 * threads);
    if (!shares_rows) share_samples(threads, patch_channels);
    if (tasks > s_.groups && !shared() && !(shares_rows && panels_in_place_))
      // Few channels would share badly: then vectors of lanes are shared one by one.
      lane_blocks_ =
          most(lane_blocks_,
               least(up(threads, s_.groups),
                     few_channels && !shares_rows ? lane_vecs_ : up(lane_vecs_, Size::vecs)));
    block_vecs_ = up(lane_vecs_, lane_blocks_);
    const int64_t block_channels =
        least(patch_channels, total_bytes / (int64_t{sizeof(T)} * block_vecs_ * L * taps_));
    channel_blocks_ = up(s_.group_in(), most(1, block_channels));
    if (!shared() && !shares_rows)
      channel_blocks_ =
          most(channel_blocks_, least(s_.group_in(), up(tasks, s_.groups * lane_blocks_)));
    // Rows that share their terms are better whole tiles.
    tile_rows_ = Size::rows_of(Lanes(s_.group_out(), 0, lane_blocks_).tile(0).vecs);
    unit_ = least(skip_padding_ ? tile_rows_ : 1, s_.group_in());
    const int64_t units = up(s_.group_in(), unit_);
    channel_blocks_ = least(channel_blocks_, units);
    most_channels_ = up(units, channel_blocks_) * unit_;
    if (shares_rows) row_blocks_ = up(tasks, s_.groups * lane_blocks_ * channel_blocks_);
    by_pixel_ =
        p_.input.stride[1] == 1 && p_.input.stride[4] != 1 && (taps_first_ || most_channels_ <= 4);
    patch_pitch_ =
        by_pixel_ ? PatchLayout::by_pixel(most_channels_, {1, 1, 1}).axis[2] : most_channels_;
    patch_limit_ = patch_bytes / int64_t{sizeof(T)} / patch_pitch_;
  }

  // Few rows and lanes, one block of totals, share badly: then blocks of samples are shared. The
  // first block adds its groups up, the others keep the sum of each group, and who is done last
  // adds them in order.
  void share_samples(int64_t threads, int64_t patch_channels) {
    const int64_t rows = s_.group_in() * taps_;
    sample_groups_ = up(pixels_, K::group);
    sum_size_ = rows * lane_vecs_ * L;
    const int64_t sum = sum_size_ * int64_t{sizeof(T)};
    if (work_ > worthwhile_products && s_.groups == 1 && K::chains == 1 && lists_ == 1 &&
        p_.total == nullptr && lane_blocks_ == 1 && patch_channels == s_.group_in() &&
        s_.group_in() < 4 * threads && rows > rows_turned && sum <= total_bytes &&
        up(s_.batch, threads) * sample_groups_ * sum <= sum_bytes)
      sample_blocks_ = least(threads, s_.batch);
    first_kept_ = cut_at(s_.batch, sample_blocks_, 1);
    shared_size_ = (1 + (s_.batch - first_kept_) * sample_groups_) * sum_size_;
  }
  bool shared() const { return sample_blocks_ > 1; }

  int64_t first_channel(int64_t block) const {
    const int64_t units = up(s_.group_in(), unit_);
    return least(s_.group_in(), cut_at(units, channel_blocks_, block) * unit_);
  }
  // Of the rows of some channels, cut where tiles are.
  int64_t first_row(int64_t channels, int64_t block) const {
    const int64_t rows = channels * taps_ / lists_, tiles = up(rows, tile_rows_);
    const int64_t tile = cut_at(lists_ * tiles, row_blocks_, block);
    return tile / tiles * rows + tile % tiles * tile_rows_;
  }
  int64_t table_size() const { return chunk_groups_ * K::group; }  // of one list

  // ---- a task ----------------------------------------------------------------------------------

  struct Workspace {
    T *totals, *panel, *patch, *no_bias;
    const T** row;
    const T* corner;     // where the rows found last begin
    PatchLayout layout;  // and how they lie
    int64_t* position;   // of each row in the weight
    int32_t* order;      // of the rows that are stored: where their totals are
    Term* term;          // list after list
    int32_t* lane_offset;
    int32_t* length;       // terms of each chain of each group of each list
    bool special = false;  // was an infinity or a NaN stored?
  };
  struct Block {  // of a task: lanes, input channels, samples
    Lanes lanes;
    int64_t group = 0, channel0 = 0, channels = 0, first_sample = 0, last_sample = 0;
    int64_t first_row = 0, rows = 0;  // of the taps of the channels
    bool keeps = false;               // the sums of its groups
    const S *image = nullptr, *grad = nullptr;
    bool in_place = false;  // are the lanes read where they are?
  };
  struct Chunk {  // pixels [first, last) of a sample: the groups whose windows fit the caches
    int64_t first, last;
    Bands bands;
    int64_t origin;  // the pixel where offsets begin
    PatchLayout layout;
  };

  Workspace workspace() const {
    // The largest patch of any chunk: at least one group's, else within the limit.
    int64_t patch = 0;
    if (patched_) {
      for (int64_t g = 0; g * K::group < pixels_; ++g) {
        const Bands bands(s_, g * K::group, least(pixels_, (g + 1) * K::group), patch_limit_,
                          skip_padding_);
        patch = most(patch, bands.elements());
      }
      // Each channel of a band is rounded up (PatchLayout), by less than 64 elements.
      constexpr int64_t most_bands = sizeof(Bands::band) / sizeof(Bands::Band);
      patch = (most(patch, patch_limit_) + 64 * most_bands) * patch_pitch_ + L;
    }
    const int64_t rows = most_channels_ * taps_, lanes = block_vecs_ * L;
    const int64_t totals = shared() ? 0 : rows * lanes, panel = K::group * L * Size::vecs;
    Arena& arena = task_arena();
    arena.reset(Arena::bytes_for<T>(totals) + Arena::bytes_for<T>(panel) +
                Arena::bytes_for<T>(patch) + Arena::bytes_for<T>(lanes) +
                Arena::bytes_for<const T*>(rows) + Arena::bytes_for<int64_t>(rows) +
                Arena::bytes_for<int32_t>(rows) + Arena::bytes_for<Term>(lists_ * table_size()) +
                Arena::bytes_for<int32_t>(table_size()) +
                Arena::bytes_for<int32_t>(lists_ * chunk_groups_ * K::chains));
    Workspace w;
    w.totals = arena.take<T>(totals);
    if (shared()) w.totals = shared_total_;
    w.panel = arena.take<T>(panel);
    w.patch = arena.take<T>(patch);
    w.no_bias = arena.take<T>(lanes);
    w.row = arena.take<const T*>(rows);
    w.position = arena.take<int64_t>(rows);
    w.order = arena.take<int32_t>(rows);
    w.term = arena.take<Term>(lists_ * table_size());
    w.lane_offset = arena.take<int32_t>(table_size());
    w.length = arena.take<int32_t>(lists_ * chunk_groups_ * K::chains);
    zero_run(w.no_bias, lanes);
    return w;
  }

  void run_task(int64_t task, Workspace& w) {
    const Block b = block_of(task);
    if (p_.total != nullptr) begin_with_earlier(b, w);
    w.corner = nullptr;
    int64_t known_first = 0, known_last = 0;  // the chunk whose terms are listed
    for (int64_t n = b.first_sample; n < b.last_sample; ++n)
      for (int64_t first = 0; first < pixels_;) {
        Chunk c = chunk_from(first);
        find_rows(b, c, n, w);
        if (c.first - c.origin != known_first || c.last - c.origin != known_last) {
          known_first = c.first - c.origin;
          known_last = c.last - c.origin;
          list_terms(b, c, known_first, known_last, w);
        }
        T* total = w.totals;
        for (int64_t i = 0; i < b.lanes.tiles; ++i) {
          const LaneTile tile = b.lanes.tile(i);
          multiply_tile(b, c, n, tile, total, w);
          total += b.rows * tile.vecs * L;
        }
        first = c.last;
      }
    if (!shared() || add_kept_sums(w)) store(b, w);
  }

  Block block_of(int64_t task) const {
    const int64_t row_block = task % row_blocks_, blocks = task / row_blocks_;
    const int64_t channel_block = blocks % channel_blocks_;
    const int64_t lane_block = blocks / channel_blocks_ % lane_blocks_;
    const int64_t sample_block = blocks / channel_blocks_ / lane_blocks_ / s_.groups;
    Block b{Lanes(s_.group_out(), lane_block, lane_blocks_)};
    b.group = blocks / channel_blocks_ / lane_blocks_ % s_.groups;
    b.channel0 = first_channel(channel_block);
    b.channels = first_channel(channel_block + 1) - b.channel0;
    b.first_row = first_row(b.channels, row_block);
    b.rows = first_row(b.channels, row_block + 1) - b.first_row;
    b.first_sample = cut_at(s_.batch, sample_blocks_, sample_block);
    b.last_sample = cut_at(s_.batch, sample_blocks_, sample_block + 1);
    b.keeps = sample_block > 0;
    b.image = static_cast<const S*>(p_.input.data) +
              (b.group * s_.group_in() + b.channel0) * p_.input.stride[1];
    b.grad = static_cast<const S*>(p_.output.data) + b.group * s_.group_out() * p_.output.stride[1];
    // Lanes that lie side by side are read in place, unless the lines of a group crowd few sets of
    // the first cache: those of a tile are to fill what is left between powers of two.
    const int64_t pitch = p_.output.stride[4];
    b.in_place = !widens && rows_side_by_side_ && p_.output.stride[1] == 1 &&
                 (b.lanes.first_vec + b.lanes.vecs) * L <= s_.group_out() &&
                 (pitch & -pitch) <= b.lanes.vecs / b.lanes.tiles * L;
    return b;
  }

  // use(r, c, d, h, w) for all rows, tap after tap or channel after channel; r counts as totals do.
  template <class Use>
  void each_row(const Block& b, bool by_tap, const Use& use) const {
    const int64_t outer = by_tap ? 1 : b.channels, inner = by_tap ? b.channels : 1;
    const int64_t channel_step = taps_first_ ? 1 : taps_, tap_step = taps_first_ ? b.channels : 1;
    for (int64_t c = 0; c < outer; ++c) {
      int64_t first = c * channel_step - b.first_row;
      for (int64_t d = 0; d < s_.axis[0].kernel; ++d)
        for (int64_t h = 0; h < s_.axis[1].kernel; ++h)
          for (int64_t w = 0; w < s_.axis[2].kernel; ++w, first += tap_step) {
            int64_t r = first;
            for (int64_t k = c; k < c + inner; ++k, r += channel_step)
              if (0 <= r && r < b.rows) use(r, k, d, h, w);
          }
    }
  }
  int64_t tap_of(int64_t d, int64_t h, int64_t w) const {
    return (d * s_.axis[1].kernel + h) * s_.axis[2].kernel + w;
  }

  void begin_with_earlier(const Block& b, Workspace& w) const {
    const T* const earlier = static_cast<const T*>(p_.total);
    T* to = w.totals;
    for (int64_t i = 0; i < b.lanes.tiles; ++i) {
      const LaneTile tile = b.lanes.tile(i);
      const int64_t lane0 = b.group * s_.group_out() + tile.first;
      each_row(b, taps_first_, [&](int64_t r, int64_t c, int64_t kd, int64_t kh, int64_t kw) {
        for (int64_t j = 0; j < tile.vecs * L; ++j) {
          const int64_t channel = (lane0 + j) * s_.group_in() + b.channel0 + c;
          to[r * tile.vecs * L + j] =
              j < tile.lanes ? earlier[channel * taps_ + tap_of(kd, kh, kw)] : T(0);
        }
      });
      to += b.rows * tile.vecs * L;
    }
  }

  // The groups whose windows fit into the patch, or in place into the cache, where all tiles of
  // lanes find them.
  Chunk chunk_from(int64_t first) const {
    const int64_t all = least(pixels_, first + table_size());
    const Bands whole(s_, first, all, INT64_MAX, skip_padding_);
    if ((patched_ ? whole.elements() : all - first) <= patch_limit_)
      return {first, all, whole, alike_ ? first : 0, PatchLayout{}};
    int64_t last = least(pixels_, first + K::group);
    Bands bands(s_, first, last, patch_limit_, skip_padding_);
    while (last < pixels_ && last - first < table_size()) {
      const int64_t next = least(pixels_, last + K::group);
      const Bands more(s_, first, next, INT64_MAX, skip_padding_);
      if ((patched_ ? more.elements() : next - first) > patch_limit_) break;
      bands = more;
      last = next;
    }
    return {first, last, bands, alike_ ? first : 0, PatchLayout{}};
  }

  // The rows, one tap of one channel each: in the image, or in the patch, which is filled.
  void find_rows(const Block& b, Chunk& c, int64_t n, Workspace& w) const {
    const int64_t* const stride = p_.input.stride;
    const S* sample = b.image + n * stride[0];
    if (patched_) {
      c.layout = by_pixel_ ? PatchLayout::by_pixel(b.channels, c.bands.size)
                           : PatchLayout::of(b.channels, c.bands.size);
      const int64_t image_size[3] = {s_.axis[0].in, s_.axis[1].in, s_.axis[2].in};
      for (int i = 0; i < c.bands.count; ++i)
        copy_patch(w.patch + i * c.layout.elements, c.layout, sample, stride[1], stride + 2,
                   image_size, c.bands.band[i].inputs, {1, 1, 1}, b.channels);
    } else {
      sample += c.origin * s_.axis[2].stride * stride[4];
      c.layout.channel = stride[1];
      for (int a = 0; a < 3; ++a) c.layout.axis[a] = stride[a + 2];
    }
    const T* const corner = patched_ ? w.patch : reinterpret_cast<const T*>(sample);
    if (w.corner != nullptr && c.layout == w.layout) {
      for (int64_t r = 0; r < b.rows && corner != w.corner; ++r) w.row[r] += corner - w.corner;
      w.corner = corner;
      return;
    }
    w.corner = corner;
    w.layout = c.layout;
    each_row(b, taps_first_, [&](int64_t r, int64_t k, int64_t kd, int64_t kh, int64_t kw) {
      w.row[r] = corner + k * c.layout.channel + kd * s_.axis[0].dilation * c.layout.axis[0] +
                 kh * s_.axis[1].dilation * c.layout.axis[1] +
                 kw * s_.axis[2].dilation * c.layout.axis[2];
    });
  }

  // Those of the pixels [first, last) of the chunk, counted from its origin.
  void list_terms(const Block& b, const Chunk& c, int64_t first, int64_t last, Workspace& w) const {
    const Bands bands = alike_ ? Bands(s_, first, last, patch_limit_, false) : c.bands;
    const int64_t* const stride = p_.output.stride;
    each_run(s_, first, last, [&](int64_t pixel, int64_t run, const int64_t (&at)[3]) {
      const int64_t of = at[0] * stride[2] + at[1] * stride[3] + at[2] * stride[4];
      for (int64_t i = 0; i < run; ++i)
        w.lane_offset[pixel - first + i] = static_cast<int32_t>(of + i * stride[4]);
    });
    for (int64_t list = 0; list < lists_; ++list) {
      const int64_t kw = s_.axis[2].kernel, kh = s_.axis[1].kernel;
      const int64_t tap[3] = {list / kw / kh, list / kw % kh, list % kw};
      list_pixels<K::chains, K::group>(s_, bands, first, last, c.layout, patched_,
                                       skip_padding_ ? tap : nullptr, w.term + list * table_size(),
                                       w.length + list * chunk_groups_ * K::chains);
    }
  }

  // One tile of lanes, the groups of a chunk.
  void multiply_tile(const Block& b, const Chunk& c, int64_t n, const LaneTile& tile, T* total,
                     Workspace& w) const {
    const int64_t* const stride = p_.output.stride;
    const S* const lanes = b.grad + n * stride[0] + tile.first * stride[1] + c.origin * stride[4];
    const bool begun = p_.total != nullptr || n > 0 || c.first > 0;
    int64_t t = 0;
    if (b.rows <= rows_turned && tile.lanes == tile.vecs * L && stride[4] == 1 && alike_)
      t = multiply_turned_groups(b, c, tile, lanes, total, begun, w);
    for (; t < c.last - c.first; t += K::group) {
      const int64_t left = c.last - c.first - t, terms = least(left, K::group);
      const bool resume = !b.keeps && (begun || t > 0);
      const int64_t kept = (n - first_kept_) * sample_groups_ + (c.first + t) / K::group;
      T* const to = total + (b.keeps ? (1 + kept) * sum_size_ : 0);
      if constexpr (!widens)
        if (b.in_place) {
          multiply_in_place(b, tile, t, reinterpret_cast<const T*>(lanes), terms, to, resume, w);
          continue;
        }
      const T* panel = w.panel;
      const bool panel_in_place = panels_in_place_ && lane_blocks_ == 1;
      // Few rows wait for the gradient, not for what they read themselves.
      const bool asks_for_panel = panel_in_place && b.rows <= 64 && lists_ == 1;
      if (panel_in_place)
        panel = reinterpret_cast<const T*>(lanes) + w.lane_offset[t];
      else
        pack_group(c, n + 1 < b.last_sample, tile, t, lanes, w);
      if constexpr (!widens)
        if (side_by_side_ && terms == K::group) {
          multiply_whole_group(b, c, tile, t, panel, to, resume, w);
          continue;
        }
      for (int64_t list = 0; list < lists_; ++list) {
        const int32_t* const length = w.length + (list * chunk_groups_ + t / K::group) * K::chains;
        const int64_t all = b.channels * taps_ / lists_, first = list * all - b.first_row;
        const int64_t row0 = most(first, 0), rows = least(first + all, b.rows) - row0;
        const bool some = length[0] > 0 || length[K::chains - 1] > 0;
        if (rows > 0 && (some || !resume))
          multiply_rows<T, K::chains>(w.row + row0, rows, w.term + list * table_size() + t, length,
                                      panel, tile.vecs, to + row0 * tile.vecs * L, resume,
                                      asks_for_panel ? Asks::panel : Asks::tile);
      }
    }
  }

  // Asks for the next group meanwhile, if need be that of the next sample.
  void pack_group(const Chunk& c, bool more_samples, const LaneTile& tile, int64_t t,
                  const S* lanes, Workspace& w) const {
    const int64_t* const stride = p_.output.stride;
    const int64_t left = c.last - c.first - t - K::group;
    const int32_t* const offset = w.lane_offset + t;
    const bool next_sample = left <= 0 && more_samples && c.last - c.first == pixels_;
    pack_panel(w.panel, tile.vecs * L, tile.lanes, lanes, stride[1], offset,
               least(left + K::group, K::group), 1, lanes + (next_sample ? stride[0] : 0),
               next_sample ? w.lane_offset : offset + K::group,
               least(next_sample ? pixels_ : left, K::group));
  }

  // Long runs of few channels, vector by vector of lanes. Says how many terms that were.
  int64_t multiply_turned_groups(const Block& b, const Chunk& c, const LaneTile& tile,
                                 const S* lanes, T* total, bool resume, const Workspace& w) const {
    const int64_t groups = (c.last - c.first) / K::group, pitch = p_.output.stride[1];
    for (int j = 0; j < tile.vecs; ++j)
      turned_of<T, S, K::chains>(b.rows)(w.row, s_.axis[2].stride * c.layout.axis[2],
                                         lanes + j * L * pitch, pitch, 3 * L, groups, K::group,
                                         total + j * L, tile.vecs * L, resume);
    return groups * K::group;
  }

  // A group whose rows and lanes are channels of pixels; those of the next group are asked for, two
  // lines of lanes by each tile of rows.
  void multiply_in_place(const Block& b, const LaneTile& tile, int64_t t, const T* lanes,
                         int64_t terms, T* to, bool resume, const Workspace& w) const {
    const int64_t lane_step = p_.output.stride[4];
    const int64_t row_step = s_.axis[2].stride * p_.input.stride[4];
    const int64_t rows_ahead = tile.first == b.lanes.first_vec * L ? K::group * row_step : 0;
    const T* row = w.row[0] + t * row_step;
    int line = 0;
    each_row_tile<T, 1>(b.rows, tile.vecs, [&](int64_t tiles, int rows) {
      const auto multiply = pixels_of<T>(rows, tile.vecs);
      for (; tiles > 0; --tiles, row += rows, to += rows * tile.vecs * L, line += 2)
        multiply(row, row_step, lanes + t * lane_step, lane_step, terms, rows_ahead,
                 line < tile.vecs ? K::group * lane_step + line * L : 0, to, resume);
    });
  }

  // A group whose terms lie side by side: whole tiles of rows without offsets, then the rest.
  void multiply_whole_group(const Block& b, const Chunk& c, const LaneTile& tile, int64_t t,
                            const T* panel, T* to, bool resume, const Workspace& w) const {
    const int64_t tiles = b.rows / Size::rows_of(tile.vecs);
    const int64_t rest = tiles * Size::rows_of(tile.vecs);
    runs_of<T>(tile.vecs)(tiles, w.row[0] + w.term[t].in_place(), c.layout.channel, K::group, panel,
                          to, resume);
    const int32_t length[max_chains] = {K::group};
    if (rest < b.rows)
      multiply_rows<T, K::chains>(w.row + rest, b.rows - rest, w.term + t, length, panel, tile.vecs,
                                  to + rest * tile.vecs * L, resume);
  }

  // Who comes last adds the sums that were kept.
  bool add_kept_sums(Workspace& w) {
    if (blocks_done_.fetch_add(1) + 1 < sample_blocks_) return false;
    for (int64_t j = sum_size_; j < shared_size_; j += sum_size_)
      for (int64_t i = 0; i < sum_size_; i += L)
        (Vec<T>::load(w.totals + i) + Vec<T>::load(w.totals + j + i)).store(w.totals + i);
    return true;
  }

  void store(const Block& b, Workspace& w) const {
    const int64_t* const stride = p_.weight.stride;
    int64_t next = 0;
    each_row(b, channels_inside_, [&](int64_t r, int64_t c, int64_t kd, int64_t kh, int64_t kw) {
      w.order[next] = static_cast<int32_t>(r);
      w.position[next++] =
          (b.channel0 + c) * stride[1] + kd * stride[2] + kh * stride[3] + kw * stride[4];
    });
    const T* total = w.totals;
    for (int64_t i = 0; i < b.lanes.tiles; ++i) {
      const LaneTile tile = b.lanes.tile(i);
      const int64_t base = (b.group * s_.group_out() + tile.first) * stride[0];
      const auto store = [&](auto* result) {
        using D = std::remove_pointer_t<decltype(result)>;
        const Target<D, T> to{result + base, w.position, stride[0], w.no_bias, tile.lanes};
        w.special |= store_rows(total, b.rows, tile.vecs, to, w.order);
      };
      if (p_.keep_total)
        store(static_cast<T*>(p_.weight.data));
      else
        store(static_cast<S*>(p_.weight.data));
      total += b.rows * tile.vecs * L;
    }
  }

  const ConvProblem& p_;
  const ConvShape& s_;
  const bool skip_padding_;
  const int64_t pixels_, taps_, lane_vecs_;
  const int64_t lists_, chunk_groups_;  // of terms, for each tap if padding is skipped
  // Neighbouring rows should lie side by side in the weight, or share their terms.
  const bool channels_inside_, taps_first_;
  bool patched_, fits_;
  bool alike_;  // the chunks of one long row: terms are listed from the first pixel of each
  bool panels_in_place_;  // does the gradient of a group lie as a panel of its lanes?
  bool rows_side_by_side_;
  bool side_by_side_;  // then the terms of a row may lie so as well
  int64_t work_, lane_blocks_, block_vecs_, channel_blocks_, most_channels_;
  int64_t row_blocks_ = 1;  // of the channels of a block
  int64_t unit_;            // channels of a block are a multiple
  int tile_rows_;
  bool by_pixel_;
  int64_t patch_pitch_, patch_limit_;  // elements of a pixel; pixels
  int64_t sample_blocks_ = 1, first_kept_ = 0, sample_groups_ = 0, sum_size_ = 0, shared_size_ = 0;
  T* shared_total_ = nullptr;
  std::atomic<int64_t> blocks_done_{0};
};

// Terms whose input lies in the padding are products with +0; `skip_padding` leaves them out, which
// is exact if the gradient is finite. Then each tap has its own list of terms. Returns false to
// decline; `special` becomes true if an infinity or a NaN was written.
template <class S>
bool multiply_windows(const ConvProblem& p, bool skip_padding, bool& special) {
  WindowProduct<S> product(p, skip_padding);
  if (!product.fits()) return false;
  special |= product.run();
  return true;
}

}  // namespace torch_naiveconv::TNC_ISA
