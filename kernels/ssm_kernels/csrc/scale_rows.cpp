// out = x * scale, one number a row. Lanes are 16 neighbouring features of one row.

#include "matrix.h"

namespace {

// Packed by cpu/scale_rows.py: every field has 8 bytes. Order matters.
struct ScaleArguments {
  Matrix x, out;
  const float* scale;  // [rows]
  int64_t rows, width, threads;
};

template <class Element>
void scale_range(const ScaleArguments& args, int64_t first, int64_t last) {
  const int64_t whole = args.width / kLanes * kLanes;
  const int rest = static_cast<int>(args.width - whole);
  for (int64_t row = first; row < last; ++row) {
    const Element* x = reinterpret_cast<const Element*>(args.x.at(row, 0));
    Element* out = reinterpret_cast<Element*>(args.out.at(row, 0));
    for (int64_t i = 0; i < whole; i += kLanes) store(out + i, load(x + i) * args.scale[row]);
    if (rest) {
      float values[kLanes];
      load_row(x + whole, rest, values);
      store(values, load(values) * args.scale[row]);
      store_row(out + whole, rest, values);
    }
  }
}

}  // namespace

extern "C" int64_t scale_rows_forward(const void* packed) {
  const ScaleArguments& args = *static_cast<const ScaleArguments*>(packed);
  const auto scale = args.x.is_bf16 ? scale_range<uint16_t> : scale_range<float>;
  for_row_ranges(args.rows, args.width, args.threads,
                 [&](int64_t first, int64_t last, int64_t) { scale(args, first, last); });
  return 0;
}
