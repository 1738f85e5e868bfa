// Backward of the selective scan. With g_t the gradient of h_t and w_t = a_t g_t, where a_t = exp(dt_t A):
//
//   g_t = C_t gy_t + w_{t+1}          dB_t = sum_channels g_t dt_t x_t      dC_t = sum_channels gy_t h_t
//   d(dt_t x_t) = sum_states g_t B_t   d(dt_t A) = w_t h_{t-1}               gy_t = dout_t silu(z_t)
//
// The forward saved h every 64 tokens. Chunks are walked from the last to the first: h and a of one chunk are recomputed
// into a buffer that the second cache holds, and the chunk is then walked backwards. Lanes are 16 channels, as in the
// forward. dB and dC sum over channels: each thread keeps 16 partial sums, one a lane, through all of its channels.

#include "selective_scan.h"

namespace {

constexpr int64_t kParallelWork = 1 << 15;  // state updates
constexpr int kBlocks = kGroup / kLanes;

// Packed by cpu/selective_scan.py: every field has 8 bytes. Order matters.
struct ScanGradients {
  ScanArguments forward;
  Rows out;          // gradient of the output, read
  StateView final;   // gradient of the final state, read; null: zero
  Rows x, dt, z;     // written, as is everything that follows
  float *a, *d, *dt_bias;  // [I, N], [I], [I]; the last two may be null
  float *b, *c;            // [threads, tokens, N]: one partial sum a thread
  StateView initial;
};

// What one thread works in. The vectors are [64][N], or [65][N] for h, whose entry t is the state before token t.
struct Workspace {
  explicit Workspace(int states)
      : h(allocate((kChunk + 1) * states)),
        decay(allocate(kChunk * states)),
        b(allocate(kChunk * states)),
        c(allocate(kChunk * states)) {}
  std::unique_ptr<vfloat[]> h, decay, b, c;
  alignas(64) float x[kChunk * kGroup];
  alignas(64) float raw_dt[kChunk * kGroup];  // before softplus, with the bias
  alignas(64) float dt[kChunk * kGroup];
  alignas(64) float z[kChunk * kGroup];
  alignas(64) float y[kChunk * kGroup];
  alignas(64) float out[kChunk * kGroup];

