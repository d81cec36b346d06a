// From ids to rows of partitions, without division and without ever a row outside of its table.
#pragma once

#include <cstdint>

#include "vectors.h"

namespace qr {

// Exact x / d for 0 <= x < 2^63 by one multiplication: with c = ⌈log2 d⌉ and magic = ⌈2^(63+c) / d⌉,
// magic · d - 2^(63+c) < 2^c, so that x · magic / 2^(63+c) exceeds x / d by less than 1 / d.
struct Divider {
    uint64_t magic = uint64_t{1} << 63;
    uint64_t divisor = 1;
    int32_t shift = 0;

    void set(int64_t d) {
        divisor = static_cast<uint64_t>(d);
        shift = 0;
        while ((uint64_t{1} << shift) < divisor) ++shift;
        const unsigned __int128 power = static_cast<unsigned __int128>(1) << (63 + shift);
        magic = static_cast<uint64_t>((power + divisor - 1) / divisor);
    }
    QR_INLINE uint64_t quotient(uint64_t x) const {
        return static_cast<uint64_t>((static_cast<unsigned __int128>(x << 1) * magic) >> 64) >> shift;
    }
    QR_INLINE uint64_t remainder(uint64_t x) const { return x - quotient(x) * divisor; }
};

QR_INLINE int64_t floor_divide(int64_t a, int64_t b) { return a / b - (a % b < 0); }
QR_INLINE int64_t floor_remainder(int64_t a, int64_t b) { return a % b + (a % b < 0 ? b : 0); }

// Rows that take less than this lie in the caches after the first few bags: no use in fetching them early.
constexpr int64_t kPrefetchedFrom = 16 << 10;

struct PartitionRows {
    Divider divisor, modulus;
    const void* class_map;
    int64_t first_row, rows, width, row_bytes;
    char* weight;
    int32_t class_map_type, weight_type;
    bool prefetched;
    bool divides, wraps;  // false: ids of the table are their own quotients, and quotients their own remainders

    void set(const Partition& p, int64_t num_ids) {
        if (!p.class_map) {
            divisor.set(p.divisor);
            modulus.set(p.modulus);
            divides = p.divisor != 1;
            wraps = num_ids < 0 || (num_ids - 1) / p.divisor >= p.modulus;
        }
        class_map = p.class_map;
        class_map_type = p.class_map_type;
        weight_type = p.weight_type;
        first_row = p.first_row;
        rows = p.rows;
        width = p.width;
        row_bytes = p.row_stride * bytes_of(p.weight_type);
        weight = static_cast<char*>(p.weight);
        prefetched = p.rows * p.width * bytes_of(p.weight_type) > kPrefetchedFrom;
    }
    QR_INLINE int64_t row_of(uint64_t id) const {
        if (class_map) {
            const int64_t c = class_map_type == kInt32 ? static_cast<const int32_t*>(class_map)[id]
                                                       : static_cast<const int64_t*>(class_map)[id];
            return c - first_row;
        }
        const uint64_t quotient = divides ? divisor.quotient(id) : id;
        return static_cast<int64_t>(wraps ? modulus.remainder(quotient) : quotient) - first_row;
    }
    // Of any integer at all.
    QR_INLINE int64_t row_of_wild(int64_t id) const {
        return floor_remainder(floor_divide(id, static_cast<int64_t>(divisor.divisor)),
                               static_cast<int64_t>(modulus.divisor)) - first_row;
    }
};

struct TableRows {
    PartitionRows partition[kMaxPartitions];
    Divider codes_per_row, code_stride, id_space;
    uint64_t hash_offset;
    int64_t num_ids, code_size, code_first_row;
    int32_t num_partitions, index;
    bool given_are_ids, hashed, id_is_rest;  // given_are_ids: neither codes nor hashed

    void set(const Group& group, int32_t table) {
        const Table& t = group.tables[table];
        index = table;
        num_partitions = t.num_partitions;
        num_ids = t.num_ids;
        const bool coded = t.codes_per_row > 0;
        hashed = t.hash_seed >= 0;
        given_are_ids = !coded && !hashed;
        if (hashed) {
            hash_offset = (static_cast<uint64_t>(t.hash_seed) + 1) * 0x9E3779B97F4A7C15u;
            id_space.set(num_ids);
        }
        id_is_rest = t.code_stride == 0;
        if (coded) codes_per_row.set(t.codes_per_row);
        if (coded && !id_is_rest) code_stride.set(t.code_stride);
        code_size = t.code_size;
        code_first_row = t.code_first_row;
        for (int j = 0; j < num_partitions; ++j) partition[j].set(group.partitions[t.first_partition + j], num_ids);
    }
    // Hashes any integer: `torchrec_qr.id_hash` has the formula. Not inlined, because the registers that it takes
    // would slow the lookups of all other tables by up to a tenth.
    __attribute__((noinline)) int64_t hashed_id(int64_t given) const {
        uint64_t z = static_cast<uint64_t>(given) + hash_offset;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
        z ^= z >> 31;
        return static_cast<int64_t>(id_space.remainder(z >> 1));
    }
    QR_INLINE int64_t id_of(int64_t code) const {
        if (given_are_ids) return code;
        if (__builtin_expect(hashed, 0)) return hashed_id(code);
        if (code < 0) return code;
        const uint64_t c = static_cast<uint64_t>(code);
        const uint64_t rest = codes_per_row.remainder(c);
        if (id_is_rest) return static_cast<int64_t>(rest);
        // Unsigned: a code that is none may overflow, and then gives some id, which is checked as any other.
        const uint64_t row = codes_per_row.quotient(c) + static_cast<uint64_t>(code_first_row);
        const uint64_t quotient = row + static_cast<uint64_t>(code_size) * code_stride.quotient(rest);
        return static_cast<int64_t>(code_stride.remainder(rest) + code_stride.divisor * quotient);
    }
    // Sets rows[j] for all partitions; false, with `failure` set, where there is no such row.
    template <int K>
    QR_INLINE bool find(int64_t given, int64_t* rows, Failure& failure) const {
        const int64_t id = id_of(given);
        const int k = K > 0 ? K : num_partitions;
        if (__builtin_expect(static_cast<uint64_t>(id) >= static_cast<uint64_t>(num_ids), 0)) {
            // `num_ids` < 0 is above all that int64 has, but for negative ids.
            if (num_ids >= 0 || id >= 0) return fail(kIdOutOfRange, 0, id, failure);
        }
        const bool wild = id < 0;
        for (int j = 0; j < k; ++j) {
            const PartitionRows& p = partition[j];
            const int64_t row = __builtin_expect(wild, 0) ? p.row_of_wild(id) : p.row_of(static_cast<uint64_t>(id));
            if (__builtin_expect(static_cast<uint64_t>(row) >= static_cast<uint64_t>(p.rows), 0)) {
                return fail(kRowOutOfRange, j, row, failure);
            }
            rows[j] = row;
        }
        return true;
    }
    bool fail(Code code, int j, int64_t value, Failure& failure) const {
        failure.code = code;
        failure.table = index;
        failure.partition = j;
        failure.value = value;
        return false;
    }
};

QR_INLINE int64_t integer_at(const void* p, int32_t type, int64_t i) {
    return type == kInt32 ? static_cast<const int32_t*>(p)[i] : static_cast<const int64_t*>(p)[i];
}

}  // namespace qr
