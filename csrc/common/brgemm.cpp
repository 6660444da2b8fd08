#include "brgemm.h"

#include "lanes.h"

#if defined(CPU_CAPABILITY_AVX512)
#include <immintrin.h>
#endif

namespace m2 {
namespace {

#if defined(CPU_CAPABILITY_AVX512)
// Transposes 16 rows of 16 32-bit lanes: 4x4 blocks of lanes within 128-bit quarters, then the quarters.
void transpose_16x16(const void* src, int64_t ld_bytes, void* dst, int64_t ld_dst_bytes, int rows, __mmask16 columns) {
  __m512i r[16], t[16];
  for (int i = 0; i < 16; ++i) {
    r[i] = i < rows ? _mm512_maskz_loadu_epi32(columns, static_cast<const char*>(src) + i * ld_bytes) : _mm512_setzero_si512();
  }
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int j = 0; j < 4; ++j) {  // r[4 g + j] holds, in quarter q, column 4 q + j of rows 4 g .. 4 g + 3
    const __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88), d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    t[j] = _mm512_shuffle_i32x4(a, c, 0x88);
    t[8 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
    t[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
  const __mmask16 kept = first_lanes(rows);
  for (int j = 0; j < 16; ++j) {
    if (columns >> j & 1) _mm512_mask_storeu_epi32(static_cast<char*>(dst) + j * ld_dst_bytes, kept, t[j]);
  }
}

// Two rows of up to 16 bf16 each, interleaved.
inline __m512i interleave(const bf16* a, const bf16* b, __mmask16 columns) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(columns, a));
  if (b == nullptr) return low;
  return _mm512_or_si512(low, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(columns, b)), 16));
}
#endif

void plain_brgemm(int64_t M, int64_t N, int64_t K, const bf16* A, int64_t lda, const bf16* B, int64_t ldb, float* C, int64_t ldc,
                  bool add) {
  for (int64_t m = 0; m < M; ++m) {
    float* row = C + m * ldc;
    if (!add) std::memset(row, 0, N * sizeof(float));
    for (int64_t k = 0; k < K; k += 2) {
      const float a = A[m * lda + k], b = A[m * lda + k + 1];
      const bf16* pair = B + k * ldb;
      for (int64_t n = 0; n < N; ++n) row[n] += a * float(pair[2 * n]) + b * float(pair[2 * n + 1]);
    }
  }
}

}  // namespace

void pack_kn(const bf16* src, int64_t ld, int64_t K, int64_t N, bf16* packed, int64_t ldb) {
  for (int64_t k = 0; k < K; k += 2, packed += 2 * ldb) {
    const bf16 *a = src + k * ld, *b = k + 1 < K ? a + ld : nullptr;
#if defined(CPU_CAPABILITY_AVX512)
    for (int64_t n = 0; n < N; n += 16) {
      _mm512_mask_storeu_epi32(packed + 2 * n, first_lanes(N - n), interleave(a + n, b ? b + n : nullptr, first_lanes(N - n)));
    }
#else
    for (int64_t n = 0; n < N; ++n) {
      packed[2 * n] = a[n];
      packed[2 * n + 1] = b ? b[n] : bf16(0);
    }
#endif
  }
}

void pack_nk(const bf16* src, int64_t ld, int64_t K, int64_t N, bf16* packed, int64_t ldb) {
  int64_t whole = 0;  // columns of src done in whole pairs: a transpose of 32-bit lanes
#if defined(CPU_CAPABILITY_AVX512)
  whole = K / 2 * 2;
  for (int64_t n = 0; n < N; n += 16) {
    for (int64_t k = 0; k < whole; k += 32) {
      transpose_16x16(src + n * ld + k, ld * sizeof(bf16), packed + k * ldb + 2 * n, 2 * ldb * sizeof(bf16),
                      static_cast<int>(std::min<int64_t>(16, N - n)), first_lanes((whole - k) / 2));
    }
  }
#endif
  for (int64_t k = whole; k < K; k += 2) {
    for (int64_t n = 0; n < N; ++n) {
      packed[k * ldb + 2 * n] = src[n * ld + k];
      packed[k * ldb + 2 * n + 1] = k + 1 < K ? src[n * ld + k + 1] : bf16(0);
    }
  }
}

void transpose(const bf16* src, int64_t ld_src, int64_t R, int64_t C, bf16* dst, int64_t ld_dst) {
  constexpr int64_t kBlock = 16;
  for (int64_t r = 0; r < R; r += kBlock) {
    for (int64_t c = 0; c < C; c += kBlock) {
      const int64_t rows = std::min(kBlock, R - r), columns = std::min(kBlock, C - c);
#if defined(CPU_CAPABILITY_AVX512)
      if (rows == kBlock && columns == kBlock) {  // pairs of rows become 32-bit lanes, whose transpose is the wanted rows in pairs
        alignas(64) uint32_t pairs[8][16], turned[16][8];
        for (int i = 0; i < 8; ++i) {
          const bf16* row = src + (r + 2 * i) * ld_src + c;
          _mm512_store_si512(pairs[i], interleave(row, row + ld_src, 0xffff));
        }
        transpose_16x16(pairs, 64, turned, 32, 8, 0xffff);
        for (int j = 0; j < 16; ++j) std::memcpy(dst + (c + j) * ld_dst + r, turned[j], 32);
        continue;
      }
#endif
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) dst[(c + j) * ld_dst + r + i] = src[(r + i) * ld_src + c + j];
      }
    }
  }
}

bool has_fast_brgemm() {
#if defined(CPUBLAS_BRGEMM_BF16BF16F32) && defined(CPU_CAPABILITY_AVX512)
  static const bool can = [] {  // PyTorch has no question for it: without oneDNN or AVX-512 its brgemm refuses packed operands
    const bf16 a[32] = {}, b[32] = {};
    float c[1];
    try {
      at::native::cpublas::brgemm(1, 1, 2, 2, 1, 1, false, a, b, c, /*is_vnni=*/true);
      at::native::cpublas::brgemm_release(/*is_vnni=*/true);
      return true;
    } catch (const c10::Error&) {
      return false;
    }
  }();
  return can;
#else
  return false;
#endif
}

void brgemm(int64_t M, int64_t N, int64_t K, const bf16* A, int64_t lda, const bf16* packed_B, int64_t ldb, float* C, int64_t ldc,
            bool add) {
#if defined(CPUBLAS_BRGEMM_BF16BF16F32) && defined(CPU_CAPABILITY_AVX512)
  if (has_fast_brgemm()) {
    at::native::cpublas::brgemm(M, N, K, lda, ldb, ldc, add, A, packed_B, C, /*is_vnni=*/true);
    return;
  }
#endif
  plain_brgemm(M, N, K, A, lda, packed_B, ldb, C, ldc, add);
}

void brgemm_done() {
#if defined(CPUBLAS_BRGEMM_BF16BF16F32) && defined(CPU_CAPABILITY_AVX512)
  if (has_fast_brgemm()) at::native::cpublas::brgemm_release(/*is_vnni=*/true);
#endif
}

}  // namespace m2
