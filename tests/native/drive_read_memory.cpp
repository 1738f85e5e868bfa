// Drives read_memory: the sum, modulo 2^64, of the words that the threads' streams divide evenly.

#include "driver.h"
#include "read_memory.cpp"

namespace {

void run(int64_t bytes, int64_t threads) {
  drive::begin_case(drive::text({{"bytes", bytes}, {"threads", threads}}));
  const int64_t piece = threads * kStreams * kLine, read = bytes / piece * piece;
  const std::unique_ptr<char[]> data(new char[bytes]);
  uint64_t expected = 0;
  int64_t sum = -1;
  for (int64_t i = 0; i < bytes; ++i) data[i] = static_cast<char>(drive::pick(-128, 127));
  for (int64_t at = 0; at < read; at += 8) {
    uint64_t word;
    std::memcpy(&word, data.get() + at, sizeof word);
    expected += word;
  }
  drive::expect(CALL(read_memory, (ReadArguments{data.get(), bytes, threads, &sum})) == 0, "returned a code");
  drive::expect(sum == static_cast<int64_t>(expected), "sum");
}

}  // namespace

void drive_read_memory() {
  for (const int64_t threads : {1, 2})
    for (const int64_t bytes : {0, 1, 255, 256, 257, 511, 512, 513, 4095, 4096, 4097}) run(bytes, threads);
}
