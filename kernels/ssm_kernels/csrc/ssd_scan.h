// What all passes of the Mamba-2 scan share: the arguments, and one recurrence over a matrix state
//
//   S = a_t S        out_t = sum_j V_t[j] S[j]        S = S + W_t (x) U_t
//
// The lanes of U, S[j] and out are neighbours in memory, 16 a vector; W and V give one number a row j. What is lanes
// and what is rows differs from pass to pass, so that no pass sums over lanes. In each, 4 rows of 64 lanes stay in
// registers while a chunk of tokens goes by. What a token gives to its own output, (W_t . V_t) U_t, is left to the
// pass: the gradient of a_t is a sum without these terms, and would lose its digits if they had to be taken off again.
//
// The decay a_t is one number a head. Instead of multiplying the state by it at every token, the state is kept as
// S 2^-c, where c is the sum of log2(a) since the segment began: then U is multiplied by 2^-c and out by 2^c, vectors
// instead of a matrix. A segment ends before c leaves [-60, 60], so that nothing overflows however strong a decay is.
#pragma once

#include <cmath>

#include "rows.h"

namespace ssd {

constexpr int kTokens = 16;      // a chunk; a multiple of kLanes
constexpr int kMaxWidth = 256;   // of P and of N: MAX_WIDTH in cpu/ssd_scan.py
constexpr int kTileRows = 4;     // rows of S in registers
constexpr int kTileVectors = 4;  // vectors of lanes in registers

struct HeadStates {
  void* data;  // [slots, H, P, N]; null: zeros when read, dropped when written
  int64_t slot_stride, head_stride, row_stride;  // in elements

  template <class Element>
  Element* row(int64_t slot, int64_t head, int64_t p) const {
    return static_cast<Element*>(data) + slot * slot_stride + head * head_stride + p * row_stride;
  }
};

// Packed by cpu/ssd_scan.py: every field has 8 bytes. Order matters.
struct Arguments {
  Rows x, dt, b, c, out;          // a token has [H P], [H], [G N], [G N], [H P]; backward: out is its gradient
  const float *a, *d, *dt_bias;   // [H]; the last two may be null
  HeadStates initial, final;      // backward: final is its gradient, and both are fp32
  Slots slots;
  Sequences sequences;
  int64_t heads, head_width, groups, states, softplus, threads;
  int64_t state_is_bf16;  // of `initial` and `final`, else fp32
  double dt_low, dt_high;

  int64_t group_of(int64_t head) const { return head / (heads / groups); }
  int64_t state_updates() const { return sequences.tokens() * heads * head_width * states; }
};

inline int padded(int64_t width) { return static_cast<int>(blocks_of(width)) * kLanes; }

// Up to kTokens tokens in the order in which a pass takes them.
struct Span {
  int64_t row, first;
  int step;  // 1, or -1 back in time
  int tokens;

  int64_t token(int i) const { return first + i * step; }
};

// [token][lane] in fp32, lanes padded with zeros to whole vectors.
struct Tile {
  int lanes;
  alignas(64) float values[kTokens * kMaxWidth];

  float* row(int i) { return values + i * lanes; }
  const float* row(int i) const { return values + i * lanes; }

  void load(const Rows& rows, const Span& span, int64_t channel, int64_t width) {
    lanes = padded(width);
    for (int i = 0; i < span.tokens; ++i)
      load_row(rows.at(span.row, span.token(i), channel), rows.is_bf16, static_cast<int>(width), row(i));
  }

  void store(const Rows& rows, const Span& span, int64_t channel, int64_t width) const {
    for (int i = 0; i < span.tokens; ++i)
      store_row(rows.at(span.row, span.token(i), channel), rows.is_bf16, static_cast<int>(width), row(i));
  }

