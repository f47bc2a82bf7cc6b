// Computes conformance cases without torch and without Python: to run the kernels on another
// processor, under another compiler or an emulator. docs/contract.md specifies the generator;
// torch_naiveconv/conformance.py is the same in Python. Start reading at main.
//
//   usage: conformance < cases > digests
//
// A line of the input is a case, one of the output is "<name> <row> <SHA-256>", for every row of
// the table that this processor can run.
#include <algorithm>
#include <array>
#include <cstdio>
#include <iostream>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "../cpu/conv.h"
#include "../cpu/max_pool.h"
#include "../cpu/parallel.h"

namespace torch_naiveconv {

int thread_count() { return 2; }
void run_parallel(int64_t count, int64_t, ParallelBody body, void* context) {
  std::thread other(body, context, int64_t{0}, count / 2);
  body(context, count / 2, count);
  other.join();
}

namespace {

// ---- SHA-256 (FIPS 180-4) -----------------------------------------------------------------------

// The first 32 bits of the fractional parts of the roots of the first primes, by integers alone.
uint32_t root_bits(uint64_t prime, bool cube) {
  // floor(root * 2^32): the largest x with x^2 (x^3) at most prime * 2^64 (2^96)
  uint64_t x = 0;
  for (int bit = 36; bit >= 0; --bit) {
    const unsigned __int128 candidate = x | (uint64_t{1} << bit);
    const unsigned __int128 limit = (unsigned __int128){prime} << 64;
    // candidate < 2^37, so its cube needs 111 bits; compare cube / 2^32 with prime * 2^64
    const unsigned __int128 square = candidate * candidate;
    const bool fits = cube ? square * candidate <= (limit << 32) : square <= limit;
    if (fits) x = static_cast<uint64_t>(candidate);
  }
  return static_cast<uint32_t>(x);
}

std::string sha256(std::vector<uint8_t> message) {
  std::array<uint32_t, 64> constant;
  std::array<uint32_t, 8> state;
  int found = 0;
  for (uint64_t p = 2; found < 64; ++p) {
    bool prime = true;
    for (uint64_t d = 2; d * d <= p; ++d) prime = prime && p % d != 0;
    if (!prime) continue;
    if (found < 8) state[found] = root_bits(p, false);
    constant[found++] = root_bits(p, true);
  }
  const uint64_t length = 8 * message.size();
  message.push_back(0x80);
  while (message.size() % 64 != 56) message.push_back(0);
  for (int i = 7; i >= 0; --i) message.push_back(static_cast<uint8_t>(length >> (8 * i)));
  const auto rotate = [](uint32_t x, int n) { return x >> n | x << (32 - n); };
  for (size_t block = 0; block < message.size(); block += 64) {
    uint32_t w[64];
    for (int i = 0; i < 16; ++i) {
      const uint8_t* m = &message[block + 4 * i];
      w[i] = uint32_t{m[0]} << 24 | uint32_t{m[1]} << 16 | uint32_t{m[2]} << 8 | m[3];
    }
    for (int i = 16; i < 64; ++i) {
      const uint32_t a = w[i - 15], b = w[i - 2];
      w[i] = w[i - 16] + (rotate(a, 7) ^ rotate(a, 18) ^ a >> 3) + w[i - 7] +
             (rotate(b, 17) ^ rotate(b, 19) ^ b >> 10);
    }
    std::array<uint32_t, 8> s = state;
    for (int i = 0; i < 64; ++i) {
      const uint32_t t1 = s[7] + (rotate(s[4], 6) ^ rotate(s[4], 11) ^ rotate(s[4], 25)) +
                          ((s[4] & s[5]) ^ (~s[4] & s[6])) + constant[i] + w[i];
      const uint32_t t2 = (rotate(s[0], 2) ^ rotate(s[0], 13) ^ rotate(s[0], 22)) +
                          ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));
      s = {t1 + t2, s[0], s[1], s[2], s[3] + t1, s[4], s[5], s[6]};
    }
    for (int i = 0; i < 8; ++i) state[i] += s[i];
  }
  std::string text;
  for (uint32_t word : state) {
    char digits[9];
    std::snprintf(digits, sizeof digits, "%08x", word);
    text += digits;
  }
  return text;
}

// ---- the generator ------------------------------------------------------------------------------

