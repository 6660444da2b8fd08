// e4m3 on the GPU: codes, factors, and the values that are quantised as they are made.
#pragma once

#include <cuda_fp8.h>

#include "e4m3.h"
#include "warp.cuh"

namespace m2 {

__device__ inline float larger(float a, float b) { return b > a || b != b ? b : a; }  // NaN wins

// The factor that maps the largest magnitude to 448; values are divided by it. Zeros have factor 1.
__device__ inline float scale_of(float largest) { return largest == 0 ? 1.0f : largest / kE4m3Max; }

// To the nearest, ties to even; no magnitude passes 448 by more than rounding.
__device__ inline uint8_t code_of(float x) { return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3); }

__device__ inline float value_of(uint8_t code) { return __half2float(__half(__nv_cvt_fp8_to_halfraw(code, __NV_E4M3))); }

// silu(gate) * up as a bf16 tensor would keep it.
__device__ inline float swiglu(float gate, float up) { return rounded<c10::BFloat16>(gate / (1.0f + expf(-gate)) * up); }

}  // namespace m2
