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

constexpr int64_t kParallelBytes = 3 << 16;  // of W; below, waking the other threads costs more
constexpr int kFeatures = 16, kStreams = 4, kTurns = kFeatures / kStreams, kChunk = 4;
constexpr int64_t kStepBytes = 64;   // of a row of W as it is stored
constexpr int64_t kScaleGroup = 32;  // inputs that share a scale; GROUP in int8_weight.py
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

// One row of W: one output feature.
struct WeightRow {
  const char* values;
  const uint16_t* scales;
};

// How one step of a row of W is multiplied: kInputs of its numbers, with at most kChunk rows of x. `Element` is what x, the
// bias and the output are made of.
// `prepare` brings the inputs of a step into the form that `add` reads, zeros where the row has ended.
struct Float32 {
  using Element = float;
  static constexpr int64_t kWeightBytes = 4, kInputs = 16, kPreparedBytes = 64;
  using Weights = vfloat;
  static Weights load_weights(const WeightRow& row, int64_t step) {
    return load(reinterpret_cast<const float*>(row.values + step * kStepBytes));
  }
  static void add(vfloat& sum, const Weights& w, const char* x) { sum += w * load(reinterpret_cast<const float*>(x)); }
  static void prepare(const char* x, int64_t count, char* out) { std::memcpy(out, x, count * 4); }
};

#if defined(__AVX512BF16__)
struct BFloat16 {
  using Element = uint16_t;
  static constexpr int64_t kWeightBytes = 2, kInputs = 32, kPreparedBytes = 64;
  using Weights = __m512bh;
  static Weights load_weights(const WeightRow& row, int64_t step) { return load_bf16(row.values + step * kStepBytes); }
  static void add(vfloat& sum, const Weights& w, const char* x) {
    sum = (vfloat)_mm512_dpbf16_ps((__m512)sum, w, load_bf16(x));
  }
  static void prepare(const char* x, int64_t count, char* out) { std::memcpy(out, x, count * 2); }
  static __m512bh load_bf16(const char* p) { return (__m512bh)_mm512_loadu_si512(p); }
};

#else
// Even and odd inputs apart: each half of a 32-bit word becomes a float by a shift or a mask.
struct BFloat16 {
  using Element = uint16_t;
  static constexpr int64_t kWeightBytes = 2, kInputs = 32, kPreparedBytes = 128;
  struct Weights {
    vfloat even, odd;
  };
  static Weights load_weights(const WeightRow& row, int64_t step) {
    vuint words;
    std::memcpy(&words, row.values + step * kStepBytes, sizeof words);
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

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
// Products of bytes. An input becomes 256 high + low, an integer of 15 bits, with one power of two for a group of 32: a
// bf16 number within 2^-6 of the group's largest is that integer, a smaller one is rounded to 2^-14 of the largest. What
// the codes are above the weights, 128, is taken off beforehand.
struct Int8 {
  using Element = uint16_t;
  static constexpr int64_t kWeightBytes = 1, kInputs = 64, kPreparedBytes = 4 * 64;

  struct Weights {
    __m512i codes;
    __m512 scales;
  };
  static Weights load_weights(const WeightRow& row, int64_t step) {
    int32_t pair;
    std::memcpy(&pair, row.scales + 2 * step, sizeof pair);
    const __m512i scales = _mm512_sllv_epi32(_mm512_set1_epi32(pair), by_group(16, 0));
    return {_mm512_loadu_si512(row.values + step * kStepBytes),
            _mm512_castsi512_ps(_mm512_and_si512(scales, _mm512_set1_epi32(0xffff0000)))};
  }

  // What `prepare` leaves: 64 high bytes, 64 low ones, 16 sums to begin with, and 16 scales.
  static void add(vfloat& sum, const Weights& w, const char* x) {
    const __m512i high = _mm512_dpbusd_epi32(_mm512_setzero_si512(), w.codes, _mm512_loadu_si512(x));
    const __m512i low = _mm512_dpbusd_epi32(_mm512_loadu_si512(x + 128), w.codes, _mm512_loadu_si512(x + 64));
    const __m512 product = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low));
    sum = (vfloat)_mm512_fmadd_ps(product, _mm512_mul_ps(w.scales, _mm512_loadu_ps(x + 192)), (__m512)sum);
  }

