// Plays a list of calls of this library's entry points, one after the other.

#include <cstdint>

namespace {

// Packed by tape.py. Order matters.
struct Call {
  int64_t (*entry_point)(const void*);
  const void* arguments;
};

}  // namespace

// 0, or the number of the call that failed, counted from 1.
extern "C" int64_t play_calls(const Call* calls, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (calls[i].entry_point(calls[i].arguments)) return i + 1;
  return 0;
}
