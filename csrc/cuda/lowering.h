// Convolution in all three directions as one product C[row][lane] = sum over terms of
// A[row][term] * B[term][lane]. Index arithmetic only, host and device; tile.h computes with it.
//
//               rows             lanes                terms, in the contract's order  A        B
//   forward     output channels  (n, od, oh, ow)      (ic, kd, kh, kw)                weight input
//   grad_input  input channels   (n, id, ih, iw)      (oc, kd, kh, kw)                weight output
//   grad_weight output channels  (ic, kd, kh, kw)     (n, od, oh, ow)                 output input
//
// B is read at the sum of a lane's and a term's offsets, unless a tap and a pixel do not meet there
// (padding, or a tap that meets no output): then it is a zero. Which taps miss a pixel is a mask of
// bits (Misses); the other side has the bits of its tap. The input gradient is cut into phases, one
// for each (i + pad) mod stride: in a phase coordinates are linear, and only the taps that can meet
// an output are terms; they keep the numbers, hence the group and the parity, that they have among
// all.
#pragma once

#include <algorithm>

#include "../cpu/conv.h"
#include "divider.h"

namespace torch_naiveconv {

constexpr int max_phases = 8;  // in one launch

// Where a lane or a term stands: its share of the offset into B, and its offset into the other
// matrix (lanes: C, terms: A).
struct Place {
  int64_t offset, other;
  int digit[3], coordinate[3];
};

// The lanes, or the terms, of a phase: digits (outer, d, h, w), and what is linear in them.
struct Side {
  Digits digits;
  int first[3], step[3];  // coordinate on axis a: first + step * digit
  int64_t outer;          // offset into B of one `outer`
  int64_t other_first, other_outer, other[3];

  TNC_HD Place at(uint32_t flat, const int64_t (&b_stride)[3]) const {
    int outer_digit;
    Place place;
    digits.split(flat, outer_digit, place.digit);
    place.offset = outer_digit * outer;
    place.other = other_first + outer_digit * other_outer;
    TNC_UNROLL
    for (int a = 0; a < 3; ++a) {
      place.coordinate[a] = first[a] + place.digit[a] * step[a];
      place.offset += place.coordinate[a] * b_stride[a];
      place.other += place.digit[a] * other[a];
    }
    return place;
  }
};

// Which taps and pixels do not meet. Every tap of an axis that can miss has a bit; a pixel's mask
// has the bits of the taps that miss it, a tap's mask its own bits. They meet if the masks have no
// bit in common. Two more bits are for taps and pixels that do not exist, which meet nobody: they
// have both.
struct Misses {
  static constexpr uint32_t of_pixels = 1u << 31, of_taps = 1u << 30;
  static constexpr uint32_t nothing = of_pixels | of_taps;
  static constexpr int most_bits = 30;
  int first_bit[3], taps[3];               // taps 0: the axis cannot miss
  int tap_first[3], tap_step[3], size[3];  // coordinates of the taps, and size of B

  TNC_HD uint32_t of_tap(const int (&digit)[3]) const {
    uint32_t mask = of_taps;
    TNC_UNROLL
    for (int a = 0; a < 3; ++a)
      if (taps[a] > 0) mask |= 1u << (first_bit[a] + digit[a]);
    return mask;
  }
  TNC_HD uint32_t of_pixel(const int (&coordinate)[3]) const {
    uint32_t mask = of_pixels;
    TNC_UNROLL
    for (int a = 0; a < 3; ++a) {
      int at = coordinate[a] + tap_first[a];
      for (int t = 0; t < taps[a]; ++t, at += tap_step[a])
        if (at < 0 || at >= size[a]) mask |= 1u << (first_bit[a] + t);
    }
    return mask;
  }
};

// The taps of one axis that are terms of a phase: first, first + step, ...
struct Taps {
  int first = 0, step = 1, count = 0;

  // How many of them lie below tap k.
  TNC_HD int below(int k) const {
    const int n = k <= first ? 0 : (k - first + step - 1) / step;
    return n < count ? n : count;
  }
};

// The terms in the order of the contract. A period (a sample of the weight gradient; else all there
// is) numbers its terms from 0 and cuts them into groups; the terms of a group that exist fill
// blocks of `block_terms`, the last one padded with terms that add nothing.
struct Chain {
  int numbers;    // of one period
  int filter;     // numbers of one filter: the pattern of existing terms repeats with it
  int existing;   // terms of one filter that exist
  Taps taps[3];   // which: used only where existing < filter
  Digits kernel;  // a number inside a filter as taps
  int group_terms, block_terms;
  int periods, groups;  // groups of one period
  int group_blocks;     // blocks of every group but the last of a period
  int period_blocks;    // blocks of one period
  Divider by_filter, by_group_blocks, by_period_blocks;
  // The number of an existing term is linear in its digits; only its parity is asked for.
  int number_first, number_outer, number[3];

