// Runs the bodies of the CUDA convolution kernels on the host, the tiled one block by block, and
// compares every bit with the naive CPU row. Reads one case a line from stdin, echoes those that
// differ; exit status 1 if any does.
//
//   direction dtype kernel order late split values channels_last  N C K groups
//   3 x (in kernel stride pad_before pad_after dilation)
#include "../../csrc/cuda/depthwise.h"
#include "emulation.h"

namespace torch_naiveconv {

extern const ConvRow conv_naive;

namespace {

struct Case {
  int direction = 0, dtype = 0, kernel = 0, order = 0, late = 0, split = 0, values = 0,
      channels_last = 0;
  ConvShape shape;
};

// Which kernel: a tile of Tiles<T>, or depthwise.
template <class T>
bool launch(const Case& c, const ConvProblem& p) {
  HostLauncher launcher{{static_cast<Schedule::Order>(c.order), c.late != 0}};
  SplitRule rule;
  if (c.split == 0) rule.few_blocks = 0;  // never
  if (c.split >= 2) {                     // always, with a workspace too small for all groups
    rule.few_blocks = 1 << 30;
    rule.few_groups = 2;
    rule.workspace_bytes = int64_t{1} << (c.split + 8);
    rule.wanted_blocks = 16;
  }
  if (c.kernel == 5) return launch_depthwise(p, launcher);
  if (!fits(p)) return false;
  if (!fits_masks(p)) {
    launch_tiles<typename Tiles<T>::Any>(p, rule, launcher);
    return true;
  }
  switch (c.kernel) {
    case 0: launch_tiles<typename Tiles<T>::Large>(p, rule, launcher); break;
    case 1: launch_tiles<typename Tiles<T>::Flat>(p, rule, launcher); break;
    case 2: launch_tiles<typename Tiles<T>::Slim>(p, rule, launcher); break;
    case 3: launch_tiles<typename Tiles<T>::Thin>(p, rule, launcher); break;
    default: launch_tiles<typename Tiles<T>::Any>(p, rule, launcher);
  }
  return true;
}

// Input gradients at position 0 whose flushed totals are -0 in the end, with a bias of -0: for one
// axis with a kernel of 3, which has taps there that meet no output, 31 output channels a group.
template <class T>
void fill_minus_zero(const ConvShape& s, Dense<T>& output, Dense<T>& weight, Dense<T>& bias) {
  for (T& x : output.data) x = narrow<T>(-0.0f);
  for (T& x : weight.data) x = narrow<T>(1.0f);
  for (T& x : bias.data) x = narrow<T>(-0.0f);
  const auto set = [&](int64_t oc, float gradient, float factor) {
    for (int64_t n = 0; n < s.batch; ++n)
      output.view.template as<T>().at(n, oc, 0, 0, 0) = narrow<T>(gradient);
    for (int64_t ic = 0; ic < s.group_in(); ++ic)
      weight.view.template as<T>().at(oc, ic, 0, 0, 0) = narrow<T>(factor);
  };
  for (int64_t first = 0; first + 31 <= s.out_channels; first += 31) {
    set(first, 0x1p-63f, 0x1p-63f);          // the total is 2^-126,
    set(first + 11, -0x1.8p-63f, 0x1p-63f);  // then -2^-127, flushed to -0,
    set(first + 22, -0x1p-100f, 0x1p-100f);  // then -0 + (-0 + -0)
    set(first + 23, -0x1p-100f, 0x1p-100f);
  }
}

template <class T>
bool agrees(const Case& c) {
  const ConvShape& s = c.shape;
  std::mt19937 random(12345);
  const bool last = c.channels_last != 0;
  const auto& a = s.axis;
  Dense<T> input({s.batch, s.in_channels, a[0].in, a[1].in, a[2].in}, last);
  Dense<T> weight({s.out_channels, s.group_in(), a[0].kernel, a[1].kernel, a[2].kernel}, last);
  Dense<T> output({s.batch, s.out_channels, a[0].out, a[1].out, a[2].out}, last);
  Dense<T> bias({std::max(s.in_channels, s.out_channels), 1, 1, 1, 1}, false);
  Dense<Total<T>> total({s.out_channels, s.group_in() * s.taps(), 1, 1, 1}, false);
  input.fill(random, c.values), weight.fill(random, c.values), output.fill(random, c.values);
  bias.fill(random, c.values), total.fill(random, c.values);
  if constexpr (is_half_type<T>)
    if (c.values == 4) fill_minus_zero(s, output, weight, bias);

  ConvProblem p;
  p.direction = static_cast<Direction>(c.direction);
  p.dtype = static_cast<DType>(c.dtype);
  p.shape = s;
  p.input = input.view, p.weight = weight.view, p.output = output.view;
  const bool sums = p.direction >= Direction::grad_weight;
  if (!sums) p.bias = bias.data.data();
  if (sums && c.values > 0) p.total = total.data.data(), p.keep_total = true;
  RawView& written = p.direction == Direction::forward      ? p.output
                     : p.direction == Direction::grad_input ? p.input
                                                            : p.weight;
  const size_t count = p.direction == Direction::forward      ? output.data.size()
                       : p.direction == Direction::grad_input ? input.data.size()
                       : p.direction == Direction::grad_weight
                           ? weight.data.size()
                           : static_cast<size_t>(s.out_channels);
  const size_t bytes = count * (p.keep_total ? sizeof(Total<T>) : sizeof(T));
  std::vector<Total<T>> expected(count), found(count);  // room enough for either type
  std::memset(static_cast<void*>(found.data()), 0xee, count * sizeof(Total<T>));
  written.data = expected.data();
  conv_naive.run(p);
  written.data = found.data();
  return launch<T>(c, p) && std::memcmp(expected.data(), found.data(), bytes) == 0;
}

bool agrees(std::istream& in) {
  Case c;
  in >> c.direction >> c.dtype >> c.kernel >> c.order >> c.late >> c.split >> c.values >>
      c.channels_last;
  in >> c.shape.batch >> c.shape.in_channels >> c.shape.out_channels >> c.shape.groups;
  read_axes(in, c.shape.axis);
  if (!in) return false;
  switch (static_cast<DType>(c.dtype)) {
    case DType::float32: return agrees<float>(c);
    case DType::float64: return agrees<double>(c);
    case DType::float16: return agrees<Half>(c);
    case DType::bfloat16: return agrees<BFloat16>(c);
    default: return false;
  }
}

bool divider_is_exact() {
  constexpr int64_t most = (int64_t{1} << 31) - 1;
  std::mt19937 random(1);
  for (int64_t trial = 1; trial < 20000; ++trial) {
    const int64_t d = trial < 1000 ? trial : 1 + static_cast<int64_t>(random()) % (most - 1);
    const Divider divider(d);
    const int64_t any = static_cast<int64_t>(random()) % (most + 1);
    for (const int64_t n : {int64_t{0}, d - 1, d, any, any / d * d, any / d * d + d - 1,
                            most / d * d - 1, most / d * d, most - 1, most})
      if (n <= most && divider.quotient(static_cast<uint32_t>(n)) != n / d) {
        std::printf("%ld / %ld\n", static_cast<long>(n), static_cast<long>(d));
        return false;
      }
  }
  return true;
}

}  // namespace
}  // namespace torch_naiveconv

int main() {
  if (!torch_naiveconv::divider_is_exact()) return 1;
  return torch_naiveconv::run_cases([](std::istream& in) { return torch_naiveconv::agrees(in); });
}
