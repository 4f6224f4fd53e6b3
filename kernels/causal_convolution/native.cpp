// Causal depthwise convolution on a CPU, each way in one pass. L pieces of M = S/L positions, B
// sequences, D channels, K taps; x (S, B, D), weight (K, D), history (L, K-1, B, D) or null, reach
// (S, B) or null.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "../native/numbers.h"

namespace {

constexpr int64_t kChannels = 256;  // of a thread's block in backward: they stay in cache
constexpr int64_t kRows = 64;       // whose gradients of the weight are summed before the rest

struct Sizes {
  int64_t pieces, positions, sequences, channels, taps;
};

// Inputs and what lies before each piece: where row `at` (below 0: of the history) of a piece is.
template <class T>
T* row_of(T* x, T* history, const Sizes& size, int64_t piece, int64_t at, int64_t sequence) {
  if (at >= 0)
    return x + ((piece * size.positions + at) * size.sequences + sequence) * size.channels;
  if (!history) return nullptr;
  const int64_t before = piece * (size.taps - 1) + size.taps - 1 + at;
  return history + (before * size.sequences + sequence) * size.channels;
}

template <class T>
void forward(const T* x, const float* weight, const T* history, const int64_t* reach, T* out,
             const Sizes& size, int threads) {
  const int64_t channels = size.channels;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> sums(channels);
#pragma omp for
    for (int64_t row = 0; row < size.pieces * size.positions * size.sequences; row++) {
      const int64_t sequence = row % size.sequences, step = row / size.sequences;
      const int64_t piece = step / size.positions, position = step % size.positions;
      float* __restrict sum = sums.data();
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (int64_t tap = 0; tap < size.taps; tap++) {
        const int64_t back = size.taps - 1 - tap;
        if (reach && reach[row] < back) continue;
        const T* __restrict from = row_of(x, history, size, piece, position - back, sequence);
        if (!from) continue;
        const float* __restrict scale = weight + tap * channels;
        for (int64_t d = 0; d < channels; d++) sum[d] += scale[d] * to_float(from[d]);
      }
      for (int64_t d = 0; d < channels; d++) out[row * channels + d] = rounded<T>(sum[d]);
    }
  }
}

// Sums of the weight's gradient of one block of channels, in parts.
class WeightGradient {
 public:
  explicit WeightGradient(int64_t taps) : part_(taps * kChannels), total_(taps * kChannels) {}

  float* part(int64_t tap) { return part_.data() + tap * kChannels; }

  void end_row() {
    if (++rows_ % kRows == 0) fold();
  }

  void write(float* grad, int64_t taps, int64_t channels, int64_t first, int64_t count) {
    fold();
    for (int64_t tap = 0; tap < taps; tap++)
      std::copy_n(total_.data() + tap * kChannels, count, grad + tap * channels + first);
  }

 private:
  void fold() {
    for (size_t i = 0; i < total_.size(); i++) total_[i] += part_[i];
    std::fill(part_.begin(), part_.end(), 0.0f);
  }

  std::vector<float> part_, total_;
  int64_t rows_ = 0;
};

// A thread has blocks of channels of its own: every sum is in the order of rows.
template <class T>
void backward(const T* grad, const T* x, const float* weight, const T* history,
              const int64_t* reach, T* grad_x, T* grad_history, float* grad_weight,
              const Sizes& size, int threads) {
  const int64_t channels = size.channels;
#pragma omp parallel for num_threads(threads)
  for (int64_t first = 0; first < channels; first += kChannels) {
    const int64_t count = std::min(kChannels, channels - first);
    WeightGradient of_weight(size.taps);
    float sum[kChannels];
    for (int64_t piece = 0; piece < size.pieces; piece++)
      for (int64_t at = history ? 1 - size.taps : 0; at < size.positions; at++)
        for (int64_t sequence = 0; sequence < size.sequences; sequence++) {
          const T* __restrict from = row_of(x, history, size, piece, at, sequence) + first;
          std::fill_n(sum, kChannels, 0.0f);
          for (int64_t tap = 0; tap < size.taps; tap++) {
            const int64_t back = size.taps - 1 - tap, seen_at = at + back;
            if (seen_at < 0 || seen_at >= size.positions) continue;
            const int64_t row = (piece * size.positions + seen_at) * size.sequences + sequence;
            if (reach && reach[row] < back) continue;
            const T* __restrict out = grad + row * channels + first;
            const float* __restrict scale = weight + tap * channels + first;
            float* __restrict part = of_weight.part(tap);
            for (int64_t d = 0; d < count; d++) {
              const float value = to_float(out[d]);
              sum[d] += scale[d] * value;
              part[d] += to_float(from[d]) * value;
            }
          }
          T* __restrict to = row_of(grad_x, grad_history, size, piece, at, sequence) + first;
          for (int64_t d = 0; d < count; d++) to[d] = rounded<T>(sum[d]);
          of_weight.end_row();
        }
    of_weight.write(grad_weight, size.taps, channels, first, count);
  }
}

// history (K-1, B, D): x (B, D) takes the last place in it, the others move up by one.
template <class T>
void step(const T* x, const float* weight, T* history, T* out, int64_t sequences, int64_t channels,
          int64_t taps, int threads) {
  const int64_t stride = sequences * channels;
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < stride; i++) {
    const int64_t d = i % channels;
    float sum = 0.0f;
    for (int64_t tap = 0; tap < taps - 1; tap++)
      sum += weight[tap * channels + d] * to_float(history[tap * stride + i]);
    sum += weight[(taps - 1) * channels + d] * to_float(x[i]);
    for (int64_t tap = 0; tap < taps - 1; tap++)
      history[tap * stride + i] = tap + 2 < taps ? history[(tap + 1) * stride + i] : x[i];
    out[i] = rounded<T>(sum);
  }
}

}  // namespace

#define CONVOLUTION(NAME, T)                                                                      \
  extern "C" void convolution_forward_##NAME(                                                     \
      const T* x, const float* weight, const T* history, const int64_t* reach, T* out,            \
      int64_t pieces, int64_t positions, int64_t sequences, int64_t channels, int64_t taps,       \
      int64_t threads) {                                                                          \
    forward(x, weight, history, reach, out, {pieces, positions, sequences, channels, taps},       \
            static_cast<int>(threads));                                                           \
  }                                                                                               \
  extern "C" void convolution_backward_##NAME(                                                    \
      const T* grad, const T* x, const float* weight, const T* history, const int64_t* reach,     \
      T* grad_x, T* grad_history, float* grad_weight, int64_t pieces, int64_t positions,          \
      int64_t sequences, int64_t channels, int64_t taps, int64_t threads) {                       \
    backward(grad, x, weight, history, reach, grad_x, grad_history, grad_weight,                  \
             {pieces, positions, sequences, channels, taps}, static_cast<int>(threads));          \
  }                                                                                               \
  extern "C" void convolution_step_##NAME(const T* x, const float* weight, T* history, T* out,    \
                                          int64_t sequences, int64_t channels, int64_t taps,      \
                                          int64_t threads) {                                      \
    step(x, weight, history, out, sequences, channels, taps, static_cast<int>(threads));          \
  }

CONVOLUTION(float32, float)
CONVOLUTION(bfloat16, bfloat16)
