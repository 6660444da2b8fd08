// A register of floats from and to fp32 or bf16 memory, for kernels whose arithmetic is fp32 whatever they store.
#pragma once

#include "vec.h"

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstring>

namespace m2 {

using Lanes = at::vec::Vectorized<float>;
constexpr int64_t kLanes = Lanes::size();

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// n values, at most kLanes; lanes beyond n are 0.
inline Lanes load(const float* from, int64_t n = kLanes) { return n == kLanes ? Lanes::loadu(from) : Lanes::loadu(from, n); }
inline void store(float* to, Lanes x, int64_t n = kLanes) { x.store(to, static_cast<int>(n)); }

#if defined(CPU_CAPABILITY_AVX512)
inline __mmask16 first_lanes(int64_t n) { return n >= 16 ? 0xffff : static_cast<__mmask16>((1u << n) - 1); }

inline Lanes load(const at::BFloat16* from, int64_t n = kLanes) {
  const __m256i half =
      n == kLanes ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)) : _mm256_maskz_loadu_epi16(first_lanes(n), from);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline __m256i to_bf16(Lanes x) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
#else
  return at::vec::cvtfp32_bf16(static_cast<__m512>(x));
#endif
}

inline void store(at::BFloat16* to, Lanes x, int64_t n = kLanes) {
  if (n == kLanes) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), to_bf16(x));
  else _mm256_mask_storeu_epi16(to, first_lanes(n), to_bf16(x));
}
#else
inline Lanes load(const at::BFloat16* from, int64_t n = kLanes) {
  float wide[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) wide[i] = from[i];
  return Lanes::loadu(wide);
}

inline void store(at::BFloat16* to, Lanes x, int64_t n = kLanes) {
  float wide[kLanes];
  x.store(wide);
  for (int64_t i = 0; i < n; ++i) to[i] = wide[i];
}
#endif

// What a store and a load would leave of x.
template <typename Stored>
Lanes rounded(Lanes x) {
  if constexpr (std::is_same_v<Stored, float>) {
    return x;
  } else {
#if defined(CPU_CAPABILITY_AVX512)
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(to_bf16(x)), 16));
#else
    Stored narrow[kLanes];
    store(narrow, x);
    return load(narrow);
#endif
  }
}

#if defined(CPU_CAPABILITY_AVX512)
inline float sum(Lanes x) { return _mm512_reduce_add_ps(x); }
inline float max(Lanes x) { return _mm512_reduce_max_ps(x); }
#else
template <typename Join>
float joined(Lanes x, Join join) {
  float each[kLanes];
  x.store(each);
  for (int64_t i = 1; i < kLanes; ++i) each[0] = join(each[0], each[i]);
  return each[0];
}

inline float sum(Lanes x) {
  return joined(x, [](float a, float b) { return a + b; });
}
inline float max(Lanes x) {
  return joined(x, [](float a, float b) { return std::max(a, b); });
}
#endif

}  // namespace m2
