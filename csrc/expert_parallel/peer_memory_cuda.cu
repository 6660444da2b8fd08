// Memory of one GPU that the other ranks of a node write to (CUDA IPC over NVLink), and the flags that say when it is written and read.
// A kernel's writes are ordered before a signal that is launched after it on its stream, and by the signal's system-wide release and
// the wait's acquire before whatever the waiting rank launches after the wait.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <torch/library.h>

#include <cuda/atomic>
#include <functional>

#include "../common/warp.cuh"
#include "expert_parallel.h"

namespace m2::expert_parallel {
namespace {

constexpr long long kPatience = 200'000'000'000;  // clock cycles, some 100 s: then a peer is dead, and an error is better than silence

struct Flags {
  int64_t* flag[kMaxRanks];
};

// ---- device -----------------------------------------------------------------------------------------------------------------------

__global__ void signal_kernel(const __grid_constant__ Flags flags, int64_t value) {
  __threadfence_system();
  cuda::atomic_ref<int64_t, cuda::thread_scope_system>(*flags.flag[threadIdx.x]).store(value, cuda::memory_order_release);
}

__global__ void wait_kernel(int64_t* flags, int64_t value) {
  const cuda::atomic_ref<int64_t, cuda::thread_scope_system> flag(flags[threadIdx.x]);
  const long long start = clock64();
  while (flag.load(cuda::memory_order_acquire) < value) {
    CUDA_KERNEL_ASSERT(clock64() - start < kPatience);
    __nanosleep(64);
  }
}

// ---- host -------------------------------------------------------------------------------------------------------------------------

at::Tensor bytes_at(void* data, int64_t bytes, c10::Device device, std::function<void(void*)> release) {
  return at::from_blob(data, {bytes}, std::move(release), at::TensorOptions().dtype(at::kByte).device(device), device);
}

// Zeros that other processes may open.
at::Tensor peer_alloc(int64_t bytes, c10::Device device) {
  TORCH_CHECK_VALUE(bytes >= 1, "bytes: ", bytes, ", need 1 or more");
  const c10::cuda::CUDAGuard guard(device);
  void* data = nullptr;
  C10_CUDA_CHECK(cudaMalloc(&data, bytes));
  at::Tensor buffer = bytes_at(data, bytes, device, [](void* p) { C10_CUDA_CHECK_WARN(cudaFree(p)); });
  C10_CUDA_CHECK(cudaMemset(data, 0, bytes));
  C10_CUDA_CHECK(cudaDeviceSynchronize());
  return buffer;
}

at::Tensor peer_handle(const at::Tensor& buffer) {
  at::Tensor handle = at::empty({static_cast<int64_t>(sizeof(cudaIpcMemHandle_t))}, at::kByte);
  C10_CUDA_CHECK(cudaIpcGetMemHandle(static_cast<cudaIpcMemHandle_t*>(handle.mutable_data_ptr()), buffer.mutable_data_ptr()));
  return handle;
}

// Fails where the buffer's GPU cannot be reached from this one.
at::Tensor peer_open(const at::Tensor& handle_in, int64_t bytes, c10::Device device) {
  check_tensor("handle", handle_in, at::kByte, {static_cast<int64_t>(sizeof(cudaIpcMemHandle_t))}, at::kCPU);
  const at::Tensor handle = handle_in.contiguous();
  const c10::cuda::CUDAGuard guard(device);
  void* data = nullptr;
  C10_CUDA_CHECK(
      cudaIpcOpenMemHandle(&data, *static_cast<const cudaIpcMemHandle_t*>(handle.const_data_ptr()), cudaIpcMemLazyEnablePeerAccess));
  return bytes_at(data, bytes, device, [](void* p) { C10_CUDA_CHECK_WARN(cudaIpcCloseMemHandle(p)); });
}

void check_flags(int64_t count) { TORCH_CHECK_VALUE(count >= 1 && count <= kMaxRanks, "flags: ", count, ", need 1 to ", kMaxRanks); }

void peer_signal(at::TensorList flags, int64_t value) {
  check_flags(static_cast<int64_t>(flags.size()));
  const c10::cuda::CUDAGuard guard(flags[0].device());
  Flags all{};
  for (size_t i = 0; i < flags.size(); ++i) {
    check_tensor("flags", flags[i], at::kLong, {1}, flags[0].device());
    all.flag[i] = flags[i].mutable_data_ptr<int64_t>();
  }
  signal_kernel<<<1, flags.size(), 0, c10::cuda::getCurrentCUDAStream()>>>(all, value);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void peer_wait(const at::Tensor& flags, int64_t value) {
  check_flags(flags.numel());
  check_tensor("flags", flags, at::kLong, {flags.numel()}, flags.device());
  const c10::cuda::CUDAGuard guard(flags.device());
  wait_kernel<<<1, flags.numel(), 0, c10::cuda::getCurrentCUDAStream()>>>(flags.mutable_data_ptr<int64_t>(), value);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

TORCH_LIBRARY_IMPL(m2_ops, CompositeExplicitAutograd, m) {
  m.impl("peer_alloc", &peer_alloc);
  m.impl("peer_open", &peer_open);
}

TORCH_LIBRARY_IMPL(m2_ops, CUDA, m) {
  m.impl("peer_handle", &peer_handle);
  m.impl("peer_signal", &peer_signal);
  m.impl("peer_wait", &peer_wait);
}

}  // namespace m2::expert_parallel
