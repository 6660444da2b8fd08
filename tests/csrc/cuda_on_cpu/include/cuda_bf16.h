#pragma once
#include "cuda_on_cpu.h"

using __nv_bfloat16 = c10::BFloat16;
inline float __bfloat162float(c10::BFloat16 x) { return x; }
inline c10::BFloat16 __float2bfloat16(float x) { return x; }
