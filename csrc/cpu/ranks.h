// What a selection keeps by ranks within rows.
#pragma once

#include "../seme.h"

namespace seme::cpu {

// [n, elements]: 1 where an element of the task vector is kept; undefined for those without a spread.
std::vector<uint8_t> rank_masks(const std::vector<View>& tensors, const Selection& selection, DType compute,
                                int threads);

}  // namespace seme::cpu
