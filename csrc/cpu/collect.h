// Picking few of many elements without a branch for each.
#pragma once

#include <cstdint>

namespace seme::cpu {

constexpr int64_t kCollectRoom = 16;  // entries that may be written after the last one

// found = the entries of x[0..n) that are not negative, in order; returns how many.
int64_t collect(const int32_t* x, int64_t n, int32_t* found);

}  // namespace seme::cpu
