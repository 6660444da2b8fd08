#pragma once
#include <c10/util/Float8_e4m3fn.h>

#include "cuda_on_cpu.h"

enum { __NV_SATFINITE, __NV_E4M3 };
struct __half_raw {
  float x;
};
using __half = __half_raw;
inline float __half2float(__half x) { return x.x; }
inline uint8_t __nv_cvt_float_to_fp8(float x, int, int) {
  if (x != x) return 0x7f;
  return c10::Float8_e4m3fn(std::clamp(x, -448.0f, 448.0f)).x;
}
inline __half_raw __nv_cvt_fp8_to_halfraw(uint8_t code, int) { return {c10::Float8_e4m3fn(code, c10::Float8_e4m3fn::from_bits())}; }
