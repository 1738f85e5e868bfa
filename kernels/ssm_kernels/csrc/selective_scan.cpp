// Forward of the selective scan, and the decode step, which is a scan of length 1.
//
//   h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t        y_t = C_t . h_t + D x_t        out_t = y_t silu(z_t)
//
// Lanes are 16 channels, and the N states of those channels are N vectors that stay in registers while time runs. The
// exponential is the cost: A arrives multiplied by log2(e), so that each decay is one multiplication and one 2^v.
// Tiles of 32 tokens by 64 channels are converted to fp32 and prepared (softplus, dt * x) before the time loop.
//
// In a step the lanes are 16 states of one channel, as they lie in memory: turning the state into lanes of channels and
// back would cost more than the step. A step reads and writes the whole state, which for many sequences lies beyond the
// caches: while one group of channels is computed, the state of the next is on its way.

#include "exp2_product.h"
#include "selective_scan.h"

namespace {

constexpr int kTile = 32;  // tokens; divides kChunk
static_assert(kChunk % kTile == 0, "a saved state must fall on the edge of a tile");

// Below this many state updates (about 40 us) waking other threads costs more than it brings.
constexpr int64_t kParallelWork = 1 << 17;

// One tile of one vector of channels. kStates 0: `states` is known only at run time and h lives in the L1 cache.
template <int kStates>
void scan_block(int tokens, int states, const float* dt, const float* u, const float* b, int64_t b_stride,
                const float* c, int64_t c_stride, const vfloat* a, vfloat* state, float* y) {
  constexpr int kTogether = kStates ? 4 : 1;
  static_assert(kStates % kTogether == 0, "states are taken several at once");
  const int count = kStates ? kStates : states;
  const Exp2Product exp2_product;
  vfloat h[kStates ? kStates : kMaxStates];
  for (int n = 0; n < count; ++n) h[n] = state[n];
  for (int t = 0; t < tokens; ++t) {
    const vfloat dt_t = load(dt + t * kGroup), u_t = load(u + t * kGroup);
    const float *b_t = b + t * b_stride, *c_t = c + t * c_stride;
    vfloat total[2] = {};  // two, so that the additions do not wait for one another
#pragma GCC unroll 16
    for (int first = 0; first < count; first += kTogether) {
      vfloat product[kTogether], decay[kTogether];
#pragma GCC unroll 4
      for (int k = 0; k < kTogether; ++k) product[k] = dt_t * a[first + k];
      exp2_product.operator()<kTogether>(product, decay);
#pragma GCC unroll 4
      for (int k = 0; k < kTogether; ++k) {
        const int n = first + k;
        h[n] = decay[k] * h[n] + u_t * b_t[n];
        total[k % 2] += h[n] * c_t[n];
      }
    }
    store(y + t * kGroup, total[0] + total[1]);
  }
  for (int n = 0; n < count; ++n) state[n] = h[n];
}

void scan_block_any(int tokens, int states, const float* dt, const float* u, const float* b, int64_t b_stride,
                    const float* c, int64_t c_stride, const vfloat* a, vfloat* state, float* y) {
  switch (states) {
    case 8: return scan_block<8>(tokens, states, dt, u, b, b_stride, c, c_stride, a, state, y);
    case 16: return scan_block<16>(tokens, states, dt, u, b, b_stride, c, c_stride, a, state, y);
    default: return scan_block<0>(tokens, states, dt, u, b, b_stride, c, c_stride, a, state, y);
  }
}

struct Tile {
  alignas(64) float dt[kTile * kGroup];
  alignas(64) float u[kTile * kGroup];  // dt * x
  alignas(64) float x[kTile * kGroup];
  alignas(64) float y[kTile * kGroup];
};

// Loads x and dt; dt becomes the step size, and u = dt * x.
void prepare(const ScanArguments& args, int64_t row, int64_t token, int tokens, int64_t group, Tile& tile) {
  const int64_t channel = group * kGroup;
  const int channels = channels_of_group(group, args.channels);
  load_tile(args.x, row, token, tokens, channel, channels, tile.x);
  load_tile(args.dt, row, token, tokens, channel, channels, tile.dt);
  for (int block = 0; block < blocks_of(channels); ++block) {
    const vfloat bias = load_parameter(args.dt_bias, channel + block * kLanes,
                                       std::min(kLanes, channels - block * kLanes));
    for (int t = 0; t < tokens; ++t) {
      const int at = t * kGroup + block * kLanes;
      vfloat dt = load(tile.dt + at) + bias;
      if (args.softplus) dt = softplus(dt);
      store(tile.dt + at, dt);
      store(tile.u + at, dt * load(tile.x + at));
    }
  }
}

// Adds the skip connection, multiplies by the gate, and stores.
void finish(const ScanArguments& args, int64_t row, int64_t token, int tokens, int64_t group, Tile& tile) {
  const int64_t channel = group * kGroup;
  const int channels = channels_of_group(group, args.channels);
  float* z = tile.u;  // no longer needed
  if (args.z) load_tile(args.z, row, token, tokens, channel, channels, z);
  for (int block = 0; block < blocks_of(channels); ++block) {
    const vfloat d = load_parameter(args.d, channel + block * kLanes, std::min(kLanes, channels - block * kLanes));
    for (int t = 0; t < tokens; ++t) {
      const int at = t * kGroup + block * kLanes;
      vfloat y = load(tile.y + at);
      if (args.d) y += d * load(tile.x + at);
      if (args.z) y *= silu(load(z + at));
      store(tile.y + at, y);
    }
  }
  store_tile(args.out, row, token, tokens, channel, channels, tile.y);
}

// The state that a sequence starts from, for up to 16 channels; and that in which it ends.
template <class Element>
void load_state(const ScanArguments& args, int64_t slot, int64_t channel, int channels, vfloat* h) {
  const StateView& view = args.initial;
  const int states = static_cast<int>(args.states);
  if (view.data)
    load_lanes(view.at<const Element>(slot, channel), view.channel_stride, channels, states, 1.0f, h);
  else
    std::fill_n(h, states, vfloat{});
}

template <class Element>
void store_state(const ScanArguments& args, int64_t slot, int64_t channel, int channels, const vfloat* h) {
  const StateView& view = args.final;
  if (view.data)
    store_lanes(h, channels, static_cast<int>(args.states), view.at<Element>(slot, channel), view.channel_stride);
}

// The whole of one sequence for one group of channels.
void scan_group(const ScanArguments& args, const StateRows& b, const StateRows& c, int64_t sequence, int64_t group,
                int64_t first_chunk) {
  const int64_t row = args.sequences.row(sequence), first = args.sequences.first(sequence);
  const int64_t length = args.sequences.length(sequence), slot = args.slots.of(sequence);
  // An empty sequence keeps every bit of its slot, also of numbers that rounding to bf16 makes zeros of.
  if (!length && args.initial.data && args.initial.data == args.final.data) return;
  Tile tile;
  constexpr int kBlocks = kGroup / kLanes;
  const int states = static_cast<int>(args.states), blocks = blocks_of_group(group, args.channels);
  vfloat h[kBlocks][kMaxStates], a[kBlocks][kMaxStates];
  for (int k = 0; k < blocks; ++k) {
    const int64_t channel = group * kGroup + k * kLanes;
    const int channels = static_cast<int>(std::min<int64_t>(kLanes, args.channels - channel));
    load_lanes(args.a + channel * states, states, channels, states, kLog2E, a[k]);
    (args.state_is_bf16 ? load_state<uint16_t> : load_state<float>)(args, slot, channel, channels, h[k]);
  }
  const int64_t all_blocks = blocks_of(args.channels);
  for (int64_t t = 0; t < length; t += kTile) {
    const int tokens = static_cast<int>(std::min<int64_t>(kTile, length - t));
    if (args.chunk_states && t % kChunk == 0)
      for (int k = 0; k < blocks; ++k) {
        const int64_t at = (first_chunk + t / kChunk) * all_blocks + group * kBlocks + k;
        std::memcpy(args.chunk_states + at * states * kLanes, h[k], states * sizeof(vfloat));
      }
    prepare(args, row, first + t, tokens, group, tile);
    const int64_t next = std::min<int64_t>(kTile, length - t - tokens);
    for (const Rows* rows : {&args.x, &args.dt, &args.z})
      if (*rows)
        prefetch_tile(*rows, row, first + t + tokens, next, group * kGroup, channels_of_group(group, args.channels));
    for (int k = 0; k < blocks; ++k)
      scan_block_any(tokens, states, tile.dt + k * kLanes, tile.u + k * kLanes, b.at(row, first + t), b.stride(),
                     c.at(row, first + t), c.stride(), a[k], h[k], tile.y + k * kLanes);
    finish(args, row, first + t, tokens, group, tile);
  }
  for (int k = 0; k < blocks; ++k) {
    const int64_t channel = group * kGroup + k * kLanes;
    const int channels = static_cast<int>(std::min<int64_t>(kLanes, args.channels - channel));
    (args.state_is_bf16 ? store_state<uint16_t> : store_state<float>)(args, slot, channel, channels, h[k]);
  }
}

// The state of one sequence before or after a step, [channels of the group][N]. Where the caller has none, all channels
// share one row: of zeros, or one that nobody reads.
template <class Element>
struct StepState {
  Element* rows;
  int64_t stride;

