// Drives causal_conv1d: out[t] = act(bias + sum_k weight[k] x[t - K + 1 + k]), and the states before and after it.

#include "causal_conv1d.cpp"
#include "driver.h"
#include "sequences.h"

namespace {

using drive::Batch;
using drive::Numbers;
using drive::States;
using drive::Values;

struct Shape {
  int64_t channels, width, silu;
};

struct Inputs {
  Values x, weight, bias, initial;  // bias may be empty; initial is by sequence
};

void naive(const Inputs& in, const Batch& batch, const Shape& shape, Values& out, Values& final) {
  const int64_t past = shape.width - 1;
  out.assign(in.x.size(), 0.0);
  final.assign(in.initial.size(), 0.0);
  for (int64_t s = 0; s < batch.count(); ++s)
    for (int64_t c = 0; c < shape.channels; ++c) {
      const int64_t state = (s * shape.channels + c) * past;
      // Token t, where those before the first are the state's.
      const auto x = [&](int64_t t) {
        return t < 0 ? in.initial[state + past + t] : in.x[(batch.first[s] + t) * shape.channels + c];
      };
      for (int64_t t = 0; t < batch.lengths[s]; ++t) {
        double y = in.bias.empty() ? 0.0 : in.bias[c];
        for (int64_t k = 0; k < shape.width; ++k) y += in.weight[c * shape.width + k] * x(t - past + k);
        out[(batch.first[s] + t) * shape.channels + c] = shape.silu ? drive::silu(y) : y;
      }
      for (int64_t k = 0; k < past; ++k) final[state + k] = x(batch.lengths[s] - past + k);
    }
}

ConvState state_of(const Numbers& numbers, int64_t channels, bool given = true) {
  return given ? ConvState{numbers.data(), channels * numbers.stride(), numbers.stride()} : ConvState{};
}

// The arguments of one call, and what they point to.
struct Case {
  Case(const Shape& sizes, const Batch& sequences, bool mixed, int64_t threads)
      : shape(sizes),
        batch(sequences),
        any_bf16(mixed),
        x(Numbers::random(batch.tokens(), shape.channels, dtype(), drive::pick(0, 3))),
        weight(Numbers::random(shape.channels, shape.width, dtype(), drive::pick(0, 2))),
        bias(Numbers::random(1, shape.channels, dtype())),
        states(batch, shape.channels, shape.width - 1, x.is_bf16()),
        with_bias(drive::coin()) {
    args.x = drive::rows(x, batch);
    args.weight = weight.data();
    args.weight_stride = weight.stride();
    args.weight_is_bf16 = weight.is_bf16();
    args.bias = with_bias ? bias.data() : nullptr;
    args.bias_is_bf16 = bias.is_bf16();
    args.sequences = batch.sequences();
    args.channels = shape.channels;
    args.width = shape.width;
    args.silu = shape.silu;
    args.threads = threads;
    in = {x.values(), weight.values(), with_bias ? bias.values() : Values{}, states.before()};
    drive::begin_case(drive::text({{"channels", shape.channels}, {"width", shape.width}, {"silu", shape.silu},
                                   {"bias", with_bias}, {"mixed", mixed}, {"threads", threads}}) +
                      batch.text() + states.text());
  }

  bool dtype() const { return any_bf16 && drive::coin(); }
  double tolerance() const { return drive::tolerance(any_bf16); }
  Numbers empty() const { return Numbers(batch.tokens(), shape.channels, dtype(), drive::pick(0, 3)); }

  void forward() {
    const Numbers out = empty(), unwritten = empty();
    args.out = drive::rows(out, batch);
    args.initial = state_of(states.initial(), shape.channels, states.has_initial);
    args.final = state_of(states.final(), shape.channels, states.has_final);
    args.slots = states.slots();
    drive::expect(CALL(causal_conv1d_forward, args) == 0, "returned a code");
    Values expected, final;
    naive(in, batch, shape, expected, final);
    drive::expect_close("out", out, expected, tolerance());
    states.expect_after(final, tolerance());
    if (!states.in_pool) return;
    const Values pool = states.final().values();
    states.leave_the_pool();
    args.slots = states.slots();
    args.out = drive::rows(unwritten, batch);
    drive::expect(CALL(causal_conv1d_forward, args) == kSlotOutOfRange, "took a slot that is not in the pool");
    drive::expect(unwritten.untouched() && pool == states.final().values(), "written despite a slot out of range");
  }

