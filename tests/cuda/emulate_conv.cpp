// Runs the body of the tiled CUDA kernel on the host, block by block, and compares every bit with
// the naive CPU row. Reads one case a line from stdin, echoes those that fail; exit status 1 if
// any.
//
//   direction dtype tile order late split values channels_last  N C K groups
//   3 x (in kernel stride pad_before pad_after dilation)
#include <cstdio>
#include <iostream>
#include <memory>
#include <sstream>
#include <string>
#include <type_traits>

#include "../../csrc/cpu/parallel.h"
#include "../../csrc/cuda/plan.h"
#include "emulation.h"

namespace torch_naiveconv {

void run_parallel(int64_t count, int64_t, ParallelBody body, void* context) {
  body(context, 0, count);
}
int thread_count() { return 1; }

extern const ConvRow conv_naive;

namespace {

struct HostLauncher {
  Schedule schedule;
  std::vector<std::unique_ptr<char[]>> memory;
  int launches = 0;

  void* allocate(int64_t bytes) {
    memory.push_back(std::make_unique<char[]>(static_cast<size_t>(bytes)));
    std::memset(memory.back().get(), 0xff, static_cast<size_t>(bytes));
    return memory.back().get();
  }
  template <class Config>
  void tiles(const TileLaunch& launch, int64_t blocks) {
    ++launches;
    const auto shared = std::make_unique<typename Config::Shared>();
    for (int64_t index = 0; index < blocks; ++index) {
      std::memset(static_cast<void*>(shared.get()), 0xff, sizeof(*shared));  // NaN, and index -1
      HostBlock<typename Config::Thread> block(Config::threads, schedule);
      compute_tile<Config>(block, launch, *shared, index);
    }
  }
  template <class T>
  void fold(const TileLaunch& launch, Total<T>* running, bool first, bool last, int64_t count) {
    for (int64_t i = 0; i < count; ++i) fold_element<T>(launch, running, first, last, i);
  }
};

template <class T>
T value_of(std::mt19937& random, int kind) {
  const uint64_t bits = (static_cast<uint64_t>(random()) << 32) | random();
  const bool special = kind > 0 && bits % 97 == 0;
  float x = static_cast<float>(static_cast<int32_t>(bits >> 20)) * 4.6566e-10f;
  if (kind == 2 && bits % 3 == 0) x *= 1e-38f;
  if (special) {
    const float values[] = {0.0f, -0.0f, 1e-45f, 3e38f, -3e38f, 1e-38f, INFINITY, -INFINITY, NAN};
    x = values[(bits >> 9) % (kind == 3 ? 9 : 6)];
  }
  if constexpr (is_half_type<T>)
    return narrow<T>(x);
  else
    return static_cast<T>(x);
}

// A dense tensor of (outer, channels, three axes) in either format.
template <class T>
struct Dense {
  std::vector<T> data;
  RawView view;

