// Runs the kernel of the row "amx" on an emulated matrix unit and compares every bit with the naive
// row. Reads one case a line from stdin, echoes those that differ or are declined; exit status 1 if
// any is. With an argument it says instead whether the self-test trusts a unit of that name.
//
//   direction values format threads limits bias total  N C K groups
//   3 x (in kernel stride pad_before pad_after dilation)
#include "../../csrc/cpu/kernels.h"

#pragma GCC target("avx2,fma,f16c")
#define TNC_ISA emulated
#include "../../csrc/cpu/vec_avx2.h"

#include "../../csrc/cpu/conv_amx.h"
#include "../cuda/emulation.h"

namespace torch_naiveconv {

extern const ConvRow conv_naive;

namespace emulated {

enum class Fault { none, one_chain, gradual, tiny_before_rounding, keeps_subnormals, truncates };

// TDPBF16PS as its manual has it, or with one rule broken.
template <Fault fault>
struct Arithmetic {
  static float multiplied(BFloat16 a, BFloat16 b, float c) {
    if (fault == Fault::gradual) return fused(operand(a), operand(b), c);
    if (fault == Fault::keeps_subnormals) return flushed_fused(widen(a), widen(b), c);
    if (fault == Fault::tiny_before_rounding) {
      const double exact = static_cast<double>(operand(a)) * operand(b) + c;
      if (std::fabs(exact) < double{smallest_normal}) return std::copysign(0.0f, float(exact));
    }
    if (fault == Fault::truncates) {
      const double exact = static_cast<double>(operand(a)) * operand(b) + c;
      const float nearest = static_cast<float>(exact);
      return flushed(std::fabs(nearest) > std::fabs(exact) ? std::nextafterf(nearest, 0) : nearest);
    }
    return flushed_fused(operand(a), operand(b), c);
  }
  static float group(const BFloat16* row, const BFloat16* columns, float total) {
    float chain[2] = {0, 0};
    for (int t = 0; t < depth; ++t) {
      float& c = chain[fault == Fault::one_chain ? 0 : t % 2];
      c = multiplied(row[t], columns[t / 2 * 2 * side + t % 2], c);
    }
    return flushed_add(flushed(total), flushed_add(chain[0], chain[1]));
  }
};

template <Fault fault>
class Unit {
 public:
  explicit Unit(int some_rows = side) {
    if (configured++ != 0) std::abort();
    height = some_rows;
    std::memset(static_cast<void*>(rows), 0xff, sizeof(rows));  // NaN
    std::memset(static_cast<void*>(columns), 0xff, sizeof(columns));
    std::memset(static_cast<void*>(totals), 0xff, sizeof(totals));
  }
  ~Unit() { --configured; }

  static void fence() {
    if (configured != 1) std::abort();
  }
  template <int Total>
  static void zero_total() {
    std::memset(totals[Total], 0, sizeof(totals[Total]));
  }
  template <int Total>
  static void load_total(const float* p) {
    std::memcpy(totals[Total], p, height * sizeof(totals[Total][0]));
  }
  template <int Total>
  static void store_total(float* p) {
    std::memcpy(p, totals[Total], height * sizeof(totals[Total][0]));
  }
  template <int Tile>
  static void load_rows(const BFloat16* p, int64_t row_bytes) {
    for (int r = 0; r < height; ++r)
      std::memcpy(rows[Tile][r], reinterpret_cast<const char*>(p) + r * row_bytes, 64);
  }
  template <int Tile>
  static void load_columns(const BFloat16* p) {
    std::memcpy(columns[Tile], p, sizeof(columns[Tile]));
  }
  template <int Total, int Rows, int Columns>
  static void multiply() {
    for (int r = 0; r < height; ++r)
      for (int c = 0; c < side; ++c)
        totals[Total][r][c] =
            Arithmetic<fault>::group(rows[Rows][r], columns[Columns][0][c], totals[Total][r][c]);
  }

 private:
  static inline int configured = 0, height = side;
  static inline float totals[4][side][side];
  static inline BFloat16 rows[2][side][depth], columns[4][depth / 2][side][2];
};

bool is_trusted(const std::string& name) {
  if (name == "exact") return unit_is_exact<Unit<Fault::none>>();
  if (name == "one chain") return unit_is_exact<Unit<Fault::one_chain>>();
  if (name == "gradual") return unit_is_exact<Unit<Fault::gradual>>();
  if (name == "tiny before rounding") return unit_is_exact<Unit<Fault::tiny_before_rounding>>();
  if (name == "keeps subnormals") return unit_is_exact<Unit<Fault::keeps_subnormals>>();
  if (name == "truncates") return unit_is_exact<Unit<Fault::truncates>>();
  std::abort();
}

// 0: about 1; 1: products about the smallest normal number, and subnormals; 2: powers of two whose
// sums lie just below it; 3: infinities and NaNs among the first; 4: all zeros and ones.
BFloat16 element(std::mt19937& random, int kind) {
  const uint32_t r = static_cast<uint32_t>(random());
  const uint32_t sign = r & 0x8000u, mantissa = r & 0x7fu, pick = r >> 16 & 15;
  static constexpr uint32_t edge[] = {64, 64, 52, 51};
  uint32_t bits = (124 + pick % 8) << 7 | mantissa;
  if (kind == 1) bits = (pick == 0 ? 0 : 60 + pick % 8) << 7 | mantissa;
  if (kind == 2) bits = edge[pick % 4] << 7;
  if (kind == 3 && r >> 20 < 20) bits = pick % 2 ? 0x7f80 : 0x7f81;
  if (kind == 4) bits = pick % 2 ? 0 : 0x3f80;
  return {static_cast<uint16_t>(sign | bits)};
}

struct Tensor {
  std::unique_ptr<BFloat16[]> data;  // exactly as long as the strides say
  int64_t count = 1;
  RawView view;

