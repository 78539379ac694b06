// Weights of tensors: one set for all elements, or one for each row or column of a matrix.
#pragma once

#include "numeric.h"

namespace seme {

// Rows: values[row, tensor], of rows of `row` elements. Columns: values[tensor, column], of rows of `columns` elements,
// of which the first element is number `offset`. Neither: values[tensor].
struct Weights {
    const double* values;
    int64_t count;  // tensors
    int64_t row, columns, offset;

    // How many elements from `at` on share one set, or take neighbouring columns.
    SEME_HD int64_t run(int64_t at) const {
        if (row > 0) return row - at % row;
        if (columns > 0) return columns - (offset + at) % columns;
        return INT64_MAX;
    }
    // The weight of tensor i at element `at`; of columns that of the next element is beside it.
    SEME_HD const double* of(int64_t i, int64_t at) const {
        if (row > 0) return values + at / row * count + i;
        if (columns > 0) return values + i * columns + (offset + at) % columns;
        return values + i;
    }
};

}  // namespace seme
