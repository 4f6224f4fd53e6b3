// Lookup-reduce on a CPU: forward by tokens, in the order of picks; backward by rows.
// T tokens, P picks per token, C cores, E groups, V value dim; letters as in reference.py.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../native/by_row.h"
#include "../native/numbers.h"
#include "../native/rows.h"

namespace {

template <class T>
void pool(const T* table, const int64_t* rows, const int64_t* groups, const float* scores, T* out,
          int64_t tokens, int64_t picks, int64_t cores, int64_t num_groups, int64_t width,
          int threads) {
  const int64_t slice = width / cores, end = tokens * picks;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> sums(num_groups * width);
#pragma omp for
    for (int64_t t = 0; t < tokens; t++) {
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (int64_t p = t * picks; p < (t + 1) * picks; p++) {
        if (p + kAhead < end) ask_for(table + rows[p + kAhead] * width, width);
        for (int64_t c = 0; c < cores; c++) {
          const float weight = to_float(rounded<T>(scores[p * cores + c]));
          add(sums.data() + groups[p] * width + c * slice, table + rows[p] * width + c * slice,
              weight, slice);
        }
      }
      T* __restrict result = out + t * num_groups * width;
      for (int64_t i = 0; i < num_groups * width; i++) result[i] = rounded<T>(sums[i]);
    }
  }
}

// As pool, of a table in 8 bits: codes (N, V), and scales (N, blocks) of neighbouring ones.
template <class T, class Code>
void pool_coded(const Code* codes, const float* scales, const int64_t* rows, const int64_t* groups,
                const float* scores, T* out, int64_t tokens, int64_t picks, int64_t cores,
                int64_t num_groups, int64_t width, int64_t blocks, int threads) {
  const int64_t slice = width / cores, block = width / blocks, end = tokens * picks;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> sums(num_groups * width);
#pragma omp for
    for (int64_t t = 0; t < tokens; t++) {
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (int64_t p = t * picks; p < (t + 1) * picks; p++) {
        if (p + kAhead < end) {
          ask_for(codes + rows[p + kAhead] * width, width);
          ask_for(scales + rows[p + kAhead] * blocks, blocks);
        }
        const Code* row = codes + rows[p] * width;
        float* to = sums.data() + groups[p] * width;
        for (int64_t i = 0, next; i < width; i = next) {
          const int64_t c = i / slice, b = i / block;
          next = std::min((c + 1) * slice, (b + 1) * block);
          const float weight = to_float(rounded<T>(scores[p * cores + c]));
          add_coded<T>(to + i, row + i, scales[rows[p] * blocks + b], weight, next - i);
        }
      }
      T* __restrict result = out + t * num_groups * width;
      for (int64_t i = 0; i < num_groups * width; i++) result[i] = rounded<T>(sums[i]);
    }
  }
}

// Fills score_grad (T, P, C).
template <class T>
void score_gradient(const T* grad, const T* table, const int64_t* rows, const int64_t* groups,
                    float* score_grad, int64_t tokens, int64_t picks, int64_t cores,
                    int64_t num_groups, int64_t width, int threads) {
  const int64_t slice = width / cores, end = tokens * picks;
#pragma omp parallel for num_threads(threads)
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t p = t * picks; p < (t + 1) * picks; p++) {
      if (p + kAhead < end) ask_for(table + rows[p + kAhead] * width, width);
      const T* from = grad + (t * num_groups + groups[p]) * width;
      for (int64_t c = 0; c < cores; c++)
        score_grad[p * cores + c] =
            dot(from + c * slice, table + rows[p] * width + c * slice, slice);
    }
}

// One row of the table's gradient while its picks are added up: in place, or in float32 beside a
// row of half precision, which is rounded once.
template <class G>
class RowSum {
 public:
  explicit RowSum(int64_t width) : sums_(width) {}

  float* of(G* row) {
    row_ = row;
    for (size_t i = 0; i < sums_.size(); i++) sums_[i] = to_float(row[i]);
    return sums_.data();
  }

  void done() {
    for (size_t i = 0; i < sums_.size(); i++) row_[i] = rounded<G>(sums_[i]);
  }

 private:
  std::vector<float> sums_;
  G* row_ = nullptr;
};

template <>
class RowSum<float> {
 public:
  explicit RowSum(int64_t) {}
  float* of(float* row) { return row; }
  void done() {}
};

