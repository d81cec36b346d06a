#include "serve.h"

#include "stored_rows.h"

namespace qr {
namespace {

// So many ids have their rows fetched into the cache while those before them are pooled. A ring holds where both lie.
constexpr int kServedAhead = 16;
constexpr int kServedRing = 2 * kServedAhead;

// The id that is looked up in place of one outside of [0, S).
QR_INLINE int64_t bounded(const ServedTable& t, int64_t id) {
    const int64_t size = t.rows.num_ids;
    if (t.policy == kClamp) return id < 0 ? 0 : id >= size ? size - 1 : id;
    if (t.policy == kWrap && (id < 0 || id >= size)) return floor_remainder(id, size);
    return id;
}

struct ServedRowsAhead {
    const char* row[kServedRing][kMaxPartitions];
    int64_t next, end;

    // Finds the rows of the ids from `position` on, as far as the ring holds them.
    QR_INLINE bool reach(const ServedTask& task, int64_t position, Failure& failure) {
        while (__builtin_expect(next <= position + kServedAhead && next < end, 0)) {
            if (!find_some(task, failure)) return false;
        }
        return true;
    }
    QR_INLINE bool find_some(const ServedTask& task, Failure& failure) {
        switch (task.table->rows.num_partitions) {
            case 1: return find<1>(task, failure);
            case 2: return find<2>(task, failure);
            case 3: return find<3>(task, failure);
            default: return find<4>(task, failure);
        }
    }
    template <int K>
    QR_INLINE bool find(const ServedTask& task, Failure& failure) {
        const ServedTable& t = *task.table;
        const int64_t until = next + kServedAhead < end ? next + kServedAhead : end;
        for (; next < until; ++next) {
            int64_t rows[K];
            const int64_t id = bounded(t, integer_at(task.ids, task.id_type, next));
            if (__builtin_expect(!t.rows.find<K>(id, rows, failure), 0)) {
                failure.position = next;
                return false;
            }
            for (int j = 0; j < K; ++j) {
                const PartitionRows& p = t.rows.partition[j];
                const char* address = p.weight + rows[j] * p.row_bytes;
                if (p.prefetched) prefetch(address, p.row_bytes);
                row[next % kServedRing][j] = address;
            }
        }
        return true;
    }
};

// Some columns of a table's output, composed of partitions [first, last).
struct Columns {
    int first, last;
    int64_t column;  // of rows of these partitions
    float* out;
};

template <typename V, int NV, int TYPE>
QR_INLINE void read_stored(const char* row, const PartitionRows& p, int64_t column, V* e) {
    const StoredRow<V, TYPE> values(row, p.width);
    for (int v = 0; v < NV; ++v) e[v] = values.at(column + v * kLanes<V>);
}

template <typename V, int NV>
QR_INLINE void read_columns(const char* row, const PartitionRows& p, int64_t column, V* e) {
    switch (p.weight_type) {
        case kFloat32: return read_stored<V, NV, kFloat32>(row, p, column, e);
        case kFloat16: return read_stored<V, NV, kFloat16>(row, p, column, e);
        case kBFloat16: return read_stored<V, NV, kBFloat16>(row, p, column, e);
        case kInt8Rows: return read_stored<V, NV, kInt8Rows>(row, p, column, e);
        default: return read_stored<V, NV, kInt4Rows>(row, p, column, e);
    }
}

// e = compose_j( W_j[row_j] )
template <typename V, int NV>
QR_INLINE void compose_columns(const ServedTable& t, const char* const* row, const Columns& of, V* e) {
    const PartitionRows* p = t.rows.partition;
    read_columns<V, NV>(row[of.first], p[of.first], of.column, e);
    for (int j = of.first + 1; j < of.last; ++j) {
        V other[NV];
        read_columns<V, NV>(row[j], p[j], of.column, other);
        if (t.operation == kMult) {
            for (int v = 0; v < NV; ++v) e[v] *= other[v];
        } else {
            for (int v = 0; v < NV; ++v) e[v] += other[v];
        }
    }
}

// Ids [begin, end) of a bag, whose rows are all in the ring.
struct BagPart {
    int64_t begin, end;
    bool begins;    // otherwise `out` holds the sum of the ids before
    float divisor;  // 1: none
};

template <typename V, int NV>
QR_INLINE void pool_vectors(const ServedTask& task, const ServedRowsAhead& ahead, const BagPart& bag, const Columns& of) {
    V sum[NV];
    for (int v = 0; v < NV; ++v) sum[v] = bag.begins ? V{} : load<V>(of.out + v * kLanes<V>);
    for (int64_t n = bag.begin; n < bag.end; ++n) {
        V e[NV];
        compose_columns<V, NV>(*task.table, ahead.row[n % kServedRing], of, e);
        if (task.id_weights) {
            for (int v = 0; v < NV; ++v) sum[v] += e[v] * task.id_weights[n];
        } else {
            for (int v = 0; v < NV; ++v) sum[v] += e[v];
        }
    }
    if (bag.divisor != 1.0f) {
        for (int v = 0; v < NV; ++v) sum[v] /= bag.divisor;
    }
    for (int v = 0; v < NV; ++v) store(of.out + v * kLanes<V>, sum[v]);
}

// One column, for widths that are no multiple of any vector.
QR_INLINE void pool_one(const ServedTask& task, const ServedRowsAhead& ahead, const BagPart& bag, const Columns& of) {
    float sum = bag.begins ? 0.0f : *of.out;
    for (int64_t n = bag.begin; n < bag.end; ++n) {
        float e = 0.0f;
        for (int j = of.first; j < of.last; ++j) {
            const PartitionRows& p = task.table->rows.partition[j];
            const float value = stored_value(ahead.row[n % kServedRing][j], p.weight_type, p.width, of.column);
            e = j == of.first ? value : task.table->operation == kMult ? e * value : e + value;
        }
        sum += task.id_weights ? e * task.id_weights[n] : e;
    }
    *of.out = bag.divisor != 1.0f ? sum / bag.divisor : sum;
}

// No more than four vectors at a time: with those that they are composed of, they fit the registers of all sets.
template <typename V>
QR_INLINE void pool_width(const ServedTask& task, const ServedRowsAhead& ahead, const BagPart& bag, Columns of,
                          int64_t width) {
    for (int64_t taken; width > 0; width -= taken, of.column += taken, of.out += taken) {
        const int64_t vectors = width / kLanes<V>;
        taken = (vectors < 4 ? vectors : 4) * kLanes<V>;
        if (vectors >= 4) {
            pool_vectors<V, 4>(task, ahead, bag, of);
        } else if (vectors == 3) {
            pool_vectors<V, 3>(task, ahead, bag, of);
        } else if (vectors == 2) {
            pool_vectors<V, 2>(task, ahead, bag, of);
        } else if (vectors == 1) {
            pool_vectors<V, 1>(task, ahead, bag, of);
        } else if (kLanes<V> > 8 && width >= 8) {
            pool_vectors<Vector8, 1>(task, ahead, bag, of);
            taken = 8;
        } else if (kLanes<V> > 4 && width >= 4) {
            pool_vectors<Vector4, 1>(task, ahead, bag, of);
            taken = 4;
        } else {
            pool_one(task, ahead, bag, of);
            taken = 1;
        }
    }
}

template <typename V>
QR_INLINE void pool_part(const ServedTask& task, const ServedRowsAhead& ahead, const BagPart& bag, float* out) {
    const ServedTable& t = *task.table;
    if (t.operation != kConcat) {
        pool_width<V>(task, ahead, bag, {0, t.rows.num_partitions, 0, out}, t.dim);
        return;
    }
    for (int j = 0; j < t.rows.num_partitions; ++j) {
        const int64_t width = t.rows.partition[j].width;
        pool_width<V>(task, ahead, bag, {j, j + 1, 0, out}, width);
        out += width;
    }
}

struct Call {
    const ServedTask& task;
    Failure& failure;
    bool* found;
};

template <typename V>
QR_INLINE void serve_by_body(const Call& call) {
    const ServedTask& task = call.task;
    const int64_t* offsets = task.offsets;
    float* out = task.out;
    int64_t n = offsets ? offsets[task.first] : task.first;
    ServedRowsAhead ahead;
    ahead.next = n;
    ahead.end = offsets ? offsets[task.last] : task.last;
    for (int64_t b = task.first; b < task.last; ++b, out += task.out_stride) {
        const int64_t end = offsets ? offsets[b + 1] : b + 1;
        const float divisor = task.table->mean && end - n > 1 ? static_cast<float>(end - n) : 1.0f;
        BagPart bag{n, n, true, 1.0f};
        do {
            if (!ahead.reach(task, n, call.failure)) return;
            n = end < n + kServedAhead ? end : n + kServedAhead;
            bag.end = n;
            if (n == end) bag.divisor = divisor;
            pool_part<V>(task, ahead, bag, out);
            bag.begin = n;
            bag.begins = false;
        } while (n < end);
    }
    *call.found = true;
}
QR_VERSIONS(serve_by, (const Call& call), (call))

}  // namespace

bool serve(int32_t isa, const ServedTask& task, Failure& failure) {
    bool found = false;
    serve_by(isa, Call{task, failure, &found});
    return found;
}

}  // namespace qr
