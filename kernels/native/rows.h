// What lookups do with a row of a table, in float.
#pragma once
#include <algorithm>
#include <cstdint>

#include "numbers.h"

constexpr int64_t kAhead = 8;  // picks whose rows are asked for before they are needed
constexpr int64_t kLine = 64;    // bytes
constexpr int64_t kAsked = 256;  // bytes, behind which a processor reads on by itself

// The row's first lines: with all of them, more would be asked for than can be under way.
template <class T>
inline void ask_for(const T* row, int64_t width) {
  const char* bytes = reinterpret_cast<const char*>(row);
  const int64_t end = std::min(kAsked, width * static_cast<int64_t>(sizeof(T)));
  for (int64_t i = 0; i < end; i += kLine) __builtin_prefetch(bytes + i);
}

template <class A, class B>
inline float dot(const A* __restrict a, const B* __restrict b, int64_t width) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < width; i++) sum += to_float(a[i]) * to_float(b[i]);
  return sum;
}

template <class T>
inline void add(float* __restrict to, const T* __restrict row, float weight, int64_t width) {
#pragma omp simd
  for (int64_t i = 0; i < width; i++) to[i] += weight * to_float(row[i]);
}

// As add, of the codes of a row and what multiplies them; values are rounded as T.
template <class T, class Code>
inline void add_coded(float* __restrict to, const Code* __restrict codes, float scale, float weight,
                      int64_t width) {
#pragma omp simd
  for (int64_t i = 0; i < width; i++)
    to[i] += weight * to_float(rounded<T>(to_float(codes[i]) * scale));
}

// dot(from, row), and adds weight times `from` to `to`.
template <class T>
inline float dot_and_add(const T* __restrict from, const T* __restrict row, float* __restrict to,
                         float weight, int64_t width) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < width; i++) {
    const float x = to_float(from[i]);
    sum += x * to_float(row[i]);
    to[i] += weight * x;
  }
  return sum;
}
