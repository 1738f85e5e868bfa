// 2^(x y), the scan's cost: one of these a token, channel and state.
//
// AVX-512 looks up 16 numbers in a register, which leaves little for a polynomial:
//
//   x y = n / 16 + r, |r| <= 1/32        2^(x y) = 2^(n div 16) T[n mod 16] (1 + r (c1 + r (c2 + r c3)))
//
// Adding 1.5 * 2^19 leaves n in the last bits of the sum. The power of two is added to the exponent bits: n << 19 has it
// in the right place, with n mod 16 below it, which the table's entries have taken off beforehand. c1 is log(2), so that
// decays close to 1 carry no bias over long sequences. Relative error below 1.2e-7.
//
// Several at once, one stage after the other: a processor that met each chain of ten steps as a whole would wait for it.
#pragma once

#include "vector.h"

#if defined(__AVX512F__)
class Exp2Product {
 public:
  // e[i] = 2^product[i]; 2^-126 where that is less, infinity where fp32 ends, and NaN stays.
  template <int kCount>
  void operator()(const vfloat* product, vfloat* e) const {
    __m512 r[kCount];
    __m512i n[kCount];
    // In this order of the operands a NaN passes through.
    for (int i = 0; i < kCount; ++i) r[i] = _mm512_max_ps(lowest_, (__m512)product[i]);
    // As integers the sums have the same order. Above the highest, what is left to the polynomial is large enough.
    for (int i = 0; i < kCount; ++i)
      n[i] = _mm512_min_epi32(_mm512_castps_si512(_mm512_add_ps(r[i], shift_)), highest_);
    for (int i = 0; i < kCount; ++i) r[i] = _mm512_sub_ps(r[i], _mm512_sub_ps(_mm512_castsi512_ps(n[i]), shift_));
    __m512 power[kCount], p[kCount];
    for (int i = 0; i < kCount; ++i)
      power[i] = _mm512_castsi512_ps(
          _mm512_add_epi32(_mm512_permutexvar_epi32(n[i], table_), _mm512_slli_epi32(n[i], 19)));
    for (int i = 0; i < kCount; ++i) p[i] = _mm512_fmadd_ps(r[i], c3_, c2_);
    for (int i = 0; i < kCount; ++i) p[i] = _mm512_fmadd_ps(r[i], p[i], c1_);
    for (int i = 0; i < kCount; ++i) p[i] = _mm512_mul_ps(r[i], p[i]);
    for (int i = 0; i < kCount; ++i) e[i] = (vfloat)_mm512_fmadd_ps(power[i], p[i], power[i]);
  }

 private:
  static constexpr float kShift = 0x1.8p+19f;
  const __m512 shift_ = _mm512_set1_ps(kShift), c1_ = _mm512_set1_ps(kLn2), c2_ = _mm512_set1_ps(0x1.ebfff2p-3f),
               c3_ = _mm512_set1_ps(0x1.c6b0eap-5f);
  const __m512 lowest_ = _mm512_set1_ps(-126.0f);
  const __m512i highest_ = _mm512_castps_si512(_mm512_set1_ps(kShift + 128.0f - 1.0f / 16));
  // The bits of 2^(k / 16), less k << 19.
  const __m512i table_ = _mm512_setr_epi32(
      0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532, 0x3f75fed7, 0x3f75583f, 0x3f7504f3,
      0x3f7508a4, 0x3f75672a, 0x3f76248c, 0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d);
};
#else
struct Exp2Product {
  template <int kCount>
  void operator()(const vfloat* product, vfloat* e) const {
    for (int i = 0; i < kCount; ++i) e[i] = exp2(product[i]);
  }
};
#endif
