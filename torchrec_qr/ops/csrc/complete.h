// What becomes of the whole gradient of a row.
#pragma once

#include "lookup.h"

namespace qr {

// Steps the row, or writes its gradient to the caller's, and marks it as touched. May overwrite `gradient`.
using CompleteRow = void (*)(const Partition& p, int64_t row, float* gradient);

// The one for an instruction set and the partition's width and type.
CompleteRow complete_row(int32_t isa, const Partition& p);

}  // namespace qr
