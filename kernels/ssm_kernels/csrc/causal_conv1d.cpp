// Depthwise causal convolution along time, K taps, forward and backward.
//
//   out[t] = act(bias + sum_k weight[k] x[t - K + 1 + k])
//
// Lanes are channels. A window of K - 1 past rows and 32 new ones, 64 channels wide, is held in fp32: out[t] reads rows
// t .. t + K - 1 of it. The last K - 1 rows are the state, and the first rows of the next window.
//
// The decode step, one token of each sequence, has no use for a window: where K is 4, the state of 16 channels is three
// vectors that lie side by side, and stays in registers from its load to its store. A few sequences share the taps.

#include "rows.h"

namespace {

constexpr int kTile = 32;      // tokens
constexpr int kStepRows = 8;   // sequences that take a step together
constexpr int kMaxWidth = 8;   // MAX_WIDTH in cpu/causal_conv1d.py
constexpr int kWindowRows = kMaxWidth - 1 + kTile;
constexpr int64_t kParallelWork = 1 << 17;  // outputs; less takes about 20 us, and other threads are not worth waking

struct ConvState {
  char* data;  // [slots, C, K - 1] in the dtype of x, or null
  int64_t slot_stride, channel_stride;

  char* at(bool is_bf16, int64_t slot, int64_t channel) const {
    return data + (slot * slot_stride + channel * channel_stride) * (is_bf16 ? 2 : 4);
  }
};

// Packed by cpu/causal_conv1d.py: every field has 8 bytes. Order matters.
struct ConvArguments {
  Rows x, out;  // backward: `out` is the gradient of the output
  const char* weight;
  int64_t weight_stride, weight_is_bf16;
  const char* bias;
  int64_t bias_is_bf16;
  ConvState initial, final;  // backward: `final` is the gradient of the final state
  Slots slots;
  Sequences sequences;
  int64_t channels, width, silu, threads;
};

struct ConvGradients {
  ConvArguments forward;
  Rows x;
  ConvState initial;
  float *weight, *bias;  // [C, K], [C]; bias may be null
};

// 16 numbers side by side.
inline vfloat load_vector(const char* data, bool is_bf16) {
  return is_bf16 ? load(reinterpret_cast<const uint16_t*>(data)) : load(reinterpret_cast<const float*>(data));
}

inline void store_vector(char* data, bool is_bf16, vfloat v) {
  if (is_bf16)
    store(reinterpret_cast<uint16_t*>(data), v);
  else
    store(reinterpret_cast<float*>(data), v);
}

float element(const char* data, bool is_bf16, int64_t index) {
  return is_bf16 ? bf16_to_float(reinterpret_cast<const uint16_t*>(data)[index])
                 : reinterpret_cast<const float*>(data)[index];
}

struct Taps {
  vfloat weight[kMaxWidth], bias;
};

// Four numbers of each of 16 channels, as they lie in memory, to lanes of channels.
inline void from_fours(const char* values, bool is_bf16, vfloat* lanes) {
  const int bytes = 2 * kLanes * (is_bf16 ? 2 : 4);
  vfloat low[2], high[2];  // of numbers 0 and 1, of numbers 2 and 3; channels 0 to 7, then 8 to 15
  for (int half = 0; half < 2; ++half) {
    const vfloat a = load_vector(values + half * bytes, is_bf16);
    const vfloat b = load_vector(values + half * bytes + bytes / 2, is_bf16);
    low[half] = SHUFFLE(a, b, 0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
    high[half] = SHUFFLE(a, b, 2, 6, 10, 14, 18, 22, 26, 30, 3, 7, 11, 15, 19, 23, 27, 31);
  }
  for (int pair = 0; pair < 2; ++pair) {
    const vfloat a = pair ? high[0] : low[0], b = pair ? high[1] : low[1];
    lanes[2 * pair] = SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    lanes[2 * pair + 1] = SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  }
}

inline Taps load_taps(const ConvArguments& args, int64_t channel) {
  Taps taps;
  const int64_t channels = std::min<int64_t>(kLanes, args.channels - channel);
  if (args.width == 4 && args.weight_stride == 4 && channels == kLanes) {
    const auto at = [](const char* data, bool is_bf16, int64_t index) { return data + index * (is_bf16 ? 2 : 4); };
    from_fours(at(args.weight, args.weight_is_bf16, channel * 4), args.weight_is_bf16, taps.weight);
    taps.bias = args.bias ? load_vector(at(args.bias, args.bias_is_bf16, channel), args.bias_is_bf16) : vfloat{};
    return taps;
  }
  taps = Taps();
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t k = 0; k < args.width; ++k)
      taps.weight[k][c] = element(args.weight, args.weight_is_bf16, (channel + c) * args.weight_stride + k);
    if (args.bias) taps.bias[c] = element(args.bias, args.bias_is_bf16, channel + c);
  }
  return taps;
}

