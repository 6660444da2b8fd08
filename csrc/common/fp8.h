// e4m3 to and from the wider floats, 16 or 32 at a time. Its values are exact in bf16.
#pragma once

#include "e4m3.h"
#include "lanes.h"

#include <array>
#include <cmath>

namespace m2 {

// The factor that maps the largest magnitude to 448; values are divided by it. Zeros have factor 1.
inline float scale_of(float largest) { return largest > 0 || largest != largest ? largest / kE4m3Max : 1.0f; }

// n <= kLanes values, |x| at most 448 or NaN, to the nearest, ties to even.
inline void store(e4m3* to, Lanes x, int64_t n = kLanes) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512i bits = _mm512_castps_si512(x), magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
  // normal: 20 bits of mantissa are rounded off, then the exponent's bias changes from 127 to 7
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(magnitude, 20), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(magnitude, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7ffff)));
  const __m512i normal = _mm512_sub_epi32(_mm512_srli_epi32(rounded, 20), _mm512_set1_epi32(120 << 3));
  // below 2^-6: multiples of 2^-9
  const __m512i subnormal = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_castsi512_ps(magnitude), _mm512_set1_ps(512.0f)));
  __m512i code = _mm512_mask_mov_epi32(normal, _mm512_cmplt_epi32_mask(magnitude, _mm512_set1_epi32(121 << 23)), subnormal);
  code = _mm512_mask_mov_epi32(code, _mm512_cmpgt_epi32_mask(magnitude, _mm512_set1_epi32(0x7f800000)), _mm512_set1_epi32(0x7f));
  code = _mm512_or_si512(code, _mm512_and_si512(_mm512_srli_epi32(bits, 24), _mm512_set1_epi32(0x80)));
  _mm_mask_storeu_epi8(to, first_lanes(n), _mm512_cvtepi32_epi8(code));
#else
  float wide[kLanes];
  x.store(wide);
  for (int64_t i = 0; i < n; ++i) to[i] = e4m3(wide[i]);
#endif
}

// count values to bf16.
inline void widen(const e4m3* from, int64_t count, at::BFloat16* to) {
  int64_t i = 0;
#if defined(CPU_CAPABILITY_AVX512)
  alignas(64) static const auto table = [] {  // of the 128 magnitudes
    std::array<at::BFloat16, 128> values;
    for (int code = 0; code < 128; ++code) values[code] = static_cast<float>(e4m3(static_cast<uint8_t>(code), e4m3::from_bits()));
    return values;
  }();
  const __m512i t0 = _mm512_loadu_si512(&table[0]), t1 = _mm512_loadu_si512(&table[32]);
  const __m512i t2 = _mm512_loadu_si512(&table[64]), t3 = _mm512_loadu_si512(&table[96]);
  for (; i + 32 <= count; i += 32) {
    const __m512i code = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
    const __m512i low = _mm512_permutex2var_epi16(t0, code, t1), high = _mm512_permutex2var_epi16(t2, code, t3);
    const __m512i magnitude = _mm512_mask_mov_epi16(low, _mm512_test_epi16_mask(code, _mm512_set1_epi16(64)), high);
    const __m512i sign = _mm512_slli_epi16(_mm512_and_si512(code, _mm512_set1_epi16(0x80)), 8);
    _mm512_storeu_si512(to + i, _mm512_or_si512(magnitude, sign));
  }
#endif
  for (; i < count; ++i) to[i] = static_cast<float>(from[i]);
}

inline float larger(float a, float b) { return b > a || b != b ? b : a; }  // NaN wins

// Greatest magnitude of n values.
inline float largest(const at::BFloat16* x, int64_t n) {
  Lanes top(0.0f);
  for (int64_t i = 0; i < n; i += kLanes) top = at::vec::maximum(top, load(x + i, std::min(kLanes, n - i)).abs());
  float each[kLanes], result = 0;  // at::vec's maximum keeps NaN, a reduction by instructions may not
  top.store(each);
  for (const float value : each) result = larger(result, value);
  return result;
}

inline void divide(const at::BFloat16* x, int64_t n, float scale, e4m3* codes) {
  for (int64_t i = 0; i < n; i += kLanes) store(codes + i, load(x + i, std::min(kLanes, n - i)) / Lanes(scale), std::min(kLanes, n - i));
}

// One row: codes and the factor of every 128 values.
inline void quantize_row(const at::BFloat16* x_W, int64_t width, e4m3* codes_W, float* scales_P) {
  for (int64_t block = 0; block < width; block += kScaleBlock) {
    const int64_t n = std::min(kScaleBlock, width - block);
    scales_P[block / kScaleBlock] = scale_of(largest(x_W + block, n));
    divide(x_W + block, n, scales_P[block / kScaleBlock], codes_W + block);
  }
}

// silu(gate) * up.
inline Lanes swiglu(Lanes gate, Lanes up) { return gate / (Lanes(1.0f) + gate.neg().exp_u20()) * up; }

}  // namespace m2
