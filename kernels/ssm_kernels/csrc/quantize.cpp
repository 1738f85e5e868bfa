// Numbers to the wires of a codec, and sums of wires back to numbers or to another wire.
//
// A block is 2048 numbers, which stay in the first-level cache: their scales are found together, a vector of them at a
// time, then their codes. A sum that becomes a wire again is kept in fp32 for one block. Numbers past the end of the
// last block are zeros. Blocks share nothing, so that threads change no result.
//
// No product here feeds a sum that would change if the compiler contracted both: numbers in units of the scale are
// rounded by a conversion or after a step on their bits, and code times scale is exact (codecs.py says why).

#include <vector>

#include "codecs.h"
#include "extremes.h"
#include "matrix.h"

namespace {

constexpr int kBlock = 2048;

template <class Codec>
constexpr int kGroups = kBlock / Codec::kGroup;
template <class Codec>
constexpr int kGroupBytes = Codec::kTileBytes * Codec::kGroup / kTile;
template <class Codec>
constexpr int kBlockBytes = kBlock / kTile * Codec::kTileBytes;

// [codes | scales]
struct Wire {
  uint8_t *codes, *scales;
};

template <class Codec>
Wire block_of(Wire wire, int64_t block) {
  return {wire.codes + block * kBlockBytes<Codec>, wire.scales + block * 2 * kGroups<Codec>};
}

// Packed by cpu/quantize.py: every field has 8 bytes. Order matters. `code_bytes` and `bytes` are the codec's.
struct QuantizeArguments {
  const uint8_t* numbers;
  uint8_t* out;
  int64_t codec, dtype, count, code_bytes, bytes, threads;
};

struct SumArguments {
  uint8_t* out;
  int64_t codec, dtype, count, code_bytes, bytes, threads, wires;

