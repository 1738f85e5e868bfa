// Drives ssd_scan: h_t = exp(dt_t A) h_{t-1} + dt_t x_t (x) B_t, y_t = h_t C_t + D x_t, one decay for a whole head.

#include <algorithm>
#include <cmath>

#include "driver.h"
#include "sequences.h"
#include "ssd_scan_backward.cpp"

extern "C" int64_t ssd_scan_forward(const void* packed);

namespace {

using drive::Batch;
using drive::Numbers;
using drive::States;
using drive::Values;

struct Inputs {
  Values x, dt, a, b, c, d, dt_bias, initial;  // d and dt_bias may be empty; initial is by sequence
};

struct Shape {
  int64_t heads, head_width, groups, states, softplus;
  double dt_low, dt_high;
};

// Before it is limited; `at` counts tokens and heads.
double step(const Inputs& in, const Shape& shape, int64_t at) {
  const double raw = in.dt[at] + (in.dt_bias.empty() ? 0.0 : in.dt_bias[at % shape.heads]);
  return shape.softplus ? drive::softplus(raw) : raw;
}

void naive(const Inputs& in, const Batch& batch, const Shape& shape, Values& out, Values& final) {
  out.assign(in.x.size(), 0.0);
  final = in.initial;
  for (int64_t s = 0; s < batch.count(); ++s)
    for (int64_t token = batch.first[s]; token < batch.first[s + 1]; ++token)
      for (int64_t head = 0; head < shape.heads; ++head) {
        const double dt = std::min(std::max(step(in, shape, token * shape.heads + head), shape.dt_low), shape.dt_high);
        const double decay = std::exp(dt * in.a[head]);
        const int64_t state = (token * shape.groups + head / (shape.heads / shape.groups)) * shape.states;
        for (int64_t p = 0; p < shape.head_width; ++p) {
          const int64_t at = (token * shape.heads + head) * shape.head_width + p;
          double y = in.d.empty() ? 0.0 : in.d[head] * in.x[at];
          for (int64_t n = 0; n < shape.states; ++n) {
            double& h = final[((s * shape.heads + head) * shape.head_width + p) * shape.states + n];
            h = decay * h + dt * in.x[at] * in.b[state + n];
            y += h * in.c[state + n];
          }
          out[at] = y;
        }
      }
}

HeadStates state_of(const Numbers& numbers, const Shape& shape, bool given = true) {
  const int64_t head_stride = shape.head_width * numbers.stride();
  return given ? HeadStates{numbers.data(), shape.heads * head_stride, head_stride, numbers.stride()} : HeadStates{};
}

// The arguments of one call, and what they point to.
struct Case {
  Case(const Shape& sizes, const Batch& sequences, bool mixed, int64_t threads)
      : shape(sizes),
        batch(sequences),
        any_bf16(mixed),
        x(random(shape.heads * shape.head_width)),
        dt(random(shape.heads, shape.softplus ? -1.0 : 0.05, 0.5)),
        b(random(shape.groups * shape.states)),
        c(random(shape.groups * shape.states)),
        a(decay_rates()),
        d(Numbers::random(1, shape.heads, false)),
        dt_bias(Numbers::random(1, shape.heads, false, 0, 0.0, 0.3)),
        states(batch, shape.heads * shape.head_width, shape.states, dtype()),
        with_d(drive::coin()),
        with_bias(drive::coin()) {
    args.x = drive::rows(x, batch);
    args.dt = drive::rows(dt, batch);
    args.b = drive::rows(b, batch);
    args.c = drive::rows(c, batch);
    args.a = a.floats();
    args.d = with_d ? d.floats() : nullptr;
    args.dt_bias = with_bias ? dt_bias.floats() : nullptr;
    args.sequences = batch.sequences();
    args.heads = shape.heads;
    args.head_width = shape.head_width;
    args.groups = shape.groups;
    args.states = shape.states;
    args.softplus = shape.softplus;
    args.threads = threads;
    in = {x.values(), dt.values(), a.values(), b.values(), c.values(), with_d ? d.values() : Values{},
          with_bias ? dt_bias.values() : Values{}, states.before()};
    if (shape.dt_low > 0.0) {
      shape.dt_low = limit_between_steps(shape.dt_low);
      shape.dt_high = limit_between_steps(shape.dt_high);
    }
    args.dt_low = shape.dt_low;
    args.dt_high = shape.dt_high;
    drive::begin_case(drive::text({{"heads", shape.heads}, {"head_width", shape.head_width}, {"groups", shape.groups},
                                   {"states", shape.states}, {"softplus", shape.softplus}, {"d", with_d},
                                   {"bias", with_bias}, {"limited", shape.dt_low > 0.0}, {"mixed", mixed},
                                   {"threads", threads}}) +
                      batch.text() + states.text());
  }