// Three numbers of each of 16 channels, as they lie in memory, to lanes of channels, and back.
inline void from_threes(const char* values, bool is_bf16, vfloat* lanes) {
  const int bytes = kLanes * (is_bf16 ? 2 : 4);
  const vfloat a = load_vector(values, is_bf16), b = load_vector(values + bytes, is_bf16);
  const vfloat c = load_vector(values + 2 * bytes, is_bf16);
  const vfloat first = SHUFFLE(a, b, 0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 0, 0, 0, 0, 0);
  const vfloat second = SHUFFLE(a, b, 1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31, 0, 0, 0, 0, 0);
  const vfloat third = SHUFFLE(a, b, 2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 0, 0, 0, 0, 0, 0);
  lanes[0] = SHUFFLE(first, c, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 17, 20, 23, 26, 29);
  lanes[1] = SHUFFLE(second, c, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 18, 21, 24, 27, 30);
  lanes[2] = SHUFFLE(third, c, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 19, 22, 25, 28, 31);
}

inline void to_threes(const vfloat* lanes, char* values, bool is_bf16) {
  const int bytes = kLanes * (is_bf16 ? 2 : 4);
  const vfloat a = SHUFFLE(lanes[0], lanes[1], 0, 16, 0, 1, 17, 0, 2, 18, 0, 3, 19, 0, 4, 20, 0, 5);
  const vfloat b = SHUFFLE(lanes[0], lanes[1], 21, 0, 6, 22, 0, 7, 23, 0, 8, 24, 0, 9, 25, 0, 10, 26);
  const vfloat c = SHUFFLE(lanes[0], lanes[1], 0, 11, 27, 0, 12, 28, 0, 13, 29, 0, 14, 30, 0, 15, 31, 0);
  store_vector(values, is_bf16, SHUFFLE(a, lanes[2], 0, 1, 16, 3, 4, 17, 6, 7, 18, 9, 10, 19, 12, 13, 20, 15));
  store_vector(values + bytes, is_bf16, SHUFFLE(b, lanes[2], 0, 21, 2, 3, 22, 5, 6, 23, 8, 9, 24, 11, 12, 25, 14, 15));
  store_vector(values + 2 * bytes, is_bf16,
               SHUFFLE(c, lanes[2], 26, 1, 2, 27, 4, 5, 28, 7, 8, 29, 10, 11, 30, 13, 14, 31));
}

// How many of a group's channels have a state that `from_threes` takes, in whole vectors.
int channels_of_threes(const ConvState& state, int past, int channels) {
  return past == 3 && state.channel_stride == 3 ? channels / kLanes * kLanes : 0;
}

// State [C, K - 1] of one group to window rows.
void load_state(const ConvState& state, bool is_bf16, int64_t slot, int64_t channel, int channels, int past,
                float* window) {
  std::fill_n(window, past * kGroup, 0.0f);
  if (!state.data) return;
  const int in_threes = channels_of_threes(state, past, channels);
  for (int c = 0; c < in_threes; c += kLanes) {
    vfloat lanes[3];
    from_threes(state.at(is_bf16, slot, channel + c), is_bf16, lanes);
    for (int k = 0; k < 3; ++k) store(window + k * kGroup + c, lanes[k]);
  }
  for (int c = in_threes; c < channels; ++c)
    for (int k = 0; k < past; ++k)
      window[k * kGroup + c] =
          element(state.data, is_bf16, slot * state.slot_stride + (channel + c) * state.channel_stride + k);
}

