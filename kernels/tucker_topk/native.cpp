// Tucker grid top-m on a CPU: a token's grid of m x m sums, its m largest, their scores by core.
// T tokens, H heads, R ranks, m keys a side, B best pairs, C cores; letters as in reference.py.
#include <cstdint>

#include "../native/largest.h"

// scores (T, H, 2, R, m), keys (T, H, 2, m), cores (C, H, R, R), total (H, R, R): the cores' sum.
// Fills positions and addresses (T, H, B), best first, and best (T, H, B, C).
extern "C" void grid_select(const float* scores, const int64_t* keys, const float* cores,
                            const float* total, int64_t* positions, int64_t* addresses,
                            float* best, int64_t tokens, int64_t heads, int64_t ranks,
                            int64_t topk, int64_t num_best, int64_t num_cores,
                            int64_t keys_per_side, int64_t threads) {
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    Largest largest(topk * topk, num_best);
    std::vector<float> sums(topk);
#pragma omp for
    for (int64_t at = 0; at < tokens * heads; at++) {
      const int64_t head = at % heads;
      const float* row = scores + at * 2 * ranks * topk;
      const float* column = row + ranks * topk;
      for (int64_t i = 0; i < topk; i++) {
        float* __restrict sum = sums.data();
        std::fill(sums.begin(), sums.end(), 0.0f);
        for (int64_t b = 0; b < ranks; b++) {
          float weight = 0.0f;
          for (int64_t a = 0; a < ranks; a++)
            weight += row[a * topk + i] * total[(head * ranks + a) * ranks + b];
          const float* __restrict other = column + b * topk;
          for (int64_t j = 0; j < topk; j++) sum[j] += weight * other[j];
        }
        int32_t* __restrict key = largest.keys() + i * topk;
        for (int64_t j = 0; j < topk; j++) key[j] = ordered(sum[j]);
      }
      int64_t* chosen = positions + at * num_best;
      largest.select(chosen, true);
      const int64_t* row_keys = keys + at * 2 * topk;
      for (int64_t k = 0; k < num_best; k++) {
        const int64_t i = chosen[k] / topk, j = chosen[k] % topk;
        addresses[at * num_best + k] = row_keys[i] * keys_per_side + row_keys[topk + j];
        for (int64_t c = 0; c < num_cores; c++) {
          const float* core = cores + (c * heads + head) * ranks * ranks;
          float score = 0.0f;
          for (int64_t a = 0; a < ranks; a++)
            for (int64_t b = 0; b < ranks; b++)
              score += row[a * topk + i] * core[a * ranks + b] * column[b * topk + j];
          best[(at * num_best + k) * num_cores + c] = score;
        }
      }
    }
  }
}

// grad_best (T, H, B, C). Adds to grad_scores, as scores, and to by_token (T, H, C, R, R): a
// token's part of the gradient of the cores.
extern "C" void grid_backward(const float* grad_best, const float* scores, const float* cores,
                              const int64_t* positions, float* grad_scores, float* by_token,
                              int64_t tokens, int64_t heads, int64_t ranks, int64_t topk,
                              int64_t num_best, int64_t num_cores, int64_t threads) {
  const int64_t square = ranks * ranks;
#pragma omp parallel for num_threads(static_cast<int>(threads))
  for (int64_t at = 0; at < tokens * heads; at++) {
    const int64_t head = at % heads;
    const float* row = scores + at * 2 * ranks * topk;
    const float* column = row + ranks * topk;
    float* row_grad = grad_scores + at * 2 * ranks * topk;
    float* column_grad = row_grad + ranks * topk;
    for (int64_t k = 0; k < num_best; k++) {
      const int64_t position = positions[at * num_best + k];
      const int64_t i = position / topk, j = position % topk;
      const float* grad = grad_best + (at * num_best + k) * num_cores;
      for (int64_t a = 0; a < ranks; a++)
        for (int64_t b = 0; b < ranks; b++) {
          const float left = row[a * topk + i], right = column[b * topk + j];
          float weight = 0.0f;
          for (int64_t c = 0; c < num_cores; c++) {
            weight += grad[c] * cores[(c * heads + head) * square + a * ranks + b];
            by_token[(at * num_cores + c) * square + a * ranks + b] += grad[c] * left * right;
          }
          row_grad[a * topk + i] += weight * right;
          column_grad[b * topk + j] += weight * left;
        }
    }
  }
}
