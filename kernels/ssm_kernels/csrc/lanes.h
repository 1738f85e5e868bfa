// Vectors of the machine's own width, `kWidth` numbers of fp32, and the dtypes that are loaded into them.
//
// Most kernels work on vectors of 16 floats (vector.h) and leave their lowering to the compiler. Where bytes are packed
// and halves widened that costs several times the instructions that the machine needs, so those have names here. What
// remains is arithmetic on whole vectors, and loops over bytes, which the compiler turns into vectors by itself.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define LANES_AVX512
constexpr int kWidth = 16;
#elif defined(__AVX2__) && defined(__F16C__)
#define LANES_AVX2
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

template <class Value, int kBytes>
struct VectorOf {
  typedef Value type __attribute__((vector_size(kBytes)));
};

using floats = VectorOf<float, 4 * kWidth>::type;
using ints = VectorOf<int32_t, 4 * kWidth>::type;
using uints = VectorOf<uint32_t, 4 * kWidth>::type;
using ushorts = VectorOf<uint16_t, 2 * kWidth>::type;
using bytes16 = VectorOf<uint8_t, 16>::type;

// Lanes of two vectors, those of the second counted on from those of the first.
#if defined(__clang__)
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (decltype(a)){__VA_ARGS__})
#endif

template <class Value>
inline Value load_as(const void* p) {
  Value value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

template <class Value>
inline void store_as(void* p, Value value) {
  std::memcpy(p, &value, sizeof value);
}

template <class Vector>
inline Vector larger(Vector a, Vector b) {
  return a > b ? a : b;
}

template <class Vector>
inline Vector smaller(Vector a, Vector b) {
  return a < b ? a : b;
}

// To the nearest integer, halves to even. Adding and subtracting 1.5 * 2^23 would not do: the compiler may contract
// that with the product that comes before it, and then the product is not rounded by itself.
inline ints nearest(floats v) {
#if defined(LANES_AVX512)
  return (ints)_mm512_cvtps_epi32((__m512)v);
#elif defined(LANES_AVX2)
  return (ints)_mm256_cvtps_epi32((__m256)v);
#elif defined(__SSE2__)
  return (ints)_mm_cvtps_epi32((__m128)v);
#else
  ints whole;
  for (int i = 0; i < kWidth; ++i) whole[i] = static_cast<int32_t>(__builtin_rintf(v[i]));
  return whole;
#endif
}

// 64 integers to bytes. Those out of range saturate.
inline void narrow(const ints* v, int8_t* out) {
#if defined(LANES_AVX512)
  // Packing takes 4 numbers of each vector in turn.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i low = _mm512_packs_epi32((__m512i)v[0], (__m512i)v[1]);
  const __m512i high = _mm512_packs_epi32((__m512i)v[2], (__m512i)v[3]);
  store_as(out, _mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high)));
#elif defined(LANES_AVX2)
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (int half = 0; half < 2; ++half, v += 4, out += 32) {
    const __m256i low = _mm256_packs_epi32((__m256i)v[0], (__m256i)v[1]);
    const __m256i high = _mm256_packs_epi32((__m256i)v[2], (__m256i)v[3]);
    store_as(out, _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order));
  }
#else
  for (int i = 0; i < 64; ++i)
    out[i] = static_cast<int8_t>(std::min(std::max<int32_t>(v[i / kWidth][i % kWidth], -128), 127));
#endif
}

// 16 signed bytes to as many floats.
inline void widen(bytes16 v, floats* out) {
#if defined(LANES_AVX512)
  *out = (floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)v));
#elif defined(LANES_AVX2)
  const __m128i second = _mm_unpackhi_epi64((__m128i)v, (__m128i)v);
  out[0] = (floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32((__m128i)v));
  out[1] = (floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(second));
#else
  float wide[16];
  for (int i = 0; i < 16; ++i) wide[i] = static_cast<int8_t>(v[i]);
  std::memcpy(out, wide, sizeof wide);
#endif
}

