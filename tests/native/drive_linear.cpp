// Drives linear_forward: y = x W^T + b. Weights are fp32, bf16, or codes of a byte with a bf16 scale for 32 of them.

#include "driver.h"
#include "linear.cpp"

namespace {

using drive::Numbers;
using drive::Values;

constexpr int64_t kFp32 = 4, kBf16 = 2, kInt8 = 1;  // bytes of a weight

// Weights [out, in] in memory, and the numbers that they stand for. A code is 128 more than what is scaled.
struct Weight {
  Weight(int64_t features, int64_t in, int64_t weight_bytes)
      : numbers(Numbers::random(features, in, weight_bytes == kBf16)),
        groups((in + kScaleGroup - 1) / kScaleGroup),
        scales(Numbers::random(features, groups, true, 0, 0.001, 0.01)),
        codes(new uint8_t[features * in]),
        values(numbers.values()) {
    if (weight_bytes != kInt8) return;
    const Values scale = scales.values();
    for (int64_t i = 0; i < features * in; ++i) {
      const int64_t number = drive::pick(-127, 127);
      codes[i] = static_cast<uint8_t>(number + 128);
      values[i] = static_cast<double>(number) * scale[i / in * groups + i % in / kScaleGroup];
    }
  }

  Numbers numbers;
  int64_t groups;
  Numbers scales;
  std::unique_ptr<uint8_t[]> codes;
  Values values;
};

Values naive(const Values& x, const Values& weight, const Values& bias, int64_t rows, int64_t in, int64_t features) {
  Values out(rows * features);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t f = 0; f < features; ++f) {
      double total = bias.empty() ? 0.0 : bias[f];
      for (int64_t i = 0; i < in; ++i) total += x[row * in + i] * weight[f * in + i];
      out[row * features + f] = total;
    }
  return out;
}

void run(int64_t rows, int64_t in, int64_t features, int64_t weight_bytes, int64_t threads) {
  const bool with_bias = drive::coin(), is_bf16 = weight_bytes != kFp32;
  const int64_t gap = drive::pick(0, 3);
  drive::begin_case(drive::text({{"rows", rows}, {"in", in}, {"out", features}, {"weight_bytes", weight_bytes},
                                 {"gap", gap}, {"bias", with_bias}, {"threads", threads}}));
  const Numbers x = Numbers::random(rows, in, is_bf16, gap), bias = Numbers::random(1, features, is_bf16);
  const Numbers out(rows, features, is_bf16);
  const Weight weight(features, in, weight_bytes);
  LinearArguments args = {};
  args.x = x.data();
  args.x_stride = x.stride();
  args.weight = weight_bytes == kInt8 ? reinterpret_cast<const char*>(weight.codes.get()) : weight.numbers.data();
  args.scales = weight_bytes == kInt8 ? reinterpret_cast<const uint16_t*>(weight.scales.data()) : nullptr;
  args.bias = with_bias ? bias.data() : nullptr;
  args.out = out.data();
  args.rows = rows;
  args.in = in;
  args.out_features = features;
  args.weight_bytes = weight_bytes;
  args.threads = threads;
  drive::expect(CALL(linear_forward, args) == 0, "returned a code");
  const Values expected = naive(x.values(), weight.values, with_bias ? bias.values() : Values{}, rows, in, features);
  drive::expect_close("out", out, expected, drive::tolerance(is_bf16));
}

}  // namespace

void drive_linear() {
  for (const int64_t weight_bytes : {kFp32, kBf16, kInt8}) {
    for (const int64_t in : drive::kWidths)
      for (const int64_t features : drive::kWidths)
        run(drive::pick(1, 6), in, features, weight_bytes, drive::pick(1, 2));
    for (const int64_t rows : {0, 1, 5}) run(rows, 517, 257, weight_bytes, 2);  // enough work for two threads
    drive::with_special_numbers([&] { run(5, 65, 33, weight_bytes, 1); });
  }
}
