// nvcuda::wmma, 16x16x16: a lane keeps 8 of a fragment's 256 elements, which ones is nobody's business.
#pragma once
#include "cuda_bf16.h"

namespace nvcuda::wmma {
struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };

template <typename Use, int M, int N, int K, typename T, typename Layout = row_major>
struct fragment {
  static_assert(M == 16 && N == 16 && K == 16);
  float x[8];
};

inline int first_element() { return static_cast<int>(cuda_on_cpu::lane()) * 8; }

template <typename Fragment>
void fill_fragment(Fragment& f, float value) { std::fill(f.x, f.x + 8, value); }

template <typename Use, typename T, typename Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& f, const T* from, unsigned ld) {
  __syncwarp();
  for (int i = 0; i < 8; ++i) {
    const int r = (first_element() + i) / 16, c = (first_element() + i) % 16;
    f.x[i] = static_cast<float>(std::is_same_v<Layout, row_major> ? from[r * ld + c] : from[c * ld + r]);
  }
  __syncwarp();
}

inline void load_matrix_sync(fragment<accumulator, 16, 16, 16, float>& f, const float* from, unsigned ld, layout_t) {
  load_matrix_sync<accumulator, float, row_major>(f, from, ld);
}

inline void store_matrix_sync(float* to, const fragment<accumulator, 16, 16, 16, float>& f, unsigned ld, layout_t) {
  __syncwarp();
  for (int i = 0; i < 8; ++i) to[(first_element() + i) / 16 * ld + (first_element() + i) % 16] = f.x[i];
  __syncwarp();
}

template <typename A, typename B>
void mma_sync(fragment<accumulator, 16, 16, 16, float>& d, const A& a, const B& b, const fragment<accumulator, 16, 16, 16, float>& c) {
  auto& scratch = cuda_on_cpu::warp().scratch;
  std::copy(a.x, a.x + 8, scratch[0] + first_element());
  std::copy(b.x, b.x + 8, scratch[1] + first_element());
  __syncwarp();
  float sums[8];
  for (int i = 0; i < 8; ++i) {
    const int row = (first_element() + i) / 16, column = (first_element() + i) % 16;
    sums[i] = c.x[i];
    for (int k = 0; k < 16; ++k) sums[i] += scratch[0][row * 16 + k] * scratch[1][k * 16 + column];
  }
  std::copy(sums, sums + 8, d.x);
  __syncwarp();
}
}  // namespace nvcuda::wmma