// `kWidth` signed bytes to 16 bits each.
inline ushorts widen_bytes(const uint8_t* p) {
#if defined(LANES_AVX512)
  return (ushorts)_mm256_cvtepi8_epi16(load_as<__m128i>(p));
#elif defined(LANES_AVX2)
  return (ushorts)_mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  ushorts wide;
  for (int i = 0; i < kWidth; ++i) wide[i] = static_cast<uint16_t>(static_cast<int8_t>(p[i]));
  return wide;
#endif
}

inline uints widen(ushorts v) {
#if defined(LANES_AVX512)
  return (uints)_mm512_cvtepu16_epi32((__m256i)v);
#elif defined(LANES_AVX2)
  return (uints)_mm256_cvtepu16_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, uints);
#endif
}

inline floats from_fp16(ushorts v) {
#if defined(LANES_AVX512)
  return (floats)_mm512_cvtph_ps((__m256i)v);
#elif defined(LANES_AVX2)
  return (floats)_mm256_cvtph_ps((__m128i)v);
#else
  const uints bits = widen(v), magnitude = bits & 0x7fff;
  const uints subnormal = (uints)(__builtin_convertvector((ints)magnitude, floats) * 0x1p-24f);
  const uints finite = magnitude < 0x400 ? subnormal : (magnitude << 13) + (112u << 23);
  return (floats)((bits & 0x8000) << 16 | (magnitude < 0x7c00 ? finite : magnitude << 13 | 0x7f800000));
#endif
}

inline ushorts to_fp16(floats v) {
#if defined(LANES_AVX512)
  return (ushorts)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(LANES_AVX2)
  return (ushorts)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  const uints bits = (uints)v, magnitude = bits & 0x7fffffff, zeros = {};
  const uints normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  // Counted in units of 2^-24; larger ones, which are not wanted, are made to fit an integer.
  const uints subnormal = (uints)nearest((floats)smaller(magnitude, zeros + (113u << 23)) * 0x1p24f);
  const uints special = magnitude > 0x7f800000 ? zeros + 0x7e00 : zeros + 0x7c00;
  const uints half = magnitude < (113u << 23) ? subnormal : magnitude < 0x47800000 ? normal : special;
  return __builtin_convertvector((bits >> 16 & 0x8000) | half, ushorts);
#endif
}

// ---- The dtypes of numbers. `Bits` orders magnitudes as integers do; storing rounds to nearest even.

struct Float32 {
  using Element = float;
  using Bits = uint32_t;
  static floats load(const void* p) { return load_as<floats>(p); }
  static void store(float* p, floats v, floats next) {
    store_as(p, v);
    store_as(p + kWidth, next);
  }
};

struct BFloat16 {
  using Element = uint16_t;
  using Bits = uint16_t;
  static floats load(const void* p) { return (floats)(widen(load_as<ushorts>(p)) << 16); }

  // The upper halves of what is stored in fp32. The NaNs that come here have no bit set in the lower half, so that
  // rounding carries nothing into the upper one.
  static void store(uint16_t* p, floats v, floats next) {
    store_as(p, upper_halves(rounded(v), rounded(next), std::make_integer_sequence<int, 2 * kWidth>{}));
  }

 private:
  using Halves = VectorOf<uint16_t, 4 * kWidth>::type;
  static Halves rounded(floats v) { return (Halves)((uints)v + 0x7fff + ((uints)v >> 16 & 1)); }
  template <int... kLane>
  static Halves upper_halves(Halves a, Halves b, std::integer_sequence<int, kLane...>) {
    return PICK(a, b, (2 * kLane + 1)...);
  }
};

struct Float16 {
  using Element = uint16_t;
  using Bits = uint16_t;
  static floats load(const void* p) { return from_fp16(load_as<ushorts>(p)); }
  static void store(uint16_t* p, floats v, floats next) {
    store_as(p, to_fp16(v));
    store_as(p + kWidth, to_fp16(next));
  }
};

// By its number in cpu/quantize.py.
template <class Run>
void with_dtype(int64_t dtype, const Run& run) {
  if (dtype == 0) run(Float32{});
  if (dtype == 1) run(BFloat16{});
  if (dtype == 2) run(Float16{});
}
