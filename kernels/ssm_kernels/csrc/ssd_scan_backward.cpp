// Backward of the Mamba-2 scan. The forward saves no states: they are walked through again. G_t is the gradient of h_t:
//
//   G_t = dy_t (x) C_t + a_{t+1} G_{t+1}     dC_t = dy_t h_t     w_t = G_t B_t     dB_t = dt_t x_t G_t
//   dx_t = dt_t w_t + D dy_t                 d dt_t = x_t . w_t + A s_t            dA = sum dt_t s_t
//
// where s_t = <G_t, a_t h_{t-1}> is the gradient of log a_t. Taking <G_t, h_t> apart in two ways gives
//
//   s_t = s_{t+1} + dC_t . C_t - dB_t . B_t
//
// so that h and G need not be multiplied at every token. Rounding errors would add up in this sum: what a token gives
// to itself, which is in both products, is left out of them, and s of each chunk's first token is computed as it is
// defined, for which the state before each chunk of one head is kept meanwhile. Three runs of the recurrence of
// ssd_scan.h, one forward in time:
//
//   dC: lanes n, rows p, U = dt B, W = x, V = dy    and two back:    w:  lanes p, rows n, U = dy, W = C, V = B
//                                                                    dB: lanes n, rows p, U = C, W = dy, V = x

#include <memory>
#include <vector>

#include "ssd_scan.h"

using namespace ssd;

namespace {

constexpr int64_t kParallelWork = 1 << 16;  // state updates

// Packed by cpu/ssd_scan.py: every field has 8 bytes. Order matters.
struct Gradients {
  Arguments forward;
  Rows x, dt;              // written, as is everything that follows
  float *a, *d, *dt_bias;  // [sequences, H], one partial sum a sequence; the last two may be null
  float *b, *c;            // [threads, tokens, G, N padded to 16], zero before: one partial sum a thread
  HeadStates initial;
};

// Works on one head of one sequence at a time. Each thread has its own.
class HeadBackward {
 public:
  HeadBackward(const Gradients& grads, int64_t thread)
      : grads_(grads), args_(grads.forward), thread_offset_(thread * args_.sequences.tokens() * token_size()) {}

  void run(int64_t sequence, int64_t head) {
    sequence_ = sequence;
    head_ = head;
    cut_into_chunks();
    walk_forward();
    walk_back();
  }

 private:
  int64_t length() const { return args_.sequences.length(sequence_); }
  int64_t chunks() const { return static_cast<int64_t>(begins_.size()) - 1; }
  float* state_before(int64_t chunk) { return &states_[chunk * by_rows_.size()]; }
  int64_t token_size() const { return args_.groups * padded(args_.states); }
  int64_t channel() const { return head_ * args_.head_width; }

  // A chunk has up to kTokens tokens. One begins where a decay is much stronger than those after it: there s falls to a
  // small part of what it was, and as a sum it would keep the rounding errors of the larger value.
  void cut_into_chunks() {
    constexpr double kFall = 4.0;
    begins_.assign(1, length());
    double weakest = 0.0;  // log2 of the decays since s was exact, back in time from the gradient of the final state
    for (int64_t end = length(); end > 0; end -= kTokens) {
      const Span span = span_of(std::max<int64_t>(end - kTokens, 0), end, true);
      steps_.load(args_, span, head_);
      for (int i = 0; i < span.tokens; ++i) {
        const int64_t t = end - 1 - i;
        const double decay = steps_.log2_decay[i];
        const bool begins = decay < weakest - kFall || begins_.back() - t == kTokens || t == 0;
        if (begins) begins_.push_back(t);
        weakest = begins ? decay : std::max(weakest, decay);
      }
    }
    std::reverse(begins_.begin(), begins_.end());
  }

  Span span_of(int64_t begin, int64_t end, bool back) const {
    const int64_t first = args_.sequences.first(sequence_) + (back ? end - 1 : begin);
    return {args_.sequences.row(sequence_), first, back ? -1 : 1, static_cast<int>(end - begin)};
  }

