// What a group must satisfy before anything of it is read.
#pragma once

#include "rows.h"

namespace qr {

inline int32_t failed(Failure* failure, Code code, int32_t table, int64_t position, int64_t value) {
    failure->code = code;
    failure->table = table;
    failure->position = position;
    failure->value = value;
    return code;
}

// Offsets start at 0, never decrease and end at N; sizes are within what the kernels have.
inline int32_t check(const Group& g, Failure* failure) {
    *failure = Failure{};
    if (g.num_tables < 0 || g.num_ids < 0 || g.num_bags < 0 || g.num_features < 0 || g.threads < 1) {
        return failed(failure, kBadArgument, -1, 0, 0);
    }
    int64_t features = 0;
    for (int32_t t = 0; t < g.num_tables; ++t) {
        const Table& table = g.tables[t];
        if (table.num_partitions < 1 || table.num_partitions > kMaxPartitions || table.first_feature != features ||
            table.num_features < 0) {
            return failed(failure, kBadArgument, t, 1, table.num_partitions);
        }
        features += table.num_features;
        if (table.hash_seed >= 0 && (table.num_ids < 1 || table.codes_per_row > 0)) {
            return failed(failure, kBadArgument, t, 7, table.hash_seed);
        }
        int64_t columns = 0;
        for (int j = 0; j < table.num_partitions; ++j) {
            const Partition& p = g.partitions[table.first_partition + j];
            if (p.width < 1 || p.width > kMaxWidth || p.row_stride < p.width || p.rows < 0) {
                return failed(failure, kBadArgument, t, 2, p.width);
            }
            if (table.operation != kConcat && p.width != table.dim) return failed(failure, kBadArgument, t, 3, p.width);
            if (p.class_map ? table.num_ids < 0 : p.divisor < 1 || p.modulus < 1) {
                return failed(failure, kBadArgument, t, 4, p.modulus);
            }
            columns += p.width;
        }
        if (table.operation == kConcat && columns != table.dim) return failed(failure, kBadArgument, t, 5, columns);
    }
    if (features != g.num_features) return failed(failure, kBadArgument, -1, 6, features);
    const int64_t last = g.pooled ? g.num_features * g.num_bags : g.num_features;
    int64_t before = 0;
    for (int64_t i = 0; i <= last; ++i) {
        const int64_t offset = integer_at(g.offsets, g.offset_type, i);
        if (offset < before) return failed(failure, kOffsetsDecrease, -1, i, offset);
        if (i == 0 && offset != 0) return failed(failure, kOffsetsDoNotCover, -1, 0, offset);
        before = offset;
    }
    if (before != g.num_ids) return failed(failure, kOffsetsDoNotCover, -1, last, before);
    return kOk;
}

// First positions of the ids of each table, and N at the end; and where its block of `out` begins, if not pooled.
struct Spans {
    int64_t first_id, last_id, first_float;
};

inline Spans span_of(const Group& g, int32_t t) {
    Spans s{0, 0, 0};
    const int64_t per_feature = g.pooled ? g.num_bags : 1;
    for (int32_t i = 0; i <= t; ++i) {
        const Table& table = g.tables[i];
        s.first_id = integer_at(g.offsets, g.offset_type, table.first_feature * per_feature);
        s.last_id = integer_at(g.offsets, g.offset_type, (table.first_feature + table.num_features) * per_feature);
        if (i < t) s.first_float += (s.last_id - s.first_id) * table.dim;
    }
    return s;
}

// The instantiation of the bodies that a table takes: the width of its rows, for one or two partitions in fp32 whose
// rows are all of one width, 16, 32, 64 or 128; otherwise 0, for everything else.
inline int64_t register_width(const Group& g, const Table& t) {
    if (t.num_partitions > 2 || (t.operation == kConcat && t.num_partitions > 1)) return 0;
    for (int j = 0; j < t.num_partitions; ++j) {
        if (g.partitions[t.first_partition + j].weight_type != kFloat32) return 0;
    }
    return t.dim == 16 || t.dim == 32 || t.dim == 64 || t.dim == 128 ? t.dim : 0;
}

}  // namespace qr
