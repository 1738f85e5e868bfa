// What the drivers of the kernels share. A driver runs the entry points of one csrc file, or of a few, at sizes around
// every vector width, and compares what they write with a naive loop in double; the sanitizers that it is compiled with
// see every access besides.
//
// `Numbers` is what makes them see: its memory ends with the last number of the last row, and a kernel that reads or
// writes one more is stopped. Numbers that no kernel has written are NaN, as are the gaps between rows.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace drive {

using Values = std::vector<double>;

// ---- Numbers of a fixed sequence

double uniform(double low, double high);
int64_t pick(int64_t low, int64_t high);  // both included
bool coin();
Values random_values(int64_t count, double low = -1.0, double high = 1.0);
inline int64_t one_of(const std::vector<int64_t>& values) {
  return values[pick(0, static_cast<int64_t>(values.size()) - 1)];
}

// Around the vector widths of 4, 8 and 16 lanes and the groups of 64.
extern const std::vector<int64_t> kWidths;
extern const std::vector<int64_t> kLengths;

// Runs `run` with NaN, infinities and numbers from both ends of fp32 among those of `Numbers::random`. Nothing is
// compared meanwhile: whether anything undefined happens is for the sanitizers to say.
void with_special_numbers(const std::function<void()>& run);

// ---- Memory

// Rows of numbers in fp32 or bf16, `gap` numbers between two rows.
class Numbers {
 public:
  Numbers(int64_t rows, int64_t width, bool is_bf16, int64_t gap = 0);
  static Numbers of(const Values& values, int64_t width, bool is_bf16 = false, int64_t gap = 0);
  static Numbers random(int64_t rows, int64_t width, bool is_bf16, int64_t gap = 0, double low = -1, double high = 1);
  static Numbers zeros(int64_t rows, int64_t width) { return of(Values(rows * width), width); }

  bool is_bf16() const { return is_bf16_; }
  int64_t stride() const { return width_ + gap_; }
  // With a gap the first number is not aligned to more than its own size.
  char* data() const { return memory_.get() + (gap_ ? element_size() : 0); }
  float* floats() const { return reinterpret_cast<float*>(data()); }
  Values values() const;
  bool untouched() const;  // nothing has been written since construction
  bool gaps_untouched() const;

 private:
  int64_t element_size() const { return is_bf16_ ? 2 : 4; }
  int64_t rows_, width_, gap_;
  bool is_bf16_;
  int64_t bytes_;
  std::unique_ptr<char[]> memory_;
};

// Integers in memory of exactly their size.
template <class Integer>
std::unique_ptr<Integer[]> exact_copy(const std::vector<int64_t>& values) {
  std::unique_ptr<Integer[]> copy(new Integer[values.size()]);
  for (size_t i = 0; i < values.size(); ++i) copy[i] = static_cast<Integer>(values[i]);
  return copy;
}

// ---- Calls and checks

// What is said with every failure from now on.
void begin_case(const std::string& description);
std::string text(const std::vector<std::pair<const char*, int64_t>>& fields);

void expect(bool holds, const std::string& what);
// |found - expected| <= tolerance (1 + |expected|), number by number, or NaN where that is expected.
void expect_close(const std::string& what, const Values& found, const Values& expected, double tolerance);
// The same, and that the gaps are as they were.
void expect_close(const std::string& what, const Numbers& found, const Values& expected, double tolerance);

// `gradient` of `loss` by `input`, along one random direction: against a difference quotient. `loss` reads `input`.
void expect_gradient(const std::string& what, const Values& gradient, Values& input,
                     const std::function<double()>& loss, double tolerance);

// Prints the entry points that were driven and how many checks failed; the exit status.
int verdict();

void record_entry_point(const char* name);
uint32_t floating_point_control();

// Calls an entry point with a packed block that ends where its memory ends: the arguments, and the addresses of wires.
template <class Entry, class Arguments>
int64_t call(const char* name, Entry entry, const Arguments& arguments,
             const std::vector<std::unique_ptr<uint8_t[]>>& wires = {}) {
  static_assert(sizeof arguments % sizeof(int64_t) == 0, "every field has 8 bytes");
  std::vector<const void*> addresses;
  for (const auto& wire : wires) addresses.push_back(wire.get());
  const size_t tail = addresses.size() * sizeof addresses[0];
  std::unique_ptr<int64_t[]> block(new int64_t[(sizeof arguments + tail) / sizeof(int64_t)]);
  std::memcpy(block.get(), &arguments, sizeof arguments);
  if (tail) std::memcpy(reinterpret_cast<char*>(block.get()) + sizeof arguments, addresses.data(), tail);
  const uint32_t before = floating_point_control();
  record_entry_point(name);
  const int64_t code = entry(reinterpret_cast<const Arguments*>(block.get()));
  expect(floating_point_control() == before, std::string(name) + " changed how numbers are rounded");
  return code;
}

#define CALL(entry, arguments) drive::call(#entry, entry, arguments)
#define CALL_WITH_WIRES(entry, arguments, wires) drive::call(#entry, entry, arguments, wires)

// Of results some of which are rounded to bf16, and of those in fp32 alone.
inline double tolerance(bool any_bf16) { return any_bf16 ? 0x1p-7 : 1e-4; }

double dot(const Values& a, const Values& b);
Values sum_of_rows(const Values& rows, int64_t width);  // one a thread or a sequence
double sigmoid(double v);
double silu(double v);
double softplus(double v);

}  // namespace drive
