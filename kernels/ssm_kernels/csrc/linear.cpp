// y = x W^T + b for a few rows of x: a decode step. All of its time goes into reading W once.
//
// A thread reads its share of W as four streams, which begin a quarter of the share apart and run side by side: up to
// twice as fast as four neighbouring rows, where the hardware begins anew to look ahead with every row. Sixteen output
// features are computed together, in four turns of one row of each stream, so that their sums end in one vector, whose
// lanes are the features. Within a row lanes are neighbouring inputs. W is read from memory once for all rows of x.
// Sums are fp32, in an order that depends neither on the threads nor on the other rows.

#include <algorithm>
#include <vector>

#include "linear_formats.h"

namespace {

using namespace linear;

constexpr int64_t kParallelBytes = 3 << 16;  // of W; below, waking the other threads costs more
constexpr int kFeatures = 16, kStreams = 4, kTurns = kFeatures / kStreams, kChunk = 4;
constexpr int64_t kAheadBytes = 256;

// Packed by cpu/linear.py: every field has 8 bytes. Order matters.
struct LinearArguments {
  const char* x;  // [rows, in], unit stride within a row
  int64_t x_stride;
  const char* weight;      // [out, in], contiguous
  const uint16_t* scales;  // [out, groups], contiguous; of int8 weights
  const char* bias;        // [out] or null
  char* out;               // [rows, out], contiguous
  int64_t rows, in, out_features, weight_bytes, threads;  // weight_bytes: 4, 2 or 1 for fp32, bf16 or int8 + 128
};

template <class Format>
int64_t steps_of(const LinearArguments& args) {
  return (args.in + Format::kInputs - 1) / Format::kInputs;
}

// All rows of x as `prepare` leaves them. A vector that straddled two cache lines would take twice as long to load.
class PreparedInputs {
 public:
  template <class Format>
  static PreparedInputs of(const LinearArguments& args) {
    const int64_t steps = steps_of<Format>(args);
    PreparedInputs prepared(args.rows * steps * Format::kPreparedBytes);
    for (int64_t row = 0; row < args.rows; ++row)
      for (int64_t step = 0; step < steps; ++step) {
        const int64_t begin = step * Format::kInputs, count = std::min(Format::kInputs, args.in - begin);
        Format::prepare(args.x + (row * args.x_stride + begin) * sizeof(typename Format::Element), count,
                        prepared.get() + (row * steps + step) * Format::kPreparedBytes);
      }
    return prepared;
  }
  char* get() { return reinterpret_cast<char*>(lines_.data()); }

