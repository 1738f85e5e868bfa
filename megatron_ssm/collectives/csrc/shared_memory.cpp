// All-reduce and all-gather between the processes of one host, through one shared segment.
//
// An operation has a number, 1, 2, 3, ..., the same on every rank. To start operation n a rank copies its tensor into
// its slot of buffer n % 2 and raises its flag `arrived` to n. To finish it, it waits until every rank has arrived,
// reads all slots, and raises `finished` to n. A slot is written again in operation n + 2, once everybody has finished
// n; as a rank normally sees everybody arrive in n + 1 before that, this second wait costs nothing, and no barrier is
// needed anywhere.
//
// Sums run over the ranks in the order 0, 1, ..., T-1, in fp32 for fp32, bf16 and fp16 and in fp64 for fp64, and are
// rounded once at the end: every rank gets the same bits, whichever of the two paths is taken.
//
//   one shot    every rank sums all slots itself
//   two phases  rank r sums the r-th part of the slots in place (nobody else reads that part of its slot), raises
//               `summed`, and copies the other parts from the ranks that summed them
//
// A reduce-scatter is the first half of the second: rank r is left with the sum of the r-th part, not rounded.
//
// Segment: [ Control: the flags of every rank | buffer 0: slot of rank 0, ..., slot of rank T-1 | buffer 1: ... ]

#include <poll.h>
#include <sched.h>
#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int kMaxRanks = 64;  // failures are reported as a 64-bit mask of ranks
constexpr int64_t kPage = 4096;
// From this size on, at three ranks or more, reading T slots costs more than a second exchange of flags.
constexpr int64_t kTwoPhaseBytes = 32 << 10;
constexpr int64_t kYieldNanoseconds = 10'000'000;  // then the waiting rank sleeps between looks,
constexpr int64_t kSleepNanoseconds = 100'000;     // for 1% of what it has waited at most
constexpr int64_t kLivenessNanoseconds = 100'000'000;

enum Status : int { kDone = 0, kTimedOut = 1, kDied = 2, kLeft = 3, kMismatch = 4 };

// Two cache lines: the processor fetches lines in pairs, and a flag must not travel with its neighbour.
struct alignas(128) Flag {
  std::atomic<uint64_t> value;
};
static_assert(std::atomic<uint64_t>::is_always_lock_free, "a lock would not work between processes");

struct RankFlags {
  Flag arrived;   // my slot holds operation `value`
  Flag summed;    // my part of operation `value` is summed (two phases only)
  Flag finished;  // I have read all that I need of operation `value`
  Flag left;      // not zero: I have failed or closed, do not wait for me
};

struct Control {
  uint64_t nonce;  // written by the rank that made the segment, checked by those that open it
  RankFlags ranks[kMaxRanks];
};

// What a rank says about the tensor in its slot. Ranks that disagree are not in the same operation.
struct alignas(128) Slot {
  int64_t kind;
  int64_t bytes;
  alignas(128) char payload[];
};

struct Context {
  Control* control;
  char* slots;
  int64_t mapped_bytes;
  int64_t slot_bytes;
  int rank;
  int size;
  int spins;
  int64_t timeout_nanoseconds;
  uint64_t started;
  uint64_t finished;
  uint64_t failed_ranks;
  pollfd processes[kMaxRanks];  // a pidfd becomes readable when its process ends

  RankFlags& mine() { return control->ranks[rank]; }

  Slot& slot(uint64_t operation, int of_rank) const {
    const int64_t stride = sizeof(Slot) + slot_bytes;
    return *reinterpret_cast<Slot*>(slots + (static_cast<int64_t>(operation % 2) * size + of_rank) * stride);
  }
};

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

int64_t now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1'000'000'000LL + time.tv_nsec;
}

void pause_briefly() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// ---- Waiting for the other ranks

using Which = Flag RankFlags::*;

bool reached(const Context& context, Which flag, int rank, uint64_t operation) {
  return (context.control->ranks[rank].*flag).value.load(std::memory_order_acquire) >= operation;
}

template <class Predicate>
uint64_t ranks_where(const Context& context, Predicate predicate) {
  uint64_t mask = 0;
  for (int rank = 0; rank < context.size; ++rank) {
    if (predicate(rank)) mask |= 1ULL << rank;
  }
  return mask;
}

int fail(Context& context, int status, uint64_t ranks) {
  context.failed_ranks = ranks;
  context.mine().left.value.store(1, std::memory_order_release);
  return status;
}

