// AdamW on rows of a table: the steps without gradient that a row has missed, and one with it.
//
// Order of operations, and where two are rounded as one, are those of PyTorch's fused AdamW on whole
// vectors. A bit off would be another training, so nothing is contracted but what is written so.
#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../native/numbers.h"
#include "../native/rows.h"

namespace {

// The numbers of a step, as history.py has them. growth: of how far a step moves a value at most,
// as a fraction of it, over the step before.
struct Step {
  float decay, mean_weight, square_decay, square_weight, correction, eps, size, growth;
};

struct Row {
  float *values, *mean, *square;
};

// Moved by less than 2^-25 of itself, a value stays as it is: that is half of what is between it and
// its neighbour. A row is still with room to spare, and stays so while the bound grows to kMost.
constexpr float kStill = 0x1p-27f, kMost = 0x1p-26f;
constexpr float kSmallest = 0x1p-60f, kSmallestSquare = 0x1p-100f;  // far from what underflows
constexpr int64_t kBlock = 64, kChunk = 16;

// As PyTorch's, from the nearer end.
inline float lerp(float from, float to, float weight) {
  return weight < 0.5f ? __builtin_fmaf(weight, to - from, from)
                       : __builtin_fmaf(weight - 1.0f, to - from, to);
}

template <bool kCorrected>
inline float update(float mean, float square, const Step& s) {
  const float root = std::sqrt(square);
  return -s.size * mean / ((kCorrected ? root / s.correction : root) + s.eps);
}

// A step without gradient; whether it moved no value of the row, and the next ones hardly can.
// kCorrected: the second moment's bias is not yet 1.
template <bool kCorrected>
inline bool replay_step(const Row& row, const Step& s, int64_t width) {
  float* __restrict values = row.values;
  float* __restrict means = row.mean;
  float* __restrict squares = row.square;
  int moving = 0;
#pragma omp simd reduction(| : moving)
  for (int64_t i = 0; i < width; i++) {
    const float mean = lerp(means[i], 0.0f, s.mean_weight);
    const float square = squares[i] * s.square_decay;
    const float value = values[i] * s.decay, by = update<kCorrected>(mean, square, s);
    means[i] = mean;
    squares[i] = square;
    values[i] = value + by;
    const float size = std::fabs(value);
    const int bounded = (size >= kSmallest) & (square >= kSmallestSquare);
    const int still = (mean == 0.0f) | (bounded & (std::fabs(by) <= kStill * size));
    moving |= !still;
  }
  return !moving;
}

// A block of a row's moment over steps n..n + kChunk - 1; whether it still changes. Zeros do not, nor
// does a mean that has shrunk to a few units of the least number, with which arithmetic is slow.
template <class F>
bool shrink(float* moment, const F& once, int64_t begin, int64_t end) {
  float before[kBlock];
  std::copy_n(moment, kBlock, before);
  for (int64_t n = begin; n < end; n++) once(moment, n);
  return std::memcmp(before, moment, sizeof before) != 0;
}

// Steps first..last - 1 of a row that none of them moves: it decays, and its moments.
void decay(const Row& row, const Step* steps, int64_t slots, int64_t first, int64_t last,
           int64_t width) {
  const auto shrink_mean = [&](float* mean, int64_t n) {
    const float weight = steps[n % slots].mean_weight;
    for (int64_t i = 0; i < kBlock; i++) mean[i] = lerp(mean[i], 0.0f, weight);
  };
  const auto shrink_square = [&](float* square, int64_t n) {
    const float by = steps[n % slots].square_decay;
    for (int64_t i = 0; i < kBlock; i++) square[i] *= by;
  };
  const auto shrink_value = [&](float* value, int64_t n) {
    const float by = steps[n % slots].decay;
    for (int64_t i = 0; i < kBlock; i++) value[i] *= by;
  };
  for (int64_t begin = 0; begin < width; begin += kBlock) {
    const int64_t size = std::min(kBlock, width - begin);
    float values[kBlock] = {}, means[kBlock] = {}, squares[kBlock] = {};
    std::copy_n(row.values + begin, size, values);
    std::copy_n(row.mean + begin, size, means);
    std::copy_n(row.square + begin, size, squares);
    bool mean_moves = true, square_moves = true;
    for (int64_t n = first; n < last; n += kChunk) {
      const int64_t end = std::min(n + kChunk, last);
      mean_moves = mean_moves && shrink(means, shrink_mean, n, end);
      square_moves = square_moves && shrink(squares, shrink_square, n, end);
      shrink(values, shrink_value, n, end);
    }
    std::copy_n(values, size, row.values + begin);
    std::copy_n(means, size, row.mean + begin);
    std::copy_n(squares, size, row.square + begin);
  }
}

// Steps first..last - 1 without gradient.
void replay(const Row& row, const Step* steps, int64_t slots, int64_t first, int64_t last,
            int64_t width) {
  while (first < last) {
    const Step& s = steps[first++ % slots];
    const bool corrected = s.correction != 1.0f;
    if (!(corrected ? replay_step<true>(row, s, width) : replay_step<false>(row, s, width)))
      continue;
    int64_t end = first;
    for (float bound = kStill; end < last; end++) {
      bound *= steps[end % slots].growth;
      if (!(bound <= kMost)) break;
    }
    decay(row, steps, slots, first, end, width);
    first = end;
  }
}

void gradient_step(const Row& row, const float* __restrict grad, const Step& s, int64_t width) {
  float* __restrict values = row.values;
  float* __restrict means = row.mean;
  float* __restrict squares = row.square;
#pragma omp simd
  for (int64_t i = 0; i < width; i++) {
    const float mean = lerp(means[i], grad[i], s.mean_weight);
    const float square =
        __builtin_fmaf(s.square_weight * grad[i], grad[i], squares[i] * s.square_decay);
    values[i] = values[i] * s.decay + update<true>(mean, square, s);
    means[i] = mean;
    squares[i] = square;
  }
}

}  // namespace

// Brings `rows`, which may repeat, up to step `count` of a history that keeps the last `slots`
// steps; the last one with `grad` unless it is null. current (N,): the step that each row is at.
// copy: of the values in bfloat16, or null.
extern "C" void adam_rows(float* values, float* mean, float* square, const float* grad,
                          bfloat16* copy, const int64_t* rows, int32_t* current,
                          const float* numbers, int64_t slots, int64_t count, int64_t num_rows,
                          int64_t width, int64_t threads) {
  const Step* steps = reinterpret_cast<const Step*>(numbers);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t share = 0; share < threads; share++) {
    for (int64_t k = 0; k < num_rows; k++) {
      const int64_t r = rows[k];
      if (k + kAhead < num_rows && current[rows[k + kAhead]] < count) {
        const int64_t next = rows[k + kAhead] * width;
        for (const float* from : {static_cast<const float*>(values), static_cast<const float*>(mean),
                                  static_cast<const float*>(square), grad})
          if (from) ask_for(from + next, width);
      }
      if ((threads > 1 && r % threads != share) || current[r] >= count) continue;
      const Row row = {values + r * width, mean + r * width, square + r * width};
      replay(row, steps, slots, current[r] + 1, grad ? count : count + 1, width);
      if (grad) gradient_step(row, grad + r * width, steps[count % slots], width);
      if (copy)
        for (int64_t i = 0; i < width; i++) copy[r * width + i] = rounded<bfloat16>(row.values[i]);
      current[r] = static_cast<int32_t>(count);
    }
  }
}
