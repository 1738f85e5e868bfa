// Drives quantize, dequantize_sum and quantize_sum: numbers to the wires of a codec, and sums of wires.
//
// What a wire means is read off it here one number at a time, as codecs.py writes the layouts down.

#include <cmath>

#include "driver.h"
#include "quantize.cpp"

namespace {

using drive::Numbers;
using drive::Values;

// As in codecs.py, in the order of `with_codec`. `error` bounds what rounding to a code takes from a number, as a part
// of the largest one of its group.
struct Layout {
  int64_t bits, group;
  double error;

  int64_t groups(int64_t count) const { return (count + group - 1) / group; }
  int64_t code_bytes(int64_t count) const { return aligned(groups(count) * group * bits / 8); }
  int64_t bytes(int64_t count) const { return code_bytes(count) + aligned(groups(count) * 2); }
  static int64_t aligned(int64_t bytes) { return (bytes + 15) / 16 * 16; }
};

constexpr int64_t kInt8 = 0, kFp8 = 1, kInt6 = 2, kInt4 = 3;
constexpr Layout kLayouts[] = {{8, 64, 0.52 / 127}, {8, 128, 1.03 / 16}, {6, 32, 0.52 / 31}, {4, 32, 1.01 / 8}};

double decode_fp8(uint8_t code) {
  const int exponent = code >> 3 & 15, fraction = code & 7;
  const double magnitude = exponent ? std::ldexp(8 + fraction, exponent - 10) : std::ldexp(fraction, -9);
  return code & 0x80 ? -magnitude : magnitude;
}

int sign_extended(int value, int bits) { return value >= 1 << (bits - 1) ? value - (1 << bits) : value; }

// Code i of a group whose codes begin at `codes`.
double decode_code(int64_t codec, const uint8_t* codes, int64_t i) {
  if (codec == kInt8) return static_cast<int8_t>(codes[i]);
  if (codec == kFp8) return decode_fp8(codes[i]);
  const int low = codes[i % 16] >> (i / 16 * 4) & 15;
  if (codec == kInt4) return sign_extended(low, 4);
  return sign_extended(low | (codes[16 + i % 8] >> (i / 8 * 2) & 3) << 4, 6);
}

Values decode(int64_t codec, const std::vector<uint8_t>& wire, int64_t count) {
  const Layout& layout = kLayouts[codec];
  Values values(count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t group = i / layout.group;
    uint16_t scale;
    std::memcpy(&scale, &wire[layout.code_bytes(count) + 2 * group], sizeof scale);
    const uint8_t* codes = &wire[group * layout.group * layout.bits / 8];
    values[i] = bf16_to_float(scale) * decode_code(codec, codes, i % layout.group);
  }
  return values;
}

constexpr int64_t kFp32 = 0, kBf16 = 1, kFp16 = 2;  // as in `with_dtype`

double from_fp16_bits(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double finite = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
  const double magnitude = exponent == 31 ? (fraction ? NAN : HUGE_VAL) : finite;
  return bits & 0x8000 ? -magnitude : magnitude;
}

float from_bits(uint32_t bits) {
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}

// Random numbers in memory of exactly their size, and what they are. Now and then all are zeros, or one is infinity or
// the NaN with all bits set.
struct Input {
  Input(int64_t count, int64_t dtype) : memory(new uint8_t[count * (dtype == kFp32 ? 4 : 2)]), values(count) {
    const int64_t kind = drive::pick(0, 9), special = kind < 2 && count ? drive::pick(0, count - 1) : -1;
    const double scale = kind == 2 ? 0.0 : std::ldexp(1.0, static_cast<int>(drive::pick(-10, 4)));
    for (int64_t i = 0; i < count; ++i) {
      float number = static_cast<float>(scale * drive::uniform(-1.0, 1.0));
      if (i == special) number = from_bits(kind == 0 ? 0x7f800000 : 0x7fffffff);
      const uint16_t half = half_of(number, dtype);
      values[i] = dtype == kFp32 ? number : dtype == kBf16 ? bf16_to_float(half) : from_fp16_bits(half);
      if (dtype == kFp32)
        std::memcpy(memory.get() + 4 * i, &number, sizeof number);
      else
        std::memcpy(memory.get() + 2 * i, &half, sizeof half);
    }
  }

  // The upper half of its bits, or for fp16 random ones of the same sign: a number below 1, perhaps subnormal.
  static uint16_t half_of(float number, int64_t dtype) {
    uint32_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    const uint32_t upper = bits >> 16;
    if (dtype != kFp16) return static_cast<uint16_t>(upper);
    if (!std::isfinite(number)) return std::isnan(number) ? 0x7fff : 0x7c00;
    return static_cast<uint16_t>((upper & 0x8000) | (number == 0.0f ? 0 : drive::pick(1, 0x3bff)));
  }

  std::unique_ptr<uint8_t[]> memory;
  Values values;
};

struct Format {
  int64_t codec, count, threads;