// Why waiting on is pointless, or kDone. The flags are read after the signs of death: a rank may raise its flag, then
// end, and that is no failure.
int check_peers(Context& context, Which flag, uint64_t operation, int64_t waited) {
  poll(context.processes, context.size, 0);
  const uint64_t dead = ranks_where(context, [&](int rank) { return context.processes[rank].revents != 0; });
  const uint64_t left = ranks_where(context, [&](int rank) { return reached(context, &RankFlags::left, rank, 1); });
  const uint64_t missing = ranks_where(context, [&](int rank) { return !reached(context, flag, rank, operation); });
  if (missing & dead) return fail(context, kDied, missing & dead);
  if (missing & left) return fail(context, kLeft, missing & left);
  if (missing && waited > context.timeout_nanoseconds) return fail(context, kTimedOut, missing);
  return kDone;
}

int wait_patiently(Context& context, Which flag, int rank, uint64_t operation) {
  const int64_t begin = now();
  int64_t next_check = begin + std::min(kLivenessNanoseconds, context.timeout_nanoseconds);
  while (!reached(context, flag, rank, operation)) {
    const int64_t time = now();
    if (time - begin < kYieldNanoseconds) {
      sched_yield();
    } else {
      const timespec pause{0, kSleepNanoseconds};
      nanosleep(&pause, nullptr);
    }
    if (time > next_check) {
      if (int status = check_peers(context, flag, operation, time - begin)) return status;
      next_check = time + kLivenessNanoseconds;
    }
  }
  return kDone;
}

int wait_for_all(Context& context, Which flag, uint64_t operation) {
  for (int rank = 0; rank < context.size; ++rank) {
    for (int spin = 0; spin < context.spins && !reached(context, flag, rank, operation); ++spin) pause_briefly();
    if (reached(context, flag, rank, operation)) continue;
    if (int status = wait_patiently(context, flag, rank, operation)) return status;
  }
  return kDone;
}

// ---- The sum

float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint32_t bits_from_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

struct Float32 {
  using Element = float;
  using Sum = float;
  static float load(float value) { return value; }
  static float store(float value) { return value; }
};

struct Float64 {
  using Element = double;
  using Sum = double;
  static double load(double value) { return value; }
  static double store(double value) { return value; }
};

struct BFloat16 {
  using Element = uint16_t;
  using Sum = float;
  static float load(uint16_t value) { return float_from_bits(static_cast<uint32_t>(value) << 16); }
  static uint16_t store(float value) {
    const uint32_t bits = bits_from_float(value);
    const uint32_t nearest_even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const uint32_t quiet_nan = (bits >> 16) | 0x40;  // rounding could carry a NaN over into an infinity
    return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? quiet_nan : nearest_even);
  }
};

// Bit operations instead of _Float16: they vectorize with every compiler.
struct Float16 {
  using Element = uint16_t;
  using Sum = float;
  static float load(uint16_t value) {
    const uint32_t sign = static_cast<uint32_t>(value & 0x8000) << 16;
    const uint32_t magnitude = static_cast<uint32_t>(value & 0x7fff) << 13;
    // 2^112 moves the exponent from bias 15 to bias 127, exactly, subnormal numbers included.
    const uint32_t finite = bits_from_float(float_from_bits(magnitude) * 0x1p112f);
    const uint32_t special = magnitude | 0x7f800000;
    return float_from_bits(sign | (magnitude >= 0x0f800000 ? special : finite));
  }
  static uint16_t store(float value) {
    const uint32_t bits = bits_from_float(value);
    const uint32_t sign = (bits >> 16) & 0x8000;
    const uint32_t magnitude = bits & 0x7fffffff;
    const uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    // Adding 0.5 aligns a number below 2^-14 so that the float addition itself rounds to a multiple of 2^-24.
    const uint32_t subnormal = bits_from_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000;
    const uint32_t nan_or_infinity = magnitude > 0x7f800000 ? 0x7e00 | ((magnitude >> 13) & 0x3ff) : 0x7c00;
    const uint32_t small = magnitude < (113u << 23) ? subnormal : normal;
    return static_cast<uint16_t>(sign | (magnitude >= 0x47800000 ? nan_or_infinity : small));
  }
};