  // Loads what both directions need of a chunk.
  void load_chunk(int64_t chunk, bool back) {
    span_ = span_of(begins_[chunk], begins_[chunk + 1], back);
    const int64_t state = args_.group_of(head_) * args_.states;
    steps_.load(args_, span_, head_);
    x_.load(args_.x, span_, channel(), args_.head_width);
    y_grad_.load(args_.out, span_, channel(), args_.head_width);
    b_.load(args_.b, span_, state, args_.states);
    c_.load(args_.c, span_, state, args_.states);
    products(x_, y_grad_, span_.tokens, x_y_grad_);
  }

  // Adds a gradient of B or C to the sum over the heads of a group, with what a token gives to itself.
  void add_to_group(const float* own_scale, const Tile& own, float* sums) const {
    const int64_t flat = args_.sequences.flat(sequence_) - args_.sequences.first(sequence_);
    for (int i = 0; i < span_.tokens; ++i) {
      float* row = sums + thread_offset_ + (flat + span_.token(i)) * token_size() + args_.group_of(head_) * own.lanes;
      for (int k = 0; k < own.lanes; k += kLanes)
        store(row + k, load(row + k) + load(out_.row(i) + k) + own_scale[i] * load(own.row(i) + k));
    }
  }

  // dC, c_products_, and the states between chunks.
  void walk_forward() {
    Segments segments;
    by_rows_.load(args_, args_.initial, sequence_, head_);
    c_products_.resize(length() + kTokens);
    states_.resize((chunks() + 1) * by_rows_.size());
    std::copy_n(by_rows_.values, by_rows_.size(), state_before(0));
    for (int64_t chunk = 0; chunk < chunks(); ++chunk) {
      load_chunk(chunk, false);
      segments.prepare(steps_.log2_decay, span_.tokens);
      float scale[kTokens];
      for (int i = 0; i < span_.tokens; ++i) scale[i] = steps_.dt[i] * segments.up[i];
      u_.scaled(b_, scale, span_.tokens);
      by_rows_.run(segments, span_.tokens, u_, x_, y_grad_, out_);
      out_.scaled(out_, segments.down, span_.tokens);
      products(out_, c_, span_.tokens, &c_products_[begins_[chunk]]);
      for (int i = 0; i < span_.tokens; ++i) scale[i] = steps_.dt[i] * x_y_grad_[i];
      add_to_group(scale, b_, grads_.c);
      const float to_true = segments.scale_at_end();
      for (int64_t i = 0; i < by_rows_.size(); i += kLanes)
        store(state_before(chunk + 1) + i, load(by_rows_.values + i) * to_true);
    }
  }

  void walk_back() {
    Segments segments;
    double a_grad = 0.0, d_grad = 0.0, dt_bias_grad = 0.0, later_decay = 0.0;
    by_rows_.load(args_, args_.final, sequence_, head_);
    by_states_.load_transposed<float>(args_, args_.final, sequence_, head_);
    double s = dot(by_rows_.values, state_before(chunks()), by_rows_.size());
    for (int64_t chunk = chunks() - 1; chunk >= 0; --chunk) {
      load_chunk(chunk, true);
      // Back in time, a token's decay acts on the way to the token before it.
      double log2_decay[kTokens];
      for (int i = 0; i < span_.tokens; ++i) log2_decay[i] = i ? steps_.log2_decay[i - 1] : later_decay;
      later_decay = steps_.log2_decay[span_.tokens - 1];
      segments.prepare(log2_decay, span_.tokens);
      b_gradient(segments);
      x_gradient(segments);
      alignas(64) float slope[kTokens];
      steps_.slopes(args_, span_.tokens, slope);
      float dt_grad[kTokens + kLanes];  // store_row reads whole vectors
      for (int i = 0; i < span_.tokens; ++i) {
        s += static_cast<double>(c_products_[begins_[chunk + 1] - 1 - i]) - b_products_[i];
        if (i == span_.tokens - 1)
          s = std::exp2(segments.c + later_decay) * dot(by_rows_.values, state_before(chunk), by_rows_.size());
        a_grad += steps_.dt[i] * s;
        d_grad += x_y_grad_[i];
        dt_grad[i] = static_cast<float>((x_products_[i] + args_.a[head_] * s) * slope[i]);
        dt_bias_grad += dt_grad[i];
        store_row(grads_.dt.at(span_.row, span_.token(i), head_), grads_.dt.is_bf16, 1, dt_grad + i);
      }
    }
    segments.c += later_decay;
    by_rows_.store(args_, grads_.initial, sequence_, head_, segments.scale_at_end());
    const int64_t at = sequence_ * args_.heads + head_;
    grads_.a[at] = static_cast<float>(a_grad);
    if (grads_.d) grads_.d[at] = static_cast<float>(d_grad);
    if (grads_.dt_bias) grads_.dt_bias[at] = static_cast<float>(dt_bias_grad);
  }

