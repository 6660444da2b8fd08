// CUDA's memory that other processes may open, for a CPU: anonymous files, which vanish with the last process that has them open.
#pragma once
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <cstdio>
#include <map>

namespace cuda_on_cpu {
struct Memory {
  int file;
  size_t bytes;
};
inline std::map<void*, Memory> memories;

inline int map_file(void** data, int file, size_t bytes) {
  *data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (*data == MAP_FAILED) return 1;
  memories[*data] = {file, bytes};
  return 0;
}
inline int unmap_file(void* data) {
  const auto memory = memories.find(data);
  if (memory == memories.end()) return 1;
  munmap(data, memory->second.bytes);
  close(memory->second.file);
  memories.erase(memory);
  return 0;
}
}  // namespace cuda_on_cpu

struct cudaIpcMemHandle_t {
  int process, file;
  char rest[56];
};
enum { cudaIpcMemLazyEnablePeerAccess = 1 };

inline int cudaMalloc(void** data, size_t bytes) {
  const int file = memfd_create("cuda_on_cpu", 0);
  return file < 0 || ftruncate(file, static_cast<off_t>(bytes)) ? 1 : cuda_on_cpu::map_file(data, file, bytes);
}
inline int cudaFree(void* data) { return cuda_on_cpu::unmap_file(data); }
inline int cudaMemset(void* data, int value, size_t bytes) { return std::memset(data, value, bytes), 0; }
inline int cudaDeviceSynchronize() { return 0; }
inline int cudaIpcGetMemHandle(cudaIpcMemHandle_t* handle, void* data) {
  const auto memory = cuda_on_cpu::memories.find(data);
  if (memory == cuda_on_cpu::memories.end()) return 1;
  *handle = {getpid(), memory->second.file, {}};
  return 0;
}
inline int cudaIpcOpenMemHandle(void** data, cudaIpcMemHandle_t handle, unsigned) {
  if (handle.process == getpid()) return 1;  // as CUDA does
  char path[64];
  std::snprintf(path, sizeof(path), "/proc/%d/fd/%d", handle.process, handle.file);
  const int file = open(path, O_RDWR);
  struct stat status{};
  return file < 0 || fstat(file, &status) ? 1 : cuda_on_cpu::map_file(data, file, static_cast<size_t>(status.st_size));
}
inline int cudaIpcCloseMemHandle(void* data) { return cuda_on_cpu::unmap_file(data); }
#define C10_CUDA_CHECK_WARN(call) static_cast<void>(call)

// What a kernel that waits for another process calls: that process needs the core.
inline void __threadfence_system() {}
inline void __nanosleep(unsigned ns) { usleep(ns / 1000 + 1); }
inline long long clock64() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1'000'000'000ll + now.tv_nsec;
}