// Elements [begin, end) of all slots of `operation`, summed in rank order into `out`. The running sums of a block stay
// in the first-level cache, so each slot is read once; the inner loops have no branches and are left to the compiler,
// which makes 16 lanes of them with AVX-512 and 8 with AVX2. `out` may be the slot's own [begin, end).
// `Out` is the format of the result.
template <class Format, class Out = Format>
void sum_slots(const Context& context, uint64_t operation, int64_t begin, int64_t end, char* out_bytes) {
  using Element = typename Format::Element;
  constexpr int64_t kBlock = 1024;
  alignas(64) typename Format::Sum sum[kBlock];
  typename Out::Element* out = reinterpret_cast<typename Out::Element*>(out_bytes);
  for (int64_t block = begin; block < end; block += kBlock) {
    const int64_t count = std::min(kBlock, end - block);
    for (int rank = 0; rank < context.size; ++rank) {
      const Element* in = reinterpret_cast<const Element*>(context.slot(operation, rank).payload) + block;
      if (rank == 0) {
        for (int64_t i = 0; i < count; ++i) sum[i] = Format::load(in[i]);
      } else {
        for (int64_t i = 0; i < count; ++i) sum[i] += Format::load(in[i]);
      }
    }
    for (int64_t i = 0; i < count; ++i) out[block - begin + i] = Out::store(sum[i]);
  }
}

using SumSlots = void (*)(const Context&, uint64_t, int64_t, int64_t, char*);

struct Kind {
  int64_t element_bytes;
  SumSlots sum;  // null for a gather of bytes
  bool scatters;
};

// The numbers of `kind` in the calls below: sums, a gather, reduce-scatters whose results are fp32 (fp64 of fp64).
constexpr Kind kKinds[] = {
    {4, sum_slots<Float32>, false},
    {8, sum_slots<Float64>, false},
    {2, sum_slots<BFloat16>, false},
    {2, sum_slots<Float16>, false},
    {1, nullptr, false},
    {4, sum_slots<Float32>, true},
    {8, sum_slots<Float64>, true},
    {2, sum_slots<BFloat16, Float32>, true},
    {2, sum_slots<Float16, Float32>, true},
};

// Rank r has elements [part_begin(r), part_begin(r + 1)) of `count`; parts share no cache line.
int64_t part_begin(const Context& context, int64_t count, int rank) {
  return std::min(count, round_up((count + context.size - 1) / context.size, 64) * rank);
}

// ---- Operations

int publish(Context& context, const char* source, int64_t bytes, int64_t kind) {
  const uint64_t operation = context.started + 1;
  if (operation > 2) {
    if (int status = wait_for_all(context, &RankFlags::finished, operation - 2)) return status;
  }
  Slot& slot = context.slot(operation, context.rank);
  slot.kind = kind;
  slot.bytes = bytes;
  if (bytes) std::memcpy(slot.payload, source, bytes);
  context.started = operation;
  context.mine().arrived.value.store(operation, std::memory_order_release);
  return kDone;
}

int wait_for_slots(Context& context, uint64_t operation, int64_t bytes, int64_t kind) {
  if (int status = wait_for_all(context, &RankFlags::arrived, operation)) return status;
  const uint64_t different = ranks_where(context, [&](int rank) {
    const Slot& slot = context.slot(operation, rank);
    return slot.kind != kind || slot.bytes != bytes;
  });
  return different ? fail(context, kMismatch, different) : kDone;
}

int sum_in_two_phases(Context& context, uint64_t operation, char* out, int64_t bytes, const Kind& kind) {
  const int64_t count = bytes / kind.element_bytes;
  const auto begin_of = [&](int rank) { return part_begin(context, count, rank); };
  const int64_t begin = begin_of(context.rank), end = begin_of(context.rank + 1);
  kind.sum(context, operation, begin, end, context.slot(operation, context.rank).payload + begin * kind.element_bytes);
  context.mine().summed.value.store(operation, std::memory_order_release);
  if (int status = wait_for_all(context, &RankFlags::summed, operation)) return status;
  for (int rank = 0; rank < context.size; ++rank) {
    const int64_t offset = begin_of(rank) * kind.element_bytes;
    const int64_t length = begin_of(rank + 1) * kind.element_bytes - offset;
    if (length) std::memcpy(out + offset, context.slot(operation, rank).payload + offset, length);
  }
  return kDone;
}

