// Drives selective_scan: h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t, y_t = C_t . h_t + D x_t, out_t = y_t silu(z_t).

#include <cmath>

#include "driver.h"
#include "selective_scan_backward.cpp"
#include "sequences.h"

extern "C" int64_t selective_scan_forward(const void* packed);

namespace {

using drive::Batch;
using drive::Numbers;
using drive::States;
using drive::Values;

struct Inputs {
  Values x, dt, a, b, c, d, z, dt_bias, initial;  // d, z and dt_bias may be empty; initial is by sequence
};

struct Shape {
  int64_t channels, states, softplus;
};

void naive(const Inputs& in, const Batch& batch, const Shape& shape, Values& out, Values& final) {
  out.assign(in.x.size(), 0.0);
  final = in.initial;
  for (int64_t s = 0; s < batch.count(); ++s)
    for (int64_t token = batch.first[s]; token < batch.first[s + 1]; ++token)
      for (int64_t i = 0; i < shape.channels; ++i) {
        const int64_t at = token * shape.channels + i;
        const double raw = in.dt[at] + (in.dt_bias.empty() ? 0.0 : in.dt_bias[i]);
        const double dt = shape.softplus ? drive::softplus(raw) : raw;
        double y = in.d.empty() ? 0.0 : in.d[i] * in.x[at];
        for (int64_t n = 0; n < shape.states; ++n) {
          double& h = final[(s * shape.channels + i) * shape.states + n];
          h = std::exp(dt * in.a[i * shape.states + n]) * h + dt * in.x[at] * in.b[token * shape.states + n];
          y += in.c[token * shape.states + n] * h;
        }
        out[at] = in.z.empty() ? y : y * drive::silu(in.z[at]);
      }
}

StateView state_of(const Numbers& numbers, int64_t channels, bool given = true) {
  return given ? StateView{numbers.data(), channels * numbers.stride(), numbers.stride()} : StateView{};
}

// The arguments of one call, and what they point to.
struct Case {
  Case(const Shape& sizes, const Batch& sequences, bool mixed, int64_t threads)
      : shape(sizes),
        batch(sequences),
        any_bf16(mixed),
        x(random(shape.channels)),
        dt(random(shape.channels, shape.softplus ? -1.0 : 0.05, 0.5)),
        b(random(shape.states)),
        c(random(shape.states)),
        z(random(shape.channels)),
        a(Numbers::random(shape.channels, shape.states, false, 0, -1.5, -0.1)),
        d(Numbers::random(1, shape.channels, false)),
        dt_bias(Numbers::random(1, shape.channels, false, 0, 0.0, 0.3)),
        states(batch, shape.channels, shape.states, dtype()),
        with_d(drive::coin()),
        with_z(drive::coin()),
        with_bias(drive::coin()) {
    args.x = drive::rows(x, batch);
    args.dt = drive::rows(dt, batch);
    args.b = drive::rows(b, batch);
    args.c = drive::rows(c, batch);
    args.z = drive::rows(z, batch, with_z);
    args.a = a.floats();
    args.d = with_d ? d.floats() : nullptr;
    args.dt_bias = with_bias ? dt_bias.floats() : nullptr;
    args.sequences = batch.sequences();
    args.channels = shape.channels;
    args.states = shape.states;
    args.softplus = shape.softplus;
    args.threads = threads;
    in = {x.values(), dt.values(), a.values(), b.values(), c.values(), with_d ? d.values() : Values{},
          with_z ? z.values() : Values{}, with_bias ? dt_bias.values() : Values{}, states.before()};
    drive::begin_case(drive::text({{"channels", shape.channels}, {"states", shape.states}, {"z", with_z},
                                   {"softplus", shape.softplus}, {"d", with_d}, {"bias", with_bias},
                                   {"mixed", mixed}, {"threads", threads}}) +
                      batch.text() + states.text());
  }

  bool dtype() const { return any_bf16 && drive::coin(); }
  double tolerance() const { return drive::tolerance(any_bf16); }
  Numbers random(int64_t width, double low = -1.0, double high = 1.0) const {
    return Numbers::random(batch.tokens(), width, dtype(), drive::pick(0, 3), low, high);
  }
  Numbers empty() const { return Numbers(batch.tokens(), shape.channels, dtype(), drive::pick(0, 3)); }

  void forward() {
    const Numbers out = empty(), unwritten = empty();
    args.out = drive::rows(out, batch);
    args.initial = state_of(states.initial(), shape.channels, states.has_initial);
    args.final = state_of(states.final(), shape.channels, states.has_final);
    args.slots = states.slots();
    args.state_is_bf16 = states.is_bf16();
    drive::expect(CALL(selective_scan_forward, args) == 0, "returned a code");
    Values expected, final;
    naive(in, batch, shape, expected, final);
    drive::expect_close("out", out, expected, tolerance());
    states.expect_after(final, drive::tolerance(states.is_bf16()));
    if (!states.in_pool) return;
    const Values pool = states.final().values();
    states.leave_the_pool();
    args.slots = states.slots();
    args.out = drive::rows(unwritten, batch);
    drive::expect(CALL(selective_scan_forward, args) == kSlotOutOfRange, "took a slot that is not in the pool");
    drive::expect(unwritten.untouched() && pool == states.final().values(), "written despite a slot out of range");
  }