void store_state(const float* window, const ConvState& state, bool is_bf16, int64_t slot, int64_t channel,
                 int channels, int past) {
  if (!state.data) return;
  const int in_threes = channels_of_threes(state, past, channels);
  for (int c = 0; c < in_threes; c += kLanes) {
    const vfloat lanes[3] = {load(window + c), load(window + kGroup + c), load(window + 2 * kGroup + c)};
    to_threes(lanes, state.at(is_bf16, slot, channel + c), is_bf16);
  }
  for (int k = 0; k < past && in_threes < channels; ++k) {
    const float* row = window + k * kGroup;
    uint16_t narrow[kGroup];
    if (is_bf16) store_row(narrow, channels, row);
    for (int c = in_threes; c < channels; ++c) {
      const int64_t at = slot * state.slot_stride + (channel + c) * state.channel_stride + k;
      if (is_bf16)
        reinterpret_cast<uint16_t*>(state.data)[at] = narrow[c];
      else
        reinterpret_cast<float*>(state.data)[at] = row[c];
    }
  }
}

template <int kWidth>
inline vfloat convolve(const float* window, const Taps& taps) {
  vfloat total = taps.bias;
#pragma GCC unroll 8
  for (int k = 0; k < kWidth; ++k) total += taps.weight[k] * load(window + k * kGroup);
  return total;
}

template <int kWidth>
void forward_group(const ConvArguments& args, int64_t sequence, int64_t group) {
  alignas(64) float window[kWindowRows * kGroup], out[kTile * kGroup];
  constexpr int kPast = kWidth - 1;
  const int64_t channel = group * kGroup, slot = args.slots.of(sequence);
  const int channels = channels_of_group(group, args.channels), blocks = static_cast<int>(blocks_of(channels));
  load_state(args.initial, args.x.is_bf16, slot, channel, channels, kPast, window);
  Taps taps[kGroup / kLanes];
  for (int k = 0; k < blocks; ++k) taps[k] = load_taps(args, channel + k * kLanes);
  const int64_t row = args.sequences.row(sequence), first = args.sequences.first(sequence);
  const int64_t length = args.sequences.length(sequence);
  for (int64_t begin = 0; begin < length; begin += kTile) {
    const int tokens = static_cast<int>(std::min<int64_t>(kTile, length - begin));
    load_tile(args.x, row, first + begin, tokens, channel, channels, window + kPast * kGroup);
    for (int k = 0; k < blocks; ++k)
      for (int t = 0; t < tokens; ++t) {
        const int at = t * kGroup + k * kLanes;
        const vfloat y = convolve<kWidth>(window + at, taps[k]);
        store(out + at, args.silu ? silu(y) : y);
      }
    store_tile(args.out, row, first + begin, tokens, channel, channels, out);
    std::memmove(window, window + tokens * kGroup, kPast * kGroup * sizeof(float));
  }
  store_state(window, args.final, args.x.is_bf16, slot, channel, channels, kPast);
}

// Whether all channels of the group have a state, if any, that `from_threes` takes; K is 4.
bool all_in_threes(const ConvArguments& args, int64_t group) {
  const int channels = channels_of_group(group, args.channels);
  for (const ConvState* state : {&args.initial, &args.final})
    if (state->data && channels_of_threes(*state, 3, channels) != channels) return false;
  return channels % kLanes == 0;
}