enum Number { INPUT, WEIGHT, BIAS, OUTPUT, TOTAL, INDEX };

uint64_t random_bits(uint64_t seed, uint64_t tensor, uint64_t i) {
  uint64_t z = (((seed * 8 + tensor) << 32) + i + 1) * 0x9E3779B97F4A7C15u;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return z ^ z >> 31;
}

struct Format {
  int bits, mantissa_bits;
  uint64_t bias;  // of the exponent; 0 for integers
  bool is_signed;
};
Format format_of(DType dtype) {
  switch (dtype) {
    case DType::float32: return {32, 23, 127, true};
    case DType::float64: return {64, 52, 1023, true};
    case DType::float16: return {16, 10, 15, true};
    case DType::bfloat16: return {16, 7, 127, true};
    case DType::int8: return {8, 0, 0, true};
    case DType::int16: return {16, 0, 0, true};
    case DType::int32: return {32, 0, 0, true};
    case DType::int64: return {64, 0, 0, true};
    case DType::uint8: return {8, 0, 0, false};
    case DType::uint16: return {16, 0, 0, false};
    case DType::uint32: return {32, 0, 0, false};
    case DType::uint64: return {64, 0, 0, false};
    case DType::boolean: return {8, 0, 0, false};
  }
  return {};
}

// The exponent field of a drawn element, and its mantissa: 0 zero, 1 random, 2 with the last bit
// set, 3 the middle bit alone.
struct Choice {
  uint64_t exponent;
  int mantissa;
};
Choice choice(const std::string& values, uint64_t bias, uint64_t draw) {
  const uint64_t middle = bias - (bias - 1) / 2;
  const Choice ordinary{bias - 4 + draw % 8, 1};
  if (values == "ordinary") return ordinary;
  if (values == "large") return {bias + bias / 2 - 2 + draw % 8, 1};
  if (values == "tiny") return {middle - 4 + draw % 8, 1};
  if (values == "subnormal") return {draw % 4 == 3 ? bias : draw % 4, 1};
  if (values == "smallest") return {draw % 4 == 3 ? 2 : std::min<uint64_t>(draw % 4, 1), 1};
  if (values == "zeros") return draw % 4 == 3 ? Choice{bias, 1} : Choice{0, 0};
  if (values == "ties") return {draw % 4 == 0 ? 0 : bias + (draw % 4 == 2), 0};
  if (values == "edge") return {middle - (draw % 4 < 2 ? 0 : 10 + draw % 4), draw % 16 < 4};
  if (values == "halfway") return draw % 2 == 0 ? Choice{bias, 3} : Choice{bias - 30, 0};
  switch (draw % 16) {  // special
    case 0: return {2 * bias + 1, 0};
    case 1: return {2 * bias + 1, 2};
    case 2: return {0, 0};
    case 3: return {0, 1};
    default: return ordinary;
  }
}

uint64_t element(Format f, bool boolean, const std::string& values, uint64_t r) {
  if (boolean) return r & 1;
  if (f.bias == 0) return values == "ties" ? (r & 3) - (f.is_signed ? 2 : 0) : r;
  const Choice c = choice(values, f.bias, (r >> 52) % 2048);
  uint64_t mantissa = r & ((uint64_t{1} << f.mantissa_bits) - 1);
  if (c.mantissa == 0) mantissa = 0;
  if (c.mantissa == 2) mantissa |= 1;
  if (c.mantissa == 3) mantissa = uint64_t{1} << f.mantissa_bits / 2;
  return r >> 63 << (f.bits - 1) | c.exponent << f.mantissa_bits | mantissa;
}

// ---- a case -------------------------------------------------------------------------------------

struct Sizes {
  int64_t n, c, axis[3];
  int64_t count() const { return n * c * axis[0] * axis[1] * axis[2]; }
};

// A contiguous tensor: little-endian elements in (n, c, d, h, w) order.
struct Buffer {
  std::vector<uint8_t> bytes;
  Sizes sizes{};
  int64_t element_size = 0;