  // Runs the forward that saves states for the backward, as training does.
  void save_states(const Numbers& initial, bool with_initial, const Numbers& chunk_states) {
    const Numbers out = empty();
    args.out = drive::rows(out, batch);
    args.slots = {};
    args.initial = state_of(initial, shape.channels, with_initial);
    args.final = {};
    args.state_is_bf16 = initial.is_bf16();
    args.chunk_states = chunk_states.floats();
    drive::expect(CALL(selective_scan_forward, args) == 0, "returned a code");
    in.initial = with_initial ? initial.values() : Values(batch.count() * shape.channels * shape.states);
    Values expected, final;
    naive(in, batch, shape, expected, final);
    drive::expect_close("out in training", out, expected, tolerance());
    args.out = {};
    args.initial = {};
    args.state_is_bf16 = 0;
  }

  void backward() {
    const bool with_initial = drive::coin(), with_final = drive::coin();
    const int64_t channels = shape.channels, n = shape.states, state_rows = batch.count() * channels;
    const int64_t threads = args.threads, tokens = batch.tokens();
    const Numbers initial = Numbers::random(state_rows, n, dtype(), drive::pick(0, 3));
    const Numbers chunk_states(first_chunks(args.sequences).back() * blocks_of(channels), n * kLanes, false);
    save_states(initial, with_initial, chunk_states);
    const Numbers out_grad = random(channels), final_grad = Numbers::random(state_rows, n, false, drive::pick(0, 3));
    const Numbers x_grad = empty(), dt_grad = empty(), z_grad = empty();
    const Numbers a_grad(channels, n, false), d_grad(1, channels, false), bias_grad(1, channels, false);
    const Numbers b_grad(threads, tokens * n, false), c_grad(threads, tokens * n, false);
    const Numbers initial_grad(state_rows, n, false, drive::pick(0, 3));
    ScanGradients grads = {};
    grads.forward = args;
    grads.out = drive::rows(out_grad, batch);
    grads.final = state_of(final_grad, channels, with_final);
    grads.x = drive::rows(x_grad, batch);
    grads.dt = drive::rows(dt_grad, batch);
    grads.z = drive::rows(z_grad, batch, with_z);
    grads.a = a_grad.floats();
    grads.d = with_d ? d_grad.floats() : nullptr;
    grads.dt_bias = with_bias ? bias_grad.floats() : nullptr;
    grads.b = b_grad.floats();
    grads.c = c_grad.floats();
    grads.initial = state_of(initial_grad, channels, with_initial);
    drive::expect(CALL(selective_scan_backward, grads) == 0, "returned a code");
    Values out, final;
    const auto loss = [&] {
      naive(in, batch, shape, out, final);
      return drive::dot(out, out_grad.values()) + (with_final ? drive::dot(final, final_grad.values()) : 0.0);
    };
    const auto check = [&](const char* what, const Values& gradient, Values& input) {
      drive::expect_gradient(what, gradient, input, loss, tolerance());
    };
    check("x", x_grad.values(), in.x);
    check("dt", dt_grad.values(), in.dt);
    check("A", a_grad.values(), in.a);
    check("B", drive::sum_of_rows(b_grad.values(), tokens * n), in.b);
    check("C", drive::sum_of_rows(c_grad.values(), tokens * n), in.c);
    if (with_d) check("D", d_grad.values(), in.d);
    if (with_z) check("z", z_grad.values(), in.z);
    if (with_bias) check("dt_bias", bias_grad.values(), in.dt_bias);
    if (with_initial) check("initial state", initial_grad.values(), in.initial);
    for (const Numbers* written : {&x_grad, &dt_grad, &z_grad, &initial_grad})
      drive::expect(written->gaps_untouched(), "a gradient: written between two rows");
  }

  const Shape shape;
  const Batch& batch;
  const bool any_bf16;
  Numbers x, dt, b, c, z, a, d, dt_bias;
  States states;
  bool with_d, with_z, with_bias;
  ScanArguments args = {};
  Inputs in;
};

void run(int64_t channels, int64_t states, const Batch& batch, bool mixed, int64_t threads) {
  Case one({channels, states, drive::coin()}, batch, mixed, threads);
  one.forward();
  one.backward();
}

}  // namespace

void drive_selective_scan() {
  const std::vector<int64_t> kStates = {1, 3, 7, 8, 9, 15, 16, 17, 32, 33};
  for (const bool mixed : {false, true}) {
    for (const int64_t channels : drive::kWidths)
      for (const bool packed : {false, true})
        run(channels, drive::one_of(kStates), Batch::around(drive::one_of(drive::kLengths), packed), mixed,
            drive::pick(1, 2));
    for (const int64_t length : drive::kLengths)
      for (const int64_t states : kStates)
        run(drive::pick(1, 20), states, Batch::around(length, drive::coin()), mixed, 1);
    for (const int64_t channels : drive::kWidths)  // the decode step's own loop
      run(channels, 16 * drive::pick(1, 3), Batch({1, 1, 1}, false), mixed, drive::pick(1, 2));
    for (const int64_t length : {1, 33, 65})
      drive::with_special_numbers([&] { run(17, 16, Batch::around(length, mixed), mixed, 1); });
    run(17, kMaxStates, Batch({2, 2}, mixed), mixed, 1);
    run(65, 16, Batch({65, 65}, mixed), mixed, 2);                      // enough work for two threads,
    run(65, 16, Batch(std::vector<int64_t>(130, 1), false), mixed, 2);  // of steps as well
  }
}