  // A limit near the wanted one with no step close to it: a difference quotient across a limit is no gradient.
  double limit_between_steps(double wanted) const {
    double best = wanted, widest = -1.0;
    for (double limit = 0.9 * wanted; limit < 1.1 * wanted; limit += 0.005 * wanted) {
      double distance = HUGE_VAL;
      for (size_t i = 0; i < in.dt.size(); ++i)
        distance = std::min(distance, std::abs(step(in, shape, static_cast<int64_t>(i)) - limit));
      if (distance > widest) widest = distance, best = limit;
    }
    return best;
  }

  bool dtype() const { return any_bf16 && drive::coin(); }
  double tolerance() const { return drive::tolerance(any_bf16); }
  Numbers random(int64_t width, double low = -1.0, double high = 1.0) const {
    return Numbers::random(batch.tokens(), width, dtype(), drive::pick(0, 3), low, high);
  }
  Numbers empty(int64_t width) const { return Numbers(batch.tokens(), width, dtype(), drive::pick(0, 3)); }
  // Now and then a head forgets so fast that a chunk has many segments.
  Numbers decay_rates() const {
    Values rates = drive::random_values(shape.heads, -1.5, -0.1);
    if (drive::pick(0, 3) == 0) rates[0] = drive::uniform(-200.0, -20.0);
    return Numbers::of(rates, shape.heads);
  }

  void forward() {
    const int64_t width = shape.heads * shape.head_width;
    const Numbers out = empty(width), unwritten = empty(width);
    args.out = drive::rows(out, batch);
    args.initial = state_of(states.initial(), shape, states.has_initial);
    args.final = state_of(states.final(), shape, states.has_final);
    args.slots = states.slots();
    args.state_is_bf16 = states.is_bf16();
    drive::expect(CALL(ssd_scan_forward, args) == 0, "returned a code");
    Values expected, final;
    naive(in, batch, shape, expected, final);
    drive::expect_close("out", out, expected, tolerance());
    states.expect_after(final, drive::tolerance(states.is_bf16()));
    if (!states.in_pool) return;
    const Values pool = states.final().values();
    states.leave_the_pool();
    args.slots = states.slots();
    args.out = drive::rows(unwritten, batch);
    drive::expect(CALL(ssd_scan_forward, args) == kSlotOutOfRange, "took a slot that is not in the pool");
    drive::expect(unwritten.untouched() && pool == states.final().values(), "written despite a slot out of range");
  }