  // Every stride is `gap` times the dense one.
  Tensor(const int64_t (&size)[5], bool channels_last, int64_t gap) {
    const int order_last[] = {1, 4, 3, 2, 0}, order_first[] = {4, 3, 2, 1, 0};
    for (const int axis : channels_last ? order_last : order_first) {
      view.stride[axis] = gap * count;
      count *= size[axis];
    }
    if (count > 0) count = (count - 1) * gap + 1;
    data.reset(new BFloat16[static_cast<size_t>(count)]);
    view.data = data.get();
  }
  void fill(std::mt19937& random, int kind) {
    for (int64_t i = 0; i < count; ++i) data[static_cast<size_t>(i)] = element(random, kind);
  }
};

bool agrees(std::istream& in) {
  int direction = 0, values = 0, format = 0, threads = 1, small = 0, with_bias = 0, with_total = 0;
  ConvShape s;
  in >> direction >> values >> format >> threads >> small >> with_bias >> with_total;
  in >> s.batch >> s.in_channels >> s.out_channels >> s.groups;
  read_axes(in, s.axis);
  if (!in) return false;
  pretended_threads = threads;

  std::mt19937 random(12345);
  const auto& a = s.axis;
  const int64_t gap = format == 4 ? 2 : 1;
  const bool last = format == 1;
  Tensor input({s.batch, s.in_channels, a[0].in, a[1].in, a[2].in}, last || format == 2, gap);
  Tensor weight({s.out_channels, s.group_in(), a[0].kernel, a[1].kernel, a[2].kernel},
                last || format == 3, gap);
  Tensor output({s.batch, s.out_channels, a[0].out, a[1].out, a[2].out}, last || format == 3, gap);
  Tensor bias({std::max(s.in_channels, s.out_channels), 1, 1, 1, 1}, false, 1);
  input.fill(random, values), weight.fill(random, values), output.fill(random, values);
  bias.fill(random, values);
  std::vector<float> total(static_cast<size_t>(s.out_channels * s.group_in() * s.taps()));
  for (float& x : total) x = widen(element(random, values)) * widen(element(random, values));

  ConvProblem p;
  p.direction = static_cast<Direction>(direction);
  p.dtype = DType::bfloat16;
  p.shape = s;
  p.input = input.view, p.weight = weight.view, p.output = output.view;
  const bool sums = p.direction == Direction::grad_weight;
  if (!sums && with_bias) p.bias = bias.data.get();
  if (sums && with_total) p.total = total.data();
  if (sums && with_total == 2) p.keep_total = true;
  RawView& written = p.direction == Direction::forward      ? p.output
                     : p.direction == Direction::grad_input ? p.input
                                                            : p.weight;
  const Tensor& shape = p.direction == Direction::forward      ? output
                        : p.direction == Direction::grad_input ? input
                                                               : weight;
  const size_t bytes = static_cast<size_t>(shape.count) * (p.keep_total ? 4 : 2);
  std::unique_ptr<char[]> expected(new char[bytes]), found(new char[bytes]);
  std::memset(expected.get(), 0xee, bytes);
  std::memset(found.get(), 0xee, bytes);

  MatrixLimits limits;
  limits.least_channels = 0;
  limits.least_work = 0;
  limits.most_touching_taps = s.taps();
  if (small == 1) limits.panel_bytes = 4096, limits.patch_bytes = 2048, limits.most_pixels = 64;
  if (small == 2) limits.panel_bytes = 1, limits.patch_bytes = 1;
  if (small > 0) limits.strip_bytes = 6144, limits.first_cache_bytes = 2048;
  if (small == 3) limits.weight_bytes = (1 + s.taps()) * 40 * 64 * 2;
  written.data = found.get();
  const bool done = run_matrix_unit<Unit<Fault::none>>(p, limits);
  written.data = expected.get();
  conv_naive.run(p);
  if (done) return std::memcmp(expected.get(), found.get(), bytes) == 0;

  // Declined: rightly, where the bias is a -0 or an infinite weight met a gradient that is not.
  for (int64_t i = 0; p.bias != nullptr && i < bias.count; ++i)
    if ((bias.data[static_cast<size_t>(i)].bits & 0xff80) == 0x8000) return true;
  return p.direction == Direction::grad_input && values == 3;
}

}  // namespace emulated
}  // namespace torch_naiveconv

int main(int argc, char** argv) {
  using namespace torch_naiveconv;
  if (argc > 1) return std::puts(emulated::is_trusted(argv[1]) ? "trusted" : "not trusted") < 0;
  return run_cases([](std::istream& in) { return emulated::agrees(in); });
}
