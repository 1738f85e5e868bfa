// What the forward and the backward of the selective scan share: their arguments and the layout of the lanes.
#pragma once

#include <memory>
#include <vector>

#include "rows.h"

constexpr int kMaxStates = 256;
constexpr int kChunk = 64;  // tokens between two saved states

struct StateView {
  void* data;  // [slots, I, N]; null: zeros when read, dropped when written
  int64_t slot_stride, channel_stride;  // in elements

  template <class Element>
  Element* at(int64_t slot, int64_t channel) const {
    return static_cast<Element*>(data) + slot * slot_stride + channel * channel_stride;
  }
};

// Packed by cpu/selective_scan.py: every field has 8 bytes. Order matters.
struct ScanArguments {
  Rows x, dt, b, c, z, out;
  const float *a, *d, *dt_bias;  // [I, N], [I] or null, [I] or null; contiguous
  StateView initial, final;
  Slots slots;
  Sequences sequences;
  int64_t channels, states, softplus, threads;
  int64_t state_is_bf16;  // of `initial` and `final`, else fp32; the backward's states are fp32
  float* chunk_states;  // [chunks, blocks, N, 16] or null: the state before every 64th token of each sequence
};

// B or C as fp32 rows of one sequence after another: the tensor itself where it is fp32, else a converted copy.
class StateRows {
 public:
  StateRows(const Rows& rows, const Sequences& sequences, int64_t states) : rows_(rows) {
    if (!rows.is_bf16) return;
    const int64_t tokens = sequences.tokens();
    copy_.reset(new float[tokens * states + kLanes]);
    for (int64_t s = 0; s < sequences.count; ++s)
      for (int64_t t = 0; t < sequences.length(s); ++t) {
        const auto* row =
            reinterpret_cast<const uint16_t*>(rows.at(sequences.row(s), sequences.first(s) + t, 0));
        float* out = copy_.get() + (sequences.flat(s) + t) * states;
        for (int64_t n = 0; n < states; ++n) out[n] = bf16_to_float(row[n]);
      }
    rows_.data = reinterpret_cast<char*>(copy_.get());
    rows_.is_bf16 = 0;
    rows_.token_stride = states;
    rows_.sequence_stride = sequences.padded_length * states;
  }

  const float* at(int64_t sequence, int64_t token) const {
    return reinterpret_cast<const float*>(rows_.at(sequence, token, 0));
  }
  int64_t stride() const { return rows_.token_stride; }

 private:
  Rows rows_;
  std::unique_ptr<float[]> copy_;
};

// Index of each sequence's first entry in `chunk_states`.
inline std::vector<int64_t> first_chunks(const Sequences& sequences) {
  std::vector<int64_t> first(sequences.count + 1, 0);
  for (int64_t s = 0; s < sequences.count; ++s)
    first[s + 1] = first[s] + (sequences.length(s) + kChunk - 1) / kChunk;
  return first;
}

// [channel][state] in memory to lanes[state] of 16 channels, times `scale`; missing channels become 0.
template <class Element>
inline void load_lanes(const Element* rows, int64_t stride, int channels, int states, float scale, vfloat* lanes) {
  for (int first = 0; first < states; first += kLanes) {
    const int count = std::min(kLanes, states - first);
    vfloat block[kLanes];
    load_turned(rows + first, stride, channels, count, block);
    for (int n = 0; n < count; ++n) lanes[first + n] = block[n] * scale;
  }
}

template <class Element>
inline void store_lanes(const vfloat* lanes, int channels, int states, Element* rows, int64_t stride) {
  for (int first = 0; first < states; first += kLanes) {
    const int count = std::min(kLanes, states - first);
    vfloat block[kLanes];
    std::copy_n(lanes + first, count, block);
    store_turned(block, channels, count, rows + first, stride);
  }
}

// 16 values of a per-channel parameter; an omitted one is 0.
inline vfloat load_parameter(const float* parameter, int64_t channel, int channels) {
  if (!parameter) return vfloat{};
  alignas(64) float values[kLanes];
  load_row(parameter + channel, channels, values);
  return load(values);
}