  void backward() {
    const bool with_initial = drive::coin(), with_final = drive::coin();
    const int64_t width = shape.heads * shape.head_width, state_rows = batch.count() * width, n = shape.states;
    const int64_t lanes = padded(n), token_rows = batch.tokens() * shape.groups, threads = args.threads;
    const Numbers initial = Numbers::random(state_rows, n, false, drive::pick(0, 3));
    const Numbers final_grad = Numbers::random(state_rows, n, false, drive::pick(0, 3));
    const Numbers out_grad = random(width), x_grad = empty(width), dt_grad = empty(shape.heads);
    const Numbers a_grad(batch.count(), shape.heads, false), d_grad(batch.count(), shape.heads, false);
    const Numbers bias_grad(batch.count(), shape.heads, false);
    const Numbers b_grad = Numbers::zeros(threads * token_rows, lanes);
    const Numbers c_grad = Numbers::zeros(threads * token_rows, lanes);
    const Numbers initial_grad(state_rows, n, false, drive::pick(0, 3));
    Gradients grads = {};
    grads.forward = args;
    grads.forward.out = drive::rows(out_grad, batch);
    grads.forward.initial = state_of(initial, shape, with_initial);
    grads.forward.final = state_of(final_grad, shape, with_final);
    grads.forward.slots = {};
    grads.forward.state_is_bf16 = 0;
    grads.x = drive::rows(x_grad, batch);
    grads.dt = drive::rows(dt_grad, batch);
    grads.a = a_grad.floats();
    grads.d = with_d ? d_grad.floats() : nullptr;
    grads.dt_bias = with_bias ? bias_grad.floats() : nullptr;
    grads.b = b_grad.floats();
    grads.c = c_grad.floats();
    grads.initial = state_of(initial_grad, shape, with_initial);
    drive::expect(CALL(ssd_scan_backward, grads) == 0, "returned a code");
    in.initial = with_initial ? initial.values() : Values(state_rows * n);
    Values out, final;
    const auto loss = [&] {
      naive(in, batch, shape, out, final);
      return drive::dot(out, out_grad.values()) + (with_final ? drive::dot(final, final_grad.values()) : 0.0);
    };
    const auto check = [&](const char* what, const Values& gradient, Values& input) {
      drive::expect_gradient(what, gradient, input, loss, tolerance());
    };
    // Partial sums of the threads, without the lanes past the last state.
    const auto group_gradient = [&](const Numbers& partial) {
      const Values sums = drive::sum_of_rows(partial.values(), token_rows * lanes);
      Values gradient;
      for (int64_t i = 0; i < token_rows * lanes; ++i)
        if (i % lanes < n) gradient.push_back(sums[i]);
      return gradient;
    };
    check("x", x_grad.values(), in.x);
    check("dt", dt_grad.values(), in.dt);
    check("A", drive::sum_of_rows(a_grad.values(), shape.heads), in.a);
    check("B", group_gradient(b_grad), in.b);
    check("C", group_gradient(c_grad), in.c);
    if (with_d) check("D", drive::sum_of_rows(d_grad.values(), shape.heads), in.d);
    if (with_bias) check("dt_bias", drive::sum_of_rows(bias_grad.values(), shape.heads), in.dt_bias);
    if (with_initial) check("initial state", initial_grad.values(), in.initial);
    for (const Numbers* written : {&x_grad, &dt_grad, &initial_grad})
      drive::expect(written->gaps_untouched(), "a gradient: written between two rows");
  }

  Shape shape;
  const Batch& batch;
  const bool any_bf16;
  Numbers x, dt, b, c, a, d, dt_bias;
  States states;
  bool with_d, with_bias;
  Arguments args = {};
  Inputs in;
};

void run(int64_t head_width, int64_t states, const Batch& batch, bool mixed, int64_t threads) {
  const int64_t groups = drive::pick(1, 2);
  const bool limited = drive::coin();
  Case one({groups * drive::pick(1, 2), head_width, groups, states, drive::coin(), limited ? 0.15 : 0.0,
            limited ? 0.6 : HUGE_VAL},
           batch, mixed, threads);
  one.forward();
  one.backward();
}

}  // namespace

void drive_ssd_scan() {
  for (const bool mixed : {false, true}) {
    for (const int64_t width : drive::kWidths)
      for (const bool packed : {false, true}) {
        const int64_t length = drive::one_of(drive::kLengths), other = drive::one_of(drive::kWidths);
        run(packed ? width : other, packed ? other : width, Batch::around(length, drive::coin()), mixed,
            drive::pick(1, 2));
      }
    for (const int64_t length : drive::kLengths)
      for (const int64_t states : {1, 15, 16, 17, 32})
        run(drive::pick(1, 20), states, Batch::around(length, drive::coin()), mixed, 1);
    for (const int64_t width : drive::kWidths)  // the decode step's own loop
      run(width, 16 * drive::pick(1, 3), Batch({1, 1, 1}, false), mixed, drive::pick(1, 2));
    for (const int64_t length : {1, 33, 65})
      drive::with_special_numbers([&] { run(17, 16, Batch::around(length, mixed), mixed, 1); });
    run(kMaxWidth, kMaxWidth, Batch({2, 2}, mixed), mixed, 1);
    run(33, 33, Batch({65, 65}, mixed), mixed, 2);                      // enough work for two threads,
    run(33, 32, Batch(std::vector<int64_t>(130, 1), false), mixed, 2);  // of steps as well
  }
}
