// The definitions of driver.h.

#include "driver.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <set>

#if defined(__SSE__)
#include <xmmintrin.h>
#else
#include <cfenv>
#endif

namespace drive {

namespace {

uint64_t random_state = 0x9e3779b97f4a7c15u;
std::string current_case;
std::set<std::string> driven;
int64_t checks = 0, failures = 0;
bool special_numbers = false;

uint64_t next_random() {  // xorshift64*
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return random_state * 0x2545f4914f6cdd1du;
}

// All bits set: a NaN in either dtype, which no kernel writes by itself.
constexpr unsigned char kUnwritten = 0xff;

uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float from_bf16(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

bool all_unwritten(const char* begin, int64_t count) {
  return std::all_of(begin, begin + count, [](char byte) { return static_cast<unsigned char>(byte) == kUnwritten; });
}

}  // namespace

const std::vector<int64_t> kWidths = {1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11,
                                      12, 13, 14, 15, 16, 17, 31, 32, 33, 63, 65};
const std::vector<int64_t> kLengths = {0, 1, 2, 31, 33, 65};

double uniform(double low, double high) {
  return low + (high - low) * static_cast<double>(next_random() >> 11) * 0x1p-53;
}
int64_t pick(int64_t low, int64_t high) {
  return low + static_cast<int64_t>(next_random() >> 11) % (high - low + 1);
}
bool coin() { return pick(0, 1) != 0; }

Values random_values(int64_t count, double low, double high) {
  Values values(count);
  for (double& value : values) value = uniform(low, high);
  return values;
}

void with_special_numbers(const std::function<void()>& run) {
  special_numbers = true;
  run();
  special_numbers = false;
}

Numbers::Numbers(int64_t rows, int64_t width, bool is_bf16, int64_t gap)
    : rows_(rows), width_(width), gap_(gap), is_bf16_(is_bf16) {
  const int64_t count = (rows ? (rows - 1) * stride() + width : 0) + (gap ? 1 : 0);
  bytes_ = count * element_size();
  memory_.reset(new char[bytes_]);
  std::memset(memory_.get(), kUnwritten, bytes_);
}

Numbers Numbers::of(const Values& values, int64_t width, bool is_bf16, int64_t gap) {
  Numbers numbers(width ? static_cast<int64_t>(values.size()) / width : 0, width, is_bf16, gap);
  for (size_t i = 0; i < values.size(); ++i) {
    const int64_t at = static_cast<int64_t>(i) / width * numbers.stride() + static_cast<int64_t>(i) % width;
    const float value = static_cast<float>(values[i]);
    if (is_bf16)
      reinterpret_cast<uint16_t*>(numbers.data())[at] = to_bf16(value);
    else
      numbers.floats()[at] = value;
  }
  return numbers;
}

Numbers Numbers::random(int64_t rows, int64_t width, bool is_bf16, int64_t gap, double low, double high) {
  constexpr double kSpecial[] = {NAN, HUGE_VAL, -HUGE_VAL, 3e38, -3e38, 1e-40, -200.0, 200.0, 0.0};
  Values values = random_values(rows * width, low, high);
  for (double& value : values)
    if (special_numbers && pick(0, 7) == 0) value = kSpecial[pick(0, 8)];
  return of(values, width, is_bf16, gap);
}

Values Numbers::values() const {
  Values values;
  for (int64_t row = 0; row < rows_; ++row)
    for (int64_t i = 0; i < width_; ++i) {
      const int64_t at = row * stride() + i;
      values.push_back(is_bf16_ ? from_bf16(reinterpret_cast<const uint16_t*>(data())[at]) : floats()[at]);
    }
  return values;
}

bool Numbers::untouched() const { return all_unwritten(memory_.get(), bytes_); }

bool Numbers::gaps_untouched() const {
  if (!all_unwritten(memory_.get(), data() - memory_.get())) return false;
  for (int64_t row = 0; row + 1 < rows_; ++row)
    if (!all_unwritten(data() + (row * stride() + width_) * element_size(), gap_ * element_size())) return false;
  return true;
}

void begin_case(const std::string& description) { current_case = description; }

std::string text(const std::vector<std::pair<const char*, int64_t>>& fields) {
  std::string result;
  for (const auto& [name, value] : fields) result += std::string(" ") + name + "=" + std::to_string(value);
  return result;
}

void expect(bool holds, const std::string& what) {
  constexpr int64_t kShown = 20;
  if (special_numbers) return;
  ++checks;
  if (!holds && ++failures <= kShown) std::printf("failed: %s:%s\n", what.c_str(), current_case.c_str());
}

void expect_close(const std::string& what, const Values& found, const Values& expected, double tolerance) {
  expect(found.size() == expected.size(), what + ": other sizes");
  for (size_t i = 0; i < std::min(found.size(), expected.size()); ++i)
    if (!(std::fabs(found[i] - expected[i]) <= tolerance * (1.0 + std::fabs(expected[i]))) &&
        !(std::isnan(expected[i]) && std::isnan(found[i])))
      return expect(false, what + "[" + std::to_string(i) + "]: expected " + std::to_string(expected[i]) + ", found " +
                               std::to_string(found[i]));
}

void expect_close(const std::string& what, const Numbers& found, const Values& expected, double tolerance) {
  expect_close(what, found.values(), expected, tolerance);
  expect(found.gaps_untouched(), what + ": written between two rows");
}

void expect_gradient(const std::string& what, const Values& gradient, Values& input,
                     const std::function<double()>& loss, double tolerance) {
  constexpr double kStep = 1e-5;
  expect(gradient.size() == input.size(), what + ": other sizes");
  const Values at = input, direction = random_values(static_cast<int64_t>(input.size()));
  double squares = 0.0;
  for (size_t i = 0; i < at.size(); ++i) {
    input[i] = at[i] + kStep * direction[i];
    squares += gradient[i] * direction[i] * gradient[i] * direction[i];
  }
  const double above = loss();
  for (size_t i = 0; i < at.size(); ++i) input[i] = at[i] - kStep * direction[i];
  const double expected = (above - loss()) / (2.0 * kStep), found = dot(gradient, direction);
  input = at;
  expect(std::fabs(found - expected) <= tolerance * (1.0 + std::sqrt(squares)),
         "gradient of " + what + " along a direction: expected " + std::to_string(expected) + ", found " +
             std::to_string(found));
}

void record_entry_point(const char* name) { driven.insert(name); }

// MXCSR without the flags of what has happened.
uint32_t floating_point_control() {
#if defined(__SSE__)
  return _mm_getcsr() & ~0x3fu;
#else
  return static_cast<uint32_t>(std::fegetround());
#endif
}

double dot(const Values& a, const Values& b) {
  double total = 0.0;
  for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) total += a[i] * b[i];
  return total;
}

Values sum_of_rows(const Values& rows, int64_t width) {
  Values total(width);
  for (size_t i = 0; i < rows.size(); ++i) total[i % width] += rows[i];
  return total;
}

double sigmoid(double v) { return 1.0 / (1.0 + std::exp(-v)); }
double silu(double v) { return v * sigmoid(v); }
double softplus(double v) { return std::max(v, 0.0) + std::log1p(std::exp(-std::fabs(v))); }

int verdict() {
  for (const std::string& name : driven) std::printf("drove %s\n", name.c_str());
  std::printf("%lld checks, %lld failed\n", static_cast<long long>(checks),
              static_cast<long long>(failures));
  return failures ? 1 : 0;
}

}  // namespace drive
