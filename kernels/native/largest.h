// The m largest of a row, equals by lowest index; NaN counts as larger than any number.
#pragma once
#include <algorithm>
#include <climits>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

// Integers that order as floats do, both zeros alike.
inline int32_t ordered(float x) {
  x += 0.0f;
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  int32_t key = bits ^ ((bits >> 31) & 0x7fffffff);
  return x != x ? INT_MAX : key;
}

// One row at a time; its buffers serve the next row too.
class Largest {
 public:
  Largest(int64_t columns, int64_t topk)
      : columns_(columns), topk_(topk), keys_(columns), best_(columns + 1) {
    chunks_ = (4 * topk + 15) / 16 * 16;  // so that few values are looked at twice
    if (columns < 2 * chunks_) chunks_ = columns;
    length_ = columns / chunks_;
    maxima_.resize(chunks_);
    sorted_.resize(chunks_);
  }

  int32_t* keys() { return keys_.data(); }

  // Fills best with the indices of the m largest of keys(), best first if `falling`, else ascending.
  void select(int64_t* best, bool falling) {
    int64_t found = length_ > 1 ? candidates() : all();
    auto first = best_.begin(), end = first + found, last = first + topk_;
    if (found > topk_) std::nth_element(first, last - 1, end, std::greater<uint64_t>());
    if (falling) std::sort(first, last, std::greater<uint64_t>());
    for (int64_t i = 0; i < topk_; i++) best[i] = static_cast<uint32_t>(~best_[i]);
    if (!falling) std::sort(best, best + topk_);
  }

 private:
  uint64_t pair(int64_t index) const {  // orders by key, then by falling index
    uint32_t key = static_cast<uint32_t>(keys_[index]) ^ 0x80000000u;
    return static_cast<uint64_t>(key) << 32 | static_cast<uint32_t>(~static_cast<uint32_t>(index));
  }

  int64_t all() {
    for (int64_t i = 0; i < columns_; i++) best_[i] = pair(i);
    return columns_;
  }

  // Chunk j is every chunks_-th column from j on. The m-th largest of the chunks' maxima is a floor
  // of the m-th largest value, so what is at least that lies in chunks whose maximum is.
  int64_t candidates() {
    const int32_t* keys = keys_.data();
    int32_t* maxima = maxima_.data();
    std::copy(keys, keys + chunks_, maxima);
    for (int64_t row = 1; row < length_; row++)
      for (int64_t j = 0; j < chunks_; j++)
        maxima[j] = std::max(maxima[j], keys[row * chunks_ + j]);
    for (int64_t i = length_ * chunks_; i < columns_; i++)
      maxima[i - length_ * chunks_] = std::max(maxima[i - length_ * chunks_], keys[i]);
    std::copy(maxima, maxima + chunks_, sorted_.begin());
    auto last = sorted_.begin() + (topk_ - 1);
    std::nth_element(sorted_.begin(), last, sorted_.end(), std::greater<int32_t>());
    const int32_t floor = *last;
    int64_t found = 0;
    for (int64_t j = 0; j < chunks_; j++) {
      if (maxima[j] < floor) continue;
      for (int64_t i = j; i < columns_; i += chunks_) {
        best_[found] = pair(i);  // kept by the next line, or written over: a branch takes longer
        found += keys[i] >= floor;
      }
    }
    return found;
  }

  int64_t columns_, topk_, chunks_ = 0, length_ = 0;
  std::vector<int32_t> keys_, maxima_, sorted_;
  std::vector<uint64_t> best_;
};