 private:
  static std::unique_ptr<vfloat[]> allocate(int64_t count) { return std::unique_ptr<vfloat[]>(new vfloat[count]); }
};

// One vector of channels through the whole batch: its parameters, and the gradients that it carries or collects.
struct Channels {
  Channels(const ScanArguments& args, int64_t first)
      : first(first),
        count(static_cast<int>(std::min<int64_t>(kLanes, args.channels - first))),
        d(load_parameter(args.d, first, count)),
        dt_bias(load_parameter(args.dt_bias, first, count)),
        a(args.states),
        a_grad(args.states),
        carried(args.states) {
    load_lanes(args.a + first * args.states, args.states, count, static_cast<int>(args.states), kLog2E, a.data());
  }
  int64_t first;
  int count;
  vfloat d, dt_bias, d_grad = {}, dt_bias_grad = {};
  std::vector<vfloat> a, a_grad, carried;  // a is A log2(e); carried is w_{t+1}
};

struct ChunkRows {
  int tokens, states;
  const float* b;
  const float* c;
  int64_t b_stride, c_stride;
};

// h, decays and, where a gate needs it, y of one chunk.
template <int kStates>
void recompute(const ChunkRows& rows, const ScanArguments& args, const Channels& channels, const float* saved,
               int offset, Workspace& work) {
  const int states = kStates ? kStates : rows.states;
  vfloat h[kStates ? kStates : kMaxStates];
  for (int n = 0; n < states; ++n) work.h[n] = h[n] = load(saved + n * kLanes);
  for (int t = 0; t < rows.tokens; ++t) {
    const int at = t * kGroup + offset;
    const vfloat raw = load(work.raw_dt + at) + channels.dt_bias, x = load(work.x + at);
    const vfloat dt = args.softplus ? softplus(raw) : raw, u = dt * x;
    store(work.raw_dt + at, raw);
    store(work.dt + at, dt);
    const float *b = rows.b + t * rows.b_stride, *c = rows.c + t * rows.c_stride;
    vfloat *decays = &work.decay[t * states], *after = &work.h[(t + 1) * states], total = channels.d * x;
#pragma GCC unroll 16
    for (int n = 0; n < states; ++n) {
      const vfloat decay = exp2(dt * channels.a[n]);
      h[n] = decay * h[n] + u * b[n];
      decays[n] = decay;
      after[n] = h[n];
      total += h[n] * c[n];
    }
    store(work.y + at, total);
  }
}

// Turns the tiles of x, raw_dt and z into their gradients.
template <int kStates>
void walk_back(const ChunkRows& rows, const ScanArguments& args, Channels& channels, int offset, Workspace& work) {
  const int states = kStates ? kStates : rows.states;
  vfloat w[kStates ? kStates : kMaxStates];
  for (int n = 0; n < states; ++n) w[n] = channels.carried[n];
  for (int t = rows.tokens - 1; t >= 0; --t) {
    const int at = t * kGroup + offset;
    const vfloat x = load(work.x + at), dt = load(work.dt + at), u = dt * x;
    vfloat y_grad = load(work.out + at);
    if (args.z) {
      const vfloat z = load(work.z + at), s = sigmoid(z);
      store(work.z + at, y_grad * load(work.y + at) * s * (1.0f + z * (1.0f - s)));
      y_grad *= z * s;
    }
    const float *b = rows.b + t * rows.b_stride, *c = rows.c + t * rows.c_stride;
    const vfloat *decays = &work.decay[t * states], *before = &work.h[t * states], *after = before + states;
    vfloat *b_grad = &work.b[t * states], *c_grad = &work.c[t * states], u_grad = {}, exponent_grad = {};
#pragma GCC unroll 16
    for (int n = 0; n < states; ++n) {
      const vfloat h_grad = w[n] + y_grad * c[n];
      b_grad[n] += h_grad * u;
      c_grad[n] += y_grad * after[n];
      u_grad += h_grad * b[n];
      w[n] = h_grad * decays[n];
      const vfloat product = w[n] * before[n];
      channels.a_grad[n] += dt * product;
      exponent_grad += channels.a[n] * product;
    }
    vfloat dt_grad = exponent_grad * kLn2 + u_grad * x;
    if (args.softplus) dt_grad *= sigmoid(load(work.raw_dt + at));
    store(work.x + at, u_grad * dt + y_grad * channels.d);
    store(work.raw_dt + at, dt_grad);
    channels.d_grad += y_grad * x;
    channels.dt_bias_grad += dt_grad;
  }
  for (int n = 0; n < states; ++n) channels.carried[n] = w[n];
}

template <int kStates>
void chunk_block(const ChunkRows& rows, const ScanArguments& args, Channels& channels, const float* saved, int offset,
                 Workspace& work) {
  recompute<kStates>(rows, args, channels, saved, offset, work);
  walk_back<kStates>(rows, args, channels, offset, work);
}

// One thread's channels, through every sequence.
class Range {
 public:
  Range(const ScanGradients& grads, int64_t first_group, int64_t last_group, int64_t thread, const StateRows& b,
        const StateRows& c, const std::vector<int64_t>& first_chunk)
      : grads_(grads),
        args_(grads.forward),
        first_group_(first_group),
        last_group_(last_group),
        b_(b),
        c_(c),
        first_chunk_(first_chunk),
        b_grad_(grads.b + thread * args_.sequences.tokens() * args_.states),
        c_grad_(grads.c + thread * args_.sequences.tokens() * args_.states),
        work_(new Workspace(static_cast<int>(args_.states))) {
    for (int64_t channel = first_group * kGroup; channel < std::min(last_group * kGroup, args_.channels);
         channel += kLanes)
      channels_.emplace_back(args_, channel);
  }

  void run() {
    for (int64_t s = 0; s < args_.sequences.count; ++s) {
      load_final(s);
      const int64_t length = args_.sequences.length(s);
      for (int64_t chunk = (length + kChunk - 1) / kChunk - 1; chunk >= 0; --chunk)
        walk_chunk(s, chunk, static_cast<int>(std::min<int64_t>(kChunk, length - chunk * kChunk)));
      store_initial(s);
    }
    store_parameters();
  }

 private:
  void load_final(int64_t s) {
    for (Channels& k : channels_)
      if (grads_.final.data)
        load_lanes(grads_.final.at<const float>(s, k.first), grads_.final.channel_stride, k.count,
                   static_cast<int>(args_.states), 1.0f, k.carried.data());
      else
        std::fill(k.carried.begin(), k.carried.end(), vfloat{});
  }

