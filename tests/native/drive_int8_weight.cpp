// Drives int8_weight_dequantize: (code - 128) scale, where 32 codes of a row share a scale.

#include "driver.h"
#include "int8_weight.cpp"

namespace {

using drive::Numbers;
using drive::Values;

void run(int64_t rows, int64_t width, int64_t threads) {
  drive::begin_case(drive::text({{"rows", rows}, {"width", width}, {"threads", threads}}));
  const int64_t groups = (width + kScaleGroup - 1) / kScaleGroup;
  const std::unique_ptr<uint8_t[]> codes(new uint8_t[rows * width]);
  const Numbers scales = Numbers::random(rows, groups, true), out(rows, width, true);
  const Values scale = scales.values();
  Values expected(rows * width);
  for (int64_t i = 0; i < rows * width; ++i) {
    codes[i] = static_cast<uint8_t>(drive::pick(0, 255));
    expected[i] = (codes[i] - 128.0) * scale[i / width * groups + i % width / kScaleGroup];
  }
  const WeightArguments args = {codes.get(), reinterpret_cast<const uint16_t*>(scales.data()),
                                reinterpret_cast<uint16_t*>(out.data()), rows, width, threads};
  drive::expect(CALL(int8_weight_dequantize, args) == 0, "returned a code");
  drive::expect_close("out", out, expected, drive::tolerance(true));
}

}  // namespace

void drive_int8_weight() {
  for (const int64_t width : drive::kWidths) run(drive::pick(1, 3), width, drive::pick(1, 2));
  run(0, 33, 1);
  run(2017, 65, 2);  // enough work for two threads
}
