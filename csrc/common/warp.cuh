// What kernels of one warp or block per row share.
#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/BFloat16.h>

#include <cstdint>

namespace m2 {

constexpr int kWarpSize = 32;

__device__ inline float warp_sum(float x) {
  for (int lane = kWarpSize / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
  return x;
}

__device__ inline float warp_max(float x) {
  for (int lane = kWarpSize / 2; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lane));
  return x;
}

// Sum over a block of kThreads; every thread gets it. The order of additions is fixed.
template <int kThreads>
__device__ float block_sum(float x) {
  __shared__ float part[kThreads / kWarpSize];
  x = warp_sum(x);
  __syncthreads();  // the last call's parts have been read
  if (threadIdx.x % kWarpSize == 0) part[threadIdx.x / kWarpSize] = x;
  __syncthreads();
  float total = 0;
  for (int i = 0; i < kThreads / kWarpSize; ++i) total += part[i];
  return total;
}

// What a store and a load would leave of x.
template <typename Stored>
__device__ float rounded(float x) {
  return static_cast<float>(static_cast<Stored>(x));
}

}  // namespace m2
