// The numbers of blockwise FP8 that every device agrees on: 4 exponent bits, 3 of mantissa, no infinity, largest 448.
#pragma once

#include <c10/util/Float8_e4m3fn.h>

#include <cstdint>

namespace m2 {

using e4m3 = c10::Float8_e4m3fn;
constexpr float kE4m3Max = 448.0f;
constexpr int64_t kScaleBlock = 128;  // values that share a factor

constexpr int64_t blocks_of(int64_t size) { return (size + kScaleBlock - 1) / kScaleBlock; }

}  // namespace m2
