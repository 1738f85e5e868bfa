// Reads memory and does nothing else: what a kernel that reads each weight once is measured against.
//
// Each thread reads its share as several streams side by side, as linear.cpp does.

#include "vector.h"

namespace {

constexpr int kStreams = 4;
constexpr int64_t kLine = sizeof(vuint);

// Packed by read_bandwidth.py: every field has 8 bytes. Order matters.
struct ReadArguments {
  const char* data;
  int64_t bytes, threads;
  int64_t* sum;  // of all 64-bit words but those of a last piece that the threads' streams do not divide evenly
};

uint64_t sum_of_lines(const char* data, int64_t lines_a_stream) {
  typedef uint64_t vlong __attribute__((vector_size(64)));
  vlong totals[kStreams] = {};
  for (int64_t line = 0; line < lines_a_stream; ++line)
    for (int s = 0; s < kStreams; ++s) {
      vlong words;
      std::memcpy(&words, data + (s * lines_a_stream + line) * kLine, sizeof words);
      totals[s] += words;
    }
  const vlong total = (totals[0] + totals[1]) + (totals[2] + totals[3]);
  uint64_t sum = 0;
  for (int lane = 0; lane < 8; ++lane) sum += total[lane];
  return sum;
}

}  // namespace

extern "C" int64_t read_memory(const ReadArguments* args) {
  const int64_t lines = args->bytes / (args->threads * kStreams * kLine);
  uint64_t sum = 0;
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(args->threads)) reduction(+ : sum)
  for (int64_t thread = 0; thread < args->threads; ++thread)
    sum += sum_of_lines(args->data + thread * lines * kStreams * kLine, lines);
  *args->sum = static_cast<int64_t>(sum);
  return 0;
}