  // This = other, each token times its scale.
  void scaled(const Tile& other, const float* scale, int tokens) {
    lanes = other.lanes;
    for (int i = 0; i < tokens; ++i)
      for (int k = 0; k < lanes; k += kLanes) ::store(row(i) + k, ::load(other.row(i) + k) * scale[i]);
  }
};

// out[i] = a_i . b_i
inline void products(const Tile& a, const Tile& b, int tokens, float* out) {
  for (int first = 0; first < tokens; first += kLanes) {
    vfloat sums[kLanes] = {};
    for (int i = first; i < std::min(first + kLanes, tokens); ++i)
      for (int k = 0; k < a.lanes; k += kLanes) sums[i - first] += load(a.row(i) + k) * load(b.row(i) + k);
    store(out + first, row_sums(sums));
  }
}

inline float dot(const float* a, const float* b, int64_t count) {
  vfloat totals[4] = {};
  for (int64_t i = 0, k = 0; i < count; i += kLanes, k = (k + 1) % 4) totals[k] += load(a + i) * load(b + i);
  return sum((totals[0] + totals[1]) + (totals[2] + totals[3]));
}

// The step sizes of one head.
struct Steps {
  alignas(64) float raw[kTokens];        // with the bias, before softplus
  alignas(64) float unclamped[kTokens];
  alignas(64) float dt[kTokens];
  double log2_decay[kTokens];            // dt A log2(e); in double, because it is summed

  void load(const Arguments& args, const Span& span, int64_t head) {
    const float bias = args.dt_bias ? args.dt_bias[head] : 0.0f;
    for (int i = 0; i < kTokens; ++i)
      raw[i] = i < span.tokens ? args.dt.value(span.row, span.token(i), head) + bias : 0.0f;
    for (int i = 0; i < span.tokens; i += kLanes) {
      const vfloat v = ::load(raw + i), step = args.softplus ? softplus(v) : v;
      store(unclamped + i, step);
      store(dt + i, at_most(at_least(step, static_cast<float>(args.dt_low)), static_cast<float>(args.dt_high)));
    }
    const double rate = args.a[head] * M_LOG2E;
    for (int i = 0; i < span.tokens; ++i) log2_decay[i] = dt[i] * rate;
  }

  // The derivative of dt by raw.
  void slopes(const Arguments& args, int tokens, float* out) const {
    for (int i = 0; i < tokens; i += kLanes)
      store(out + i, args.softplus ? sigmoid(::load(raw + i)) : broadcast(1.0f));
    for (int i = 0; i < tokens; ++i)
      if (unclamped[i] < args.dt_low || unclamped[i] > args.dt_high) out[i] = 0.0f;
  }
};

// The segments of one chunk.
struct Segments {
  static constexpr double kLimit = 60.0;  // of |c|
  double c = 0.0;                         // at the end of the chunk before
  int count;
  int end[kTokens];
  float scale[kTokens];  // of the state, where the segment begins
  alignas(64) float up[kTokens], down[kTokens];  // 2^-c, 2^c

  void prepare(const double* log2_decay, int tokens) {
    alignas(64) float whole[kTokens] = {}, fraction[kTokens] = {};
    count = 0;
    for (int i = 0; i < tokens; ++i) {
      c += log2_decay[i];
      if (i == 0 || !(std::fabs(c) <= kLimit)) {
        scale[count++] = static_cast<float>(std::exp2(c));
        c = 0.0;
      }
      end[count - 1] = i + 1;
      whole[i] = static_cast<float>(std::nearbyint(c));
      fraction[i] = static_cast<float>(c - whole[i]);
    }
    for (int i = 0; i < tokens; i += kLanes) {
      const vfloat n = ::load(whole + i), r = ::load(fraction + i);
      store(up + i, scale_by_power_of_2(exp2_fraction(-r), -n));
      store(down + i, scale_by_power_of_2(exp2_fraction(r), n));
    }
  }

  // What a state that leaves the recurrence is multiplied by.
  float scale_at_end() const { return static_cast<float>(std::exp2(c)); }
};

template <int kVectors>
inline void run_tile(const Segments& segments, const float* u, int lanes, const float* w, const float* v, int rows,
                     float* state, float* out) {
  vfloat s[kTileRows][kVectors];
#pragma GCC unroll 4
  for (int j = 0; j < kTileRows; ++j)
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; ++k) s[j][k] = load(state + j * lanes + k * kLanes);
  int i = 0;
  for (int segment = 0; segment < segments.count; ++segment) {
#pragma GCC unroll 4
    for (int j = 0; j < kTileRows; ++j)
#pragma GCC unroll 4
      for (int k = 0; k < kVectors; ++k) s[j][k] *= segments.scale[segment];
    for (; i < segments.end[segment]; ++i) {
      vfloat total[kVectors], u_i[kVectors];
#pragma GCC unroll 4
      for (int k = 0; k < kVectors; ++k) {
        total[k] = load(out + i * lanes + k * kLanes);
        u_i[k] = load(u + i * lanes + k * kLanes);
      }
#pragma GCC unroll 4
      for (int j = 0; j < kTileRows; ++j) {
        const vfloat w_j = broadcast(w[i * rows + j]), v_j = broadcast(v[i * rows + j]);
#pragma GCC unroll 4
        for (int k = 0; k < kVectors; ++k) {
          total[k] += v_j * s[j][k];
          s[j][k] += w_j * u_i[k];
        }
      }
#pragma GCC unroll 4
      for (int k = 0; k < kVectors; ++k) store(out + i * lanes + k * kLanes, total[k]);
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < kTileRows; ++j)
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; ++k) store(state + j * lanes + k * kLanes, s[j][k]);
}