  Buffer(DType dtype, Sizes s) : sizes(s), element_size(format_of(dtype).bits / 8) {
    bytes.resize(static_cast<size_t>(s.count() * element_size) + 1);  // never a null pointer
  }
  RawView view() {
    RawView v;
    v.data = bytes.data();
    const int64_t* a = sizes.axis;
    const int64_t plane = a[0] * a[1] * a[2];
    const int64_t strides[5] = {sizes.c * plane, plane, a[1] * a[2], a[2], 1};
    for (int i = 0; i < 5; ++i) v.stride[i] = strides[i];
    return v;
  }
  void append_to(std::vector<uint8_t>& all) const {
    all.insert(all.end(), bytes.begin(), bytes.end() - 1);
  }
};

struct Case {
  std::string name, op, direction, dtype_name, values, ties_name;
  uint64_t seed = 0;
  DType dtype = DType::float32;
  int64_t batch = 0, in_channels = 0, out_channels = 0, groups = 1;
  Axis axis[3];
  bool bias = false, total = false;
  Ties ties = Ties::first;

  Buffer make(int tensor, Sizes sizes) const { return make(tensor, sizes, dtype); }
  Buffer make(int tensor, Sizes sizes, DType type) const {
    Buffer buffer(type, sizes);
    const Format f = format_of(type);
    const bool edge_total = tensor == TOTAL && values == "edge";
    const std::string& drawn = edge_total ? "smallest" : values;
    for (int64_t i = 0; i < sizes.count(); ++i) {
      const uint64_t bits = element(f, type == DType::boolean, drawn, random_bits(seed, tensor, i));
      for (int b = 0; b < f.bits / 8; ++b)
        buffer.bytes[i * (f.bits / 8) + b] = static_cast<uint8_t>(bits >> (8 * b));
    }
    return buffer;
  }
  Sizes input_sizes() const { return {batch, in_channels, {axis[0].in, axis[1].in, axis[2].in}}; }
  Sizes output_sizes() const {
    return {batch, out_channels, {axis[0].out, axis[1].out, axis[2].out}};
  }
  Sizes weight_sizes() const {
    return {out_channels, in_channels / groups, {axis[0].kernel, axis[1].kernel, axis[2].kernel}};
  }
};

std::string conv_digest(const Case& c, const char* row) {
  ConvProblem p;
  p.dtype = c.dtype;
  p.shape.batch = c.batch;
  p.shape.in_channels = c.in_channels;
  p.shape.out_channels = c.out_channels;
  p.shape.groups = c.groups;
  for (int i = 0; i < 3; ++i) p.shape.axis[i] = c.axis[i];
  const bool forward = c.direction == "forward", grad_input = c.direction == "grad_input";
  const bool grad_bias = c.direction == "grad_bias";
  p.direction = forward      ? Direction::forward
                : grad_input ? Direction::grad_input
                : grad_bias  ? Direction::grad_bias
                             : Direction::grad_weight;
  const bool half = c.dtype == DType::float16 || c.dtype == DType::bfloat16;
  const DType total_type = half ? DType::float32 : c.dtype;
  const Sizes reduced = grad_bias ? Sizes{c.out_channels, 1, {1, 1, 1}} : c.weight_sizes();
  p.keep_total = c.total;

  Buffer input = grad_input ? Buffer(c.dtype, c.input_sizes()) : c.make(INPUT, c.input_sizes());
  Buffer weight = forward || grad_input ? c.make(WEIGHT, c.weight_sizes())
                                        : Buffer(c.total ? total_type : c.dtype, reduced);
  Buffer output = forward ? Buffer(c.dtype, c.output_sizes()) : c.make(OUTPUT, c.output_sizes());
  Buffer bias = c.make(BIAS, {forward ? c.out_channels : c.in_channels, 1, {1, 1, 1}});
  Buffer total = c.make(TOTAL, reduced, total_type);
  p.input = input.view();
  p.weight = weight.view();
  p.output = output.view();
  if (c.bias) p.bias = bias.bytes.data();
  if (c.total) p.total = total.bytes.data();
  if (!run_conv(p, row)) return "refused";
  std::vector<uint8_t> written;
  (forward ? output : grad_input ? input : weight).append_to(written);
  return sha256(written);
}