  const Layout& layout() const { return kLayouts[codec]; }
  int64_t bytes() const { return layout().bytes(count); }
};

std::unique_ptr<uint8_t[]> unwritten(int64_t bytes) {
  std::unique_ptr<uint8_t[]> memory(new uint8_t[bytes]);
  std::fill_n(memory.get(), bytes, uint8_t{0xff});
  return memory;
}

// What the wire means is close to `expected`, or NaN where the group is not finite, and zeros fill both of its parts.
void expect_wire(const char* what, const Format& format, const uint8_t* wire, const Values& expected) {
  const Layout& layout = format.layout();
  const std::vector<uint8_t> bytes(wire, wire + format.bytes());
  const Values found = decode(format.codec, bytes, format.count);
  for (int64_t first = 0; first < format.count; first += layout.group) {
    const int64_t last = std::min(first + layout.group, format.count);
    double largest = 0.0;
    bool finite = true;
    for (int64_t i = first; i < last; ++i) {
      largest = std::max(largest, std::fabs(expected[i]));
      finite = finite && std::isfinite(expected[i]);
    }
    for (int64_t i = first; i < last; ++i)
      drive::expect(finite ? std::fabs(found[i] - expected[i]) <= layout.error * largest : std::isnan(found[i]), what);
  }
  const auto zeros = [&](int64_t begin, int64_t end) {
    return std::all_of(wire + begin, wire + end, [](uint8_t byte) { return byte == 0; });
  };
  const int64_t groups = layout.groups(format.count), codes = layout.code_bytes(format.count);
  drive::expect(zeros(groups * layout.group * layout.bits / 8, codes) && zeros(codes + 2 * groups, format.bytes()),
                std::string(what) + ": expected zeros behind the codes and the scales");
}

SumArguments sum_arguments(const Format& format, int64_t wires, int64_t dtype, void* out) {
  SumArguments args = {};
  args.out = static_cast<uint8_t*>(out);
  args.codec = format.codec;
  args.dtype = dtype;
  args.count = format.count;
  args.code_bytes = format.layout().code_bytes(format.count);
  args.bytes = format.bytes();
  args.threads = format.threads;
  args.wires = wires;
  return args;
}

void run(const Format& format, int64_t dtype, int64_t wire_count) {
  drive::begin_case(drive::text({{"codec", format.codec}, {"count", format.count}, {"dtype", dtype},
                                 {"wires", wire_count}, {"threads", format.threads}}));
  std::vector<std::unique_ptr<uint8_t[]>> wires;
  Values sum(format.count);
  for (int64_t w = 0; w < wire_count; ++w) {
    const Input input(format.count, dtype);
    wires.push_back(unwritten(format.bytes()));
    QuantizeArguments args = {};
    args.numbers = input.memory.get();
    args.out = wires.back().get();
    args.codec = format.codec;
    args.dtype = dtype;
    args.count = format.count;
    args.code_bytes = format.layout().code_bytes(format.count);
    args.bytes = format.bytes();
    args.threads = format.threads;
    drive::expect(CALL(quantize, args) == 0, "returned a code");
    expect_wire("quantize", format, wires.back().get(), input.values);
    const std::vector<uint8_t> wire(wires.back().get(), wires.back().get() + format.bytes());
    const Values decoded = decode(format.codec, wire, format.count);
    for (int64_t i = 0; i < format.count; ++i) sum[i] += decoded[i];
  }
  for (const bool is_bf16 : {false, true}) {
    const Numbers out(1, format.count, is_bf16);
    const SumArguments args = sum_arguments(format, wire_count, is_bf16 ? kBf16 : kFp32, out.data());
    drive::expect(CALL_WITH_WIRES(dequantize_sum, args, wires) == 0, "returned a code");
    drive::expect_close("dequantize_sum", out, sum, is_bf16 ? 0x1p-8 : 1e-6);
  }
  const bool in_place = drive::coin();
  const std::unique_ptr<uint8_t[]> other = unwritten(format.bytes());
  uint8_t* out = in_place ? wires[0].get() : other.get();
  const SumArguments args = sum_arguments(format, wire_count, 0, out);
  drive::expect(CALL_WITH_WIRES(quantize_sum, args, wires) == 0, "returned a code");
  expect_wire("quantize_sum", format, out, sum);
}

}  // namespace

void drive_quantize() {
  for (const int64_t codec : {kInt8, kFp8, kInt6, kInt4}) {
    for (const int64_t dtype : {kFp32, kBf16, kFp16}) {
      for (const int64_t count : drive::kWidths) run({codec, count, drive::pick(1, 2)}, dtype, drive::pick(1, 3));
      for (const int64_t count : {0, 127, 128, 129, 2047, 2048, 2049}) run({codec, count, 1}, dtype, drive::pick(1, 3));
    }
    run({codec, 64 * 2048 + 33, 2}, kBf16, 2);  // enough work for two threads
  }
}
