// The lookup of a served model: no gradients, all types of rows, and ids in any order of features.
#pragma once

#include <vector>

#include "../rows.h"

namespace qr {

enum Policy : int32_t { kError = 0, kClamp = 1, kWrap = 2, kUnchecked = 3 };

struct ServedTable {
    TableRows rows;
    int32_t operation, policy;
    int64_t dim;
    bool mean;
};

// Consecutive bags of one feature, or ids that are not pooled if `offsets` is null.
struct ServedTask {
    const ServedTable* table;
    const void* ids;
    int32_t id_type;
    const float* id_weights;  // of all ids, or null
    const int64_t* offsets;   // of all bags of all features of the batch
    int64_t first, last;      // bags, or ids
    float* out;               // of `first`
    int64_t out_stride;
};

// Looks a task up. Returns false, with `failure` set, if an id has no row.
bool serve(int32_t isa, const ServedTask& task, Failure& failure);

}  // namespace qr
