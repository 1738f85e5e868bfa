// y = x W^T + b for a few rows of x: a decode step. All of its time goes into reading W once.
//
// Sixteen output features are computed together, in four turns of four rows of W, so that a turn reads four streams and
// the sixteen sums end in one vector, whose lanes are the features. Within a row lanes are neighbouring inputs. W is
// read once for up to four rows of x. Sums are fp32.

#include <algorithm>
#include <vector>

#include "rows.h"

namespace {

constexpr int64_t kParallelBytes = 1 << 17;  // of W; below, waking the other threads costs more
constexpr int kFeatures = 16, kTurn = 4, kChunk = 4;
constexpr int64_t kStepBytes = 64;  // of a row of W

// Packed by cpu/linear.py: every field has 8 bytes. Order matters.
struct LinearArguments {
  const char* x;  // [rows, in], unit stride within a row
  int64_t x_stride;
  const char* weight;  // [out, in], contiguous
  const char* bias;    // [out] or null
  char* out;           // [rows, out], contiguous
  int64_t rows, in, out_features, is_bf16, threads;
};

// How one step (64 bytes of a row of W) is multiplied. `prepare` brings the inputs of a step into the form that `add`
// reads, zeros where the row has ended.
struct Float32 {
  static constexpr int64_t kElementBytes = 4, kInputs = 16, kPreparedBytes = 64;
  using Weights = vfloat;
  static Weights load_weights(const char* p) { return load(reinterpret_cast<const float*>(p)); }
  static void add(vfloat& sum, const Weights& w, const char* x) { sum += w * load(reinterpret_cast<const float*>(x)); }
  static void prepare(const char* x, int64_t count, char* out) { std::memcpy(out, x, count * 4); }
};

#if defined(__AVX512BF16__)
struct BFloat16 {
  static constexpr int64_t kElementBytes = 2, kInputs = 32, kPreparedBytes = 64;
  using Weights = __m512bh;
  static Weights load_weights(const char* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static void add(vfloat& sum, const Weights& w, const char* x) {
    sum = (vfloat)_mm512_dpbf16_ps((__m512)sum, w, load_weights(x));
  }
  static void prepare(const char* x, int64_t count, char* out) { std::memcpy(out, x, count * 2); }
};
#else
// Even and odd inputs apart: each half of a 32-bit word becomes a float by a shift or a mask.
struct BFloat16 {
  static constexpr int64_t kElementBytes = 2, kInputs = 32, kPreparedBytes = 128;
  struct Weights {
    vfloat even, odd;
  };
  static Weights load_weights(const char* p) {
    vuint words;
    std::memcpy(&words, p, sizeof words);
    return {(vfloat)(words << 16), (vfloat)(words & 0xffff0000u)};
  }
  static void add(vfloat& sum, const Weights& w, const char* x) {
    const float* values = reinterpret_cast<const float*>(x);
    sum += w.even * load(values);
    sum += w.odd * load(values + kLanes);
  }
  static void prepare(const char* x, int64_t count, char* out) {
    const uint16_t* bits = reinterpret_cast<const uint16_t*>(x);
    uint32_t* values = reinterpret_cast<uint32_t*>(out);
    for (int64_t i = 0; i < count; ++i) values[i % 2 * kLanes + i / 2] = static_cast<uint32_t>(bits[i]) << 16;
  }
};
#endif

template <class Format>
int64_t steps_of(const LinearArguments& args) {
  return (args.in + Format::kInputs - 1) / Format::kInputs;
}

template <class Format>
std::vector<char> prepare_inputs(const LinearArguments& args) {
  const int64_t steps = steps_of<Format>(args);
  std::vector<char> prepared(args.rows * steps * Format::kPreparedBytes, 0);
  for (int64_t row = 0; row < args.rows; ++row) {
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t begin = step * Format::kInputs, count = std::min(Format::kInputs, args.in - begin);
      Format::prepare(args.x + (row * args.x_stride + begin) * Format::kElementBytes, count,
                      prepared.data() + (row * steps + step) * Format::kPreparedBytes);
    }
  }
  return prepared;
}

// Sums of kTurn rows of W with M rows of x.
template <class Format, int M>
void turn(const char* const* weights, const char* x, int64_t x_stride, int64_t in, vfloat (*sums)[M]) {
  const int64_t whole = in / Format::kInputs, rest_bytes = in % Format::kInputs * Format::kElementBytes;
  const int64_t row_bytes = in * Format::kElementBytes;
  vfloat totals[kTurn][M] = {};
  for (int64_t step = 0; step < whole; ++step) {
    for (int r = 0; r < kTurn; ++r) {
      // The next turn's rows: the hardware begins anew to look ahead with every row.
      __builtin_prefetch(weights[r] + kTurn * row_bytes + step * kStepBytes);
      const auto w = Format::load_weights(weights[r] + step * kStepBytes);
      for (int m = 0; m < M; ++m) Format::add(totals[r][m], w, x + m * x_stride + step * Format::kPreparedBytes);
    }
  }
  if (rest_bytes) {
    for (int r = 0; r < kTurn; ++r) {
      char padded[kStepBytes] = {};
      std::memcpy(padded, weights[r] + whole * kStepBytes, rest_bytes);
      const auto w = Format::load_weights(padded);
      for (int m = 0; m < M; ++m) Format::add(totals[r][m], w, x + m * x_stride + whole * Format::kPreparedBytes);
    }
  }
  std::memcpy(sums, totals, sizeof totals);
}

// Features [begin, begin + 16) of M rows.
template <class Format, int M>
void features(const LinearArguments& args, const char* x, int64_t row, int64_t begin) {
  const int64_t x_stride = steps_of<Format>(args) * Format::kPreparedBytes;
  const int count = static_cast<int>(std::min<int64_t>(kFeatures, args.out_features - begin));
  vfloat sums[kFeatures][M];
  for (int first = 0; first < kFeatures; first += kTurn) {
    const char* weights[kTurn];
    for (int r = 0; r < kTurn; ++r) {
      const int64_t feature = begin + std::min(first + r, count - 1);  // beyond the last: computed again, not stored
      weights[r] = args.weight + feature * args.in * Format::kElementBytes;
    }
    turn<Format, M>(weights, x + row * x_stride, x_stride, args.in, sums + first);
  }
  alignas(64) float bias[kFeatures + kLanes] = {};
  if (args.bias) load_row(args.bias + begin * Format::kElementBytes, args.is_bf16, count, bias);
  for (int m = 0; m < M; ++m) {
    vfloat of_row[kFeatures];
    for (int i = 0; i < kFeatures; ++i) of_row[i] = sums[i][m];
    alignas(64) float out[kFeatures + kLanes];
    store(out, row_sums(of_row) + load(bias));
    store_row(args.out + ((row + m) * args.out_features + begin) * Format::kElementBytes, args.is_bf16, count, out);
  }
}

template <class Format>
void multiply(const LinearArguments& args) {
  const std::vector<char> prepared = prepare_inputs<Format>(args);
  const char* x = prepared.data();
  const bool parallel = args.out_features * args.in * Format::kElementBytes >= kParallelBytes;
#pragma omp parallel for schedule(static) num_threads(parallel ? args.threads : 1)
  for (int64_t begin = 0; begin < args.out_features; begin += kFeatures) {
    int64_t row = 0;
    for (; row + kChunk <= args.rows; row += kChunk) features<Format, kChunk>(args, x, row, begin);
    if (args.rows - row == 3) features<Format, 3>(args, x, row, begin);
    if (args.rows - row == 2) features<Format, 2>(args, x, row, begin);
    if (args.rows - row == 1) features<Format, 1>(args, x, row, begin);
  }
}

}  // namespace

extern "C" int64_t linear_forward(const LinearArguments* packed) {
  if (packed->is_bf16) {
    multiply<BFloat16>(*packed);
  } else {
    multiply<Float32>(*packed);
  }
  return 0;
}