// One token of up to kStepRows sequences, 16 channels of each. The activation comes last, for all of them: it is one
// long chain of operations, and several chains can be under way together.
void step_of_threes(const ConvArguments& args, int64_t first_sequence, int64_t count, int64_t channel) {
  const Taps taps = load_taps(args, channel);
  const bool is_bf16 = args.x.is_bf16;
  vfloat y[kStepRows];
  for (int64_t i = 0; i < count; ++i) {
    const int64_t sequence = first_sequence + i, slot = args.slots.of(sequence);
    vfloat x[4] = {};
    if (args.initial.data) from_threes(args.initial.at(is_bf16, slot, channel), is_bf16, x);
    x[3] = load_vector(args.x.at(sequence, 0, channel), is_bf16);
    vfloat total = taps.bias;
    for (int k = 0; k < 4; ++k) total += taps.weight[k] * x[k];
    y[i] = total;
    if (args.final.data) to_threes(x + 1, args.final.at(is_bf16, slot, channel), is_bf16);
  }
  for (int64_t i = 0; i < count; ++i)
    store_vector(args.out.at(first_sequence + i, 0, channel), args.out.is_bf16, args.silu ? silu(y[i]) : y[i]);
}

// `count` sequences of one token, one group of channels; K is 4.
void step_group(const ConvArguments& args, int64_t first_sequence, int64_t count, int64_t group) {
  if (all_in_threes(args, group))
    for (int block = 0; block < blocks_of_group(group, args.channels); ++block)
      step_of_threes(args, first_sequence, count, group * kGroup + block * kLanes);
  else
    for (int64_t i = 0; i < count; ++i) forward_group<4>(args, first_sequence + i, group);
}

// The gradient of x has the window's rows: out[t] gives to rows t .. t + K - 1. A row is complete, and leaves, once the
// window has moved past it; rows before the first token belong to the initial state.
template <int kWidth>
struct BackwardGroup {
  static constexpr int kPast = kWidth - 1;
  const ConvGradients& grads;
  const ConvArguments& args;
  const int64_t channel;
  const int channels, blocks;
  Taps taps[kGroup / kLanes], taps_grad[kGroup / kLanes] = {};
  alignas(64) float x[kWindowRows * kGroup];
  alignas(64) float x_grad[kWindowRows * kGroup];
  alignas(64) float out_grad[kTile * kGroup];
  alignas(64) float initial_grad[kMaxWidth * kGroup];

  BackwardGroup(const ConvGradients& gradients, int64_t group)
      : grads(gradients),
        args(gradients.forward),
        channel(group * kGroup),
        channels(channels_of_group(group, args.channels)),
        blocks(static_cast<int>(blocks_of(channels))) {
    for (int k = 0; k < blocks; ++k) taps[k] = load_taps(args, channel + k * kLanes);
  }

  void tile(int tokens) {
    for (int k = 0; k < blocks; ++k) {
      Taps grad = taps_grad[k];
      for (int t = 0; t < tokens; ++t) {
        const int at = t * kGroup + k * kLanes;
        vfloat g = load(out_grad + at);
        if (args.silu) {
          const vfloat y = convolve<kWidth>(x + at, taps[k]), s = sigmoid(y);
          g *= s * (1.0f + y * (1.0f - s));
        }
        grad.bias += g;
#pragma GCC unroll 8
        for (int j = 0; j < kWidth; ++j) {
          grad.weight[j] += g * load(x + at + j * kGroup);
          store(x_grad + at + j * kGroup, load(x_grad + at + j * kGroup) + g * taps[k].weight[j]);
        }
      }
      taps_grad[k] = grad;
    }
  }

  // `token` is the position within the sequence of the first of `count` finished rows.
  void emit(int64_t sequence, int64_t token, int count) {
    const int64_t row = args.sequences.row(sequence), first = args.sequences.first(sequence);
    for (int r = 0; r < count; ++r) {
      const float* from = x_grad + r * kGroup;
      if (token + r < 0)
        std::memcpy(initial_grad + (token + r + kPast) * kGroup, from, kGroup * sizeof(float));
      else
        store_row(grads.x.at(row, first + token + r, channel), grads.x.is_bf16, channels, from);
    }
  }

