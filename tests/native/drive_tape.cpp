// Drives play_calls: calls one after another, up to the first that fails.

#include "driver.h"
#include "tape.cpp"

namespace {

// Counts its calls, down to the one that fails.
int64_t count_down(const void* calls_left) { return --*static_cast<int64_t*>(const_cast<void*>(calls_left)) == 0; }

// With call number `failing` failing; 0: none.
void run(int64_t count, int64_t failing) {
  drive::begin_case(drive::text({{"count", count}, {"failing", failing}}));
  int64_t calls_left = failing;
  const std::unique_ptr<Call[]> calls(new Call[count]);
  for (int64_t i = 0; i < count; ++i) calls[i] = {count_down, &calls_left};
  drive::record_entry_point("play_calls");
  drive::expect(play_calls(calls.get(), count) == failing, "returned another call's number");
  drive::expect(calls_left == (failing ? 0 : -count), "made another number of calls");
}

}  // namespace

void drive_tape() {
  for (const int64_t count : {0, 1, 2, 17})
    for (int64_t failing = 0; failing <= count; ++failing) run(count, failing);
}
