// Drives rms_norm, gated_rms_norm and scale_rows: what works on rows of features, one at a time.

#include <cmath>

#include "driver.h"
#include "gated_rms_norm.cpp"
#include "rms_norm.cpp"
#include "scale_rows.cpp"

namespace {

using drive::Numbers;
using drive::Values;

constexpr double kEps = 1e-5;

Matrix matrix(const Numbers& numbers, bool given = true) {
  return given ? Matrix{numbers.data(), numbers.stride(), numbers.is_bf16()} : Matrix{};
}

// How one norm is called; dtypes and gaps are drawn tensor by tensor.
struct Shape {
  int64_t rows, width, threads;
  bool mixed;  // some tensors in bf16

  Numbers random(int64_t row_count) const {
    return Numbers::random(row_count, width, mixed && drive::coin(), drive::pick(0, 3));
  }
  Numbers empty() const { return Numbers(rows, width, mixed && drive::coin(), drive::pick(0, 3)); }
  double tolerance() const { return drive::tolerance(mixed); }
  std::string text() const {
    return drive::text({{"rows", rows}, {"width", width}, {"threads", threads}, {"mixed", mixed}});
  }
};

template <class Run>
void for_each_shape(const Run& run) {
  for (const bool mixed : {false, true}) {
    for (const int64_t width : drive::kWidths)
      for (const int64_t rows : {1, 3}) run(Shape{rows, width, drive::pick(1, 2), mixed});
    run(Shape{0, 33, 1, mixed});
    drive::with_special_numbers([&] { run(Shape{8, 33, 1, mixed}); });
    run(Shape{2017, 65, 2, mixed});  // enough work for two threads
  }
}

// ---- rms_norm

struct NormInputs {
  Values x, residual, weight;  // the last two may be empty
};

// out, and the sum x + residual behind it.
void naive_norm(const NormInputs& in, int64_t width, Values& out, Values& sum) {
  out = sum = in.x;
  for (size_t i = 0; i < in.residual.size(); ++i) sum[i] += in.residual[i];
  for (size_t row = 0; row < sum.size(); row += width) {
    double squares = 0.0;
    for (int64_t i = 0; i < width; ++i) squares += sum[row + i] * sum[row + i];
    for (int64_t i = 0; i < width; ++i)
      out[row + i] =
          sum[row + i] / std::sqrt(squares / width + kEps) * (in.weight.empty() ? 1.0 : in.weight[i]);
  }
}

void run_norm(const Shape& shape) {
  const bool with_residual = drive::coin(), with_weight = drive::coin(), with_sum = drive::coin();
  drive::begin_case(" rms_norm" + shape.text() +
                    drive::text({{"residual", with_residual}, {"weight", with_weight}, {"sum", with_sum}}));
  const Numbers x = shape.random(shape.rows), residual = shape.random(shape.rows), weight = shape.random(1);
  const Numbers out = shape.empty(), sum = shape.empty();
  NormGradients grads = {};
  NormArguments& args = grads.forward;
  args = {matrix(x),   matrix(residual, with_residual), matrix(weight, with_weight), matrix(out),
          matrix(sum, with_sum), shape.rows, shape.width, shape.threads, kEps};
  drive::expect(CALL(rms_norm_forward, args) == 0, "returned a code");
  NormInputs in = {x.values(), with_residual ? residual.values() : Values{}, with_weight ? weight.values() : Values{}};
  Values expected, expected_sum;
  naive_norm(in, shape.width, expected, expected_sum);
  drive::expect_close("out", out, expected, shape.tolerance());
  if (with_sum) drive::expect_close("x + residual", sum, expected_sum, shape.tolerance());
  drive::expect(with_sum || sum.untouched(), "x + residual was written unasked");

  const bool with_out_grad = !with_sum || drive::coin();
  const Numbers out_grad = shape.random(shape.rows), sum_grad = shape.random(shape.rows);
  const Numbers x_grad = shape.empty(), residual_grad = shape.empty();
  const Numbers weight_grad = Numbers::zeros(shape.threads, shape.width);
  args.out = matrix(out_grad, with_out_grad);
  args.residual_out = matrix(sum_grad, with_sum);
  grads.x = matrix(x_grad);
  grads.residual = matrix(residual_grad, with_residual);
  grads.weight = with_weight ? weight_grad.floats() : nullptr;
  drive::expect(CALL(rms_norm_backward, grads) == 0, "returned a code");
  const auto loss = [&] {
    naive_norm(in, shape.width, expected, expected_sum);
    return (with_out_grad ? drive::dot(expected, out_grad.values()) : 0.0) +
           (with_sum ? drive::dot(expected_sum, sum_grad.values()) : 0.0);
  };
  drive::expect_gradient("x", x_grad.values(), in.x, loss, shape.tolerance());
  drive::expect(x_grad.gaps_untouched() && residual_grad.gaps_untouched(), "a gradient: written between two rows");
  if (with_residual) drive::expect_gradient("residual", residual_grad.values(), in.residual, loss, shape.tolerance());
  if (with_weight)
    drive::expect_gradient("weight", drive::sum_of_rows(weight_grad.values(), shape.width), in.weight, loss,
                           shape.tolerance());
}

// ---- gated_rms_norm

struct GatedInputs {
  Values x, z, weight;  // the last two may be empty
};

// out, and the square sums of its groups. `eps` below 0: no norm.
void naive_gated(const GatedInputs& in, int64_t width, int64_t groups, bool norm_before_gate, double eps, Values& out,
                 Values& square_sums) {
  const int64_t group_width = width / groups;
  out.assign(in.x.size(), 0.0);
  square_sums.clear();
  for (size_t first = 0; first < in.x.size(); first += group_width) {
    double squares = 0.0;
    const auto gate = [&](size_t i) { return in.z.empty() ? 1.0 : drive::silu(in.z[i]); };
    const auto normed = [&](size_t i) { return in.x[i] * (norm_before_gate ? 1.0 : gate(i)); };
    for (size_t i = first; i < first + group_width; ++i) squares += normed(i) * normed(i);
    square_sums.push_back(squares);
    const double scale = eps < 0.0 ? 1.0 : 1.0 / std::sqrt(squares / group_width + eps);
    for (size_t i = first; i < first + group_width; ++i)
      out[i] = normed(i) * scale * (in.weight.empty() ? 1.0 : in.weight[i % width]) *
               (norm_before_gate ? gate(i) : 1.0);
  }
}

void run_gated(Shape shape) {
  const int64_t groups = drive::pick(1, 3);
  const bool with_gate = drive::coin(), with_weight = drive::coin(), before = drive::coin(), normalize = drive::coin();
  shape.width *= groups;
  drive::begin_case(" gated_rms_norm" + shape.text() +
                    drive::text({{"groups", groups}, {"gate", with_gate}, {"weight", with_weight},
                                 {"norm_before_gate", before}, {"normalize", normalize}}));
  const Numbers x = shape.random(shape.rows), z = shape.random(shape.rows), weight = shape.random(1);
  const Numbers out = shape.empty(), square_sums(shape.rows, groups, false);
  GatedGradients grads = {};
  GatedArguments& args = grads.forward;
  args = {matrix(x), matrix(z, with_gate), matrix(weight, with_weight), matrix(out),
          normalize ? nullptr : square_sums.floats(), shape.rows, shape.width, groups, before, normalize,
          shape.threads, kEps};
  drive::expect(CALL(gated_rms_norm_forward, args) == 0, "returned a code");
  GatedInputs in = {x.values(), with_gate ? z.values() : Values{}, with_weight ? weight.values() : Values{}};
  Values expected, expected_squares;
  const double eps = normalize ? kEps : -1.0;
  naive_gated(in, shape.width, groups, before, eps, expected, expected_squares);
  drive::expect_close("out", out, expected, shape.tolerance());
  if (!normalize) drive::expect_close("square sums", square_sums, expected_squares, 1e-4);

  const bool with_squares_grad = !normalize && drive::coin(), with_out_grad = !with_squares_grad || drive::coin();
  const Numbers out_grad = shape.random(shape.rows), squares_grad = Numbers::random(shape.rows, groups, false);
  const Numbers x_grad = shape.empty(), z_grad = shape.empty();
  const Numbers weight_grad = Numbers::zeros(shape.threads, shape.width);
  args.out = matrix(out_grad, with_out_grad);
  args.square_sums = with_squares_grad ? squares_grad.floats() : nullptr;
  grads.x = matrix(x_grad);
  grads.z = matrix(z_grad, with_gate);
  grads.weight = with_weight ? weight_grad.floats() : nullptr;
  drive::expect(CALL(gated_rms_norm_backward, grads) == 0, "returned a code");
  const auto loss = [&] {
    naive_gated(in, shape.width, groups, before, eps, expected, expected_squares);
    return (with_out_grad ? drive::dot(expected, out_grad.values()) : 0.0) +
           (with_squares_grad ? drive::dot(expected_squares, squares_grad.values()) : 0.0);
  };
  drive::expect_gradient("x", x_grad.values(), in.x, loss, shape.tolerance());
  drive::expect(x_grad.gaps_untouched() && z_grad.gaps_untouched(), "a gradient: written between two rows");
  if (with_gate) drive::expect_gradient("z", z_grad.values(), in.z, loss, shape.tolerance());
  if (with_weight)
    drive::expect_gradient("weight", drive::sum_of_rows(weight_grad.values(), shape.width), in.weight, loss,
                           shape.tolerance());
}

// ---- scale_rows

void run_scale(const Shape& shape) {
  drive::begin_case(" scale_rows" + shape.text());
  const bool is_bf16 = shape.mixed;
  const Numbers x = Numbers::random(shape.rows, shape.width, is_bf16, drive::pick(0, 3));
  const Numbers out(shape.rows, shape.width, is_bf16, drive::pick(0, 3)), scale = Numbers::random(shape.rows, 1, false);
  const ScaleArguments args = {matrix(x), matrix(out), scale.floats(), shape.rows, shape.width, shape.threads};
  drive::expect(CALL(scale_rows_forward, args) == 0, "returned a code");
  Values expected = x.values();
  const Values scales = scale.values();
  for (size_t i = 0; i < expected.size(); ++i) expected[i] *= scales[i / shape.width];
  drive::expect_close("out", out, expected, shape.tolerance());
}

}  // namespace

void drive_norms() {
  for_each_shape(run_norm);
  for_each_shape(run_gated);
  for_each_shape(run_scale);
}