  static void prepare(const char* x, int64_t count, char* out) {
    uint16_t values[kInputs] = {};
    std::memcpy(values, x, count * sizeof(uint16_t));
    __m512i integers[4];
    const __m512 first = to_integers(values, integers), second = to_integers(values + kScaleGroup, integers + 2);
    for (int k = 0; k < 4; ++k) {
      const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(integers[k], _mm512_set1_epi32(128)), 8);
      const __m512i low = _mm512_sub_epi32(integers[k], _mm512_slli_epi32(high, 8));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + k * kLanes), _mm512_cvtepi32_epi8(high));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 64 + k * kLanes), _mm512_cvtepi32_epi8(low));
    }
    const __m512i zero = _mm512_setzero_si512(), code = _mm512_set1_epi8(static_cast<char>(128));
    const __m512i high = _mm512_dpbusd_epi32(zero, code, _mm512_loadu_si512(out));
    const __m512i low = _mm512_dpbusd_epi32(zero, code, _mm512_loadu_si512(out + 64));
    const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
    _mm512_storeu_si512(out + 128, _mm512_sub_epi32(zero, sum));
    _mm512_storeu_ps(out + 192, _mm512_mask_blend_ps(0xff00, first, second));
  }

 private:
  static __m512i by_group(int first, int second) {
    return _mm512_mask_blend_epi32(0xff00, _mm512_set1_epi32(first), _mm512_set1_epi32(second));
  }
  // A group's inputs as integers below 2^14, and what one of them stands for: NaN where an input is not finite.
  static __m512 to_integers(const uint16_t* x, __m512i* out) {
    const __m512 a = (__m512)load(x), b = (__m512)load(x + kLanes);
    const float largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b)));
    int32_t bits;
    std::memcpy(&bits, &largest, sizeof bits);
    const int exponent = std::max((bits >> 23) - 127, -100);
    const bool finite = !_mm512_fpclass_ps_mask(a, 0x99) && !_mm512_fpclass_ps_mask(b, 0x99);
    const __m512 scale = _mm512_castsi512_ps(_mm512_set1_epi32((127 + 13 - exponent) << 23));
    out[0] = _mm512_cvtps_epi32(_mm512_mul_ps(a, scale));
    out[1] = _mm512_cvtps_epi32(_mm512_mul_ps(b, scale));
    return finite ? _mm512_castsi512_ps(_mm512_set1_epi32((127 - 13 + exponent) << 23))
                  : _mm512_set1_ps(__builtin_nanf(""));
  }
};
#else
struct Int8 {
  using Element = uint16_t;
  static constexpr int64_t kWeightBytes = 1, kInputs = 64, kPreparedBytes = 256;
  struct Weights {
    vfloat parts[4];
  };
  static Weights load_weights(const WeightRow& row, int64_t step) {
    Weights weights;
    for (int k = 0; k < 4; ++k) {
      typedef uint8_t vbytes __attribute__((vector_size(16)));
      vbytes codes;
      std::memcpy(&codes, row.values + step * kStepBytes + k * kLanes, sizeof codes);
      const vfloat whole = __builtin_convertvector(codes, vfloat) - 128.0f;
      weights.parts[k] = whole * bf16_to_float(row.scales[2 * step + k / 2]);
    }
    return weights;
  }
  static void add(vfloat& sum, const Weights& w, const char* x) {
    for (int k = 0; k < 4; ++k) sum += w.parts[k] * load(reinterpret_cast<const float*>(x) + k * kLanes);
  }
  static void prepare(const char* x, int64_t count, char* out) {
    const uint16_t* bits = reinterpret_cast<const uint16_t*>(x);
    uint32_t* values = reinterpret_cast<uint32_t*>(out);
    for (int64_t i = 0; i < count; ++i) values[i] = static_cast<uint32_t>(bits[i]) << 16;
  }
};
#endif

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