  void store_initial(int64_t s) {
    const StateView& initial = grads_.initial;
    for (const Channels& k : channels_)
      if (initial.data)
        store_lanes(k.carried.data(), k.count, static_cast<int>(args_.states),
                    initial.at<float>(s, k.first), initial.channel_stride);
  }

  void walk_chunk(int64_t s, int64_t chunk, int tokens) {
    const int states = static_cast<int>(args_.states);
    const int64_t row = args_.sequences.row(s), token = args_.sequences.first(s) + chunk * kChunk;
    const ChunkRows rows = {tokens, states, b_.at(row, token), c_.at(row, token), b_.stride(), c_.stride()};
    std::fill_n(work_->b.get(), tokens * states, vfloat{});
    std::fill_n(work_->c.get(), tokens * states, vfloat{});
    for (int64_t group = first_group_; group < last_group_; ++group) {
      const int64_t channel = group * kGroup;
      const int channels = channels_of_group(group, args_.channels);
      load_tile(args_.x, row, token, tokens, channel, channels, work_->x);
      load_tile(args_.dt, row, token, tokens, channel, channels, work_->raw_dt);
      load_tile(grads_.out, row, token, tokens, channel, channels, work_->out);
      if (args_.z) load_tile(args_.z, row, token, tokens, channel, channels, work_->z);
      for (int k = 0; k < blocks_of(channels); ++k) {
        const int64_t block = group * kBlocks + k;
        const int64_t at = ((first_chunk_[s] + chunk) * blocks_of(args_.channels) + block) * states * kLanes;
        Channels& lanes = channels_[block - first_group_ * kBlocks];
        const auto run = states == 16 ? chunk_block<16> : states == 8 ? chunk_block<8> : chunk_block<0>;
        run(rows, args_, lanes, args_.chunk_states + at, k * kLanes, *work_);
      }
      store_tile(grads_.x, row, token, tokens, channel, channels, work_->x);
      store_tile(grads_.dt, row, token, tokens, channel, channels, work_->raw_dt);
      if (args_.z) store_tile(grads_.z, row, token, tokens, channel, channels, work_->z);
    }
    const int64_t at = (args_.sequences.flat(s) + chunk * kChunk) * states;
    sum_lanes(work_->b.get(), tokens * states, b_grad_ + at);
    sum_lanes(work_->c.get(), tokens * states, c_grad_ + at);
  }

  static void sum_lanes(const vfloat* lanes, int64_t count, float* out) {
    for (int64_t i = 0; i < count; i += kLanes) {
      const int64_t n = std::min<int64_t>(kLanes, count - i);
      vfloat rows[kLanes] = {};
      std::copy_n(lanes + i, n, rows);
      const vfloat sums = row_sums(rows);
      std::memcpy(out + i, &sums, n * sizeof(float));
    }
  }

  void store_parameters() {
    for (const Channels& k : channels_) {
      store_lanes(k.a_grad.data(), k.count, static_cast<int>(args_.states), grads_.a + k.first * args_.states,
                  args_.states);
      if (grads_.d) std::memcpy(grads_.d + k.first, &k.d_grad, k.count * sizeof(float));
      if (grads_.dt_bias) std::memcpy(grads_.dt_bias + k.first, &k.dt_bias_grad, k.count * sizeof(float));
    }
  }

  const ScanGradients& grads_;
  const ScanArguments& args_;
  const int64_t first_group_, last_group_;
  const StateRows &b_, &c_;
  const std::vector<int64_t>& first_chunk_;
  float *b_grad_, *c_grad_;
  std::vector<Channels> channels_;
  std::unique_ptr<Workspace> work_;
};

}  // namespace

extern "C" int64_t selective_scan_backward(const void* packed) {
  const ScanGradients& grads = *static_cast<const ScanGradients*>(packed);
  const ScanArguments& args = grads.forward;
  const StateRows b(args.b, args.sequences, args.states), c(args.c, args.sequences, args.states);
  const std::vector<int64_t> first_chunk = first_chunks(args.sequences);
  const int64_t groups = groups_of(args.channels), threads = args.threads;
  const auto run = [&](int64_t thread) {
    Range(grads, groups * thread / threads, groups * (thread + 1) / threads, thread, b, c, first_chunk).run();
  };
  if (threads == 1 || args.sequences.tokens() * args.channels * args.states < kParallelWork) {
    for (int64_t thread = 0; thread < threads; ++thread) run(thread);
  } else {
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(threads))
    for (int64_t thread = 0; thread < threads; ++thread) run(thread);
  }
  return 0;
}