std::string pool_digest(const Case& c, const char* row) {
  PoolProblem p;
  p.dtype = c.dtype;
  p.shape.batch = c.batch;
  p.shape.channels = c.in_channels;
  for (int i = 0; i < 3; ++i) p.shape.axis[i] = c.axis[i];
  p.ties = c.ties;
  const bool forward = c.direction == "forward", several = c.ties > Ties::last;
  Buffer input = c.make(INPUT, c.input_sizes());
  Buffer output(c.dtype, c.output_sizes());
  Buffer index(DType::int64, c.output_sizes());
  std::vector<uint8_t> written;
  p.input = input.view();
  p.output = output.view();
  p.index = index.view();
  p.index_type = IndexType::int64;
  p.kind = several ? IndexKind::none : forward ? IndexKind::flat : IndexKind::offset;
  if (!run_pool(p, row)) return "refused";
  if (forward) {
    output.append_to(written);
    if (!several) index.append_to(written);
    return sha256(written);
  }
  if (several) p.index = input.view();
  const bool scatter = c.direction == "scatter";
  p.direction = scatter ? PoolDirection::scatter : PoolDirection::gather;
  Buffer values = c.make(OUTPUT, scatter ? c.output_sizes() : c.input_sizes());
  Buffer result(c.dtype, scatter ? c.input_sizes() : c.output_sizes());
  p.input = (scatter ? result : values).view();
  p.output = (scatter ? values : result).view();
  if (!run_pool(p, row)) return "refused";
  result.append_to(written);
  return sha256(written);
}

std::string unpool_digest(const Case& c) {
  UnpoolProblem p;
  p.transpose = c.direction == "transpose";
  p.dtype = c.dtype;
  p.planes = c.batch * c.in_channels;
  p.inputs = c.axis[0].in * c.axis[1].in * c.axis[2].in;
  p.outputs = c.axis[0].out * c.axis[1].out * c.axis[2].out;
  std::vector<int64_t> indices;
  for (int64_t i = 0; i < p.planes * p.inputs; ++i)
    indices.push_back(static_cast<int64_t>(random_bits(c.seed, INDEX, i) % p.outputs));
  Buffer input = c.make(INPUT, c.input_sizes()), output = c.make(OUTPUT, c.output_sizes());
  p.input = input.bytes.data();
  p.output = output.bytes.data();
  p.indices = indices.data();
  if (!run_unpool(p)) return "refused";
  std::vector<uint8_t> written;
  (p.transpose ? input : output).append_to(written);
  return sha256(written);
}

// name op direction dtype values seed batch in_channels out_channels groups, then in out kernel
// stride dilation pad of three axes, then bias total ties
bool read(const std::string& line, Case& c) {
  static const char* const dtypes[] = {"float32", "float64", "float16", "bfloat16", "int8",
                                       "int16",   "int32",   "int64",   "uint8",    "uint16",
                                       "uint32",  "uint64",  "bool"};
  static const char* const ties[] = {"first", "last", "all", "split"};
  std::istringstream in(line);
  in >> c.name >> c.op >> c.direction >> c.dtype_name >> c.values >> c.seed >> c.batch >>
      c.in_channels >> c.out_channels >> c.groups;
  for (Axis& a : c.axis) in >> a.in >> a.out >> a.kernel >> a.stride >> a.dilation >> a.pad;
  in >> c.bias >> c.total >> c.ties_name;
  bool known_type = false, known_ties = false;
  for (int i = 0; i < 13; ++i)
    if (c.dtype_name == dtypes[i]) c.dtype = static_cast<DType>(i), known_type = true;
  for (int i = 0; i < 4; ++i)
    if (c.ties_name == ties[i]) c.ties = static_cast<Ties>(i), known_ties = true;
  return in && known_type && known_ties;
}

}  // namespace
}  // namespace torch_naiveconv

int main() {
  using namespace torch_naiveconv;
  std::string line;
  while (std::getline(std::cin, line)) {
    Case c;
    if (!read(line, c)) {
      std::cerr << "not a case: " << line << "\n";
      return 2;
    }
    const auto report = [&](const char* row, const std::string& digest) {
      std::cout << c.name << ' ' << row << ' ' << digest << '\n';
    };
    if (c.op == "conv") {
      for (int i = 0; i < conv_row_count; ++i)
        if (conv_rows[i]->can_run()) report(conv_rows[i]->name, conv_digest(c, conv_rows[i]->name));
    } else if (c.op == "max_pool") {
      for (int i = 0; i < pool_row_count; ++i)
        if (pool_rows[i]->can_run()) report(pool_rows[i]->name, pool_digest(c, pool_rows[i]->name));
    } else {
      report("naive", unpool_digest(c));
    }
  }
}
