// The m largest of a row, equals by lowest index; NaN counts as larger than any number.
#pragma once
#include <algorithm>
#include <climits>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

// Integers that order as floats do, both zeros alike.
inline int32_t ordered(float x) {
  x += 0.0f;
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  int32_t key = bits ^ ((bits >> 31) & 0x7fffffff);
  return x != x ? INT_MAX : key;
}

// A bit for each of 64 keys, set where it reaches the floor.
inline uint64_t at_least(const int32_t* keys, int32_t floor) {
  uint64_t passes = 0;
#ifdef __AVX512F__  // compilers do not find its masks by themselves
  const __m512i floors = _mm512_set1_epi32(floor);
  for (int i = 0; i < 64; i += 16) {
    const __mmask16 found = _mm512_cmpge_epi32_mask(_mm512_loadu_si512(keys + i), floors);
    passes |= static_cast<uint64_t>(found) << i;
  }
#else
  for (int i = 0; i < 64; i++) passes |= static_cast<uint64_t>(keys[i] >= floor) << i;
#endif
  return passes;
}

// One row at a time; its buffers serve the next row too. Bounds are found by bisection: to count
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
    const int32_t least = bound(kept, found, topk_);
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
    if (falling) sort(best);
  }

 private:
  static constexpr int64_t kBlock = 64, kCounted = 128;

  static uint64_t pair(int32_t key, int32_t index) {  // orders by key, then by falling index
    const uint32_t high = static_cast<uint32_t>(key) ^ 0x80000000u;
    return static_cast<uint64_t>(high) << 32 | static_cast<uint32_t>(~index);
  }

  // Few are sorted by counting what is above each, which vector instructions do.
  void sort(int64_t* best) {
    uint64_t* __restrict pairs = falling_.data();
    if (topk_ > kCounted) {
      std::sort(pairs, pairs + topk_, std::greater<uint64_t>());
      for (int64_t i = 0; i < topk_; i++) best[i] = static_cast<uint32_t>(~pairs[i]);
      return;
    }
    for (int64_t i = 0; i < topk_; i++) {
      int64_t above = 0;
      for (int64_t j = 0; j < topk_; j++) above += pairs[j] > pairs[i];
      best[above] = static_cast<uint32_t>(~pairs[i]);
    }
  }

  // A number that m to `most` of `count` keys reach; if there is none, the m-th largest of them.
  int32_t bound(const int32_t* keys, int64_t count, int64_t most) const {
    int32_t least = INT_MAX, greatest = INT_MIN;
    for (int64_t i = 0; i < count; i++) {
      least = std::min(least, keys[i]);
      greatest = std::max(greatest, keys[i]);
    }
    int64_t low = least, high = greatest;
    while (low < high) {
      const int64_t middle = low + (high - low + 1) / 2;
      const int32_t bound = static_cast<int32_t>(middle);
      int32_t reached = 0;
      for (int64_t i = 0; i < count; i++) reached += keys[i] >= bound;
      if (reached >= topk_)
        low = middle;
      else
        high = middle - 1;
      if (reached >= topk_ && reached <= most) break;
    }
    return static_cast<int32_t>(low);
  }

  // Fills kept_ and indices_ with what can be among the m largest, indices ascending. Chunk j is
  // every chunks_-th column from j on. What m of the chunks' maxima reach is a floor of the m-th
  // largest value. Behind the last column lies what no floor lets through.
  int64_t candidates() {
    const int32_t floor = chunks_ ? floor_of_chunks() : INT_MIN + 1;
    const int32_t* __restrict keys = keys_.data();
    int32_t* __restrict kept = kept_.data();
    int32_t* __restrict indices = indices_.data();
    int64_t found = 0;
    for (int64_t start = 0; start < columns_; start += kBlock) {
      for (uint64_t passes = at_least(keys + start, floor); passes; passes &= passes - 1) {
        const int64_t i = start + __builtin_ctzll(passes);
        kept[found] = keys[i];
        indices[found++] = static_cast<int32_t>(i);
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
    return bound(maxima, chunks_, topk_ + topk_ / 4);
  }

  int64_t columns_, topk_, chunks_;
  std::vector<int32_t> keys_, kept_, indices_, maxima_;
  std::vector<uint64_t> falling_;
};