  void sequence(int64_t s) {
    const int64_t row = args.sequences.row(s), first = args.sequences.first(s), length = args.sequences.length(s);
    load_state(args.initial, args.x.is_bf16, s, channel, channels, kPast, x);
    std::fill_n(x_grad, kWindowRows * kGroup, 0.0f);
    for (int64_t begin = 0; begin < length; begin += kTile) {
      const int tokens = static_cast<int>(std::min<int64_t>(kTile, length - begin));
      load_tile(args.x, row, first + begin, tokens, channel, channels, x + kPast * kGroup);
      load_tile(args.out, row, first + begin, tokens, channel, channels, out_grad);
      tile(tokens);
      emit(s, begin - kPast, tokens);
      std::memmove(x, x + tokens * kGroup, kPast * kGroup * sizeof(float));
      std::memmove(x_grad, x_grad + tokens * kGroup, kPast * kGroup * sizeof(float));
      std::fill_n(x_grad + kPast * kGroup, kTile * kGroup, 0.0f);
    }
    load_state(args.final, args.x.is_bf16, s, channel, channels, kPast, x);  // x is no longer needed
    for (int i = 0; i < kPast * kGroup; ++i) x_grad[i] += x[i];
    emit(s, length - kPast, kPast);
    store_state(initial_grad, grads.initial, args.x.is_bf16, s, channel, channels, kPast);
  }

  void store_parameters() {
    for (int c = 0; c < channels; ++c) {
      const Taps& grad = taps_grad[c / kLanes];
      for (int k = 0; k < kWidth; ++k) grads.weight[(channel + c) * kWidth + k] = grad.weight[k][c % kLanes];
      if (grads.bias) grads.bias[channel + c] = grad.bias[c % kLanes];
    }
  }
};

template <int kWidth>
void backward_group(const ConvGradients& grads, int64_t group) {
  BackwardGroup<kWidth> state(grads, group);
  for (int64_t s = 0; s < grads.forward.sequences.count; ++s) state.sequence(s);
  state.store_parameters();
}

using ForwardGroup = void (*)(const ConvArguments&, int64_t, int64_t);
using BackwardGroupFunction = void (*)(const ConvGradients&, int64_t);
constexpr ForwardGroup kForward[] = {nullptr,          nullptr,          forward_group<2>, forward_group<3>, forward_group<4>,
                                     forward_group<5>, forward_group<6>, forward_group<7>, forward_group<8>};
constexpr BackwardGroupFunction kBackward[] = {
    nullptr,           nullptr,           backward_group<2>, backward_group<3>, backward_group<4>,
    backward_group<5>, backward_group<6>, backward_group<7>, backward_group<8>};

template <class Run>
void for_each(int64_t items, const ConvArguments& args, const Run& run) {
  if (args.threads == 1 || args.sequences.tokens() * args.channels < kParallelWork) {
    for (int64_t item = 0; item < items; ++item) run(item);
  } else {
#pragma omp parallel for schedule(dynamic) num_threads(static_cast<int>(args.threads))
    for (int64_t item = 0; item < items; ++item) run(item);
  }
}

}  // namespace

extern "C" int64_t causal_conv1d_forward(const void* packed) {
  const ConvArguments& args = *static_cast<const ConvArguments*>(packed);
  if (!args.slots.in_range(args.sequences.count)) return kSlotOutOfRange;
  const int64_t groups = groups_of(args.channels), sequences = args.sequences.count;
  const bool one_step = !args.sequences.starts && args.sequences.padded_length == 1;
  const int64_t rows = one_step && args.width == 4 ? kStepRows : 1;
  for_each((sequences + rows - 1) / rows * groups, args, [&](int64_t item) {
    const int64_t first = item / groups * rows, group = item % groups;
    if (rows == 1)
      kForward[args.width](args, first, group);
    else
      step_group(args, first, std::min(rows, sequences - first), group);
  });
  return 0;
}

extern "C" int64_t causal_conv1d_backward(const void* packed) {
  const ConvGradients& grads = *static_cast<const ConvGradients*>(packed);
  for_each(groups_of(grads.forward.channels), grads.forward,
           [&](int64_t group) { kBackward[grads.forward.width](grads, group); });
  return 0;
}
