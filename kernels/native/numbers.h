// Numbers as tables hold them, read and written as float.
#pragma once
#include <cstdint>
#include <cstring>

struct bfloat16 {
  uint16_t bits;
};

struct e4m3 {
  uint8_t bits;
};

inline float to_float(float x) { return x; }

inline float to_float(int8_t x) { return x; }

// NaN, in no table, becomes 480. Below 2^-6 there are 8 steps from zero.
inline float to_float(e4m3 x) {
  const uint32_t size = x.bits & 0x7fu;
  const uint32_t bits = (size << 20) + (120u << 23);
  float normal;
  std::memcpy(&normal, &bits, sizeof normal);
  const float value = size < 8 ? static_cast<float>(size) * 0x1p-9f : normal;
  return x.bits & 0x80u ? -value : value;
}

inline float to_float(bfloat16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
inline T rounded(float x);

template <>
inline float rounded<float>(float x) {
  return x;
}

// To the nearest, ties to even, as PyTorch rounds; NaN stays NaN.
template <>
inline bfloat16 rounded<bfloat16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  uint16_t nearest = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  return {x != x ? static_cast<uint16_t>(0x7fc0) : nearest};
}