  // How many terms with a number below `number` exist.
  TNC_HD int rank(int number) const {
    if (existing == filter) return number;
    const int q = static_cast<int>(by_filter.quotient(static_cast<uint32_t>(number)));
    int outer, k[3];
    kernel.split(static_cast<uint32_t>(number - q * filter), outer, k);
    int within = 0;
    TNC_UNROLL
    for (int a = 0; a < 3; ++a) {
      const int below = taps[a].below(k[a]);
      within = within * taps[a].count + below;
      const bool exists = below < taps[a].count && taps[a].first + below * taps[a].step == k[a];
      if (!exists) {  // the axes that follow do not matter
        for (int rest = a + 1; rest < 3; ++rest) within *= taps[rest].count;
        break;
      }
    }
    return q * existing + within;
  }

  // The existing terms below group g of a period.
  TNC_HD int first_of_group(int g) const {
    const int number = g >= groups ? numbers : g * group_terms;
    return rank(number);
  }

  // The first block of a group counted over all periods.
  TNC_HD int block_of_group(int group) const {
    return group / groups * period_blocks + group % groups * group_blocks;
  }

  // The place of slot `slot` of block `block` among the terms of a period that exist, or -1.
  TNC_HD int term_at(int block, int slot, int& period) const {
    uint32_t rest = static_cast<uint32_t>(block);
    const uint32_t within = by_period_blocks.take(rest);
    period = static_cast<int>(rest);
    const int group = static_cast<int>(by_group_blocks.quotient(within));
    const int term = first_of_group(group) +
                     (static_cast<int>(within) - group * group_blocks) * block_terms + slot;
    return term < first_of_group(group + 1) ? term : -1;
  }

  TNC_HD bool ends_group(int block) const {
    uint32_t rest = static_cast<uint32_t>(block);
    const int within = static_cast<int>(by_period_blocks.take(rest));
    return within + 1 == period_blocks || (within + 1) % group_blocks == 0;
  }
};

struct Phase {
  Side lanes, terms;
  Chain chain;
  int lane_count, term_period;  // term_period: terms of a period that exist
  int first_tile;               // of this phase, counted over the phases of the launch
  int residue[3];               // (i + pad) mod stride of its inputs; 0 but in the input gradient
  Misses misses;
  int first_slot;  // among the packed slots of the launch