 private:
  struct alignas(64) Line {
    char bytes[64];
  };
  explicit PreparedInputs(int64_t bytes) : lines_(bytes / 64) {}
  std::vector<Line> lines_;
};

// The last step of a row of W where the row ends within it, padded with zeros.
template <class Format>
typename Format::Weights load_rest(const WeightRow& row, int64_t whole, int64_t inputs) {
  const char* from = row.values + whole * kStepBytes;
  const int64_t bytes = inputs * Format::kWeightBytes;
  alignas(64) char values[kStepBytes];
#if defined(__AVX512BW__)
  _mm512_store_si512(values, _mm512_maskz_loadu_epi8((uint64_t{1} << bytes) - 1, from));
#else
  std::memset(values, 0, sizeof values);
  std::memcpy(values, from, bytes);
#endif
  uint16_t scales[2] = {};
  if (row.scales) std::memcpy(scales, row.scales + 2 * whole, (inputs + kScaleGroup - 1) / kScaleGroup * 2);
  return Format::load_weights({values, scales}, 0);
}

// Sums of M rows of x with one row of W of every stream.
template <class Format, int M>
void turn(const WeightRow* rows, const char* x, int64_t x_stride, int64_t in, vfloat (*sums)[M]) {
  const int64_t whole = in / Format::kInputs, rest = in % Format::kInputs;
  vfloat totals[kStreams][M] = {};
  for (int64_t step = 0; step < whole; ++step) {
    for (int s = 0; s < kStreams; ++s) {
      // What keeps the processor from running ahead, several rows of x or the widening of bytes, makes asking pay.
      if (M > 1 || Format::kWeightBytes == 1) __builtin_prefetch(rows[s].values + step * kStepBytes + kAheadBytes);
      const auto w = Format::load_weights(rows[s], step);
      for (int m = 0; m < M; ++m) Format::add(totals[s][m], w, x + m * x_stride + step * Format::kPreparedBytes);
    }
  }
  if (rest) {
#pragma GCC unroll 4  // or the totals leave their registers
    for (int s = 0; s < kStreams; ++s) {
      const auto w = load_rest<Format>(rows[s], whole, rest);
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

// kTurns neighbouring features of every stream, in the order of the streams. Stream s begins at feature
// begin + s * stream and ends where the next one begins, or at `end`.
struct Features {
  int64_t begin, stream, end;
  WeightRow rows[kFeatures];

  template <class Format>
  static Features of(const LinearArguments& args, int64_t begin, int64_t stream, int64_t end) {
    const int64_t groups = (args.in + kScaleGroup - 1) / kScaleGroup;
    Features features = {begin, stream, end, {}};
    for (int i = 0; i < kFeatures; ++i) {
      const int64_t feature = begin + i / kTurns * stream + i % kTurns;
      const int64_t row = std::min(feature, end - 1);  // beyond the last: computed, not stored
      features.rows[i] = {args.weight + row * args.in * Format::kWeightBytes,
                          args.scales ? args.scales + row * groups : nullptr};
    }
    return features;
  }
  int64_t count(int s) const { return std::clamp<int64_t>(end - begin - s * stream, 0, kTurns); }
};

// Of M rows of x, from `row` on.
template <class Format, int M>
void multiply_features(const LinearArguments& args, const Features& features, const char* x, int64_t row) {
  const int64_t x_stride = steps_of<Format>(args) * Format::kPreparedBytes, begin = features.begin;
  vfloat sums[kFeatures][M];
  for (int t = 0; t < kTurns; ++t) {
    WeightRow rows[kStreams];
    for (int s = 0; s < kStreams; ++s) rows[s] = features.rows[s * kTurns + t];
    turn<Format, M>(rows, x + row * x_stride, x_stride, args.in, sums + t);
  }
  using Element = typename Format::Element;
  Element values[kFeatures] = {};
  vfloat bias = {};
  if (args.bias) {
    const Element* from = reinterpret_cast<const Element*>(args.bias) + begin;
    for (int s = 0; s < kStreams; ++s) copy(from + s * features.stream, features.count(s), values + s * kTurns);
    bias = load(values);
  }
  for (int m = 0; m < M; ++m) {
    vfloat of_row[kFeatures];
    for (int i = 0; i < kFeatures; ++i) of_row[i] = sums[i][m];
    store(values, row_sums(of_row) + bias);
    Element* to = reinterpret_cast<Element*>(args.out) + (row + m) * args.out_features + begin;
    for (int s = 0; s < kStreams; ++s) copy(values + s * kTurns, features.count(s), to + s * features.stream);
  }
}

template <class Format>
void multiply_all_rows(const LinearArguments& args, const Features& features, const char* x) {
  int64_t row = 0;
  for (; row + kChunk <= args.rows; row += kChunk)
    multiply_features<Format, kChunk>(args, features, x, row);
  if (args.rows - row == 3) multiply_features<Format, 3>(args, features, x, row);
  if (args.rows - row == 2) multiply_features<Format, 2>(args, features, x, row);
  if (args.rows - row == 1) multiply_features<Format, 1>(args, features, x, row);
}

// Features [begin, end): one thread's share.
template <class Format>
void share(const LinearArguments& args, const char* x, int64_t begin, int64_t end) {
  const int64_t stream = (end - begin + kFeatures - 1) / kFeatures * kTurns;
  for (int64_t offset = 0; offset < stream; offset += kTurns)
    multiply_all_rows<Format>(args, Features::of<Format>(args, begin + offset, stream, end), x);
}

template <class Format>
void multiply(const LinearArguments& args) {
  PreparedInputs prepared = PreparedInputs::of<Format>(args);
  const char* x = prepared.get();
  const bool parallel = args.out_features * args.in * Format::kWeightBytes >= kParallelBytes;
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
  switch (packed->weight_bytes) {
    case 1: multiply<Int8>(*packed); break;
    case 2: multiply<BFloat16>(*packed); break;
    default: multiply<Float32>(*packed);
  }
  return 0;
}
