// Tensors as the kernels see them: rows of channels, one row a token, in fp32 or bf16, with unit stride between
// channels and any stride between tokens (a view of a packed projection is read where it lies). Kernels work on tiles:
// a few tokens of one group of 64 channels, converted to fp32; 64 bf16 channels are two whole cache lines.
#pragma once

#include <algorithm>
#include <cstdint>

#include "vector.h"

constexpr int kGroup = 64;  // channels

inline float bf16_to_float(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// Mirrors `rows()` in cpu/library.py.
struct Rows {
  char* data;  // null: the argument was omitted
  int64_t sequence_stride, token_stride;  // in elements
  int64_t is_bf16;

  explicit operator bool() const { return data != nullptr; }
  int64_t element_size() const { return is_bf16 ? 2 : 4; }
  char* at(int64_t sequence, int64_t token, int64_t channel) const {
    return data + (sequence * sequence_stride + token * token_stride + channel) * element_size();
  }
  float value(int64_t sequence, int64_t token, int64_t channel) const {
    const char* element = at(sequence, token, channel);
    return is_bf16 ? bf16_to_float(*reinterpret_cast<const uint16_t*>(element))
                   : *reinterpret_cast<const float*>(element);
  }
};

// Where each sequence's tokens lie: rows of their own (`starts` null) or packed one after another in row 0.
struct Sequences {
  const int64_t* starts;  // [count + 1] or null
  int64_t count, padded_length;

  int64_t row(int64_t sequence) const { return starts ? 0 : sequence; }
  int64_t first(int64_t sequence) const { return starts ? starts[sequence] : 0; }
  int64_t length(int64_t sequence) const {
    return starts ? starts[sequence + 1] - starts[sequence] : padded_length;
  }
  int64_t tokens() const { return starts ? starts[count] : count * padded_length; }
  // Position among all tokens, packed or not.
  int64_t flat(int64_t sequence) const { return starts ? starts[sequence] : sequence * padded_length; }
};

// Slots of a state pool; without indices sequence s owns slot s.
struct Slots {
  const void* indices;
  int64_t is_int32, count;

  int64_t of(int64_t sequence) const {
    if (!indices) return sequence;
    return is_int32 ? static_cast<const int32_t*>(indices)[sequence] : static_cast<const int64_t*>(indices)[sequence];
  }
  bool in_range(int64_t sequences) const {
    for (int64_t s = 0; indices && s < sequences; ++s)
      if (of(s) < 0 || of(s) >= count) return false;
    return true;
  }
};

constexpr int64_t kSlotOutOfRange = 1;  // returned by the entry points; 0 is success

inline float to_float(float value) { return value; }
inline float to_float(uint16_t value) { return bf16_to_float(value); }

// Channels past `channels` become 0, up to a whole vector, so that no kernel has a special last vector.
template <class Element>
inline void load_row(const Element* row, int channels, float* out) {
  int c = 0;
  for (; c + kLanes <= channels; c += kLanes) store(out + c, load(row + c));
  if (c == channels) return;
  store(out + c, vfloat{});
  for (; c < channels; ++c) out[c] = to_float(row[c]);
}

template <class Element>
inline void store_row(Element* row, int channels, const float* values) {
  int c = 0;
  for (; c + kLanes <= channels; c += kLanes) store(row + c, load(values + c));
  if (c == channels) return;
  Element last[kLanes];
  store(last, load(values + c));
  std::memcpy(row + c, last, (channels - c) * sizeof(Element));
}

// Up to 16 rows of up to 16 numbers, turned: lane r of out[i] is number i of row r, and 0 where there is no such row.
template <class Element>
inline void load_turned(const Element* rows, int64_t stride, int count, int width, vfloat* out) {
  if (kFastTranspose && width == kLanes) {
    for (int r = 0; r < kLanes; ++r) out[r] = r < count ? load(rows + r * stride) : vfloat{};
    return transpose(out);
  }
  float* numbers = reinterpret_cast<float*>(out);
  for (int i = 0; i < width; ++i)
    for (int r = 0; r < kLanes; ++r) numbers[i * kLanes + r] = r < count ? to_float(rows[r * stride + i]) : 0.0f;
}

// The way back. Overwrites `in`.
template <class Element>
inline void store_turned(vfloat* in, int count, int width, Element* rows, int64_t stride) {
  if (kFastTranspose && width == kLanes) {
    transpose(in);
    for (int r = 0; r < count; ++r) store(rows + r * stride, in[r]);
    return;
  }
  for (int i = 0; i < width; ++i) {
    Element numbers[kLanes];
    store(numbers, in[i]);
    for (int r = 0; r < count; ++r) rows[r * stride + i] = numbers[r];
  }
}

inline void load_row(const char* row, bool is_bf16, int channels, float* out) {
  if (is_bf16)
    load_row(reinterpret_cast<const uint16_t*>(row), channels, out);
  else
    load_row(reinterpret_cast<const float*>(row), channels, out);
}

inline void store_row(char* row, bool is_bf16, int channels, const float* values) {
  if (is_bf16)
    store_row(reinterpret_cast<uint16_t*>(row), channels, values);
  else
    store_row(reinterpret_cast<float*>(row), channels, values);
}

// tile[token][channel of the group]
inline void load_tile(const Rows& rows, int64_t sequence, int64_t token, int tokens, int64_t channel, int channels,
                      float* tile) {
  for (int t = 0; t < tokens; ++t)
    load_row(rows.at(sequence, token + t, channel), rows.is_bf16, channels, tile + t * kGroup);
}

// Asks for a tile that will be loaded soon: its rows lie in different pages, where the hardware does not look ahead.
inline void prefetch_tile(const Rows& rows, int64_t sequence, int64_t token, int64_t tokens, int64_t channel,
                          int channels) {
  constexpr int kCacheLine = 64;
  for (int64_t t = 0; t < tokens; ++t) {
    const char* row = rows.at(sequence, token + t, channel);
    for (int64_t byte = 0; byte < channels * rows.element_size(); byte += kCacheLine) __builtin_prefetch(row + byte);
  }
}

inline void store_tile(const Rows& rows, int64_t sequence, int64_t token, int tokens, int64_t channel, int channels,
                       const float* tile) {
  for (int t = 0; t < tokens; ++t)
    store_row(rows.at(sequence, token + t, channel), rows.is_bf16, channels, tile + t * kGroup);
}

inline int64_t groups_of(int64_t channels) { return (channels + kGroup - 1) / kGroup; }
inline int64_t blocks_of(int64_t channels) { return (channels + kLanes - 1) / kLanes; }
inline int channels_of_group(int64_t group, int64_t channels) {
  return static_cast<int>(std::min<int64_t>(kGroup, channels - group * kGroup));
}
inline int blocks_of_group(int64_t group, int64_t channels) {
  return static_cast<int>(blocks_of(channels_of_group(group, channels)));
}
