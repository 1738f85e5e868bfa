// Root mean square norm of each row, with the residual addition in front of it, forward and backward.
//
//   y = x + residual        out = y / sqrt(mean(y^2) + eps) * weight
//
// Lanes are 16 neighbouring features of one row. A row is converted to fp32 once, into a buffer that the first cache
// holds, and every further pass reads the buffer.

#include "matrix.h"

namespace {

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

float mean_of_products(const float* a, const float* b, int64_t width) {
  return sum_of_products(a, b, width) / static_cast<float>(width);
}

// y = x + residual into `y`, padded with zeros to a whole vector.
void load_sum(const NormArguments& args, int64_t row, float* y, float* scratch) {
  args.x.load(row, 0, args.width, y);
  if (!args.residual) return;
  args.residual.load(row, 0, args.width, scratch);
  for (int64_t i = 0; i < args.width; i += kLanes) store(y + i, load(y + i) + load(scratch + i));
}

float inverse_root(const NormArguments& args, const float* y) {
  return 1.0f / __builtin_sqrtf(mean_of_products(y, y, args.width) + static_cast<float>(args.eps));
}

void forward_rows(const NormArguments& args, int64_t first, int64_t last) {
  Buffer y_buffer(args.width), scratch_buffer(args.width), weight_buffer(args.width);
  float *y = y_buffer.get(), *scratch = scratch_buffer.get(), *weight = weight_buffer.get();
  if (args.weight) args.weight.load(0, 0, args.width, weight);
  for (int64_t row = first; row < last; ++row) {
    load_sum(args, row, y, scratch);
    if (args.residual_out) args.residual_out.store(row, 0, args.width, y);
    const float scale = inverse_root(args, y);
    for (int64_t i = 0; i < args.width; i += kLanes) {
      const vfloat normed = load(y + i) * scale;
      store(y + i, args.weight ? normed * load(weight + i) : normed);
    }
    args.out.store(row, 0, args.width, y);
  }
}

// With n = y * scale and g = grad_out * weight:  grad_y = scale (g - n mean(g n)) + grad_residual_out.
void backward_rows(const NormGradients& grads, int64_t first, int64_t last, float* weight_grad) {
  const NormArguments& args = grads.forward;
  Buffer y_buffer(args.width), g_buffer(args.width), weight_buffer(args.width), partial_buffer(args.width);
  float *y = y_buffer.get(), *g = g_buffer.get(), *weight = weight_buffer.get(), *partial = partial_buffer.get();
  Buffer scratch_buffer(args.width);
  float* scratch = scratch_buffer.get();
  if (args.weight) args.weight.load(0, 0, args.width, weight);
  for (int64_t row = first; row < last; ++row) {
    load_sum(args, row, y, scratch);
    const float scale = inverse_root(args, y);
    if (args.out)
      args.out.load(row, 0, args.width, g);
    else
      std::fill_n(g, args.width + kLanes, 0.0f);
    for (int64_t i = 0; i < args.width; i += kLanes) {
      const vfloat normed = load(y + i) * scale, out_grad = load(g + i);
      store(y + i, normed);
      store(partial + i, load(partial + i) + out_grad * normed);
      if (args.weight) store(g + i, out_grad * load(weight + i));
    }
    const float projection = mean_of_products(g, y, args.width);
    if (args.residual_out) args.residual_out.load(row, 0, args.width, scratch);
    for (int64_t i = 0; i < args.width; i += kLanes) {
      vfloat grad = scale * (load(g + i) - load(y + i) * projection);
      if (args.residual_out) grad += load(scratch + i);
      store(g + i, grad);
    }
    grads.x.store(row, 0, args.width, g);
    if (grads.residual) grads.residual.store(row, 0, args.width, g);
  }
  if (weight_grad) std::memcpy(weight_grad, partial, args.width * sizeof(float));
}

}  // namespace

extern "C" int64_t rms_norm_forward(const void* packed) {
  const NormArguments& args = *static_cast<const NormArguments*>(packed);
  for_row_ranges(args.rows, args.width, args.threads,
                 [&](int64_t first, int64_t last, int64_t) { forward_rows(args, first, last); });
  return 0;
}

extern "C" int64_t rms_norm_backward(const void* packed) {
  const NormGradients& grads = *static_cast<const NormGradients*>(packed);
  const NormArguments& args = grads.forward;
  for_row_ranges(args.rows, args.width, args.threads, [&](int64_t first, int64_t last, int64_t thread) {
    backward_rows(grads, first, last, grads.weight ? grads.weight + thread * args.width : nullptr);
  });
  return 0;
}