  Dense(const int64_t (&size)[5], bool channels_last) {
    const int order_last[] = {1, 4, 3, 2, 0}, order_first[] = {4, 3, 2, 1, 0};
    int64_t stride = 1;
    for (const int axis : channels_last ? order_last : order_first) {
      view.stride[axis] = stride;
      stride *= size[axis];
    }
    data.resize(static_cast<size_t>(stride));
    view.data = data.data();
  }
  void fill(std::mt19937& random, int kind) {
    for (T& x : data) x = value_of<T>(random, kind);
  }
};

struct Case {
  int direction, dtype, tile, order, late, split, values, channels_last;
  ConvShape shape;
};

template <class T>
bool agrees(const Case& c) {
  const ConvShape& s = c.shape;
  std::mt19937 random(12345);
  const bool last = c.channels_last != 0;
  const auto& a = s.axis;
  Dense<T> input({s.batch, s.in_channels, a[0].in, a[1].in, a[2].in}, last);
  Dense<T> weight({s.out_channels, s.group_in(), a[0].kernel, a[1].kernel, a[2].kernel}, last);
  Dense<T> output({s.batch, s.out_channels, a[0].out, a[1].out, a[2].out}, last);
  std::vector<T> bias(static_cast<size_t>(std::max(s.in_channels, s.out_channels)));
  input.fill(random, c.values), weight.fill(random, c.values), output.fill(random, c.values);
  for (T& x : bias) x = value_of<T>(random, c.values);
  std::vector<Total<T>> total(weight.data.size());
  for (auto& x : total) x = static_cast<Total<T>>(value_of<float>(random, c.values));

  ConvProblem p;
  p.direction = static_cast<Direction>(c.direction);
  p.dtype = static_cast<DType>(c.dtype);
  p.shape = s;
  p.input = input.view, p.weight = weight.view, p.output = output.view;
  if (p.direction == Direction::grad_weight) {
    // Earlier totals lie in the order of a contiguous weight.
    if (c.values > 0) p.total = total.data(), p.keep_total = true;
  } else {
    p.bias = bias.data();
  }
  RawView& written = p.direction == Direction::forward      ? p.output
                     : p.direction == Direction::grad_input ? p.input
                                                            : p.weight;
  const size_t count = p.direction == Direction::forward      ? output.data.size()
                       : p.direction == Direction::grad_input ? input.data.size()
                                                              : weight.data.size();
  using Wide = std::conditional_t<sizeof(Total<T>) >= sizeof(T), Total<T>, T>;
  const size_t bytes = count * (p.keep_total ? sizeof(Total<T>) : sizeof(T));
  std::vector<Wide> expected(count), found(count);
  std::memset(static_cast<void*>(found.data()), 0xee, count * sizeof(Wide));
  written.data = expected.data();
  conv_naive.run(p);
  written.data = found.data();

  if (!fits(p)) return true;
  SplitRule rule;
  if (c.split == 0) rule.few_blocks = 0;
  if (c.split >= 2) {
    rule.few_blocks = 1 << 30;
    rule.workspace_bytes = int64_t{1} << (c.split + 8);
    rule.wanted_blocks = 16;
  }
  HostLauncher launcher{{static_cast<Schedule::Order>(c.order), c.late != 0}, {}, 0};
  switch (c.tile) {
    case 0: launch_tiles<typename Tiles<T>::Large>(p, rule, launcher); break;
    case 1: launch_tiles<typename Tiles<T>::Medium>(p, rule, launcher); break;
    case 2: launch_tiles<typename Tiles<T>::Flat>(p, rule, launcher); break;
    default: launch_tiles<typename Tiles<T>::Thin>(p, rule, launcher);
  }
  return std::memcmp(expected.data(), found.data(), bytes) == 0;
}

}  // namespace
}  // namespace torch_naiveconv

int main() {
  using namespace torch_naiveconv;
  std::string line;
  int cases = 0, failures = 0;
  while (std::getline(std::cin, line)) {
    std::istringstream in(line);
    Case c{};
    in >> c.direction >> c.dtype >> c.tile >> c.order >> c.late >> c.split >> c.values >>
        c.channels_last;
    ConvShape& s = c.shape;
    in >> s.batch >> s.in_channels >> s.out_channels >> s.groups;
    for (Axis& axis : s.axis) {
      int64_t after;
      in >> axis.in >> axis.kernel >> axis.stride >> axis.pad >> after >> axis.dilation;
      const int64_t room = axis.in + axis.pad + after - axis.dilation * (axis.kernel - 1) - 1;
      axis.out = room < 0 ? 0 : room / axis.stride + 1;
    }
    if (!in) {
      std::printf("unreadable: %s\n", line.c_str());
      return 1;
    }
    bool good = false;
    switch (static_cast<DType>(c.dtype)) {
      case DType::float32: good = agrees<float>(c); break;
      case DType::float64: good = agrees<double>(c); break;
      case DType::float16: good = agrees<Half>(c); break;
      case DType::bfloat16: good = agrees<BFloat16>(c); break;
      default: break;
    }
    ++cases;
    if (!good) {
      ++failures;
      std::printf("differs: %s\n", line.c_str());
    }
  }
  std::printf("%d cases, %d differ\n", cases, failures);
  return failures != 0 || cases == 0;
}
