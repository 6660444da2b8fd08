// cub::BlockScan.
#pragma once
#include "cuda_on_cpu.h"

namespace cub {
template <typename T, int N>
struct BlockScan {
  struct TempStorage {
    T slots[N];
  };
  TempStorage& storage;
  explicit BlockScan(TempStorage& s) : storage(s) {}
  void ExclusiveSum(T mine, T& before, T& total) {
    storage.slots[threadIdx.x] = mine;
    __syncthreads();
    before = total = T{};
    for (int i = 0; i < N; ++i) {
      if (i == static_cast<int>(threadIdx.x)) before = total;
      total += storage.slots[i];
    }
  }
};
}  // namespace cub
