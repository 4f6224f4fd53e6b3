// Side top-m on a CPU: choice of keys from their scores, and the gradients of what was chosen.
// T tokens, H heads, S sides, N keys, R ranks, K width, m top-m; letters as in reference.py.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "../native/largest.h"
#include "../native/numbers.h"
#include "../native/rows.h"

namespace {

// Where a score lies: numbers from pair to pair, from rank to rank, and so on.
struct Apart {
  int64_t pair, rank, token, key;
};

// scores of P pairs of a head and a side, direction (P, R); indices (T, P, m) and picked
// (T, P, R, m) are `stride` and `picked_stride` numbers apart from token to token. known: apart.key,
// for the compiler; 0: any.
template <int64_t known, class T>
void select(const T* scores, const float* direction, int64_t* indices, float* picked,
            int64_t pairs, int64_t tokens, int64_t ranks, int64_t keys, int64_t topk,
            int64_t stride, int64_t picked_stride, const Apart& apart, int threads) {
  const int64_t step = known ? known : apart.key;
#pragma omp parallel num_threads(threads)
  {
    Largest largest(keys, topk);
    std::vector<float> sums(keys);
#pragma omp for collapse(2)
    for (int64_t p = 0; p < pairs; p++)
      for (int64_t t = 0; t < tokens; t++) {
        const T* own = scores + p * apart.pair + t * apart.token;
        float* __restrict sum = sums.data();
        int32_t* __restrict key = largest.keys();
        for (int64_t r = 0; r < ranks; r++) {
          const T* __restrict row = own + r * apart.rank;
          const float weight = direction[p * ranks + r];
          if (r + 1 < ranks)
            for (int64_t n = 0; n < keys; n++)
              sum[n] = (r ? sum[n] : 0.0f) + to_float(row[n * step]) * weight;
          else
            for (int64_t n = 0; n < keys; n++)
              key[n] = ordered((r ? sum[n] : 0.0f) + to_float(row[n * step]) * weight);
        }
        int64_t* best = indices + t * stride + p * topk;
        largest.select(best, false);
        float* found = picked + t * picked_stride + p * ranks * topk;
        for (int64_t r = 0; r < ranks; r++)
          for (int64_t k = 0; k < topk; k++)
            found[r * topk + k] = to_float(own[r * apart.rank + best[k] * step]);
      }
  }
}

// Which query a pair of a head and a side reads, and which rank of it.
struct Sharing {
  int64_t sides, queries, each, ranks;  // each: heads that read one query; ranks: 1 serves all

  int64_t row(int64_t pair) const { return pair / sides / each * sides + pair % sides; }
  int64_t rank(int64_t r) const { return ranks == 1 ? 0 : r; }
};

// Fills query_grad as query: of a token, the sum over the keys that its pairs have picked.
template <class T>
void query_gradient(const float* grad, const int64_t* indices, const T* keys, T* query_grad,
                    const Sharing& sharing, int64_t tokens, int64_t pairs, int64_t ranks,
                    int64_t topk, int64_t num_keys, int64_t width, int threads) {
  const int64_t rows = sharing.queries * sharing.sides, row = sharing.ranks * width;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> sums(rows * row);
#pragma omp for
    for (int64_t t = 0; t < tokens; t++) {
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (int64_t p = 0; p < pairs; p++) {
        const int64_t at = t * pairs + p;
        float* to = sums.data() + sharing.row(p) * row;
        for (int64_t k = 0; k < topk; k++) {
          const T* key = keys + (p * num_keys + indices[at * topk + k]) * ranks * width;
          for (int64_t r = 0; r < ranks; r++)
            add(to + sharing.rank(r) * width, key + r * width, grad[(at * ranks + r) * topk + k],
                width);
        }
      }
      T* __restrict result = query_grad + t * rows * row;
      for (int64_t i = 0; i < rows * row; i++) result[i] = rounded<T>(sums[i]);
    }
  }
}

// Fills key_grad as keys. A thread has pairs of its own: every sum is in the order of tokens.
template <class T>
void key_gradient(const float* grad, const int64_t* indices, const T* query, T* key_grad,
                  const Sharing& sharing, int64_t tokens, int64_t pairs, int64_t ranks,
                  int64_t topk, int64_t num_keys, int64_t width, int threads) {
  const int64_t size = num_keys * ranks * width, row = sharing.ranks * width;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> sums(size), from(row);
#pragma omp for schedule(static, 1)
    for (int64_t p = 0; p < pairs; p++) {
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (int64_t t = 0; t < tokens; t++) {
        const int64_t at = t * pairs + p;
        const T* read = query + (t * sharing.queries * sharing.sides + sharing.row(p)) * row;
        for (int64_t i = 0; i < row; i++) from[i] = to_float(read[i]);
        for (int64_t k = 0; k < topk; k++) {
          float* to = sums.data() + indices[at * topk + k] * ranks * width;
          for (int64_t r = 0; r < ranks; r++)
            add(to + r * width, from.data() + sharing.rank(r) * width,
                grad[(at * ranks + r) * topk + k], width);
        }
      }
      T* __restrict result = key_grad + p * size;
      for (int64_t i = 0; i < size; i++) result[i] = rounded<T>(sums[i]);
    }
  }
}

}  // namespace

#define SELECT(NAME, T)                                                                           \
  extern "C" void side_select_##NAME(                                                             \
      const T* scores, const float* direction, int64_t* indices, float* picked, int64_t pairs,    \
      int64_t tokens, int64_t ranks, int64_t keys, int64_t topk, int64_t stride,                  \
      int64_t picked_stride, int64_t pair, int64_t rank, int64_t token, int64_t key,              \
      int64_t threads) {                                                                          \
    const Apart apart{pair, rank, token, key};                                                    \
    const auto chosen = key == 1 ? select<1, T> : key == 2 ? select<2, T> : select<0, T>;         \
    chosen(scores, direction, indices, picked, pairs, tokens, ranks, keys, topk, stride,          \
           picked_stride, apart, static_cast<int>(threads));                                      \
  }

SELECT(float32, float)
SELECT(bfloat16, bfloat16)

// grad (T, P, R, m) of the picked scores, indices (T, P, m), query (T, Q, S, R or 1, K), keys
// (P, N, R, K), P = H*S pairs. Fills query_grad as query and key_grad as keys; either may be null.
#define BACKWARD(NAME, T)                                                                         \
  extern "C" void side_backward_##NAME(const T* query, const T* keys, const float* grad,          \
                                       const int64_t* indices, T* query_grad, T* key_grad,        \
                                       int64_t tokens, int64_t pairs, int64_t ranks,              \
                                       int64_t topk, int64_t num_keys, int64_t width,             \
                                       int64_t sides, int64_t queries, int64_t each,              \
                                       int64_t query_ranks, int64_t threads) {                    \
    const Sharing sharing{sides, queries, each, query_ranks};                                     \
    if (query_grad)                                                                               \
      query_gradient(grad, indices, keys, query_grad, sharing, tokens, pairs, ranks, topk,        \
                     num_keys, width, static_cast<int>(threads));                                 \
    if (key_grad)                                                                                 \
      key_gradient(grad, indices, query, key_grad, sharing, tokens, pairs, ranks, topk, num_keys, \
                   width, static_cast<int>(threads));                                             \
  }

BACKWARD(float32, float)
BACKWARD(bfloat16, bfloat16)