  Element* at(int channel) const { return rows + channel * stride; }
};

// One token of one sequence for one group of channels.
template <class Element>
struct Step {
  const float* a;       // [channels, N]
  const float *dt, *u;  // [channels]
  const float *b, *c;   // [N]
  int64_t states;       // N, a multiple of 16
  StepState<const Element> before;
  StepState<Element> after;
};

// Lanes whose sum is C . h, for kCount channels. kVectors is N / 16, or 0 where that is known only at run time.
template <int kVectors, int kCount, class Element>
inline void step_channels(const Step<Element>& step, int channel, vfloat* products) {
  const Exp2Product exp2_product;
  const int64_t vectors = kVectors ? kVectors : step.states / kLanes;
  vfloat total[kCount] = {};
  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t n = v * kLanes;
    vfloat product[kCount], decay[kCount];
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i)  // in the scan's order, so that the decay is the scan's to the last bit
      product[i] = step.dt[channel + i] * (load(step.a + (channel + i) * step.states + n) * kLog2E);
    exp2_product.operator()<kCount>(product, decay);
    const vfloat b_n = load(step.b + n), c_n = load(step.c + n);
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
      const vfloat h = decay[i] * load(step.before.at(channel + i) + n) + step.u[channel + i] * b_n;
      store(step.after.at(channel + i) + n, h);
      total[i] += h * c_n;
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) products[i] = total[i];
}