  void b_gradient(const Segments& segments) {
    float scale[kTokens], own[kTokens];
    for (int i = 0; i < span_.tokens; ++i) {
      scale[i] = steps_.dt[i] * segments.down[i];
      own[i] = steps_.dt[i] * x_y_grad_[i];
    }
    u_.scaled(c_, segments.up, span_.tokens);
    by_rows_.run(segments, span_.tokens, u_, y_grad_, x_, out_);
    out_.scaled(out_, scale, span_.tokens);
    products(out_, b_, span_.tokens, b_products_);
    add_to_group(own, c_, grads_.b);
  }

  void x_gradient(const Segments& segments) {
    const float d = args_.d ? args_.d[head_] : 0.0f;
    u_.scaled(y_grad_, segments.up, span_.tokens);
    by_states_.run(segments, span_.tokens, u_, c_, b_, out_);
    float own[kTokens];
    products(b_, c_, span_.tokens, own);
    for (int i = 0; i < span_.tokens; ++i)
      for (int k = 0; k < out_.lanes; k += kLanes)
        store(out_.row(i) + k, load(out_.row(i) + k) * segments.down[i] + own[i] * load(y_grad_.row(i) + k));
    products(out_, x_, span_.tokens, x_products_);
    for (int i = 0; i < span_.tokens; ++i)
      for (int k = 0; k < out_.lanes; k += kLanes)
        store(out_.row(i) + k, load(out_.row(i) + k) * steps_.dt[i] + d * load(y_grad_.row(i) + k));
    out_.store(grads_.x, span_, channel(), args_.head_width);
  }

  const Gradients& grads_;
  const Arguments& args_;
  const int64_t thread_offset_;
  int64_t sequence_, head_;
  std::vector<int64_t> begins_;     // of the chunks within the sequence, and its length
  std::vector<float> states_;       // [chunk][p][n], the last after the last token
  std::vector<float> c_products_;   // [token] dC_t . C_t without what t gives to itself
  // dB_t . B_t likewise, x_t . w_t, x_t . dy_t
  alignas(64) float b_products_[kTokens], x_products_[kTokens], x_y_grad_[kTokens];
  Span span_;
  Steps steps_;
  Tile x_, y_grad_, b_, c_, u_, out_;
  State by_rows_, by_states_;  // [p][n], [n][p]
};

}  // namespace

extern "C" int64_t ssd_scan_backward(const void* packed) {
  const Gradients& grads = *static_cast<const Gradients*>(packed);
  const Arguments& args = grads.forward;
  const int64_t items = args.sequences.count * args.heads, threads = args.threads;
  const auto run = [&](int64_t thread) {
    const std::unique_ptr<HeadBackward> backward(new HeadBackward(grads, thread));
    // Sequences of one head after another, so that sequences of different lengths spread over the threads.
    for (int64_t item = items * thread / threads; item < items * (thread + 1) / threads; ++item)
      backward->run(item % args.sequences.count, item / args.sequences.count);
  };
  if (threads == 1 || args.state_updates() < kParallelWork) {
    for (int64_t thread = 0; thread < threads; ++thread) run(thread);
  } else {
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(threads))
    for (int64_t thread = 0; thread < threads; ++thread) run(thread);
  }
  return 0;
}
