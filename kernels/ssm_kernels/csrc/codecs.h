// The four lossy formats of codecs.py, a tile of 64 numbers at a time: from numbers in units of the scale to bytes, and
// back.
//
// A scale is rounded up, so that no number comes here that is rounded to more than the largest code, not even where the
// scale is the largest one (127.01, 448.9 and 31.03 units then at most). Only a signed scale leaves numbers to cut.
//
// The vectors of a tile hold its numbers in an order of the codec's own: `element(position)` says which number is at a
// position; it goes on by one within 16 positions, and is its own inverse.
#pragma once

#include "lanes.h"

constexpr int kTile = 64;
constexpr int kVectors = kTile / kWidth;

struct Int8 {
  static constexpr int kGroup = 64, kTileBytes = 64;
  static constexpr float kLargest = 127;               // code
  static constexpr float kLargestScale = 0x1.02p121f;  // times the largest code it is finite
  static constexpr float kUnit = 1;                    // decoded numbers are in units of scale * kUnit
  static constexpr bool kSignedScale = false;
  static constexpr int element(int position) { return position; }

  static void encode(const floats* tile, uint8_t* wire) {
    ints rounded[kVectors];
    for (int k = 0; k < kVectors; ++k) rounded[k] = nearest(tile[k]);
    narrow(rounded, reinterpret_cast<int8_t*>(wire));
  }

  static void decode(const uint8_t* wire, floats* tile) {
    for (int i = 0; i < kTile; i += 16) widen(load_as<bytes16>(wire + i), tile + i / kWidth);
  }
};

struct Fp8 {
  static constexpr int kGroup = 128, kTileBytes = 64;
  static constexpr float kLargest = 448, kLargestScale = 0x1.24p119f, kUnit = 256;
  static constexpr bool kSignedScale = false;
  static constexpr int element(int position) { return position; }

  static void encode(const floats* tile, uint8_t* wire) {
    ints codes[kVectors];
    for (int k = 0; k < kVectors; ++k) codes[k] = code(tile[k]);
    narrow(codes, reinterpret_cast<int8_t*>(wire));
  }

  // The exponent e of a number, -6 at least, says what the last bit of its code is worth: 2^(e - 3). That is also the
  // worth of the last bit of 2^(e + 20) in fp32: added to it, the number is rounded as its code is, and the last byte
  // of the sum counts the bits: 8 to 16 of them for a normal number, less for a subnormal one. With 8 more for each
  // exponent above -6 that is the code; 56 is -8 * (127 - 6) in a byte, and even, so that halves go to even.
  static ints code(floats number) {
    constexpr int32_t kSmallest = (127 - 6) << 23, kAlign = (20 << 23) + 56;
    const ints bits = (ints)number, magnitude = bits & 0x7fffffff;
    const ints exponent = larger(bits & 0x7f800000, ints{} + kSmallest);
    const uints sum = (uints)((floats)magnitude + (floats)((uints)exponent + static_cast<uint32_t>(kAlign)));
    const ints last_seven = ints{} + 0x7f;
    return ((ints)(sum + (uints)(exponent >> 20)) & last_seven) | (bits >> 24 & ~last_seven);
  }

  // The bits are those of an fp16 number that is 2^8 times smaller.
  static void decode(const uint8_t* wire, floats* tile) {
    for (int k = 0; k < kVectors; ++k) tile[k] = from_fp16(widen_bytes(wire + k * kWidth) << 7 & 0xbf80);
  }
};

// Two groups of 32: the first halves of both, then the second halves. Numbers whose codes share a byte are then 32
// positions apart.
constexpr int halves_apart(int position) { return position % 32 / 16 * 32 + position / 32 * 16 + position % 16; }

using words16 = VectorOf<uint64_t, 16>::type;
constexpr uint64_t every_byte(uint64_t byte) { return byte * 0x0101010101010101u; }

struct Int6 {
  static constexpr int kGroup = 32, kTileBytes = 48;
  static constexpr float kLargest = 31, kLargestScale = 0x1.08p123f, kUnit = 1;
  static constexpr bool kSignedScale = false;
  static constexpr int element(int position) { return halves_apart(position); }

  static void encode(const floats* tile, uint8_t* wire) {
    ints rounded[kVectors];
    int8_t codes[kTile];
    uint8_t low[32], high[32];
    for (int k = 0; k < kVectors; ++k) rounded[k] = nearest(tile[k]);
    narrow(rounded, codes);
    for (int i = 0; i < 32; ++i) {
      low[i] = static_cast<uint8_t>((codes[i] & 15) | static_cast<uint8_t>(codes[i + 32]) << 4);
      high[i] = static_cast<uint8_t>((codes[i] >> 4 & 3) | (codes[i + 32] & 0x30));
    }
    for (int group = 0; group < 2; ++group, wire += 24) {
      const uint8_t* plane = high + group * 16;
      std::memcpy(wire, low + group * 16, 16);
      store_as(wire + 16, load_as<uint64_t>(plane) | load_as<uint64_t>(plane + 8) << 2);
    }
  }

  static void decode(const uint8_t* wire, floats* tile) {
    for (int group = 0; group < 2; ++group, wire += 24, tile += 16 / kWidth) {
      const words16 low = load_as<words16>(wire);
      const words16 high = (words16{} + load_as<uint64_t>(wire + 16)) >> (words16){0, 2};
      const words16 first = (low & every_byte(0x0f)) | (high & every_byte(0x03)) << 4;
      const words16 second = (low >> 4 & every_byte(0x0f)) | (high & every_byte(0x30));
      widen(((bytes16)first ^ 32) - 32, tile);
      widen(((bytes16)second ^ 32) - 32, tile + kVectors / 2);
    }
  }
};

struct Int4 {
  static constexpr int kGroup = 32, kTileBytes = 32;
  static constexpr float kLargest = 8, kLargestScale = 0x1.fep124f, kUnit = 1;
  static constexpr bool kSignedScale = true;
  static constexpr int element(int position) { return halves_apart(position); }

  static void encode(const floats* tile, uint8_t* wire) {
    ints rounded[kVectors];
    int8_t codes[kTile];
    for (int k = 0; k < kVectors; ++k) rounded[k] = nearest(tile[k]);
    narrow(rounded, codes);
    for (int i = 0; i < 32; ++i) {
      const int8_t first = std::min<int8_t>(codes[i], 7), second = std::min<int8_t>(codes[i + 32], 7);
      wire[i] = static_cast<uint8_t>((first & 15) | static_cast<uint8_t>(second) << 4);
    }
  }

  static void decode(const uint8_t* wire, floats* tile) {
    for (int group = 0; group < 2; ++group, wire += 16, tile += 16 / kWidth) {
#if defined(LANES_AVX512)
      // A table of 16 floats is one register; it is looked up by the last 4 bits.
      const __m512 numbers = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
      const __m512i both = _mm512_cvtepu8_epi32(load_as<__m128i>(wire));
      tile[0] = (floats)_mm512_permutexvar_ps(both, numbers);
      tile[2] = (floats)_mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), numbers);
#else
      const words16 both = load_as<words16>(wire);
      widen(((bytes16)(both & every_byte(0x0f)) ^ 8) - 8, tile);
      widen(((bytes16)(both >> 4 & every_byte(0x0f)) ^ 8) - 8, tile + kVectors / 2);
#endif
    }
  }
};