  // Is the number of a term odd? (The contract's two chains of the 16-bit types.)
  TNC_HD int is_odd(uint32_t term) const {
    int outer, x[3];
    terms.digits.split(term, outer, x);
    return (chain.number_first + outer * chain.number_outer + x[0] * chain.number[0] +
            x[1] * chain.number[1] + x[2] * chain.number[2]) &
           1;
  }
};

// One launch: up to max_phases phases that share their matrices.
struct Lowering {
  const void *a, *b;
  void* c;
  const void *bias, *total;
  int rows, groups, phases;
  int64_t a_row, c_row, a_group, b_group, c_group;
  int64_t b_stride[3];
  Phase phase[max_phases];
};

// ---- on the host: from a problem to its phases -----------------------------------------------

inline Chain make_chain(int64_t numbers, int64_t filter, int64_t existing, int64_t periods,
                        int group_terms, int block_terms) {
  Chain chain{};
  chain.numbers = static_cast<int>(numbers);
  chain.filter = static_cast<int>(filter);
  chain.existing = static_cast<int>(existing);
  chain.group_terms = group_terms;
  chain.block_terms = block_terms;
  chain.periods = static_cast<int>(periods);
  chain.groups = static_cast<int>(ceil_div(numbers, group_terms));
  chain.by_filter = Divider(filter);
  return chain;
}

// After taps and kernel are set: how many blocks a group and a period need.
inline void count_blocks(Chain& chain) {
  // Any `filter` consecutive numbers hold `existing` terms, fewer numbers no more than themselves.
  const int whole = chain.filter > 0 ? chain.group_terms / chain.filter : 0;
  const int rest = chain.group_terms - whole * chain.filter;
  const int most = whole * chain.existing + (rest < chain.existing ? rest : chain.existing);
  chain.group_blocks = static_cast<int>(ceil_div(most, chain.block_terms));
  if (chain.group_blocks == 0) chain.group_blocks = 1;
  chain.period_blocks = 0;
  if (chain.groups > 0 && chain.existing > 0) {
    const int last = chain.first_of_group(chain.groups) - chain.first_of_group(chain.groups - 1);
    chain.period_blocks = (chain.groups - 1) * chain.group_blocks +
                          static_cast<int>(ceil_div(last, chain.block_terms));
  }
  chain.by_group_blocks = Divider(chain.group_blocks);
  chain.by_period_blocks = Divider(chain.period_blocks);
}

// Phases of the input gradient along one axis; 1 elsewhere.
inline int64_t phases_of(Direction direction, const Axis& axis) {
  return direction == Direction::grad_input ? axis.stride : 1;
}

// All that does not depend on the phase.
inline Lowering lower(const ConvProblem& p) {
  const ConvShape& s = p.shape;
  const bool weight_gradient = p.direction == Direction::grad_weight;
  const bool input_gradient = p.direction == Direction::grad_input;
  const RawView& b = input_gradient ? p.output : p.input;
  const RawView& a = weight_gradient ? p.output : p.weight;
  const RawView& c = weight_gradient ? p.weight : input_gradient ? p.input : p.output;
  Lowering l{};
  l.a = a.data;
  l.b = b.data;
  l.c = c.data;
  l.bias = p.bias;
  l.total = p.total;
  l.groups = static_cast<int>(s.groups);
  l.rows = static_cast<int>(input_gradient ? s.group_in() : s.group_out());
  // A row of the input gradient is an input channel: axis 1 of the weight and of the input.
  l.a_row = a.stride[input_gradient || weight_gradient ? 1 : 0];
  l.a_group = weight_gradient ? s.group_out() * a.stride[1] : s.group_out() * a.stride[0];
  l.b_group = (input_gradient ? s.group_out() : s.group_in()) * b.stride[1];
  l.c_row = c.stride[weight_gradient ? 0 : 1];
  l.c_group = l.rows * l.c_row;
  for (int axis = 0; axis < 3; ++axis) l.b_stride[axis] = b.stride[2 + axis];
  return l;
}

inline Phase forward_phase(const ConvProblem& p, int group_terms, int block_terms) {
  const ConvShape& s = p.shape;
  Phase phase{};
  phase.lane_count = static_cast<int>(s.batch * s.outputs());
  phase.lanes.digits = Digits(s.axis[0].out, s.axis[1].out, s.axis[2].out);
  phase.lanes.outer = p.input.stride[0];
  phase.lanes.other_outer = p.output.stride[0];
  phase.terms.digits = Digits(s.axis[0].kernel, s.axis[1].kernel, s.axis[2].kernel);
  phase.terms.outer = p.input.stride[1];
  phase.terms.other_outer = p.weight.stride[1];
  phase.chain =
      make_chain(s.group_in() * s.taps(), s.taps(), s.taps(), 1, group_terms, block_terms);
  phase.chain.number_outer = static_cast<int>(s.taps());
  int64_t number = 1;
  for (int a = 2; a >= 0; --a) {
    const Axis& axis = s.axis[a];
    phase.lanes.first[a] = static_cast<int>(-axis.pad);
    phase.lanes.step[a] = static_cast<int>(axis.stride);
    phase.lanes.other[a] = p.output.stride[2 + a];
    phase.terms.step[a] = static_cast<int>(axis.dilation);
    phase.terms.other[a] = p.weight.stride[2 + a];
    phase.chain.number[a] = static_cast<int>(number);
    number *= axis.kernel;
  }
  phase.term_period = static_cast<int>(s.group_in() * s.taps());
  count_blocks(phase.chain);
  return phase;
}

inline Phase grad_input_phase(const ConvProblem& p, int64_t index, int group_terms,
                              int block_terms) {
  const ConvShape& s = p.shape;
  Phase phase{};
  int64_t existing = 1, lanes = s.batch, number = 1, positions[3];
  Taps taps[3];
  phase.lanes.outer = p.output.stride[0];
  phase.lanes.other_outer = p.input.stride[0];
  phase.terms.outer = p.output.stride[1];
  phase.terms.other_outer = p.weight.stride[0];
  phase.chain.number_first = 0;
  int number_first = 0, numbers[3];
  for (int a = 2; a >= 0; --a) {
    const Axis& axis = s.axis[a];
    const int64_t residue = index % axis.stride;  // (i + pad) mod stride
    index /= axis.stride;
    phase.residue[a] = static_cast<int>(residue);
    const int64_t shift = ((residue - axis.pad) % axis.stride + axis.stride) % axis.stride;
    positions[a] = axis.in > shift ? ceil_div(axis.in - shift, axis.stride) : 0;
    lanes *= positions[a];
    // Taps k with k * dilation = residue modulo stride, and the output that each then meets:
    // (i + pad - k * dilation) / stride = (i + pad - residue) / stride - (k * dilation - residue) /
    // stride.
    int64_t step = 1;
    while (step * axis.dilation % axis.stride != 0) ++step;
    int64_t first = 0;
    while (first < step && first * axis.dilation % axis.stride != residue) ++first;
    taps[a].first = static_cast<int>(first);
    taps[a].step = static_cast<int>(step);
    taps[a].count = first == step || first >= axis.kernel
                        ? 0
                        : static_cast<int>(ceil_div(axis.kernel - first, step));
    existing *= taps[a].count;
    phase.lanes.first[a] = static_cast<int>((shift + axis.pad - residue) / axis.stride);
    phase.lanes.step[a] = 1;
    phase.lanes.other_first += shift * p.input.stride[2 + a];
    phase.lanes.other[a] = axis.stride * p.input.stride[2 + a];
    if (taps[a].count > 0) {
      phase.terms.first[a] = static_cast<int>(-(first * axis.dilation - residue) / axis.stride);
      phase.terms.step[a] = static_cast<int>(-(step * axis.dilation) / axis.stride);
    }
    phase.terms.other_first += first * p.weight.stride[2 + a];
    phase.terms.other[a] = step * p.weight.stride[2 + a];
    number_first += static_cast<int>(first * number);
    numbers[a] = static_cast<int>(step * number);
    number *= axis.kernel;
  }
  phase.lane_count = static_cast<int>(lanes);
  phase.lanes.digits = Digits(positions[0], positions[1], positions[2]);
  phase.terms.digits = Digits(taps[0].count, taps[1].count, taps[2].count);
  phase.chain =
      make_chain(s.group_out() * s.taps(), s.taps(), existing, 1, group_terms, block_terms);
  phase.chain.number_first = number_first;
  phase.chain.number_outer = static_cast<int>(s.taps());
  for (int a = 0; a < 3; ++a) {
    phase.chain.taps[a] = taps[a];
    phase.chain.number[a] = numbers[a];
  }
  phase.chain.kernel = Digits(s.axis[0].kernel, s.axis[1].kernel, s.axis[2].kernel);
  phase.term_period = static_cast<int>(s.group_out() * existing);
  count_blocks(phase.chain);
  return phase;
}

inline Phase grad_weight_phase(const ConvProblem& p, int group_terms, int block_terms) {
  const ConvShape& s = p.shape;
  Phase phase{};
  phase.lane_count = static_cast<int>(s.group_in() * s.taps());
  phase.lanes.digits = Digits(s.axis[0].kernel, s.axis[1].kernel, s.axis[2].kernel);
  phase.lanes.outer = p.input.stride[1];
  phase.lanes.other_outer = p.weight.stride[1];
  phase.terms.digits = Digits(s.axis[0].out, s.axis[1].out, s.axis[2].out);
  phase.terms.outer = p.input.stride[0];
  phase.terms.other_outer = p.output.stride[0];
  phase.chain =
      make_chain(s.outputs(), s.outputs(), s.outputs(), s.batch, group_terms, block_terms);
  int64_t number = 1;  // starts afresh at each sample: number_outer is 0
  for (int a = 2; a >= 0; --a) {
    const Axis& axis = s.axis[a];
    phase.lanes.step[a] = static_cast<int>(axis.dilation);
    phase.lanes.other[a] = p.weight.stride[2 + a];
    phase.terms.first[a] = static_cast<int>(-axis.pad);
    phase.terms.step[a] = static_cast<int>(axis.stride);
    phase.terms.other[a] = p.output.stride[2 + a];
    phase.chain.number[a] = static_cast<int>(number);
    number *= axis.out;
  }
  phase.term_period = static_cast<int>(s.outputs());
  count_blocks(phase.chain);
  return phase;
}

inline int64_t phase_count(const ConvProblem& p) {
  int64_t count = 1;
  for (const Axis& axis : p.shape.axis) count *= phases_of(p.direction, axis);
  return count;
}

// Returns how many bits the masks need. More than `most_bits` of them are not set up.
inline int make_misses(const ConvProblem& p, Phase& phase) {
  const bool lanes_are_taps = p.direction == Direction::grad_weight;
  const Side& tap = lanes_are_taps ? phase.lanes : phase.terms;
  const Side& pixel = lanes_are_taps ? phase.terms : phase.lanes;
  Misses& m = phase.misses;
  int bits = 0;
  for (int a = 0; a < 3; ++a) {
    const Axis& axis = p.shape.axis[a];
    const int64_t size = p.direction == Direction::grad_input ? axis.out : axis.in;
    const int64_t taps = tap.digits.size[a].divisor, pixels = pixel.digits.size[a].divisor;
    const int64_t last_tap = (taps - 1) * tap.step[a], first = pixel.first[a] + tap.first[a];
    const int64_t last = first + (pixels - 1) * pixel.step[a];
    const bool can_miss =
        first + std::min<int64_t>(0, last_tap) < 0 || last + std::max<int64_t>(0, last_tap) >= size;
    m.first_bit[a] = bits;
    m.taps[a] = can_miss ? static_cast<int>(taps) : 0;
    m.tap_first[a] = tap.first[a];
    m.tap_step[a] = tap.step[a];
    m.size[a] = static_cast<int>(size);
    bits += m.taps[a];
  }
  return bits;
}

inline Phase make_phase(const ConvProblem& p, int64_t index, int group_terms, int block_terms) {
  Phase phase = p.direction == Direction::forward ? forward_phase(p, group_terms, block_terms)
                : p.direction == Direction::grad_input
                    ? grad_input_phase(p, index, group_terms, block_terms)
                    : grad_weight_phase(p, group_terms, block_terms);
  make_misses(p, phase);
  return phase;
}

// May the taps of every axis be bits of a mask? Of many phases none is looked at: their taps are
// counted as if all could miss.
inline bool fits_masks(const ConvProblem& p) {
  if (phase_count(p) == 1) {
    Phase phase = make_phase(p, 0, 128, 8);
    return make_misses(p, phase) <= Misses::most_bits;
  }
  int64_t bits = 0;
  for (const Axis& axis : p.shape.axis) {
    int64_t step = 1;  // from a tap of a phase to the next
    while (step * axis.dilation % axis.stride != 0) ++step;
    bits += ceil_div(axis.kernel, step);
  }
  return bits <= Misses::most_bits;
}

// Is every number above within 31 bits, and every offset that a term adds within 32? The rest of an
// address is 64 bits wide.
inline bool fits(const ConvProblem& p) {
  constexpr int64_t most = int64_t{1} << 29;
  const ConvShape& s = p.shape;
  const bool weight_gradient = p.direction == Direction::grad_weight;
  const RawView& b = p.direction == Direction::grad_input ? p.output : p.input;
  const RawView& a = weight_gradient ? p.output : p.weight;
  if (s.batch >= most || s.in_channels >= most || s.out_channels >= most) return false;
  int64_t b_reach =
      weight_gradient
          ? s.batch * b.stride[0]
          : (p.direction == Direction::grad_input ? s.group_out() : s.group_in()) * b.stride[1];
  int64_t a_reach = weight_gradient                        ? s.batch * a.stride[0]
                    : p.direction == Direction::grad_input ? s.out_channels * a.stride[0]
                                                           : s.group_in() * a.stride[1];
  double taps = 1, inputs = 1, outputs = 1;  // products that may overflow
  for (int i = 0; i < 3; ++i) {
    const Axis& axis = s.axis[i];
    if (axis.in >= most || axis.out >= most || axis.kernel >= most || axis.pad >= most ||
        axis.stride >= most || axis.dilation >= most)
      return false;
    const int64_t reach = axis.in + axis.pad + axis.out * axis.stride + axis.kernel * axis.dilation;
    if (reach >= most || b.stride[2 + i] >= most || a.stride[2 + i] >= most) return false;
    b_reach += reach * b.stride[2 + i];
    a_reach += (weight_gradient ? axis.out : axis.kernel) * a.stride[2 + i];
    taps *= static_cast<double>(axis.kernel);
    inputs *= static_cast<double>(axis.in);
    outputs *= static_cast<double>(axis.out);
  }
  const double limit = static_cast<double>(most);
  return b_reach < most && a_reach < most && taps * static_cast<double>(s.group_in()) < limit &&
         taps * static_cast<double>(s.group_out()) < limit &&
         inputs * static_cast<double>(s.batch) < limit &&
         outputs * static_cast<double>(s.batch) < limit;
}

}  // namespace torch_naiveconv
