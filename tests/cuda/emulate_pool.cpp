// Runs the bodies of the CUDA pooling kernels on the host and compares every bit with the naive CPU
// row. Reads one case a line from stdin, echoes those that differ; exit status 1 if any does.
//
//   direction dtype ties kind index_type values channels_last  N C
//   3 x (in kernel stride pad_before pad_after dilation)
//
// Direction 2 is max-unpooling and its transpose, of N * C planes of in[0] inputs and in[1]
// outputs.
#include "../../csrc/cuda/pool.h"
#include "emulation.h"

namespace torch_naiveconv {

extern const PoolRow pool_naive;

namespace {

struct Case {
  int direction = 0, dtype = 0, ties = 0, kind = 0, index_type = 0, values = 0, channels_last = 0;
  PoolShape shape;
};

template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

template <class T, class Index>
bool agrees(const Case& c) {
  const PoolShape& s = c.shape;
  const auto& a = s.axis;
  std::mt19937 random(12345);
  const bool last = c.channels_last != 0;
  const int64_t in[] = {s.batch, s.channels, a[0].in, a[1].in, a[2].in};
  const int64_t out[] = {s.batch, s.channels, a[0].out, a[1].out, a[2].out};
  Dense<T> input(in, last), output(out, last), input2(in, last), output2(out, last);
  Dense<Index> index(out, last), index2(out, last);
  input.fill(random, c.values);
  PoolProblem p;
  p.dtype = static_cast<DType>(c.dtype);
  p.shape = s;
  p.ties = static_cast<Ties>(c.ties);
  p.kind = static_cast<IndexKind>(c.kind);
  p.index_type = static_cast<IndexType>(c.index_type);
  p.input = input.view, p.output = output.view, p.index = index.view;
  pool_naive.run(p);
  HostLauncher launcher{{}};
  if (c.direction == 0) {
    p.output = output2.view, p.index = index2.view;
    return launch_runs(p, launcher) && same(output.data, output2.data) &&
           same(index.data, index2.data);
  }
  p.direction = PoolDirection::scatter;
  output.fill(random, c.values);  // the gradient
  pool_naive.run(p);
  p.input = input2.view;
  return launch_runs(p, launcher) && same(input.data, input2.data);
}

template <class T>
bool unpool_agrees(const Case& c) {
  UnpoolProblem p;
  p.dtype = static_cast<DType>(c.dtype);
  p.planes = c.shape.batch * c.shape.channels;
  p.inputs = c.shape.axis[0].in;
  p.outputs = c.shape.axis[1].in;
  std::mt19937 random(12345);
  Dense<T> input({p.planes, p.inputs, 1, 1, 1}, false),
      output({p.planes, p.outputs, 1, 1, 1}, false);
  input.fill(random, c.values);
  std::vector<int64_t> indices(input.data.size());
  for (int64_t& i : indices) i = static_cast<int64_t>(random() % static_cast<uint64_t>(p.outputs));
  p.indices = indices.data();
  p.input = input.data.data(), p.output = output.data.data();
  for (const bool transpose : {false, true}) {
    p.transpose = transpose;
    auto& written = transpose ? input.data : output.data;
    if (!run_unpool(p)) return false;
    const auto expected = written;
    for (const auto order : {Schedule::ascending, Schedule::descending}) {
      std::memset(static_cast<void*>(written.data()), 0xee, written.size() * sizeof(T));
      HostLauncher launcher{{order, false}};
      launch_unpool(p, launcher);
      if (!same(expected, written)) return false;
    }
  }
  // Indices outside of the plane are dropped, and nothing outside is read or written.
  for (int64_t& i : indices) i += i % 2 == 0 ? p.outputs : -p.outputs;
  for (const bool transpose : {false, true}) {
    p.transpose = transpose;
    HostLauncher launcher{{}};
    launch_unpool(p, launcher);
    for (const T& x : transpose ? input.data : output.data)
      if (!equal(x, zero<T>())) return false;
  }
  return true;
}

bool agrees(std::istream& in) {
  Case c;
  in >> c.direction >> c.dtype >> c.ties >> c.kind >> c.index_type >> c.values >> c.channels_last;
  in >> c.shape.batch >> c.shape.channels;
  read_axes(in, c.shape.axis);
  if (!in) return false;
  bool good = false;
  with_type(static_cast<DType>(c.dtype), [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (c.direction == 2) {
      good = unpool_agrees<T>(c);
      return;
    }
    switch (static_cast<IndexType>(c.index_type)) {
      case IndexType::uint8: good = agrees<T, uint8_t>(c); break;
      case IndexType::int16: good = agrees<T, int16_t>(c); break;
      case IndexType::int32: good = agrees<T, int32_t>(c); break;
      case IndexType::int64: good = agrees<T, int64_t>(c); break;
    }
  });
  return good;
}

}  // namespace
}  // namespace torch_naiveconv

int main() {
  return torch_naiveconv::run_cases([](std::istream& in) { return torch_naiveconv::agrees(in); });
}
