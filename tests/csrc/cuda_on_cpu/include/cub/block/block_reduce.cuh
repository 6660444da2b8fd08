// cub::BlockReduce: as in CUB, thread 0 alone gets the sum.
#pragma once
#include "cuda_on_cpu.h"

namespace cub {
template <typename T, int N>
struct BlockReduce {
  struct TempStorage {
    T slots[N];
  };
  TempStorage& storage;
  explicit BlockReduce(TempStorage& s) : storage(s) {}
  T Sum(T mine) {
    storage.slots[threadIdx.x] = mine;
    __syncthreads();
    T total{};
    if (threadIdx.x == 0)
      for (const T& slot : storage.slots) total += slot;
    return total;
  }
};
}  // namespace cub