// C . h of up to 16 channels. `step` is a copy, which no store can change: its fields stay in registers.
template <int kVectors, class Element>
vfloat step_block(const Step<Element> step, int first, int channels) {
  constexpr int kTogether = kVectors == 1 ? 2 : 1;  // of wide states, memory is read in order
  vfloat products[kLanes];
  int i = 0;
  for (; i + kTogether <= channels; i += kTogether) step_channels<kVectors, kTogether>(step, first + i, products + i);
  for (; i < channels; ++i) step_channels<kVectors, 1>(step, first + i, products + i);
  for (; i < kLanes; ++i) products[i] = vfloat{};
  return row_sums(products);
}

// Asks for the states of up to 16 channels, which lie side by side in all but odd layouts. Into the L2 cache where they
// are fp32: as many as are under way at a time crowd the L1 cache.
template <class Element>
inline void prefetch_state(const Element* first, int64_t count) {
  constexpr int kCacheLine = 64, kLocality = sizeof(Element) == 4 ? 2 : 3;
  const char* bytes = reinterpret_cast<const char*>(first);
  for (int64_t at = 0; at < count * static_cast<int64_t>(sizeof(Element)); at += kCacheLine)
    __builtin_prefetch(bytes + at, 0, kLocality);
}

// How many channels of a group its block `k` of 16 has.
inline int channels_of_block(int64_t group, int k, int64_t channels) {
  return static_cast<int>(std::min<int64_t>(kLanes, channels - group * kGroup - k * kLanes));
}

