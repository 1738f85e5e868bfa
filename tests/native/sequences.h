// What the drivers of ops along time share: batches of sequences, and the states before and after them.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "driver.h"
#include "rows.h"

namespace drive {

// Sequences of tokens: packed one after another, or padded, all of one length. Either way all tokens follow one another
// in memory.
struct Batch {
  Batch(std::vector<int64_t> sequence_lengths, bool packed) : lengths(std::move(sequence_lengths)), first{0} {
    for (const int64_t length : lengths) first.push_back(first.back() + length);
    if (packed) starts = exact_copy<int64_t>(first);
  }

  // Sequences of that length, and others between them where they are packed.
  static Batch around(int64_t length, bool packed) {
    if (packed) return Batch({length, 1, 0, length, pick(2, 40)}, true);
    return Batch(std::vector<int64_t>(pick(2, 3), length), false);
  }

  int64_t count() const { return static_cast<int64_t>(lengths.size()); }
  int64_t tokens() const { return first.back(); }
  int64_t row_length() const { return starts ? tokens() : lengths[0]; }
  Sequences sequences() const { return {starts.get(), count(), row_length()}; }
  std::string text() const {
    return drive::text({{"length", lengths[0]}, {"sequences", count()}, {"packed", starts != nullptr}});
  }

  std::vector<int64_t> lengths, first;  // first token of each sequence, and the number of all
  std::unique_ptr<int64_t[]> starts;    // null unless packed
};

inline Rows rows(const Numbers& numbers, const Batch& batch, bool given = true) {
  if (!given) return {};
  return {numbers.data(), batch.row_length() * numbers.stride(), numbers.stride(), numbers.is_bf16()};
}

// The states of a batch, each `height` rows of `width` numbers: before and after it, both, or none; or slots of a pool,
// in no order, which is updated in place. Which of them is drawn.
class States {
 public:
  States(const Batch& batch, int64_t height, int64_t width, bool is_bf16)
      : in_pool(coin()),
        has_initial(in_pool || coin()),
        has_final(in_pool || coin()),
        size_(height * width),
        is_int32_(coin()),
        slots_(batch.count() + (in_pool ? 2 : 0)),
        slot_of_(slots_),
        initial_(Numbers::random(slots_ * height, width, is_bf16, pick(0, 3))),
        final_(slots_ * height, width, is_bf16, pick(0, 3)),
        pool_before_(initial_.values()) {
    for (int64_t i = 0; i < slots_; ++i) slot_of_[i] = i;
    for (int64_t i = slots_ - 1; in_pool && i > 0; --i) std::swap(slot_of_[i], slot_of_[pick(0, i)]);
    slot_of_.resize(batch.count());
    copy_indices();
  }

  const Numbers& initial() const { return initial_; }
  const Numbers& final() const { return in_pool ? initial_ : final_; }
  bool is_bf16() const { return initial_.is_bf16(); }
  Slots slots() const {
    if (!in_pool) return {};
    return {is_int32_ ? static_cast<const void*>(narrow_.get()) : wide_.get(), is_int32_, slots_};
  }

  // By sequence; zeros where they are omitted.
  Values before() const {
    Values states(slot_of_.size() * size_);
    for (size_t s = 0; has_initial && s < slot_of_.size(); ++s)
      std::copy_n(pool_before_.begin() + slot_of_[s] * size_, size_, states.begin() + s * size_);
    return states;
  }

  // `after` is by sequence. All other slots of a pool are as they were.
  void expect_after(const Values& after, double tolerance) const {
    if (!has_final) return expect(final_.untouched(), "the final state was written unasked");
    Values expected = in_pool ? pool_before_ : after;
    for (size_t s = 0; s < slot_of_.size(); ++s)
      std::copy_n(after.begin() + s * size_, size_, expected.begin() + slot_of_[s] * size_);
    expect_close("state", final(), expected, tolerance);
  }

  // One slot below the first or behind the last.
  void leave_the_pool() {
    slot_of_[pick(0, static_cast<int64_t>(slot_of_.size()) - 1)] = coin() ? -1 : slots_;
    copy_indices();
  }

  std::string text() const {
    return drive::text({{"initial", has_initial}, {"final", has_final}, {"pool", in_pool}, {"int32", is_int32_},
                        {"bf16 states", is_bf16()}});
  }

  const bool in_pool, has_initial, has_final;

 private:
  void copy_indices() {
    narrow_ = exact_copy<int32_t>(slot_of_);
    wide_ = exact_copy<int64_t>(slot_of_);
  }

  const int64_t size_;
  const bool is_int32_;
  const int64_t slots_;
  std::vector<int64_t> slot_of_;
  Numbers initial_, final_;
  Values pool_before_;
  std::unique_ptr<int32_t[]> narrow_;
  std::unique_ptr<int64_t[]> wide_;
};

}  // namespace drive
