// Rows of an int8 weight as the bf16 numbers that they stand for: (code - 128) scale, rounded once. One pass over memory.

#include "linear_formats.h"

namespace {

constexpr int64_t kParallelWork = 1 << 17;  // weights; less is not worth waking other threads

// Packed by cpu/int8_weight.py: every field has 8 bytes. Order matters.
struct WeightArguments {
  const uint8_t* codes;    // [rows, width], contiguous
  const uint16_t* scales;  // [rows, groups], contiguous
  uint16_t* out;           // [rows, width] bf16
  int64_t rows, width, threads;
};

void dequantize_row(const WeightArguments& args, int64_t row) {
  const int64_t groups = (args.width + kScaleGroup - 1) / kScaleGroup;
  const uint8_t* codes = args.codes + row * args.width;
  uint16_t* out = args.out + row * args.width;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t begin = group * kScaleGroup, count = std::min(kScaleGroup, args.width - begin);
    const float scale = bf16_to_float(args.scales[row * groups + group]);
    alignas(64) float values[kScaleGroup];
    if (count == kScaleGroup)  // a known number of turns becomes vectors
      for (int64_t i = 0; i < kScaleGroup; ++i) values[i] = static_cast<float>(codes[begin + i] - 128) * scale;
    else
      for (int64_t i = 0; i < count; ++i) values[i] = static_cast<float>(codes[begin + i] - 128) * scale;
    store_row(out + begin, static_cast<int>(count), values);
  }
}

}  // namespace

extern "C" int64_t int8_weight_dequantize(const WeightArguments* packed) {
  const WeightArguments args = *packed;
  const int64_t threads = args.rows * args.width < kParallelWork ? 1 : args.threads;
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(threads)) if (threads > 1)
  for (int64_t row = 0; row < args.rows; ++row) dequantize_row(args, row);
  return 0;
}
