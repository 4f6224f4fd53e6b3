// Picks in the order of their rows, those of one row in their own order.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

class ByRow {
 public:
  // rows (count): 0 to 2^31; fewer than 2^32 picks.
  ByRow(const int64_t* rows, int64_t count) : keys_(count), other_(count) {
    uint64_t greatest = 0;
    for (int64_t i = 0; i < count; i++) {
      keys_[i] = static_cast<uint64_t>(rows[i]) << kRow | static_cast<uint64_t>(i);
      greatest = std::max(greatest, keys_[i]);
    }
    for (int shift = kRow; shift < 64 && greatest >> shift; shift += kDigit) by_digit(shift);
  }

  int64_t row(int64_t i) const { return static_cast<int64_t>(keys_[i] >> kRow); }
  int64_t pick(int64_t i) const { return static_cast<int64_t>(keys_[i] & 0xffffffffu); }

  // Where the share of a thread begins; no row is in two shares.
  int64_t start(int64_t share, int64_t shares) const {
    const int64_t count = static_cast<int64_t>(keys_.size());
    int64_t i = count * share / shares;
    while (i > 0 && i < count && row(i) == row(i - 1)) i++;
    return i;
  }

 private:
  static constexpr int kRow = 32, kDigit = 11;  // bits

  void by_digit(int shift) {
    constexpr uint64_t most = (1u << kDigit) - 1;
    std::vector<int64_t> at(most + 2);
    for (uint64_t key : keys_) at[(key >> shift & most) + 1]++;
    for (uint64_t digit = 0; digit < most; digit++) at[digit + 1] += at[digit];
    for (uint64_t key : keys_) other_[at[key >> shift & most]++] = key;
    keys_.swap(other_);
  }

  std::vector<uint64_t> keys_, other_;
};