// Finishes the oldest operation: for a sum, `out` is this piece of the result; for a reduce-scatter, this rank's part of
// it; for a gather, this piece of rank 0's part, with the parts of the other ranks `part_bytes` apart.
int complete(Context& context, char* out, int64_t bytes, int64_t kind_number, int64_t part_bytes) {
  const uint64_t operation = context.finished + 1;
  const Kind& kind = kKinds[kind_number];
  if (int status = wait_for_slots(context, operation, bytes, kind_number)) return status;
  if (!kind.sum) {
    for (int rank = 0; rank < context.size && bytes; ++rank) {
      std::memcpy(out + rank * part_bytes, context.slot(operation, rank).payload, bytes);
    }
  } else if (kind.scatters) {
    const int64_t count = bytes / kind.element_bytes;
    kind.sum(
        context, operation, part_begin(context, count, context.rank), part_begin(context, count, context.rank + 1), out);
  } else if (context.size > 2 && bytes >= kTwoPhaseBytes) {
    if (int status = sum_in_two_phases(context, operation, out, bytes, kind)) return status;
  } else {
    kind.sum(context, operation, 0, bytes / kind.element_bytes, out);
  }
  context.finished = operation;
  context.mine().finished.value.store(operation, std::memory_order_release);
  return kDone;
}

// Hands over the first piece of `source`, the only one of a reduce-scatter. Two operations may be started and not finished; one alone if it has pieces.
int start(Context& context, const char* source, int64_t bytes, int64_t kind) {
  return publish(context, source, std::min(bytes, context.slot_bytes), kind);
}

// Finishes the oldest started operation into `out`, piece by piece; the next piece is handed over before the present
// one is read.
int finish(Context& context, const char* source, char* out, int64_t bytes, int64_t kind) {
  for (int64_t offset = 0;; offset += context.slot_bytes) {
    const int64_t next = offset + context.slot_bytes;
    if (next < bytes) {
      const int64_t length = std::min(bytes - next, context.slot_bytes);
      if (int status = publish(context, source + next, length, kind)) return status;
    }
    const int64_t length = std::min(bytes - offset, context.slot_bytes);
    if (int status = complete(context, out + offset, length, kind, bytes)) return status;
    if (next >= bytes) return kDone;
  }
}

}  // namespace

extern "C" {

int64_t reduction_segment_bytes(int64_t size, int64_t slot_bytes) {
  return round_up(sizeof(Control), kPage) + 2 * size * (static_cast<int64_t>(sizeof(Slot)) + slot_bytes);
}

// Maps the segment behind `file`. `slot_bytes` is a multiple of 128; `processes` are pidfds, -1 for this rank itself.
// Returns null if the system refuses.
void* reduction_attach(
    int file, int rank, int size, int64_t slot_bytes, int spins, double timeout, const int* processes) {
  const int64_t bytes = reduction_segment_bytes(size, slot_bytes);
  void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (base == MAP_FAILED) return nullptr;
  Context* context = new Context{};
  context->control = static_cast<Control*>(base);
  context->slots = static_cast<char*>(base) + round_up(sizeof(Control), kPage);
  context->mapped_bytes = bytes;
  context->slot_bytes = slot_bytes;
  context->rank = rank;
  context->size = size;
  context->spins = spins;
  context->timeout_nanoseconds = static_cast<int64_t>(timeout * 1e9);
  for (int peer = 0; peer < size; ++peer) context->processes[peer] = pollfd{processes[peer], POLLIN, 0};
  return context;
}

void reduction_detach(Context* context) {
  context->mine().left.value.store(1, std::memory_order_release);
  munmap(context->control, context->mapped_bytes);
  delete context;
}

uint64_t reduction_failed_ranks(const Context* context) { return context->failed_ranks; }

int reduction_start(Context* context, const char* source, int64_t bytes, int64_t kind) {
  return start(*context, source, bytes, kind);
}

int reduction_finish(Context* context, const char* source, char* out, int64_t bytes, int64_t kind) {
  return finish(*context, source, out, bytes, kind);
}

int reduction_run(Context* context, const char* source, char* out, int64_t bytes, int64_t kind) {
  if (int status = start(*context, source, bytes, kind)) return status;
  return finish(*context, source, out, bytes, kind);
}

// `reduction_run` with its arguments in memory, and its status left there: as a tape plays it.
struct RunArguments {
  Context* context;
  const char* source;
  char* out;
  int64_t bytes, kind, status;
};

int64_t reduction_play(RunArguments* args) {
  args->status = reduction_run(args->context, args->source, args->out, args->bytes, args->kind);
  return args->status;
}
}
