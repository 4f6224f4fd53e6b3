// The lookup behind pre-values on a CPU: picks are read in order, each one's two rows once a pass.
// T tokens, P picks per token, C cores, E groups, V value dim, K pre-value dim; as in reference.py.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../native/numbers.h"
#include "../native/rows.h"

namespace {

struct Sizes {
  int64_t tokens, picks, cores, num_groups, width, pre_width;
};

// Numbered as in activations.py.
inline float activated(float x, int64_t act) {
  if (act == 1) return std::max(x, 0.0f);
  if (act == 2) return 0.5f * x * std::erfc(-x * 0.70710678f);
  if (act == 3) return x / (1.0f + std::exp(-x));
  return x;
}

template <class T>
void pool(const T* table, const T* pre_table, const int64_t* rows, const int64_t* groups,
          const float* scores, const T* x, T* out, float* dots, const Sizes& of, int64_t act,
          int threads) {
  const int64_t slice = of.width / of.cores, end = of.tokens * of.picks;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> sums(of.num_groups * of.width);
#pragma omp for
    for (int64_t t = 0; t < of.tokens; t++) {
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (int64_t p = t * of.picks; p < (t + 1) * of.picks; p++) {
        if (p + kAhead < end) {
          ask_for(pre_table + rows[p + kAhead] * of.pre_width, of.pre_width);
          ask_for(table + rows[p + kAhead] * of.width, of.width);
        }
        dots[p] = dot(pre_table + rows[p] * of.pre_width, x + t * of.pre_width, of.pre_width);
        const float gate = activated(dots[p], act);
        for (int64_t c = 0; c < of.cores; c++)
          add(sums.data() + groups[p] * of.width + c * slice,
              table + rows[p] * of.width + c * slice, scores[p * of.cores + c] * gate, slice);
      }
      T* __restrict result = out + t * of.num_groups * of.width;
      for (int64_t i = 0; i < of.num_groups * of.width; i++) result[i] = rounded<T>(sums[i]);
    }
  }
}

// All that a pick's two rows are read for.
template <class T>
struct Backward {
  const T *grad, *table, *pre_table;
  const int64_t *rows, *groups;
  const float* scores;
  const T* x;
  const float *gates, *slopes;
  float *target, *pre_target, *score_grad, *x_grad, *dot_grad;
  Sizes of;

  const T* grad_of(int64_t t, int64_t p) const {
    return grad + (t * of.num_groups + groups[p]) * of.width;
  }

  // Gradients of pick p's scores and product.
  void score(int64_t t, int64_t p) const {
    const int64_t slice = of.width / of.cores;
    float sum = 0.0f;
    for (int64_t c = 0; c < of.cores; c++) {
      const float by_weight =
          dot(grad_of(t, p) + c * slice, table + rows[p] * of.width + c * slice, slice);
      score_grad[p * of.cores + c] = by_weight * gates[p];
      sum += by_weight * scores[p * of.cores + c];
    }
    dot_grad[p] = sum * slopes[p];
  }

  // Its part of those of the token's inputs.
  void input(int64_t t, int64_t p) const {
    add(x_grad + t * of.pre_width, pre_table + rows[p] * of.pre_width, dot_grad[p], of.pre_width);
  }

  // Gradient of its value.
  void add_value(int64_t t, int64_t p) const {
    const int64_t slice = of.width / of.cores;
    for (int64_t c = 0; target && c < of.cores; c++)
      add(target + rows[p] * of.width + c * slice, grad_of(t, p) + c * slice,
          scores[p * of.cores + c] * gates[p], slice);
  }

  // Gradient of its pre-value.
  void add_pre_value(int64_t t, int64_t p) const {
    if (pre_target)
      add(pre_target + rows[p] * of.pre_width, x + t * of.pre_width, dot_grad[p], of.pre_width);
  }

  void ask_values(int64_t p) const { ask_for(table + rows[p] * of.width, of.width); }

  void ask_pre_values(int64_t p) const {
    ask_for(pre_table + rows[p] * of.pre_width, of.pre_width);
  }

  void ask_value_target(int64_t p) const {
    if (target) ask_for(target + rows[p] * of.width, of.width);
  }

  void ask_pre_target(int64_t p) const {
    if (pre_target) ask_for(pre_target + rows[p] * of.pre_width, of.pre_width);
  }
};

// A thread has tokens of its own, then rows of its own: sums are in the order of picks in any case.
// A token's values come before its pre-values: with all four rows of a pick at once, what is asked
// for ahead would not fit into the first cache.
template <class T>
void backward(const Backward<T>& b, int threads) {
  const int64_t tokens = b.of.tokens, picks = b.of.picks, end = tokens * picks;
  const bool alone = threads == 1;
  std::fill(b.x_grad, b.x_grad + tokens * b.of.pre_width, 0.0f);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < tokens; t++) {
    const int64_t first = t * picks, last = first + picks;
    for (int64_t p = first; p < last; p++) {
      if (p + kAhead < end) {
        b.ask_values(p + kAhead);
        if (alone) b.ask_value_target(p + kAhead);
      }
      b.score(t, p);
      if (alone) b.add_value(t, p);
    }
    for (int64_t p = first; p < last; p++) {
      if (p + kAhead < end) {
        b.ask_pre_values(p + kAhead);
        if (alone) b.ask_pre_target(p + kAhead);
      }
      b.input(t, p);
      if (alone) b.add_pre_value(t, p);
    }
  }
  if (alone || !(b.target || b.pre_target)) return;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t share = 0; share < threads; share++)
    for (int64_t p = 0; p < end; p++)
      if (b.rows[p] % threads == share) {
        if (p + kAhead < end) {
          b.ask_value_target(p + kAhead);
          b.ask_pre_target(p + kAhead);
        }
        b.add_value(p / picks, p);
        b.add_pre_value(p / picks, p);
      }
}

}  // namespace

#define PREVALUED(NAME, T)                                                                        \
  extern "C" void prevalued_pool_##NAME(                                                          \
      const T* table, const T* pre_table, const int64_t* rows, const int64_t* groups,             \
      const float* scores, const T* x, T* out, float* dots, int64_t tokens, int64_t picks,        \
      int64_t cores, int64_t num_groups, int64_t width, int64_t pre_width, int64_t act,           \
      int64_t threads) {                                                                          \
    pool(table, pre_table, rows, groups, scores, x, out, dots,                                    \
         {tokens, picks, cores, num_groups, width, pre_width}, act, static_cast<int>(threads));   \
  }                                                                                               \
  extern "C" void prevalued_backward_##NAME(                                                      \
      const T* grad, const T* table, const T* pre_table, const int64_t* rows,                     \
      const int64_t* groups, const float* scores, const T* x, const float* gates,                 \
      const float* slopes, float* target, float* pre_target, float* score_grad, float* x_grad,    \
      float* dot_grad, int64_t tokens, int64_t picks, int64_t cores, int64_t num_groups,          \
      int64_t width, int64_t pre_width, int64_t threads) {                                        \
    backward<T>({grad, table, pre_table, rows, groups, scores, x, gates, slopes, target,          \
                 pre_target, score_grad, x_grad, dot_grad,                                        \
                 {tokens, picks, cores, num_groups, width, pre_width}},                           \
                static_cast<int>(threads));                                                       \
  }

PREVALUED(float32, float)
PREVALUED(bfloat16, bfloat16)