// Adds to target (N, V) and fills score_grad (T, P, C), which may be null. Picks are taken row by
// row, those of one row in their order: each row comes into cache once, a thread has rows of its
// own, and no bit depends on the number of threads.
template <class T, class G>
void row_gradient(const T* grad, const T* table, const int64_t* rows, const int64_t* groups,
                  const float* scores, G* target, float* score_grad, int64_t tokens,
                  int64_t picks, int64_t cores, int64_t num_groups, int64_t width, int threads) {
  const int64_t slice = width / cores;
  const ByRow sorted(rows, tokens * picks);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t share = 0; share < threads; share++) {
    const int64_t last = sorted.start(share + 1, threads);
    RowSum<G> sum(width);
    float* to = nullptr;
    for (int64_t i = sorted.start(share, threads); i < last; i++) {
      if (i + kAhead < last && sorted.row(i + kAhead) != sorted.row(i + kAhead - 1)) {
        if (score_grad) ask_for(table + sorted.row(i + kAhead) * width, width);
        ask_for(target + sorted.row(i + kAhead) * width, width);
      }
      const int64_t p = sorted.pick(i), at = sorted.row(i) * width;
      const T* from = grad + (p / picks * num_groups + groups[p]) * width;
      if (!to) to = sum.of(target + at);
      for (int64_t c = 0; c < cores; c++) {
        const int64_t first = c * slice;
        const float weight = scores[p * cores + c];
        if (score_grad)
          score_grad[p * cores + c] =
              dot_and_add(from + first, table + at + first, to + first, weight, slice);
        else
          add(to + first, from + first, weight, slice);
      }
      if (i + 1 == last || sorted.row(i + 1) != sorted.row(i)) {
        sum.done();
        to = nullptr;
      }
    }
  }
}

// As row_gradient; target may be null too.
template <class T, class G>
void pool_backward(const T* grad, const T* table, const int64_t* rows, const int64_t* groups,
                   const float* scores, G* target, float* score_grad, int64_t tokens,
                   int64_t picks, int64_t cores, int64_t num_groups, int64_t width, int threads) {
  if (target)
    row_gradient(grad, table, rows, groups, scores, target, score_grad, tokens, picks, cores,
                 num_groups, width, threads);
  else if (score_grad)
    score_gradient(grad, table, rows, groups, score_grad, tokens, picks, cores, num_groups, width,
                   threads);
}

}  // namespace

#define LOOKUP(NAME, T)                                                                          \
  extern "C" void lookup_pool_##NAME(const T* table, const int64_t* rows, const int64_t* groups, \
                                     const float* scores, T* out, int64_t tokens, int64_t picks, \
                                     int64_t cores, int64_t num_groups, int64_t width,           \
                                     int64_t threads) {                                          \
    pool(table, rows, groups, scores, out, tokens, picks, cores, num_groups, width,              \
         static_cast<int>(threads));                                                             \
  }

LOOKUP(float32, float)
LOOKUP(bfloat16, bfloat16)

// NAME: of the codes, then of the output.
#define CODED(NAME, Code, T)                                                                     \
  extern "C" void lookup_coded_##NAME(                                                           \
      const Code* codes, const float* scales, const int64_t* rows, const int64_t* groups,        \
      const float* scores, T* out, int64_t tokens, int64_t picks, int64_t cores,                 \
      int64_t num_groups, int64_t width, int64_t blocks, int64_t threads) {                      \
    pool_coded(codes, scales, rows, groups, scores, out, tokens, picks, cores, num_groups,       \
               width, blocks, static_cast<int>(threads));                                        \
  }

CODED(int8_to_float32, int8_t, float)
CODED(int8_to_bfloat16, int8_t, bfloat16)
CODED(fp8_to_float32, e4m3, float)
CODED(fp8_to_bfloat16, e4m3, bfloat16)

// NAME: of the table and output gradient, then of the target.
#define BACKWARD(NAME, T, G)                                                                     \
  extern "C" void lookup_backward_##NAME(                                                        \
      const T* grad, const T* table, const int64_t* rows, const int64_t* groups,                 \
      const float* scores, G* target, float* score_grad, int64_t tokens, int64_t picks,          \
      int64_t cores, int64_t num_groups, int64_t width, int64_t threads) {                       \
    pool_backward(grad, table, rows, groups, scores, target, score_grad, tokens, picks, cores,   \
                  num_groups, width, static_cast<int>(threads));                                 \
  }

BACKWARD(float32_to_float32, float, float)
BACKWARD(bfloat16_to_float32, bfloat16, float)
BACKWARD(bfloat16_to_bfloat16, bfloat16, bfloat16)

// Sets rows (count) of `bytes` bytes of target to zero.
extern "C" void lookup_clear(char* target, const int64_t* rows, int64_t count, int64_t bytes,
                             int64_t threads) {
#pragma omp parallel for num_threads(static_cast<int>(threads))
  for (int64_t i = 0; i < count; i++) {
    if (i + kAhead < count) ask_for(target + rows[i + kAhead] * bytes, bytes);
    std::memset(target + rows[i] * bytes, 0, bytes);
  }
}
