// Random numbers of a run of elements; see ../philox.h for what an element draws.
#pragma once

#include "../philox.h"
#include "tile.h"

namespace seme::cpu {

constexpr int64_t kBlocksAtOnce = 16;
// Room for the draws of a tile that begins inside a block, in whole steps.
constexpr int64_t kDraws = kTile + kBlocksAtOnce * kPerBlock;

// The upper halves of elements [e, e + n) of a tensor, n <= kTile: a pointer into `memory`.
const int32_t* upper_halves(uint64_t key, int64_t e, int64_t n, int32_t (&memory)[kDraws]);

}  // namespace seme::cpu
