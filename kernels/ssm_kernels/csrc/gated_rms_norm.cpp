// Root mean square norm of groups of channels with a gate, before or behind it, forward and backward; and the same
// without its scale r, which then is 1.
//
//   t = x silu(z)   out = t r weight      or      t = x   out = t r weight silu(z),     r = 1 / sqrt(mean(t^2) + eps)
//
// Lanes are 16 neighbouring channels. One group of one row at a time is converted to fp32, into buffers that the first
// cache holds, and every further pass reads the buffers. Both orders of gate and norm are out = t r q with t = x s and
// q = weight, or t = x and q = weight s, where s = silu(z).

#include "matrix.h"

namespace {

// Packed by cpu/gated_rms_norm.py: every field has 8 bytes. Order matters.
struct GatedArguments {
  Matrix x, z, weight, out;  // z and weight may be null; weight is one row; backward: out is its gradient, or null
  float* square_sums;        // [rows, groups] or null; backward: their gradient
  int64_t rows, width, groups, norm_before_gate, normalize, threads;
  double eps;

  int64_t group_width() const { return width / groups; }
};

struct GatedGradients {
  GatedArguments forward;
  Matrix x, z;
  float* weight;  // [threads, width] or null, zero before: one partial sum a thread
};

// One group of channels: t, q and what they are made of, row after row.
class Group {
 public:
  Group(const GatedArguments& args, int64_t group)
      : args_(args), first_(group * args.group_width()), width_(args.group_width()), group_(group) {
    if (args.weight)
      args.weight.load(0, first_, width_, weight());
    else
      std::fill_n(weight(), width_, 1.0f);
  }

  // Returns r.
  float prepare(int64_t row) {
    args_.x.load(row, first_, width_, x());
    if (args_.z) args_.z.load(row, first_, width_, z());
    for (int64_t i = 0; i < width_; i += kLanes) {
      const vfloat s = args_.z ? silu(load(z() + i)) : broadcast(1.0f);
      store(s_.get() + i, s);
      store(t() + i, args_.norm_before_gate ? load(x() + i) : load(x() + i) * s);
      store(q() + i, args_.norm_before_gate ? load(weight() + i) * s : load(weight() + i));
    }
    square_sum_ = sum_of_products(t(), t(), width_);
    if (!args_.normalize) return 1.0f;
    return 1.0f / __builtin_sqrtf(square_sum_ / static_cast<float>(width_) + static_cast<float>(args_.eps));
  }

  void forward(int64_t row) {
    const float r = prepare(row);
    if (args_.square_sums) args_.square_sums[row * args_.groups + group_] = square_sum_;
    for (int64_t i = 0; i < width_; i += kLanes) store(t() + i, load(t() + i) * r * load(q() + i));
    args_.out.store(row, first_, width_, t());
  }

  // With g the gradient of out and n = t r:  dq = g n,  and of n: e = g q;  dt = r (e - n mean(e n)).
  void backward(int64_t row, const GatedGradients& grads, float* weight_grad) {
    const float r = prepare(row);
    if (args_.out)
      args_.out.load(row, first_, width_, g());
    else
      std::fill_n(g(), width_, 0.0f);
    float projection = 0.0f, square_sum_grad = 0.0f;
    if (args_.normalize) {
      for (int64_t i = 0; i < width_; i += kLanes) store(e_.get() + i, load(g() + i) * load(q() + i));
      projection = sum_of_products(e_.get(), t(), width_) * r / static_cast<float>(width_);
    } else if (args_.square_sums) {
      square_sum_grad = args_.square_sums[row * args_.groups + group_];
    }
    for (int64_t i = 0; i < width_; i += kLanes) {
      const vfloat n = load(t() + i) * r, s = load(s_.get() + i), w = load(weight() + i), x_i = load(x() + i);
      const vfloat q_grad = load(g() + i) * n;
      const vfloat t_grad = r * (load(g() + i) * load(q() + i) - n * projection) + 2.0f * square_sum_grad * n;
      const vfloat s_grad = args_.norm_before_gate ? q_grad * w : t_grad * x_i;
      if (weight_grad)
        store(weight_grad_.get() + i, load(weight_grad_.get() + i) + (args_.norm_before_gate ? q_grad * s : q_grad));
      store(t() + i, args_.norm_before_gate ? t_grad : t_grad * s);
      if (args_.z) {
        const vfloat z_i = load(z() + i), sigma = sigmoid(z_i);
        store(g() + i, s_grad * sigma * (1.0f + z_i * (1.0f - sigma)));
      }
    }
    grads.x.store(row, first_, width_, t());
    if (args_.z) grads.z.store(row, first_, width_, g());
  }

  void store_weight_gradient(float* weight_grad) {
    std::memcpy(weight_grad + first_, weight_grad_.get(), width_ * sizeof(float));
  }

 private:
  float* x() { return x_.get(); }
  float* z() { return z_.get(); }
  float* t() { return t_.get(); }
  float* q() { return q_.get(); }
  float* g() { return g_.get(); }
  float* weight() { return weight_.get(); }

  const GatedArguments& args_;
  const int64_t first_, width_, group_;
  float square_sum_ = 0.0f;
  Buffer x_{width_}, z_{width_}, s_{width_}, t_{width_}, q_{width_}, g_{width_}, e_{width_}, weight_{width_};
  Buffer weight_grad_{width_};
};

}  // namespace

extern "C" int64_t gated_rms_norm_forward(const void* packed) {
  const GatedArguments& args = *static_cast<const GatedArguments*>(packed);
  for_row_ranges(args.rows, args.width, args.threads, [&](int64_t first, int64_t last, int64_t) {
    for (int64_t g = 0; g < args.groups; ++g) {
      Group group(args, g);
      for (int64_t row = first; row < last; ++row) group.forward(row);
    }
  });
  return 0;
}

extern "C" int64_t gated_rms_norm_backward(const void* packed) {
  const GatedGradients& grads = *static_cast<const GatedGradients*>(packed);
  const GatedArguments& args = grads.forward;
  for_row_ranges(args.rows, args.width, args.threads, [&](int64_t first, int64_t last, int64_t thread) {
    float* weight_grad = grads.weight ? grads.weight + thread * args.width : nullptr;
    for (int64_t g = 0; g < args.groups; ++g) {
      Group group(args, g);
      for (int64_t row = first; row < last; ++row) group.backward(row, grads, weight_grad);
      if (weight_grad) group.store_weight_gradient(weight_grad);
    }
  });
  return 0;
}
