// y = x W^T + b for a few rows of x: a decode step. All of its time goes into reading W once.
//
// A thread reads its share of W as four streams, which begin a quarter of the share apart and run side by side: up to
// twice as fast as four neighbouring rows, where the hardware begins anew to look ahead with every row. Sixteen output
// features are computed together, in four turns of one row of each stream, so that their sums end in one vector, whose
// lanes are the features. Within a row lanes are neighbouring inputs. W is read from memory once for all rows of x.
// Sums are fp32, in an order that depends neither on the threads nor on the other rows.

#include <algorithm>
#include <vector>

#include "rows.h"

namespace {

constexpr int64_t kParallelBytes = 1 << 17;  // of W; below, waking the other threads costs more
constexpr int kFeatures = 16, kStreams = 4, kTurns = kFeatures / kStreams, kChunk = 4;
constexpr int64_t kStepBytes = 64;  // of a row of W
constexpr int64_t kAheadBytes = 256;

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
  using Element = float;
  static constexpr int64_t kElementBytes = 4, kInputs = 16, kPreparedBytes = 64;
  using Weights = vfloat;
  static Weights load_weights(const char* p) { return load(reinterpret_cast<const float*>(p)); }
  static void add(vfloat& sum, const Weights& w, const char* x) { sum += w * load(reinterpret_cast<const float*>(x)); }
  static void prepare(const char* x, int64_t count, char* out) { std::memcpy(out, x, count * 4); }
};

#if defined(__AVX512BF16__)
struct BFloat16 {
  using Element = uint16_t;
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
  using Element = uint16_t;
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

// Sums of M rows of x with one row of W of every stream.
template <class Format, int M>
void turn(const char* const* weights, const char* x, int64_t x_stride, int64_t in, vfloat (*sums)[M]) {
  const int64_t whole = in / Format::kInputs, rest_bytes = in % Format::kInputs * Format::kElementBytes;
  vfloat totals[kStreams][M] = {};
  for (int64_t step = 0; step < whole; ++step) {
    for (int s = 0; s < kStreams; ++s) {
      const char* values = weights[s] + step * kStepBytes;
      // The products of several rows of x keep the processor from running ahead; with one row asking only costs.
      if (M > 1) __builtin_prefetch(values + kAheadBytes);
      const auto w = Format::load_weights(values);
      for (int m = 0; m < M; ++m) Format::add(totals[s][m], w, x + m * x_stride + step * Format::kPreparedBytes);
    }
  }
  if (rest_bytes) {
#pragma GCC unroll 4  // or the totals leave their registers
    for (int s = 0; s < kStreams; ++s) {
      char padded[kStepBytes] = {};
      std::memcpy(padded, weights[s] + whole * kStepBytes, rest_bytes);
      const auto w = Format::load_weights(padded);
      for (int m = 0; m < M; ++m) Format::add(totals[s][m], w, x + m * x_stride + whole * Format::kPreparedBytes);
    }
  }
  for (int s = 0; s < kStreams; ++s)
    for (int m = 0; m < M; ++m) sums[s * kTurns][m] = totals[s][m];
}

// The features of one stream: kTurns of them, fewer at the end of a share.
template <class Element>
void copy(const Element* from, int64_t count, Element* to) {
  if (count == kTurns)
    std::memcpy(to, from, kTurns * sizeof(Element));
  else
    std::memcpy(to, from, count * sizeof(Element));
}

// kTurns neighbouring features of every stream, of M rows. Stream s begins at feature begin + s * stream and ends where
// the next one begins, or at `end`.
template <class Format, int M>
void features(const LinearArguments& args, const char* x, int64_t row, int64_t begin, int64_t stream, int64_t end) {
  const int64_t x_stride = steps_of<Format>(args) * Format::kPreparedBytes;
  vfloat sums[kFeatures][M];
  for (int t = 0; t < kTurns; ++t) {
    const char* weights[kStreams];
    for (int s = 0; s < kStreams; ++s) {
      const int64_t feature = std::min(begin + s * stream + t, end - 1);  // beyond the last: computed, not stored
      weights[s] = args.weight + feature * args.in * Format::kElementBytes;
    }
    turn<Format, M>(weights, x + row * x_stride, x_stride, args.in, sums + t);
  }
  const auto count = [&](int s) { return std::clamp<int64_t>(end - begin - s * stream, 0, kTurns); };
  using Element = typename Format::Element;
  Element values[kFeatures] = {};
  vfloat bias = {};
  if (args.bias) {
    const Element* from = reinterpret_cast<const Element*>(args.bias) + begin;
    for (int s = 0; s < kStreams; ++s) copy(from + s * stream, count(s), values + s * kTurns);
    bias = load(values);
  }
  for (int m = 0; m < M; ++m) {
    vfloat of_row[kFeatures];
    for (int i = 0; i < kFeatures; ++i) of_row[i] = sums[i][m];
    store(values, row_sums(of_row) + bias);
    Element* to = reinterpret_cast<Element*>(args.out) + (row + m) * args.out_features + begin;
    for (int s = 0; s < kStreams; ++s) copy(values + s * kTurns, count(s), to + s * stream);
  }
}

// Features [begin, end): one thread's share.
template <class Format>
void share(const LinearArguments& args, const char* x, int64_t begin, int64_t end) {
  const int64_t stream = (end - begin + kFeatures - 1) / kFeatures * kTurns;
  for (int64_t offset = 0; offset < stream; offset += kTurns) {
    const int64_t first = begin + offset;
    int64_t row = 0;
    for (; row + kChunk <= args.rows; row += kChunk) features<Format, kChunk>(args, x, row, first, stream, end);
    if (args.rows - row == 3) features<Format, 3>(args, x, row, first, stream, end);
    if (args.rows - row == 2) features<Format, 2>(args, x, row, first, stream, end);
    if (args.rows - row == 1) features<Format, 1>(args, x, row, first, stream, end);
  }
}

template <class Format>
void multiply(const LinearArguments& args) {
  const std::vector<char> prepared = prepare_inputs<Format>(args);
  const char* x = prepared.data();
  const bool parallel = args.out_features * args.in * Format::kElementBytes >= kParallelBytes;
  const int64_t threads = parallel ? args.threads : 1, blocks = (args.out_features + kFeatures - 1) / kFeatures;
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(threads)) if (threads > 1)
  for (int64_t thread = 0; thread < threads; ++thread) {
    const int64_t begin = blocks * thread / threads * kFeatures;
    const int64_t end = std::min(blocks * (thread + 1) / threads * kFeatures, args.out_features);
    if (begin < end) share<Format>(args, x, begin, end);
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
