// Side top-m on a CPU: choice of keys from their scores, and the gradients of what was chosen.
// T tokens, H heads, S sides, N keys, R ranks, K width, m top-m; letters as in reference.py.
#include <cstdint>

#include "../native/largest.h"
#include "../native/numbers.h"

namespace {

// scores (P, R, T, N) of P pairs of a head and a side, direction (P, R); indices (T, P, m) and
// picked (T, P, R, m) are `stride` and `picked_stride` numbers apart from token to token.
template <class T>
void select(const T* scores, const float* direction, int64_t* indices, float* picked,
            int64_t pairs, int64_t tokens, int64_t ranks, int64_t keys, int64_t topk,
            int64_t stride, int64_t picked_stride, int threads) {
#pragma omp parallel num_threads(threads)
  {
    Largest largest(keys, topk);
    std::vector<float> sums(keys);
#pragma omp for collapse(2)
    for (int64_t p = 0; p < pairs; p++)
      for (int64_t t = 0; t < tokens; t++) {
        float* __restrict sum = sums.data();
        for (int64_t r = 0; r < ranks; r++) {
          const T* __restrict row = scores + ((p * ranks + r) * tokens + t) * keys;
          const float weight = direction[p * ranks + r];
          for (int64_t n = 0; n < keys; n++)
            sum[n] = r == 0 ? to_float(row[n]) * weight : sum[n] + to_float(row[n]) * weight;
        }
        int32_t* __restrict key = largest.keys();
        for (int64_t n = 0; n < keys; n++) key[n] = ordered(sum[n]);
        int64_t* best = indices + t * stride + p * topk;
        largest.select(best, false);
        float* found = picked + t * picked_stride + p * ranks * topk;
        for (int64_t r = 0; r < ranks; r++)
          for (int64_t k = 0; k < topk; k++)
            found[r * topk + k] = to_float(scores[((p * ranks + r) * tokens + t) * keys + best[k]]);
      }
  }
}

}  // namespace

#define SELECT(NAME, T)                                                                           \
  extern "C" void side_select_##NAME(const T* scores, const float* direction, int64_t* indices,   \
                                     float* picked, int64_t pairs, int64_t tokens, int64_t ranks, \
                                     int64_t keys, int64_t topk, int64_t stride,                  \
                                     int64_t picked_stride, int64_t threads) {                    \
    select(scores, direction, indices, picked, pairs, tokens, ranks, keys, topk, stride,          \
           picked_stride, static_cast<int>(threads));                                             \
  }

SELECT(float32, float)
SELECT(bfloat16, bfloat16)

// grad (T, P, R, m) of the picked scores, indices (T, P, m), query (T, P, R, K), keys
// (P, N, R, K), P = H*S pairs. Fills query_grad as query and adds to key_grad as keys; either may
// be null. A thread has pairs of its own: every sum is in the order of tokens.
extern "C" void side_backward(const float* grad, const int64_t* indices, const float* query,
                              const float* keys, float* query_grad, float* key_grad,
                              int64_t tokens, int64_t pairs, int64_t ranks, int64_t topk,
                              int64_t num_keys, int64_t width, int64_t threads) {
  const int64_t row = ranks * width;
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static, 1)
  for (int64_t pair = 0; pair < pairs; pair++)
    for (int64_t t = 0; t < tokens; t++) {
      const int64_t at = t * pairs + pair;
      if (query_grad) std::fill(query_grad + at * row, query_grad + (at + 1) * row, 0.0f);
      for (int64_t k = 0; k < topk; k++) {
        const int64_t key = (pair * num_keys + indices[at * topk + k]) * row;
        for (int64_t r = 0; r < ranks; r++) {
          const float weight = grad[(at * ranks + r) * topk + k];
          if (query_grad) {
            const float* __restrict from = keys + key + r * width;
            float* __restrict to = query_grad + at * row + r * width;
#pragma omp simd
            for (int64_t i = 0; i < width; i++) to[i] += weight * from[i];
          }
          if (key_grad) {
            const float* __restrict from = query + at * row + r * width;
            float* __restrict to = key_grad + key + r * width;
#pragma omp simd
            for (int64_t i = 0; i < width; i++) to[i] += weight * from[i];
          }
        }
      }
    }
}
