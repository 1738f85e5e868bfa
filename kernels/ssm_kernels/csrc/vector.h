// Sixteen floats side by side, and the few functions of them that the kernels need.
//
// `vfloat` is a GCC/Clang vector of 64 bytes: one AVX-512 register, two AVX2 registers or four SSE/NEON ones, as the
// compiler sees fit. A lane is a channel almost everywhere (the recurrence never mixes channels), so that lanes need no
// reductions inside the time loop.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

constexpr int kLanes = 16;

typedef float vfloat __attribute__((vector_size(64)));
typedef int32_t vint __attribute__((vector_size(64)));
typedef uint32_t vuint __attribute__((vector_size(64)));
typedef uint16_t vbfloat16 __attribute__((vector_size(32)));

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vint){__VA_ARGS__})
#endif

inline vfloat load(const float* p) {
  vfloat v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, vfloat v) { std::memcpy(p, &v, sizeof v); }

inline vfloat broadcast(float value) { return vfloat{} + value; }

inline vfloat load(const uint16_t* p) {
  vbfloat16 narrow;
  std::memcpy(&narrow, p, sizeof narrow);
#if defined(__AVX512F__)  // GCC would widen halves and join them
  const vuint wide = (vuint)_mm512_cvtepu16_epi32((__m256i)narrow);
#else
  const vuint wide = __builtin_convertvector(narrow, vuint);
#endif
  return (vfloat)(wide << 16);
}

// Rounds to nearest even, as torch does. A NaN keeps its sign and stays a NaN: the rounding could carry it into infinity.
// (The machine's own instruction makes zeros of what is smaller than the smallest normal number.)
inline void store(uint16_t* p, vfloat v) {
#if defined(__AVX512BF16__)
  const __m256bh narrow = _mm512_cvtneps_pbh((__m512)v);
#else
  const vuint bits = (vuint)v;
  const vuint rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const vuint nan = (bits >> 16) | 0x40;
  const vbfloat16 narrow = __builtin_convertvector(v != v ? nan : rounded, vbfloat16);
#endif
  std::memcpy(p, &narrow, sizeof narrow);
}

// What AVX-512 has instructions for and GCC does not find by itself. Together they make the scan a third faster.
#if defined(__AVX512F__)
// The order of the operands matters: a NaN in `v` passes through.
inline vfloat at_least(vfloat v, float low) { return (vfloat)_mm512_max_ps(_mm512_set1_ps(low), (__m512)v); }
inline vfloat at_most(vfloat v, float high) { return (vfloat)_mm512_min_ps(_mm512_set1_ps(high), (__m512)v); }

inline vfloat round_to_integer(vfloat v) { return (vfloat)_mm512_roundscale_ps((__m512)v, 0); }

inline vfloat scale_by_power_of_2(vfloat v, vfloat n) { return (vfloat)_mm512_scalef_ps((__m512)v, (__m512)n); }

// 1 / v for normal v whose reciprocal is normal: 14 bits and one Newton step, within 2 ulp.
inline vfloat reciprocal(vfloat v) {
  const vfloat guess = (vfloat)_mm512_rcp14_ps((__m512)v);
  return guess + guess * (1.0f - v * guess);
}
#else
// The comparisons are written so that a NaN in `v` passes through.
inline vfloat at_least(vfloat v, float low) { return v < low ? broadcast(low) : v; }
inline vfloat at_most(vfloat v, float high) { return v > high ? broadcast(high) : v; }

// Adding 1.5 * 2^23 leaves no room for a fraction; good for |v| < 2^22.
inline vfloat round_to_integer(vfloat v) { return (v + 0x1.8p23f) - 0x1.8p23f; }

// Through the exponent bits, in two halves: every n of -252 to 254 then saturates as it should, to 0 or infinity.
inline vfloat scale_by_power_of_2(vfloat v, vfloat n) {
  const vint whole = __builtin_convertvector(n, vint), half = whole >> 1;
  return v * (vfloat)((half + 127) << 23) * (vfloat)((whole - half + 127) << 23);
}

inline vfloat reciprocal(vfloat v) { return 1.0f / v; }
#endif

constexpr float kLog2E = 0x1.715476p+0f;
constexpr float kLn2 = 0x1.62e43p-1f;
constexpr float kLn2High = 0x1.62e4p-1f;     // 16 bits: exact times an integer of 8 bits
constexpr float kLn2Low = 0x1.7f7d1cp-20f;  // log(2) - kLn2High

