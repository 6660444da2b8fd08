// What Hopper adds, as functions: barriers that count bytes, the bulk tensor copy engine, warpgroup products of e4m3 codes.
// PTX ISA 8.x: mbarrier, cp.async.bulk.tensor, wgmma. tests/csrc/cuda_on_cpu has the same functions for a CPU.
#pragma once

#include <c10/cuda/CUDAException.h>
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace m2 {

using mbarrier_t = uint64_t;
using TensorMap = CUtensorMap;
constexpr int kWarpgroup = 128;

// ---- device -----------------------------------------------------------------------------------------------------------------------

__device__ inline uint32_t shared_address(const void* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

__device__ inline void mbarrier_init(mbarrier_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}

// After the last init, before the block's __syncthreads.
__device__ inline void mbarrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void mbarrier_arrive(mbarrier_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and makes the phase wait for so many bytes of copies.
__device__ inline void mbarrier_arrive_expecting(mbarrier_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

// Until the phase of this parity is over; the first has parity 0.
__device__ inline void mbarrier_wait(mbarrier_t* barrier, uint32_t parity) {
  const uint32_t address = shared_address(barrier);
  uint32_t over = 0;
  while (!over) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(over)
        : "r"(address), "r"(parity)
        : "memory");
  }
}

// One thread: the box at (column, row) of the map to shared memory, 128-byte rows swizzled; outside the matrix zeros.
__device__ inline void copy_box(void* to, const TensorMap* map, mbarrier_t* barrier, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row)
      : "memory");
}

__device__ inline void prefetch_map(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

// Of a matrix with rows of 128 swizzled bytes, a multiple of 1024 bytes from the start of shared memory or 32 k bytes along its rows:
// groups of 8 rows are 1024 bytes apart.
__device__ inline uint64_t matrix_descriptor(const void* start) {
  constexpr uint64_t kSwizzle128 = 1ull << 62, kRowGroups = static_cast<uint64_t>(1024 >> 4) << 32, kIgnored = 1ull << 16;
  return kSwizzle128 | kRowGroups | kIgnored | ((shared_address(start) & 0x3ffff) >> 4);
}

__device__ inline void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Ends a batch of products and waits for it; the compiler may not read the sums before.
template <int N>
__device__ inline void wgmma_finish(float (&sums)[N]) {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// A warpgroup: sums [64, 128] (+)= a [64, 32] b [128, 32]^T of e4m3 codes. Thread t's sums[4 i + 2 r + c] is row
// 16 (t / 32) + t % 32 / 4 + 8 r, column 8 i + 2 (t % 4) + c. Valid after wgmma_finish.
__device__ inline void wgmma_e4m3(float (&sums)[64], uint64_t a, uint64_t b, bool add) {
#define M2_8(s, i) \
  "+f"(s[i]), "+f"(s[i + 1]), "+f"(s[i + 2]), "+f"(s[i + 3]), "+f"(s[i + 4]), "+f"(s[i + 5]), "+f"(s[i + 6]), "+f"(s[i + 7])
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, "
      "%28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, "
      "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, p, 1, 1;\n"
      "}"
      : M2_8(sums, 0), M2_8(sums, 8), M2_8(sums, 16), M2_8(sums, 24), M2_8(sums, 32), M2_8(sums, 40), M2_8(sums, 48), M2_8(sums, 56)
      : "l"(a), "l"(b), "r"(static_cast<int>(add)));
#undef M2_8
}

// Registers of every thread of this warpgroup from here on.
template <int kCount>
__device__ inline void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ inline void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// ---- host -------------------------------------------------------------------------------------------------------------------------

// A matrix of bytes [rows, columns] with rows `stride` bytes apart (a multiple of 16, as is the address), in boxes of 128 columns.
inline TensorMap map_of(const void* data, int64_t rows, int64_t columns, int64_t stride, int box_rows) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
    C10_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
#else
    C10_CUDA_CHECK(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found));
#endif
    TORCH_CHECK(found == cudaDriverEntryPointSuccess, "the NVIDIA driver has no cuTensorMapEncodeTiled: it is older than CUDA 12");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  TensorMap map{};
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)},
                   strides[1] = {static_cast<cuuint64_t>(stride)};
  const cuuint32_t box[2] = {128, static_cast<cuuint32_t>(box_rows)}, every[2] = {1, 1};
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(data), sizes, strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  TORCH_CHECK(result == CUDA_SUCCESS, "cuTensorMapEncodeTiled: error ", static_cast<int>(result), " for [", rows, ", ", columns, "] bytes");
  return map;
}

}  // namespace m2
