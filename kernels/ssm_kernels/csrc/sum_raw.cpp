// Sums of wires that hold the numbers themselves, in fp32 and rounded once: what the codecs' sums are without codes.

#include "lanes.h"
#include "matrix.h"

namespace {

constexpr int kStep = 2 * kWidth;
constexpr int kBlock = 2048;  // numbers of a thread's smallest part

// Packed by cpu/quantize.py: every field has 8 bytes. Order matters.
struct RawArguments {
  uint8_t* out;
  int64_t dtype, out_dtype;  // numbers as in `with_dtype`
  int64_t count, bytes;      // of the result, zeros to fill it up included
  int64_t threads, wires;

  const uint8_t* wire(int64_t index) const { return reinterpret_cast<const uint8_t* const*>(this + 1)[index]; }
};

// All NaNs become one.
inline floats one_nan(floats v) { return v == v ? v : (floats)(uints{} + 0x7fc00000); }

// `count` numbers, and zeros where they are less than a vector.
template <class Number>
floats load_some(const uint8_t* numbers, int64_t count) {
  typename Number::Element some[kWidth] = {};
  if (count > 0) std::memcpy(some, numbers, std::min<int64_t>(count, kWidth) * sizeof some[0]);
  return Number::load(some);
}

template <class From, class To>
void add(const RawArguments& args, int64_t first, int64_t last) {
  using Element = typename To::Element;
  constexpr int64_t kFrom = sizeof(typename From::Element);
  for (int64_t i = first; i < last; i += kStep) {
    const int64_t count = std::min<int64_t>(kStep, last - i);
    floats sum[2] = {};
    for (int64_t w = 0; w < args.wires; ++w)
      for (int k = 0; k < 2; ++k) {
        const uint8_t* numbers = args.wire(w) + (i + k * kWidth) * kFrom;
        const floats next = count == kStep ? From::load(numbers) : load_some<From>(numbers, count - k * kWidth);
        sum[k] = w ? sum[k] + next : next;
      }
    Element rounded[kStep];
    To::store(rounded, one_nan(sum[0]), one_nan(sum[1]));
    if (count == kStep)
      std::memcpy(args.out + i * sizeof(Element), rounded, sizeof rounded);
    else
      std::memcpy(args.out + i * sizeof(Element), rounded, count * sizeof(Element));
  }
}

template <class From, class To>
void add_all(const RawArguments& args) {
  for_row_ranges((args.count + kBlock - 1) / kBlock, kBlock, args.threads, [&](int64_t first, int64_t last, int64_t) {
    add<From, To>(args, first * kBlock, std::min(args.count, last * kBlock));
  });
  const int64_t used = args.count * sizeof(typename To::Element);
  std::memset(args.out + used, 0, args.bytes - used);
}

}  // namespace

extern "C" int64_t sum_raw(const void* packed) {
  const RawArguments& args = *static_cast<const RawArguments*>(packed);
  with_dtype(args.dtype, [&](auto number) {
    with_dtype(args.out_dtype, [&](auto rounded) { add_all<decltype(number), decltype(rounded)>(args); });
  });
  return 0;
}
