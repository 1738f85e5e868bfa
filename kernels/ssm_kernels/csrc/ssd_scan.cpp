// Forward of the Mamba-2 scan, and its decode step, which is a scan of length 1.
//
//   h_t = exp(dt_t A) h_{t-1} + dt_t x_t (x) B_t        y_t = h_t C_t + D x_t
//
// The recurrence of ssd_scan.h with lanes p and rows n: U = dt x, W = B, V = C.

#include <memory>

#include "ssd_scan.h"

using namespace ssd;

namespace {

// Below this many state updates (6 us of a scan, 15 us of a step) waking other threads costs more than it brings.
constexpr int64_t kParallelWork = 1 << 17;

struct Workspace {
  Steps steps;
  Tile x, b, c, u, y;
  State state;
};

// The whole of one sequence for one head.
template <class Element>
void scan_head(const Arguments& args, int64_t sequence, int64_t head, Workspace& work) {
  const int64_t slot = args.slots.of(sequence), length = args.sequences.length(sequence);
  // An empty sequence keeps every bit of its slot, also of numbers that rounding to bf16 makes zeros of.
  if (!length && args.initial.data && args.initial.data == args.final.data) return;
  const int64_t channel = head * args.head_width, state = args.group_of(head) * args.states;
  const float d = args.d ? args.d[head] : 0.0f;
  Segments segments;
  work.state.load_transposed<Element>(args, args.initial, slot, head);
  for (int64_t t = 0; t < length; t += kTokens) {
    const int tokens = static_cast<int>(std::min<int64_t>(kTokens, length - t));
    const Span span = {args.sequences.row(sequence), args.sequences.first(sequence) + t, 1, tokens};
    work.steps.load(args, span, head);
    segments.prepare(work.steps.log2_decay, tokens);
    work.x.load(args.x, span, channel, args.head_width);
    work.b.load(args.b, span, state, args.states);
    work.c.load(args.c, span, state, args.states);
    prefetch_tile(args.x, span.row, span.first + tokens, std::min<int64_t>(kTokens, length - t - tokens), channel,
                  static_cast<int>(args.head_width));
    float u_scale[kTokens], own[kTokens];
    for (int i = 0; i < tokens; ++i) u_scale[i] = work.steps.dt[i] * segments.up[i];
    products(work.b, work.c, tokens, own);
    work.u.scaled(work.x, u_scale, tokens);
    work.state.run(segments, tokens, work.u, work.b, work.c, work.y);
    for (int i = 0; i < tokens; ++i) {
      const float x_scale = d + work.steps.dt[i] * own[i];
      for (int k = 0; k < work.y.lanes; k += kLanes)
        store(work.y.row(i) + k, load(work.y.row(i) + k) * segments.down[i] + x_scale * load(work.x.row(i) + k));
    }
    work.y.store(args.out, span, channel, args.head_width);
  }
  work.state.store_transposed<Element>(args, args.final, slot, head, segments.scale_at_end());
}

// One token. Turning the state into rows of n and back would cost more than the step, so here the lanes are 16 states,
// as they lie in memory; N is a multiple of 16.
template <class Element>
void step_head(const Arguments& args, int64_t sequence, int64_t head, Workspace& work) {
  const int64_t slot = args.slots.of(sequence), states = args.states;
  const int64_t channel = head * args.head_width, state = args.group_of(head) * states;
  const Span span = {sequence, 0, 1, 1};
  work.steps.load(args, span, head);
  work.x.load(args.x, span, channel, args.head_width);
  work.b.load(args.b, span, state, states);
  work.c.load(args.c, span, state, states);
  const float decay = static_cast<float>(std::exp2(work.steps.log2_decay[0])), d = args.d ? args.d[head] : 0.0f;
  const float *x = work.x.values, *b = work.b.values, *c = work.c.values;
  float* y = work.y.values;
  for (int64_t first = 0; first < args.head_width; first += kLanes) {
    const int64_t rows = std::min<int64_t>(kLanes, args.head_width - first);
    vfloat products[kLanes] = {};
    for (int64_t p = 0; p < rows; ++p) {
      const Element* from = args.initial.data ? args.initial.row<const Element>(slot, head, first + p) : nullptr;
      Element* to = args.final.data ? args.final.row<Element>(slot, head, first + p) : nullptr;
      const float u = work.steps.dt[0] * x[first + p];
      vfloat total = {};
      for (int64_t n = 0; n < states; n += kLanes) {
        const vfloat before = from ? load(from + n) : vfloat{};
        const vfloat h = decay * before + u * load(b + n);
        if (to) store(to + n, h);
        total += h * load(c + n);
      }
      products[p] = total;
    }
    store(y + first, row_sums(products) + d * load(x + first));
  }
  store_row(args.out.at(sequence, 0, channel), args.out.is_bf16, static_cast<int>(args.head_width), y);
}

using RunHead = void (*)(const Arguments&, int64_t, int64_t, Workspace&);

template <class Element>
RunHead choose_run(const Arguments& args) {
  const bool one_step = !args.sequences.starts && args.sequences.padded_length == 1 && args.states % kLanes == 0;
  return one_step ? step_head<Element> : scan_head<Element>;
}

}  // namespace

extern "C" int64_t ssd_scan_forward(const void* packed) {
  const Arguments& args = *static_cast<const Arguments*>(packed);
  if (!args.slots.in_range(args.sequences.count)) return kSlotOutOfRange;
  const RunHead run = args.state_is_bf16 ? choose_run<uint16_t>(args) : choose_run<float>(args);
  const int64_t items = args.sequences.count * args.heads;
  const bool parallel = args.threads > 1 && args.state_updates() >= kParallelWork;
#pragma omp parallel num_threads(parallel ? static_cast<int>(args.threads) : 1)
  {
    const std::unique_ptr<Workspace> work(new Workspace);
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < items; ++item) run(args, item / args.heads, item % args.heads, *work);
  }
  return 0;
}
