// Small matrix products on packed operands: the building block of every CPU kernel that multiplies.
//
//   C[M, N] (+)= A[M, K] B[K, N]     A, B bf16; C fp32; A and C row-major with leading dimensions lda, ldc
//
// B is packed in pairs along K ("VNNI"): packed[k / 2][n][k % 2], each pair of rows ldb columns wide. With AVX-512 the product is
// oneDNN's JIT kernel, reached through PyTorch's own header (it makes one kernel per distinct shape and thread, in about a
// millisecond: call it with few shapes); elsewhere a plain loop.
#pragma once

#include "vec.h"

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>

#include <cstring>

namespace m2 {

using bf16 = at::BFloat16;

// Elements of a packed [K, N] operand; an odd K is padded by a zero row.
inline int64_t packed_size(int64_t K, int64_t N) { return (K + 1) / 2 * 2 * N; }

// Packs row-major src[K, N]. ldb: columns of a packed pair of rows, >= N; columns beyond N are not written.
void pack_kn(const bf16* src, int64_t ld, int64_t K, int64_t N, bf16* packed, int64_t ldb);

// Packs the transpose of row-major src[N, K].
void pack_nk(const bf16* src, int64_t ld, int64_t K, int64_t N, bf16* packed, int64_t ldb);

// dst[c, r] = src[r, c] for src[R, C], both row-major.
void transpose(const bf16* src, int64_t ld_src, int64_t R, int64_t C, bf16* dst, int64_t ld_dst);

// Whether brgemm() runs at the speed of the hardware's bf16 products; the plain loop is for correctness only.
bool has_fast_brgemm();

// K even. A thread that called it calls brgemm_done() before it leaves its parallel region.
void brgemm(int64_t M, int64_t N, int64_t K, const bf16* A, int64_t lda, const bf16* packed_B, int64_t ldb, float* C, int64_t ldc,
            bool add);
void brgemm_done();

}  // namespace m2
