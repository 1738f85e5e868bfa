// out = x * scale, one number a row. Lanes are 16 neighbouring features of one row, which the first cache holds in fp32
// between its conversions.

#include "matrix.h"

namespace {

// Packed by cpu/scale_rows.py: every field has 8 bytes. Order matters.
struct ScaleArguments {
  Matrix x, out;
  const float* scale;  // [rows]
  int64_t rows, width, threads;
};

void scale_range(const ScaleArguments& args, int64_t first, int64_t last) {
  Buffer buffer(args.width);
  float* values = buffer.get();
  for (int64_t row = first; row < last; ++row) {
    args.x.load(row, 0, args.width, values);
    for (int64_t i = 0; i < args.width; i += kLanes) store(values + i, load(values + i) * args.scale[row]);
    args.out.store(row, 0, args.width, values);
  }
}

}  // namespace

extern "C" int64_t scale_rows_forward(const void* packed) {
  const ScaleArguments& args = *static_cast<const ScaleArguments*>(packed);
  for_row_ranges(args.rows, args.width, args.threads,
                 [&](int64_t first, int64_t last, int64_t) { scale_range(args, first, last); });
  return 0;
}
