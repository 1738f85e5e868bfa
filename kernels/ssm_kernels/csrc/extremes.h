// The largest magnitude of each of 16 groups, and its sign. Magnitudes are compared as integers: that orders numbers,
// with NaN and infinity above all others, and 16-bit ones need not be converted first.
#pragma once

#include <limits>
#include <type_traits>

#include "lanes.h"

constexpr int kRows = 16;

template <class Value>
using Row = typename VectorOf<Value, 16>::type;

// The larger of both halves, until 16 bytes are left.
template <class Value, class Wide>
inline Row<Value> fold(Wide wide) {
  if constexpr (sizeof wide == 16) {
    return wide;
  } else {
    typename VectorOf<Value, sizeof wide / 2>::type halves[2];
    std::memcpy(halves, &wide, sizeof wide);
    return fold<Value>(larger(halves[0], halves[1]));
  }
}

// Lanes of two rows in turn, from lane `kFirst` on.
template <int kFirst, class Row, int... kLane>
inline Row zip(Row a, Row b, std::integer_sequence<int, kLane...>) {
  constexpr int kLanes = sizeof...(kLane);
  return PICK(a, b, (kFirst + kLane / 2 + kLane % 2 * kLanes)...);
}

// Zips neighbouring rows and takes the larger of both halves: half as many rows, each with the candidates of twice as
// many groups, half as many of each. `Lane` has the size of a group's candidates side by side.
template <class Lane, class Row>
inline void halve(Row* rows, int count) {
  using Lanes = ::Row<Lane>;
  constexpr int kLanes = 16 / sizeof(Lane);
  constexpr std::make_integer_sequence<int, kLanes> kOrder;
  for (int i = 0; i < count; i += 2) {
    const Lanes a = (Lanes)rows[i], b = (Lanes)rows[i + 1];
    rows[i / 2] = larger((Row)zip<0>(a, b, kOrder), (Row)zip<kLanes / 2>(a, b, kOrder));
  }
}

// rows[g] holds the candidates of group g; afterwards the first rows hold the largest ones, one a group.
template <class Row>
inline void largest_of_rows(Row* rows) {
  constexpr bool kShort = sizeof(rows[0][0]) == 2;
  if (kShort) halve<uint16_t>(rows, kRows);
  halve<uint32_t>(rows, kShort ? kRows / 2 : kRows);
  halve<uint64_t>(rows, kShort ? kRows / 4 : kRows / 2);
}

// Writes the bits of the largest magnitudes to `largest` [16] and, if `kSigned`, the opposite of the sign of the first
// number that has it to `signs` [16].
template <int kGroup, bool kSigned, class Bits>
inline void find_extremes(const Bits* numbers, Bits* largest, Bits* signs) {
  using SignedBits = std::make_signed_t<Bits>;
  using Wide = typename VectorOf<Bits, 4 * kWidth>::type;
  using SignedWide = typename VectorOf<SignedBits, 4 * kWidth>::type;
  constexpr int kLanes = sizeof(Wide) / sizeof(Bits), kRowLanes = 16 / sizeof(Bits);
  constexpr Bits kMagnitude = std::numeric_limits<Bits>::max() >> 1;
  constexpr SignedBits kSign = std::numeric_limits<SignedBits>::min();
  constexpr Bits kKept = kSigned ? std::numeric_limits<Bits>::max() : kMagnitude;
  Row<Bits> rows[kRows];
  Row<SignedBits> signed_rows[kRows];
  for (int g = 0; g < kRows; ++g) {
    Wide most = load_as<Wide>(numbers + g * kGroup) & kKept;
    SignedWide signed_most = (SignedWide)most;
    for (int i = kLanes; i < kGroup; i += kLanes) {
      const Wide next = load_as<Wide>(numbers + g * kGroup + i) & kKept;
      most = larger(most, next);
      signed_most = larger(signed_most, (SignedWide)next);
    }
    rows[g] = fold<Bits>(most);
    if (kSigned) signed_rows[g] = fold<SignedBits>(signed_most);
  }
  largest_of_rows(rows);
  if (!kSigned) {
    std::memcpy(largest, rows, kRows * sizeof(Bits));
    return;
  }
  // With its sign bit, the largest unsigned integer is the lowest number, unless all are positive; the largest signed
  // integer is the highest number, unless all are negative.
  largest_of_rows(signed_rows);
  Row<SignedBits> ties[kRows / kRowLanes], any_tie = {};
  for (int i = 0; i < kRows / kRowLanes; ++i) {
    const Row<SignedBits> lowest = (Row<SignedBits>)rows[i], highest = signed_rows[i];
    const Row<SignedBits> magnitude = larger(lowest & static_cast<SignedBits>(kMagnitude), highest);
    ties[i] = lowest == (highest ^ kSign);
    any_tie |= ties[i];
    store_as(largest + i * kRowLanes, magnitude);
    store_as(signs + i * kRowLanes, (highest == magnitude) & kSign);
  }
  if (!(load_as<uint64_t>(&any_tie) | load_as<uint64_t>(reinterpret_cast<char*>(&any_tie) + 8))) return;
  for (int g = 0; g < kRows; ++g) {
    if (!ties[g / kRowLanes][g % kRowLanes]) continue;
    const Bits* first = numbers + g * kGroup;
    while ((load_as<Bits>(first) & kMagnitude) != largest[g]) ++first;
    signs[g] = static_cast<Bits>(~load_as<Bits>(first) & kSign);
  }
}
