// Lookup-reduce on a CPU: picks are read in order, each row once a pass.
// T tokens, P picks per token, C cores, E groups, V value dim; letters as in reference.py.
#include <algorithm>
#include <cstdint>
#include <vector>

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

// A token's gradients (E*V) as float: its own, or converted once for all its picks.
inline const float* as_float(const float* from, std::vector<float>&) { return from; }

inline const float* as_float(const bfloat16* from, std::vector<float>& room) {
  float* __restrict to = room.data();
  for (size_t i = 0; i < room.size(); i++) to[i] = to_float(from[i]);
  return to;
}

// Adds to target (N, V) and fills score_grad (T, P, C); either may be null. A thread keeps to rows
// of its own and, for the scores, to tokens of its own: sums are in the order of picks in any case.
template <class T>
void pool_backward(const T* grad, const T* table, const int64_t* rows, const int64_t* groups,
                   const float* scores, float* target, float* score_grad, int64_t tokens,
                   int64_t picks, int64_t cores, int64_t num_groups, int64_t width, int threads) {
  const int64_t slice = width / cores, end = tokens * picks;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t share = 0; share < threads; share++) {
    const int64_t first = tokens * share / threads, last = tokens * (share + 1) / threads;
    std::vector<float> room(num_groups * width);
    const float* of_token = nullptr;
    for (int64_t p = 0; p < end; p++) {
      const int64_t t = p / picks;
      if (p % picks == 0) of_token = as_float(grad + t * num_groups * width, room);
      const bool scored = score_grad && t >= first && t < last;
      const bool owned = target && (threads == 1 || rows[p] % threads == share);
      if (!scored && !owned) continue;
      if (p + kAhead < end) {
        if (scored) ask_for(table + rows[p + kAhead] * width, width);
        if (owned) ask_for(target + rows[p + kAhead] * width, width);
      }
      for (int64_t c = 0; c < cores; c++) {
        const float* from = of_token + groups[p] * width + c * slice;
        const int64_t at = rows[p] * width + c * slice;
        if (scored) score_grad[p * cores + c] = dot(from, table + at, slice);
        if (owned) add(target + at, from, scores[p * cores + c], slice);
      }
    }
  }
}

}  // namespace

#define LOOKUP(NAME, T)                                                                          \
  extern "C" void lookup_pool_##NAME(const T* table, const int64_t* rows, const int64_t* groups, \
                                     const float* scores, T* out, int64_t tokens, int64_t picks, \
                                     int64_t cores, int64_t num_groups, int64_t width,           \
                                     int64_t threads) {                                          \
    pool(table, rows, groups, scores, out, tokens, picks, cores, num_groups, width,              \
         static_cast<int>(threads));                                                             \
  }                                                                                              \
  extern "C" void lookup_backward_##NAME(                                                        \
      const T* grad, const T* table, const int64_t* rows, const int64_t* groups,                 \
      const float* scores, float* target, float* score_grad, int64_t tokens, int64_t picks,      \
      int64_t cores, int64_t num_groups, int64_t width, int64_t threads) {                       \
    pool_backward(grad, table, rows, groups, scores, target, score_grad, tokens, picks, cores,   \
                  num_groups, width, static_cast<int>(threads));                                 \
  }

LOOKUP(float32, float)
LOOKUP(bfloat16, bfloat16)
