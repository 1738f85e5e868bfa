// Drives sum_raw: sums of wires that hold numbers themselves, rounded once, and zeros up to the end of the result.

#include "driver.h"
#include "sum_raw.cpp"

namespace {

using drive::Values;

constexpr int64_t kFp32 = 0, kBf16 = 1, kFp16 = 2;  // as in `with_dtype`

// A small multiple of 1/8: the same in fp32, bf16 and fp16, and so are sums of a few of them.
double exact_number() { return static_cast<double>(drive::pick(-15, 15)) / 8.0; }

// Its bits in one of the dtypes.
uint32_t bits_of(double value, int64_t dtype) {
  const float narrow = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &narrow, sizeof bits);
  if (dtype == kFp32) return bits;
  if (dtype == kBf16) return bits >> 16;
  const uint32_t magnitude = bits & 0x7fffffff;  // zero, or normal in fp16 too
  return (bits >> 16 & 0x8000) | (magnitude ? (magnitude - (112u << 23)) >> 13 : 0);
}

std::vector<uint8_t> wire_of(const Values& values, int64_t dtype, int64_t bytes) {
  const int64_t size = dtype == kFp32 ? 4 : 2;
  std::vector<uint8_t> wire(bytes, 0);
  for (size_t i = 0; i < values.size(); ++i) {
    const uint32_t bits = bits_of(values[i], dtype);
    std::memcpy(&wire[i * size], &bits, size);
  }
  return wire;
}

void run(int64_t count, int64_t wires, int64_t dtype, int64_t out_dtype, int64_t threads) {
  drive::begin_case(drive::text({{"count", count}, {"wires", wires}, {"dtype", dtype}, {"out_dtype", out_dtype},
                                 {"threads", threads}}));
  const auto size = [&](int64_t kind) { return count * (kind == kFp32 ? 4 : 2); };
  const int64_t bytes = (size(out_dtype) + 15) / 16 * 16;  // zeros fill it up
  Values sum(count);
  std::vector<std::unique_ptr<uint8_t[]>> inputs;
  for (int64_t w = 0; w < wires; ++w) {
    Values values(count);
    for (int64_t i = 0; i < count; ++i) sum[i] += values[i] = exact_number();
    const std::vector<uint8_t> wire = wire_of(values, dtype, size(dtype));
    inputs.emplace_back(new uint8_t[wire.size()]);
    std::copy(wire.begin(), wire.end(), inputs.back().get());
  }
  const std::unique_ptr<uint8_t[]> out(new uint8_t[bytes]);
  std::fill_n(out.get(), bytes, uint8_t{0xff});
  RawArguments args = {};
  args.out = out.get();
  args.dtype = dtype;
  args.out_dtype = out_dtype;
  args.count = count;
  args.bytes = bytes;
  args.threads = threads;
  args.wires = wires;
  drive::expect(CALL_WITH_WIRES(sum_raw, args, inputs) == 0, "returned a code");
  drive::expect(wire_of(sum, out_dtype, bytes) == std::vector<uint8_t>(out.get(), out.get() + bytes), "sum");
}

}  // namespace

void drive_sum_raw() {
  for (const int64_t dtype : {kFp32, kBf16, kFp16})
    for (const int64_t out_dtype : {kFp32, kBf16, kFp16}) {
      for (const int64_t count : drive::kWidths) run(count, drive::pick(1, 4), dtype, out_dtype, drive::pick(1, 2));
      for (const int64_t count : {0, 2047, 2048, 2049}) run(count, drive::pick(1, 4), dtype, out_dtype, 1);
      run(64 * 2048 + 3, 3, dtype, out_dtype, 2);  // enough work for two threads
    }
}