  void backward() {
    const bool with_initial = drive::coin(), with_final = drive::coin(), is_bf16 = x.is_bf16();
    const int64_t past = shape.width - 1, state_rows = batch.count() * shape.channels;
    const Numbers out_grad = Numbers::random(batch.tokens(), shape.channels, dtype(), drive::pick(0, 3));
    const Numbers initial = Numbers::random(state_rows, past, is_bf16, drive::pick(0, 3));
    const Numbers final_grad = Numbers::random(state_rows, past, is_bf16, drive::pick(0, 3));
    const Numbers x_grad = empty(), initial_grad(state_rows, past, is_bf16, drive::pick(0, 3));
    const Numbers weight_grad(shape.channels, shape.width, false), bias_grad(1, shape.channels, false);
    ConvGradients grads = {};
    grads.forward = args;
    grads.forward.out = drive::rows(out_grad, batch);
    grads.forward.initial = state_of(initial, shape.channels, with_initial);
    grads.forward.final = state_of(final_grad, shape.channels, with_final);
    grads.forward.slots = {};
    grads.x = drive::rows(x_grad, batch);
    grads.initial = state_of(initial_grad, shape.channels, with_initial);
    grads.weight = weight_grad.floats();
    grads.bias = with_bias ? bias_grad.floats() : nullptr;
    drive::expect(CALL(causal_conv1d_backward, grads) == 0, "returned a code");
    in.initial = with_initial ? initial.values() : Values(state_rows * past);
    Values out, final;
    const auto loss = [&] {
      naive(in, batch, shape, out, final);
      return drive::dot(out, out_grad.values()) + (with_final ? drive::dot(final, final_grad.values()) : 0.0);
    };
    drive::expect_gradient("x", x_grad.values(), in.x, loss, tolerance());
    drive::expect_gradient("weight", weight_grad.values(), in.weight, loss, tolerance());
    if (with_bias) drive::expect_gradient("bias", bias_grad.values(), in.bias, loss, tolerance());
    if (with_initial) drive::expect_gradient("initial state", initial_grad.values(), in.initial, loss, tolerance());
    drive::expect(x_grad.gaps_untouched() && initial_grad.gaps_untouched(), "a gradient: written between two rows");
    drive::expect(with_initial || initial_grad.untouched(), "the initial state's gradient was written unasked");
  }

  const Shape shape;
  const Batch& batch;
  const bool any_bf16;
  Numbers x, weight, bias;
  States states;
  bool with_bias;
  ConvArguments args = {};
  Inputs in;
};

void run(const Shape& shape, const Batch& batch, bool mixed, int64_t threads) {
  Case one(shape, batch, mixed, threads);
  one.forward();
  one.backward();
}

}  // namespace

void drive_causal_conv1d() {
  for (const bool mixed : {false, true}) {
    for (const int64_t channels : drive::kWidths)
      for (const bool packed : {false, true}) {
        const Batch batch = Batch::around(drive::one_of(drive::kLengths), packed);
        run({channels, drive::pick(2, 8), drive::coin()}, batch, mixed, drive::pick(1, 2));
      }
    for (const int64_t length : drive::kLengths)
      for (int64_t width = 2; width <= 8; ++width)
        run({drive::pick(1, 20), width, drive::coin()}, Batch::around(length, drive::coin()), mixed, 1);
    for (const int64_t channels : drive::kWidths)  // the decode step's own loop
      run({channels, 4, drive::coin()}, Batch(std::vector<int64_t>(drive::pick(1, 10), 1), false), mixed, 1);
    drive::with_special_numbers([&] { run({33, 4, 1}, Batch::around(33, mixed), mixed, 1); });
    run({65, 4, 1}, Batch({1009, 1009}, mixed), mixed, 2);  // enough work for two threads
  }
}
