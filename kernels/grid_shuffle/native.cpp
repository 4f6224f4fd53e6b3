// The fixed shuffle on a CPU: all rounds of an address in registers. Letters as in reference.py.
#include <cstdint>

namespace {

// x modulo side: as a rule x is below twice the side, but a damaged table may hold any number.
inline int64_t wrapped(int64_t x, int64_t side) {
  if (x >= side) x -= side;
  if (static_cast<uint64_t>(x) < static_cast<uint64_t>(side)) return x;
  const int64_t rest = x % side;
  return rest < 0 ? rest + side : rest;
}

}  // namespace

// addresses and target (count); tables (rounds, side).
extern "C" void grid_shuffle(const int64_t* addresses, const int32_t* tables, int64_t* target,
                             int64_t count, int64_t rounds, int64_t side, int64_t threads) {
#pragma omp parallel for num_threads(static_cast<int>(threads))
  for (int64_t i = 0; i < count; i++) {
    int64_t row = addresses[i] / side, column = wrapped(addresses[i] % side, side);
    for (int64_t round = 0; round < rounds; round += 2) {
      row = wrapped(row + tables[round * side + column], side);
      column = wrapped(column + tables[(round + 1) * side + row], side);
    }
    target[i] = row * side + column;
  }
}