using RunTile = void (*)(const Segments&, const float*, int, const float*, const float*, int, float*, float*);
constexpr RunTile kRunTile[] = {nullptr, run_tile<1>, run_tile<2>, run_tile<3>, run_tile<4>};

// S 2^-c, [rows][lanes], both padded with zeros.
struct State {
  int rows, lanes;
  alignas(64) float values[kMaxWidth * kMaxWidth];

  int64_t size() const { return rows * lanes; }

  void resize(int64_t height, int64_t width) {
    rows = padded(height);
    lanes = padded(width);
    std::fill_n(values, size(), 0.0f);
  }

  // Rows are p, lanes are n, as in memory, which is fp32.
  void load(const Arguments& args, const HeadStates& states, int64_t slot, int64_t head) {
    resize(args.head_width, args.states);
    for (int64_t p = 0; states.data && p < args.head_width; ++p)
      load_row(states.row<const float>(slot, head, p), static_cast<int>(args.states), values + p * lanes);
  }

  void store(const Arguments& args, const HeadStates& states, int64_t slot, int64_t head, float scale) {
    for (int64_t p = 0; states.data && p < args.head_width; ++p) {
      float* row = values + p * lanes;
      for (int k = 0; k < lanes; k += kLanes) ::store(row + k, ::load(row + k) * scale);
      store_row(states.row<float>(slot, head, p), static_cast<int>(args.states), row);
    }
  }

  // Rows are n, lanes are p.
  template <class Element>
  void load_transposed(const Arguments& args, const HeadStates& states, int64_t slot, int64_t head) {
    resize(args.states, args.head_width);
    if (!states.data) return;
    for_each_block(args, [&](int64_t p, int64_t n, int height, int width) {
      vfloat block[kLanes];
      load_turned(states.row<const Element>(slot, head, p) + n, states.row_stride, height, width, block);
      for (int i = 0; i < width; ++i) ::store(values + (n + i) * lanes + p, block[i]);
    });
  }

  template <class Element>
  void store_transposed(const Arguments& args, const HeadStates& states, int64_t slot, int64_t head, float scale) {
    if (!states.data) return;
    for_each_block(args, [&](int64_t p, int64_t n, int height, int width) {
      vfloat block[kLanes];
      for (int i = 0; i < width; ++i) block[i] = ::load(values + (n + i) * lanes + p) * scale;
      store_turned(block, height, width, states.row<Element>(slot, head, p) + n, states.row_stride);
    });
  }

  // Runs one chunk; out_t still lacks its 2^c.
  void run(const Segments& segments, int tokens, const Tile& u, const Tile& w, const Tile& v, Tile& out) {
    out.lanes = lanes;
    std::fill_n(out.values, tokens * lanes, 0.0f);
    for (int lane = 0; lane < lanes; lane += kTileVectors * kLanes) {
      const int vectors = std::min(kTileVectors, (lanes - lane) / kLanes);
      const auto tile = kRunTile[vectors];
      for (int j = 0; j < rows; j += kTileRows)
        tile(segments, u.values + lane, lanes, w.values + j, v.values + j, rows, values + j * lanes + lane,
             out.values + lane);
    }
  }

 private:
  // Blocks of 16 rows p and 16 states n of a state in memory, fewer at the edges: run(p, n, rows, states).
  template <class Run>
  static void for_each_block(const Arguments& args, const Run& run) {
    const auto left = [](int64_t all, int64_t first) { return static_cast<int>(std::min<int64_t>(kLanes, all - first)); };
    for (int64_t p = 0; p < args.head_width; p += kLanes)
      for (int64_t n = 0; n < args.states; n += kLanes) run(p, n, left(args.head_width, p), left(args.states, n));
  }
};

}  // namespace ssd
