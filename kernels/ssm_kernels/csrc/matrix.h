// A tensor [..., features] as the norms see it: rows of any number of features, in fp32 or bf16, with unit stride
// within a row and any stride between rows. Lanes are 16 neighbouring features of one row.
#pragma once

#include <vector>

#include "rows.h"

// Mirrors `matrix()` in cpu/library.py.
struct Matrix {
  char* data;  // null: omitted
  int64_t stride, is_bf16;

  explicit operator bool() const { return data != nullptr; }
  char* at(int64_t row, int64_t column) const { return data + (row * stride + column) * (is_bf16 ? 2 : 4); }
  // `count` values from a column on.
  void load(int64_t row, int64_t column, int64_t count, float* out) const {
    load_row(at(row, column), is_bf16, static_cast<int>(count), out);
  }
  void store(int64_t row, int64_t column, int64_t count, const float* values) const {
    store_row(at(row, column), is_bf16, static_cast<int>(count), values);
  }
};

// A row in fp32 with room for the last whole vector.
class Buffer {
 public:
  explicit Buffer(int64_t width) : values_(width + 2 * kLanes) {}
  float* get() { return values_.data(); }

 private:
  std::vector<float> values_;
};

inline float sum_of_products(const float* a, const float* b, int64_t width) {
  vfloat totals[4] = {};
  for (int64_t i = 0, k = 0; i < width; i += kLanes, k = (k + 1) % 4) totals[k] += load(a + i) * load(b + i);
  return sum((totals[0] + totals[1]) + (totals[2] + totals[3]));
}

// Runs run(first, last, thread) for one range of rows a thread; small matrices stay on the calling one.
template <class Run>
void for_row_ranges(int64_t rows, int64_t width, int64_t threads, const Run& run) {
  constexpr int64_t kParallelWork = 1 << 17;  // elements
  if (threads == 1 || rows * width < kParallelWork) {
    run(0, rows, 0);
    return;
  }
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(threads))
  for (int64_t thread = 0; thread < threads; ++thread)
    run(rows * thread / threads, rows * (thread + 1) / threads, thread);
}