// An item is one group of channels of one sequence.
template <class Element>
void step_group(const ScanArguments& args, const StateRows& b, const StateRows& c, int64_t item) {
  static const Element zeros[kMaxStates] = {};
  Element unread[kMaxStates];
  Tile tile;
  const int64_t groups = groups_of(args.channels), states = args.states;
  const int64_t row = item / groups, group = item % groups, channel = group * kGroup, slot = args.slots.of(row);
  prepare(args, row, 0, 1, group, tile);
  Step<Element> step = {args.a + channel * states, tile.dt, tile.u, b.at(row, 0), c.at(row, 0), states,
                        {zeros, 0}, {unread, 0}};
  if (args.initial.data) step.before = {args.initial.at<const Element>(slot, channel), args.initial.channel_stride};
  if (args.final.data) step.after = {args.final.at<Element>(slot, channel), args.final.channel_stride};
  const int64_t next_row = (item + 1) / groups, next_group = (item + 1) % groups;
  const Element* next = nullptr;
  const bool narrow = states == kLanes;  // wider ones are runs long enough for the processor to see ahead by itself
  if (narrow && args.initial.data && next_row < args.sequences.count)
    next = args.initial.at<const Element>(args.slots.of(next_row), next_group * kGroup);
  for (int k = 0; k < blocks_of_group(group, args.channels); ++k) {
    const int first = k * kLanes, channels = channels_of_block(group, k, args.channels);
    if (next) prefetch_state(next + first * states, channels_of_block(next_group, k, args.channels) * states);
    store(tile.y + first, narrow ? step_block<1>(step, first, channels) : step_block<0>(step, first, channels));
  }
  finish(args, row, 0, 1, group, tile);
}

}  // namespace

extern "C" int64_t selective_scan_forward(const void* packed) {
  const ScanArguments& args = *static_cast<const ScanArguments*>(packed);
  if (!args.slots.in_range(args.sequences.count)) return kSlotOutOfRange;
  const StateRows b(args.b, args.sequences, args.states), c(args.c, args.sequences, args.states);
  const std::vector<int64_t> chunks = first_chunks(args.sequences);
  const int64_t groups = groups_of(args.channels), items = args.sequences.count * groups;
  const bool one_step = !args.sequences.starts && args.sequences.padded_length == 1 && args.states % kLanes == 0 &&
                        !args.chunk_states;
  const auto step = args.state_is_bf16 ? step_group<uint16_t> : step_group<float>;
  const auto run = [&](int64_t item) {
    const int64_t sequence = item / groups;
    if (one_step)
      step(args, b, c, item);
    else
      scan_group(args, b, c, sequence, item % groups, chunks[sequence]);
  };
  if (args.threads == 1 || args.sequences.tokens() * args.channels * args.states < kParallelWork) {
    for (int64_t item = 0; item < items; ++item) run(item);
  } else {
    // A step asks for what the next item needs, so that the same thread should take it.
    const int64_t together = one_step ? std::max<int64_t>(1, items / (4 * args.threads)) : 1;
#pragma omp parallel for schedule(dynamic, together) num_threads(static_cast<int>(args.threads))
    for (int64_t item = 0; item < items; ++item) run(item);
  }
  return 0;
}
