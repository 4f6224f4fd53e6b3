// Statistics of a forward on a CPU, in one pass. Letters as in reference.py. One thread: it takes
// less time than to start others.
#include <cmath>
#include <cstdint>
#include <vector>

#include "../native/numbers.h"
#include "../native/rows.h"

namespace {

void count(const int64_t* addresses, int32_t* hits, int64_t reads, int64_t num_values, int64_t own,
           int64_t shared, int64_t stride) {
  for (int64_t i = 0; i < reads; i++) {
    int64_t row = addresses[i] % num_values;
    if (row < 0) row += num_values;
    if (shared) {
      row = row * stride % num_values;
      if (row >= own) row = own + row % shared;
    }
    hits[row]++;
  }
}

template <class T>
double deviation(const T* output, int64_t size) {
  double sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum, squares)
  for (int64_t i = 0; i < size; i++) {
    const double x = to_float(output[i]);
    sum += x;
    squares += x * x;
  }
  const double variance = (squares - sum * sum / size) / (size - 1);
  return variance < 0 ? 0 : std::sqrt(variance);
}

// Of every `apart`-th of query (T, pairs, width).
template <class T>
double cosine(const T* query, int64_t tokens, int64_t apart, int64_t pairs, int64_t width) {
  std::vector<float> sums(pairs * width);
  int64_t compared = 0;
  for (int64_t t = 0; t < tokens; t += apart, compared++)
    for (int64_t p = 0; p < pairs; p++) {
      const T* row = query + (t * pairs + p) * width;
      const float length = std::sqrt(dot(row, row, width));
      add(sums.data() + p * width, row, 1.0f / (length < 1e-12f ? 1e-12f : length), width);
    }
  double found = 0;
  for (int64_t p = 0; p < pairs; p++) {
    const float* sum = sums.data() + p * width;
    found += dot(sum, sum, width) - compared;
  }
  const int64_t others = compared * (compared - 1);
  return found / pairs / (others > 1 ? others : 1);
}

template <class T>
void statistics(const T* output, const T* query, const float* scores, const int64_t* addresses,
                float* sums, int32_t* hits, int64_t size, int64_t tokens, int64_t apart,
                int64_t pairs, int64_t width, int64_t picks, int64_t cores, int64_t topk,
                int64_t num_values, int64_t own, int64_t shared, int64_t stride) {
  double best = 0, every = 0;
  for (int64_t pick = 0; pick < tokens * picks; pick++) {
    double sum = 0;
    for (int64_t c = 0; c < cores; c++) sum += scores[pick * cores + c];
    every += sum;
    if (pick % picks % topk == 0) best += sum;
  }
  sums[0] += best / (tokens * ((picks + topk - 1) / topk) * cores);
  sums[1] += every / (tokens * picks * cores);
  sums[2] += deviation(output, size);
  sums[3] += cosine(query, tokens, apart, pairs, width);
  count(addresses, hits, tokens * picks, num_values, own, shared, stride);
}

}  // namespace

#define STATISTICS(NAME, T)                                                                       \
  extern "C" void read_statistics_##NAME(                                                         \
      const T* output, const T* query, const float* scores, const int64_t* addresses,             \
      float* sums, int32_t* hits, int64_t size, int64_t tokens, int64_t apart, int64_t pairs,     \
      int64_t width, int64_t picks, int64_t cores, int64_t topk, int64_t num_values, int64_t own, \
      int64_t shared, int64_t stride, int64_t) {                                                  \
    statistics(output, query, scores, addresses, sums, hits, size, tokens, apart, pairs, width,   \
               picks, cores, topk, num_values, own, shared, stride);                              \
  }

STATISTICS(float32, float)
STATISTICS(bfloat16, bfloat16)