  const uint8_t* wire(int64_t index) const { return reinterpret_cast<const uint8_t* const*>(this + 1)[index]; }
};

// ---- Numbers of one block

// Scales and their inverses, from the bits of the largest magnitudes. Whether there is NaN or infinity anywhere.
template <class Codec, class Number>
bool find_scales(const typename Number::Bits* largest, const typename Number::Bits* signs, float* inverse,
                 uint8_t* scales) {
  using Signs = std::conditional_t<sizeof(*signs) == 2, BFloat16, Float32>;
  const ints least = ints{} + (1 << 23), most = (ints)(floats{} + Codec::kLargestScale);
  ints any_special = {};
  for (int g = 0; g < kGroups<Codec>; g += kWidth) {
    const floats magnitude = Number::load(largest + g);
    const ints special = (ints)magnitude >= 0x7f800000;
    // Adding all but one of the bits that bf16 has not rounds up.
    ints bits = (ints)(((uints)(magnitude / Codec::kLargest) + 0xffff) & 0x7fff0000);
    bits = smaller(larger(bits, least), most);
    if (Codec::kSignedScale) bits |= (ints)Signs::load(signs + g);
    bits = magnitude == 0.0f ? (ints)(floats{} + 1.0f) : bits;
    store_as(inverse + g, 1.0f / (floats)bits);
    bits = special ? ints{} + 0x7fc00000 : bits;
    store_as(scales + 2 * g, __builtin_convertvector((uints)bits >> 16, ushorts));
    any_special |= special;
  }
  bool found = false;
  for (int i = 0; i < kWidth; ++i) found |= any_special[i] != 0;
  return found;
}

template <class Codec, class Number>
void encode_block(const typename Number::Element* numbers, Wire wire) {
  using Bits = typename Number::Bits;
  Bits largest[kGroups<Codec>], signs[kGroups<Codec>];
  float inverse[kGroups<Codec>];
  for (int g = 0; g < kGroups<Codec>; g += kRows)
    find_extremes<Codec::kGroup, Codec::kSignedScale>(
        reinterpret_cast<const Bits*>(numbers) + g * Codec::kGroup, largest + g, signs + g);
  const bool special = find_scales<Codec, Number>(largest, signs, inverse, wire.scales);
  for (int tile = 0; tile < kBlock / kTile; ++tile) {
    floats scaled[kVectors];
    for (int k = 0; k < kVectors; ++k) {
      const int i = tile * kTile + Codec::element(k * kWidth);
      scaled[k] = Number::load(numbers + i) * inverse[i / Codec::kGroup];
    }
    Codec::encode(scaled, wire.codes + tile * Codec::kTileBytes);
  }
  for (int g = 0; special && g < kGroups<Codec>; ++g)
    if (load_as<uint16_t>(wire.scales + 2 * g) == 0x7fc0)
      std::memset(wire.codes + g * kGroupBytes<Codec>, 0, kGroupBytes<Codec>);
}

// The sum of a block of `wires`. `scales` has room for those of a block in fp32, for each wire.
template <class Codec, class Number>
void decode_block(const std::vector<Wire>& wires, int64_t block, float* scales, typename Number::Element* out) {
  constexpr int kCount = kGroups<Codec>;
  const int64_t count = static_cast<int64_t>(wires.size());
  for (int64_t w = 0; w < count; ++w)
    for (int g = 0; g < kCount; g += kWidth)
      store_as(scales + w * kCount + g,
               BFloat16::load(block_of<Codec>(wires[w], block).scales + 2 * g) * Codec::kUnit);
  for (int tile = 0; tile < kBlock / kTile; ++tile) {
    const int64_t offset = block * kBlockBytes<Codec> + tile * Codec::kTileBytes;
    const auto group = [&](int k) { return (tile * kTile + Codec::element(k * kWidth)) / Codec::kGroup; };
    floats sum[kVectors], next[kVectors];
    Codec::decode(wires[0].codes + offset, sum);
    for (int k = 0; k < kVectors; ++k) sum[k] *= scales[group(k)];
    for (int64_t w = 1; w < count; ++w) {
      Codec::decode(wires[w].codes + offset, next);
      for (int k = 0; k < kVectors; ++k) sum[k] += next[k] * scales[w * kCount + group(k)];
    }
    for (int i = 0; i < kTile; i += 2 * kWidth)
      Number::store(out + tile * kTile + i, sum[Codec::element(i) / kWidth],
                    sum[Codec::element(i + kWidth) / kWidth]);
  }
}

// ---- The last block may be a part of one

template <class Codec>
struct WireBlock {
  uint8_t codes[kBlockBytes<Codec>], scales[2 * kGroups<Codec>];
};

template <class Codec>
int64_t groups_of_numbers(int64_t count) {
  return (count + Codec::kGroup - 1) / Codec::kGroup;
}

template <class Codec, class Number>
void encode(const typename Number::Element* numbers, int64_t count, Wire out) {
  if (count == kBlock) return encode_block<Codec, Number>(numbers, out);
  typename Number::Element padded[kBlock] = {};
  WireBlock<Codec> whole;
  std::memcpy(padded, numbers, count * sizeof padded[0]);
  encode_block<Codec, Number>(padded, {whole.codes, whole.scales});
  std::memcpy(out.codes, whole.codes, groups_of_numbers<Codec>(count) * kGroupBytes<Codec>);
  std::memcpy(out.scales, whole.scales, groups_of_numbers<Codec>(count) * 2);
}

template <class Codec, class Number>
void decode(const std::vector<Wire>& wires, int64_t block, int64_t count, float* scales,
            typename Number::Element* out) {
  if (count == kBlock) return decode_block<Codec, Number>(wires, block, scales, out);
  std::vector<WireBlock<Codec>> whole(wires.size());  // zeros
  std::vector<Wire> copies;
  for (size_t w = 0; w < wires.size(); ++w) {
    const Wire part = block_of<Codec>(wires[w], block);
    std::memcpy(whole[w].codes, part.codes, groups_of_numbers<Codec>(count) * kGroupBytes<Codec>);
    std::memcpy(whole[w].scales, part.scales, groups_of_numbers<Codec>(count) * 2);
    copies.push_back({whole[w].codes, whole[w].scales});
  }
  typename Number::Element padded[kBlock];
  decode_block<Codec, Number>(copies, 0, scales, padded);
  std::memcpy(out, padded, count * sizeof padded[0]);
}

// ---- All blocks

// Runs run(first, last, thread) for ranges of blocks.
template <class Run>
void for_block_ranges(int64_t count, int64_t threads, const Run& run) {
  for_row_ranges((count + kBlock - 1) / kBlock, kBlock, threads, run);
}

int64_t numbers_of(int64_t block, int64_t count) { return std::min<int64_t>(kBlock, count - block * kBlock); }

template <class Arguments>
std::vector<Wire> wires_of(const Arguments& args) {
  std::vector<Wire> wires;
  for (int64_t w = 0; w < args.wires; ++w) {
    uint8_t* data = const_cast<uint8_t*>(args.wire(w));
    wires.push_back({data, data + args.code_bytes});
  }
  return wires;
}

// Both parts of a wire are filled up to a multiple of 16 bytes.
template <class Codec, class Arguments>
Wire padded_out(const Arguments& args) {
  const int64_t groups = groups_of_numbers<Codec>(args.count);
  const int64_t codes = groups * kGroupBytes<Codec>, scales = args.code_bytes + 2 * groups;
  std::memset(args.out + codes, 0, args.code_bytes - codes);
  std::memset(args.out + scales, 0, args.bytes - scales);
  return {args.out, args.out + args.code_bytes};
}

template <class Codec, class Number>
void quantize_all(const QuantizeArguments& args) {
  const auto* numbers = reinterpret_cast<const typename Number::Element*>(args.numbers);
  const Wire out = padded_out<Codec>(args);
  for_block_ranges(args.count, args.threads, [&](int64_t first, int64_t last, int64_t) {
    for (int64_t b = first; b < last; ++b)
      encode<Codec, Number>(numbers + b * kBlock, numbers_of(b, args.count), block_of<Codec>(out, b));
  });
}

template <class Codec, class Number>
void dequantize_all(const SumArguments& args) {
  auto* out = reinterpret_cast<typename Number::Element*>(args.out);
  const std::vector<Wire> wires = wires_of(args);
  for_block_ranges(args.count, args.threads, [&](int64_t first, int64_t last, int64_t) {
    std::vector<float> scales(wires.size() * kGroups<Codec>);
    for (int64_t b = first; b < last; ++b)
      decode<Codec, Number>(wires, b, numbers_of(b, args.count), scales.data(), out + b * kBlock);
  });
}

// `out` may be one of the wires: a block is written when it has been read.
template <class Codec>
void requantize_all(const SumArguments& args) {
  const std::vector<Wire> wires = wires_of(args);
  const Wire out = padded_out<Codec>(args);
  for_block_ranges(args.count, args.threads, [&](int64_t first, int64_t last, int64_t) {
    std::vector<float> scales(wires.size() * kGroups<Codec>);
    alignas(64) float sums[kBlock];
    for (int64_t b = first; b < last; ++b) {
      decode<Codec, Float32>(wires, b, numbers_of(b, args.count), scales.data(), sums);
      encode<Codec, Float32>(sums, numbers_of(b, args.count), block_of<Codec>(out, b));
    }
  });
}

// By its number in cpu/quantize.py.
template <class Run>
void with_codec(int64_t codec, const Run& run) {
  if (codec == 0) run(Int8{});
  if (codec == 1) run(Fp8{});
  if (codec == 2) run(Int6{});
  if (codec == 3) run(Int4{});
}

}  // namespace

extern "C" int64_t quantize(const void* packed) {
  const QuantizeArguments& args = *static_cast<const QuantizeArguments*>(packed);
  with_codec(args.codec, [&](auto codec) {
    with_dtype(args.dtype, [&](auto number) { quantize_all<decltype(codec), decltype(number)>(args); });
  });
  return 0;
}

extern "C" int64_t dequantize_sum(const void* packed) {
  const SumArguments& args = *static_cast<const SumArguments*>(packed);
  with_codec(args.codec, [&](auto codec) {
    with_dtype(args.dtype, [&](auto number) { dequantize_all<decltype(codec), decltype(number)>(args); });
  });
  return 0;
}

extern "C" int64_t quantize_sum(const void* packed) {
  const SumArguments& args = *static_cast<const SumArguments*>(packed);
  with_codec(args.codec, [&](auto codec) { requantize_all<decltype(codec)>(args); });
  return 0;
}
