// Root mean square norm of each row, with the residual addition in front of it, forward and backward.
//
//   y = x + residual        out = y / sqrt(mean(y^2) + eps) * weight
//
// Lanes are 16 neighbouring features of one row. A row is converted to fp32 once, into a buffer that the first cache
// holds, and every further pass reads the buffer.

#include <vector>

#include "rows.h"

namespace {

constexpr int64_t kParallelWork = 1 << 17;  // elements

struct Matrix {
  char* data;  // null: omitted
  int64_t stride, is_bf16;

  explicit operator bool() const { return data != nullptr; }
  char* row(int64_t r) const { return data + r * stride * (is_bf16 ? 2 : 4); }
  void load(int64_t r, int64_t width, float* out) const { load_row(row(r), is_bf16, static_cast<int>(width), out); }
  void store(int64_t r, int64_t width, const float* values) const {
    store_row(row(r), is_bf16, static_cast<int>(width), values);
  }
};

// Packed by cpu/rms_norm.py: every field has 8 bytes. Order matters.
struct NormArguments {
  Matrix x, residual, weight, out, residual_out;  // weight is one row; backward: out, residual_out are gradients
  int64_t rows, width, threads;
  double eps;
};

struct NormGradients {
  NormArguments forward;
  Matrix x, residual;
  float* weight;  // [threads, width] or null: one partial sum a thread
};

class Buffer {
 public:
  explicit Buffer(int64_t width) : values_(width + 2 * kLanes) {}
  float* get() { return values_.data(); }

 private:
  std::vector<float> values_;
};

float mean_of_products(const float* a, const float* b, int64_t width) {
  vfloat totals[4] = {};
  for (int64_t i = 0, k = 0; i < width; i += kLanes, k = (k + 1) % 4) totals[k] += load(a + i) * load(b + i);
  return sum((totals[0] + totals[1]) + (totals[2] + totals[3])) / static_cast<float>(width);
}

// y = x + residual into `y`, padded with zeros to a whole vector.
void load_sum(const NormArguments& args, int64_t row, float* y, float* scratch) {
  args.x.load(row, args.width, y);
  if (!args.residual) return;
  args.residual.load(row, args.width, scratch);
  for (int64_t i = 0; i < args.width; i += kLanes) store(y + i, load(y + i) + load(scratch + i));
}

float inverse_root(const NormArguments& args, const float* y) {
  return 1.0f / __builtin_sqrtf(mean_of_products(y, y, args.width) + static_cast<float>(args.eps));
}

// Runs rows(first, last, thread) for one range of rows a thread.
template <class Run>
void for_row_ranges(const NormArguments& args, const Run& run) {
  if (args.threads == 1 || args.rows * args.width < kParallelWork) {
    run(0, args.rows, 0);
    return;
  }
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(args.threads))
  for (int64_t thread = 0; thread < args.threads; ++thread)
    run(args.rows * thread / args.threads, args.rows * (thread + 1) / args.threads, thread);
}

void forward_rows(const NormArguments& args, int64_t first, int64_t last) {
  Buffer y_buffer(args.width), scratch_buffer(args.width), weight_buffer(args.width);
  float *y = y_buffer.get(), *scratch = scratch_buffer.get(), *weight = weight_buffer.get();
  if (args.weight) args.weight.load(0, args.width, weight);
  for (int64_t row = first; row < last; ++row) {
    load_sum(args, row, y, scratch);
    if (args.residual_out) args.residual_out.store(row, args.width, y);
    const float scale = inverse_root(args, y);
    for (int64_t i = 0; i < args.width; i += kLanes) {
      const vfloat normed = load(y + i) * scale;
      store(y + i, args.weight ? normed * load(weight + i) : normed);
    }
    args.out.store(row, args.width, y);
  }
}

// With n = y * scale and g = grad_out * weight:  grad_y = scale (g - n mean(g n)) + grad_residual_out.
void backward_rows(const NormGradients& grads, int64_t first, int64_t last, float* weight_grad) {
  const NormArguments& args = grads.forward;
  Buffer y_buffer(args.width), g_buffer(args.width), weight_buffer(args.width), partial_buffer(args.width);
  float *y = y_buffer.get(), *g = g_buffer.get(), *weight = weight_buffer.get(), *partial = partial_buffer.get();
  Buffer scratch_buffer(args.width);
  float* scratch = scratch_buffer.get();
  if (args.weight) args.weight.load(0, args.width, weight);
  for (int64_t row = first; row < last; ++row) {
    load_sum(args, row, y, scratch);
    const float scale = inverse_root(args, y);
    if (args.out)
      args.out.load(row, args.width, g);
    else
      std::fill_n(g, args.width + kLanes, 0.0f);
    for (int64_t i = 0; i < args.width; i += kLanes) {
      const vfloat normed = load(y + i) * scale, out_grad = load(g + i);
      store(y + i, normed);
      store(partial + i, load(partial + i) + out_grad * normed);
      if (args.weight) store(g + i, out_grad * load(weight + i));
    }
    const float projection = mean_of_products(g, y, args.width);
    if (args.residual_out) args.residual_out.load(row, args.width, scratch);
    for (int64_t i = 0; i < args.width; i += kLanes) {
      vfloat grad = scale * (load(g + i) - load(y + i) * projection);
      if (args.residual_out) grad += load(scratch + i);
      store(g + i, grad);
    }
    grads.x.store(row, args.width, g);
    if (grads.residual) grads.residual.store(row, args.width, g);
  }
  if (weight_grad) std::memcpy(weight_grad, partial, args.width * sizeof(float));
}

}  // namespace

extern "C" int64_t rms_norm_forward(const void* packed) {
  const NormArguments& args = *static_cast<const NormArguments*>(packed);
  for_row_ranges(args, [&](int64_t first, int64_t last, int64_t) { forward_rows(args, first, last); });
  return 0;
}

extern "C" int64_t rms_norm_backward(const void* packed) {
  const NormGradients& grads = *static_cast<const NormGradients*>(packed);
  for_row_ranges(grads.forward, [&](int64_t first, int64_t last, int64_t thread) {
    backward_rows(grads, first, last, grads.weight ? grads.weight + thread * grads.forward.width : nullptr);
  });
  return 0;
}