// 2^r for |r| <= 1/2: the minimax polynomial of degree 6 with p(0) = 1 exactly, so that decays close to 1 carry no bias
// over long sequences.
inline vfloat exp2_fraction(vfloat r) {
  vfloat p = r * 0x1.41fbbcp-13f + 0x1.5f3e52p-10f;
  p = p * r + 0x1.3b2d4cp-7f;
  p = p * r + 0x1.c6aee8p-5f;
  p = p * r + 0x1.ebfbdcp-3f;
  p = p * r + 0x1.62e43p-1f;
  return p * r + 1.0f;
}

// 2^v, within 2 ulp; 0 and infinity where fp32 ends.
inline vfloat exp2(vfloat v) {
#if !defined(__AVX512F__)
  v = at_most(at_least(v, -200.0f), 200.0f);  // AVX-512 rounds and scales any v
#endif
  const vfloat n = round_to_integer(v);
  return scale_by_power_of_2(exp2_fraction(v - n), n);
}

// e^v for |v| <= 130, within 2 ulp. Taking n log(2) off v in two parts, the first without rounding, keeps the bits that
// exp2(v * log2(e)) would lose for large |v|.
inline vfloat exp_bounded(vfloat v) {
  const vfloat n = round_to_integer(v * kLog2E);
  const vfloat r = (v - n * kLn2High) - n * kLn2Low;
  return scale_by_power_of_2(exp2_fraction(r * kLog2E), n);
}

// At -80 the sigmoid is 2e-35, and there it stays.
inline vfloat sigmoid(vfloat v) { return reciprocal(1.0f + exp_bounded(at_most(at_least(-v, -80.0f), 80.0f))); }
inline vfloat silu(vfloat v) { return v * sigmoid(v); }

// log(1 + e^v) = max(v, 0) + log1p(e), e = e^-|v|, with log1p(e) = 2 atanh(s), s = e / (2 + e) <= 1/3: relative error
// below 3e-7 for every v, where log(1 + e) would lose small e altogether.
inline vfloat softplus(vfloat v) {
  const vfloat minus_magnitude = (vfloat)((vuint)v | 0x80000000u);
  const vfloat e = exp_bounded(at_least(minus_magnitude, -130.0f));
  const vfloat twice_s = (e + e) * reciprocal(e + 2.0f);
  const vfloat w = twice_s * twice_s * 0.25f;
  vfloat p = w * (1.0f / 13) + 1.0f / 11;
  p = p * w + 1.0f / 9;
  p = p * w + 1.0f / 7;
  p = p * w + 1.0f / 5;
  p = p * w + 1.0f / 3;
  return at_least(v, 0.0f) + (twice_s + twice_s * w * p);
}

// Gives the lanes of `a` whose number has this bit for those of `b` whose number lacks it.
template <int kBit>
inline void exchange(vfloat& a, vfloat& b) {
  const vfloat x = a, y = b;
  if constexpr (kBit == 8) {
    a = SHUFFLE(x, y, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    b = SHUFFLE(x, y, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  } else if constexpr (kBit == 4) {
    a = SHUFFLE(x, y, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
    b = SHUFFLE(x, y, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  } else if constexpr (kBit == 2) {
    a = SHUFFLE(x, y, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
    b = SHUFFLE(x, y, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  } else {
    a = SHUFFLE(x, y, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
    b = SHUFFLE(x, y, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
  }
}

template <int kBit>
inline void sum_pairs(vfloat* rows) {
  for (int i = 0; i < kBit; ++i) {
    exchange<kBit>(rows[i], rows[i + kBit]);
    rows[i] += rows[i + kBit];
  }
}

// Lane i of the result is the sum of the lanes of rows[i]. Overwrites `rows`. Each step halves the number of vectors:
// a pair is merged into one vector whose lanes hold partial sums of both.
inline vfloat row_sums(vfloat* rows) {
  sum_pairs<8>(rows);
  sum_pairs<4>(rows);
  sum_pairs<2>(rows);
  sum_pairs<1>(rows);
  return rows[0];
}

template <int kBit>
inline void exchange_pairs(vfloat* rows) {
  for (int i = 0; i < kLanes; ++i)
    if (!(i & kBit)) exchange<kBit>(rows[i], rows[i + kBit]);
}

// Lane j of rows[i] becomes lane i of rows[j].
inline void transpose(vfloat* rows) {
  exchange_pairs<8>(rows);
  exchange_pairs<4>(rows);
  exchange_pairs<2>(rows);
  exchange_pairs<1>(rows);
}

#if defined(__AVX512F__)
constexpr bool kFastTranspose = true;
#else
constexpr bool kFastTranspose = false;  // GCC takes these shuffles apart, lane by lane
#endif

inline float sum(vfloat v) {
  float total = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane) total += v[lane];
  return total;
}
