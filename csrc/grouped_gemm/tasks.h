// How grouped products are cut into tasks and shared by threads.
#pragma once

#include "../common/brgemm.h"
#include "../common/lanes.h"

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>
#include <vector>

namespace m2::grouped_gemm {

constexpr int64_t kRows = 64;  // of a tile; the last tile of a group has a multiple of kRowStep, so that shapes stay few
constexpr int64_t kRowStep = 16;
constexpr int64_t kRowsPerTask = 1024;  // that share one packing

struct Task {
  int64_t group, column, begin, end;  // rows [begin, end) of the group, output columns from `column`
};

// (group, block of columns, range of rows) of every piece of work.
inline std::vector<Task> tasks_of(const int32_t* ends, int64_t groups, int64_t width, int64_t columns) {
  std::vector<Task> tasks;
  for (int64_t e = 0; e < groups; ++e) {
    for (int64_t row = e ? ends[e - 1] : 0; row < ends[e]; row += kRowsPerTask) {
      for (int64_t c = 0; c < width; c += columns) tasks.push_back({e, c, row, std::min<int64_t>(row + kRowsPerTask, ends[e])});
    }
  }
  return tasks;
}

// Runs work(thread's own state, task index) for every index; whoever is free takes the next.
template <typename MakeState, typename Work>
void each_task(int64_t count, MakeState make_state, Work work) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(count, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    auto state = make_state();
    for (int64_t i = next++; i < count; i = next++) work(state, i);
    brgemm_done();
  });
}

inline void store_tile(const float* tile, int64_t ld, int64_t rows, int64_t n, bf16* out, int64_t ld_out) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < n; i += kLanes)
      store(out + r * ld_out + i, load(tile + r * ld + i, std::min(kLanes, n - i)), std::min(kLanes, n - i));
  }
}

inline int64_t used_rows(const at::Tensor& ends) { return ends.numel() ? ends.const_data_ptr<int32_t>()[ends.numel() - 1] : 0; }

}  // namespace m2::grouped_gemm
