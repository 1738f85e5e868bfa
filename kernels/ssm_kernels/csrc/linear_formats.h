// What W is made of in linear.cpp, and how one step of a row of it, 64 bytes as they are stored, is multiplied.
//
// A format has
//
//   Element       what x, the bias and the output are made of
//   kInputs       how many inputs a step has
//   load_weights  a step of a row, ready to be multiplied
//   prepare       the inputs of a step, zeros where the row has ended, in the form that `add` reads
//   add           the products of both, to a sum for each lane
//
// fp32, bf16, and int8 with one bf16 scale for 32 inputs.
#pragma once

#include <algorithm>

#include "rows.h"

constexpr int64_t kStepBytes = 64;
constexpr int64_t kScaleGroup = 32;  // inputs that share a scale; GROUP in int8_weight.py

namespace linear {

// One row of W: one output feature.
struct WeightRow {
  const char* values;
  const uint16_t* scales;
};

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

}  // namespace linear
