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

// One row at a time; its buffers serve the next row too. Thresholds are found by bisection: to count
// what is at least a number takes a vector instruction for sixteen, and no branch to foresee.
class Largest {
 public:
  Largest(int64_t columns, int64_t topk)
      : columns_(columns), topk_(topk), keys_(columns + kBlock, INT_MIN), kept_(columns + kBlock),
        indices_(columns + kBlock), falling_(topk) {
    chunks_ = (4 * topk + 15) / 16 * 16;  // so that few values are looked at twice
    if (columns < 2 * chunks_) chunks_ = 0;
    maxima_.resize(chunks_);
  }

  int32_t* keys() { return keys_.data(); }

  // Fills best with the indices of the m largest of keys(), best first if `falling`, else ascending.
  void select(int64_t* best, bool falling) {
    const int64_t found = candidates();
    const int32_t* kept = kept_.data();
    const int32_t* indices = indices_.data();
    uint64_t* pairs = falling_.data();
    const int32_t least = threshold(kept, found);
    int64_t above = 0;
    for (int64_t i = 0; i < found; i++) above += kept[i] > least;
    int64_t chosen = 0, equals = topk_ - above;
    for (int64_t i = 0; chosen < topk_; i++) {
      best[chosen] = indices[i];  // kept by what follows, or written over: a branch takes longer
      pairs[chosen] = pair(kept[i], indices[i]);
      const bool equal = kept[i] == least && equals > 0;
      equals -= equal;
      chosen += equal || kept[i] > least;
    }
    if (!falling) return;
    std::sort(falling_.begin(), falling_.end(), std::greater<uint64_t>());
    for (int64_t i = 0; i < topk_; i++) best[i] = static_cast<uint32_t>(~falling_[i]);
  }

 private:
  static constexpr int64_t kBlock = 16;

  static uint64_t pair(int32_t key, int32_t index) {  // orders by key, then by falling index
    const uint32_t high = static_cast<uint32_t>(key) ^ 0x80000000u;
    return static_cast<uint64_t>(high) << 32 | static_cast<uint32_t>(~index);
  }

  // The m-th largest of `count` keys.
  int32_t threshold(const int32_t* keys, int64_t count) const {
    int64_t low = INT_MIN, high = INT_MAX;
    while (low < high) {
      const int64_t middle = low + (high - low + 1) / 2;
      const int32_t bound = static_cast<int32_t>(middle);
      int32_t reached = 0;
      for (int64_t i = 0; i < count; i++) reached += keys[i] >= bound;
      if (reached >= topk_)
        low = middle;
      else
        high = middle - 1;
    }
    return static_cast<int32_t>(low);
  }

  // Fills kept_ and indices_ with what can be among the m largest, indices ascending. Chunk j is
  // every chunks_-th column from j on. The m-th largest of the chunks' maxima is a floor of the m-th
  // largest value. Behind the last column lies what no floor lets through.
  int64_t candidates() {
    const int32_t floor = chunks_ ? floor_of_chunks() : INT_MIN + 1;
    const int32_t* __restrict keys = keys_.data();
    int32_t* __restrict kept = kept_.data();
    int32_t* __restrict indices = indices_.data();
    int64_t found = 0;
    for (int64_t start = 0; start < columns_; start += kBlock) {
      int32_t any = 0;
      for (int64_t i = start; i < start + kBlock; i++) any += keys[i] >= floor;
      if (!any) continue;
      for (int64_t i = start; i < start + kBlock; i++) {
        kept[found] = keys[i];
        indices[found] = static_cast<int32_t>(i);
        found += keys[i] >= floor;
      }
    }
    return found;
  }

  int32_t floor_of_chunks() {
    const int32_t* keys = keys_.data();
    int32_t* __restrict maxima = maxima_.data();
    std::copy(keys, keys + chunks_, maxima);
    int64_t start = chunks_;
    for (; start + chunks_ <= columns_; start += chunks_)
      for (int64_t j = 0; j < chunks_; j++) maxima[j] = std::max(maxima[j], keys[start + j]);
    for (int64_t j = 0; start + j < columns_; j++)
      maxima[j] = std::max(maxima[j], keys[start + j]);
    return threshold(maxima, chunks_);
  }

  int64_t columns_, topk_, chunks_;
  std::vector<int32_t> keys_, kept_, indices_, maxima_;
  std::vector<uint64_t> falling_;
};
