// The gradients of rows from those of bags, added up per row.
#include "backward.h"
#include "vectors.h"

namespace qr {
namespace {

constexpr int kAhead = 12;
constexpr int kRing = 16;

// One id: the gradient of its output, its rows of the partitions that have sums, and where these lie.
struct Entry {
    int64_t row, position;
    const float* gradient;
    float scale;
    const char* weight[kMaxPartitions];
    float* sums[kMaxPartitions];
};

// Sorted ids, some of them before they are needed.
struct EntriesAhead {
    Entry ring[kRing];
    int64_t next, last;

    // K: partitions of the table, 0 if any number.
    template <int K>
    QR_INLINE bool reach(const Part& part, int64_t i) {
        TableBackward& work = *part.work;
        const Group& g = *work.group;
        const int k = K > 0 ? K - 1 : work.num_sums;
        const int64_t until = i + kAhead < last ? i + kAhead : last;
        for (; next < until; ++next) {
            Entry& e = ring[next % kRing];
            uint64_t rest = work.sorted.rest(next);
            const int64_t position = static_cast<int64_t>(rest & ((uint64_t{1} << work.position_bits) - 1));
            int64_t rows[kMaxPartitions], bag;
            if (__builtin_expect(work.packed, 1)) {
                rest >>= work.position_bits;
                for (int j = k - 1; j >= 0; --j) {
                    rows[j] = static_cast<int64_t>(rest & ((uint64_t{1} << work.row_bits[j]) - 1));
                    rest >>= work.row_bits[j];
                }
                bag = static_cast<int64_t>(rest);
            } else {
                int64_t of_table[kMaxPartitions];
                const int64_t id = integer_at(g.ids, g.id_type, work.first_id + position);
                if (!work.rows.find<K>(id, of_table, *part.failure)) {
                    part.failure->position = work.first_id + position;
                    return false;
                }
                for (int j = 0; j < k; ++j) rows[j] = of_table[work.sums[j].index];
                bag = work.bag_of[position];
            }
            e.row = work.sorted.row(next);
            e.position = work.first_id + position;
            e.gradient = work.gradient + bag * work.gradient_stride;
            e.scale = g.id_weights ? g.id_weights[e.position] : 1.0f;
            prefetch(e.gradient, work.table->dim * 4);
            const PartitionRows& pivot = work.rows.partition[work.pivot_index];
            if (pivot.prefetched && (next == part.first || work.sorted.row(next - 1) != e.row)) {
                const Partition& p = *work.pivot;
                prefetch(pivot.weight + e.row * pivot.row_bytes, pivot.row_bytes);
                if (p.rule == kPartialRowWiseAdam || p.rule == kPartialRowWiseLamb) {
                    prefetch(p.state[1] + e.row, 4);
                } else if (p.rule >= kAdam) {
                    prefetch(p.state[1] + e.row * p.width, p.width * 4);
                }
                if (p.rule == kAdagrad || p.rule >= kAdam) prefetch(p.state[0] + e.row * p.width, p.width * 4);
                if (p.rule == kRowWiseAdagrad) prefetch(p.state[0] + e.row, 4);
            }
            for (int j = 0; j < k; ++j) {
                Sums& s = work.sums[j];
                const PartitionRows& p = work.rows.partition[s.index];
                e.weight[j] = p.weight + rows[j] * p.row_bytes;
                if (p.prefetched) prefetch(e.weight[j], p.row_bytes);
                if (!s.needed) continue;
                const int64_t slot = s.compact ? s.slot_of[position] : rows[j];
                e.sums[j] = s.sums_of(part.part) + slot * p.width;
                if (p.prefetched) prefetch(e.sums[j], p.width * 4);
                uint8_t* touched = s.touched_of(part.part);
                if (touched) touched[slot] = 1;
            }
        }
        return true;
    }
};

template <typename V, int NV>
QR_INLINE void add(float* sums, const V* x) {
    for (int v = 0; v < NV; ++v) store(sums + v * kLanes<V>, load<V>(sums + v * kLanes<V>) + x[v]);
}

template <typename V, int NV>
QR_INLINE void add_times(float* sums, const V* x, const float* w) {
    for (int v = 0; v < NV; ++v) {
        store(sums + v * kLanes<V>, load<V>(sums + v * kLanes<V>) + x[v] * load<V>(w + v * kLanes<V>));
    }
}

// Σ_d gradient[d] · (a row, or two composed)[d].
template <typename V, int NV, int OP>
QR_INLINE float product_with_composed(const float* gradient, const float* a, const float* b) {
    V products{};
    for (int v = 0; v < NV; ++v) {
        V composed = load<V>(a + v * kLanes<V>);
        if (b) {
            const V y = load<V>(b + v * kLanes<V>);
            composed = OP == kMult ? composed * y : composed + y;
        }
        products += load<V>(gradient + v * kLanes<V>) * composed;
    }
    return sum_of(products);
}

// Sorted; one or two partitions, rows of W floats.
template <typename V, int W, int OP, int K>
QR_INLINE void sorted_in_registers(const Part& part) {
    constexpr int NV = W / kLanes<V>;
    TableBackward& work = *part.work;
    const Group& g = *work.group;
    const PartitionRows& pivot = work.rows.partition[work.pivot_index];
    const bool other_needed = K > 1 && work.sums[0].needed;
    EntriesAhead ahead;
    ahead.next = part.first;
    ahead.last = part.last;
    float sums[W];
    V sum[NV] = {};
    const float* mine = nullptr;
    int64_t row = -1;
    for (int64_t i = part.first; i < part.last; ++i) {
        if (!ahead.reach<K>(part, i)) return;
        const Entry& e = ahead.ring[i % kRing];
        if (e.row != row) {
            if (row >= 0) {
                for (int v = 0; v < NV; ++v) store(sums + v * kLanes<V>, sum[v]);
                work.complete(*work.pivot, row, sums);
            }
            row = e.row;
            mine = reinterpret_cast<const float*>(pivot.weight + row * pivot.row_bytes);
            for (int v = 0; v < NV; ++v) sum[v] = V{};
        }
        const float* other = K > 1 ? reinterpret_cast<const float*>(e.weight[0]) : nullptr;
        V x[NV];
        for (int v = 0; v < NV; ++v) x[v] = load<V>(e.gradient + v * kLanes<V>) * e.scale;
        if (K == 1 || OP == kAdd) {
            for (int v = 0; v < NV; ++v) sum[v] += x[v];
            if (other_needed) add<V, NV>(e.sums[0], x);
        } else {
            for (int v = 0; v < NV; ++v) sum[v] += x[v] * load<V>(other + v * kLanes<V>);
            if (other_needed) add_times<V, NV>(e.sums[0], x, mine);
        }
        if (g.id_weights_gradient) {
            g.id_weights_gradient[e.position] = product_with_composed<V, NV, OP>(e.gradient, mine, other);
        }
    }
    if (row >= 0) {
        for (int v = 0; v < NV; ++v) store(sums + v * kLanes<V>, sum[v]);
        work.complete(*work.pivot, row, sums);
    }
}

// sums[d] += scale · gradient[d] · Π of the k rows w.
QR_INLINE void add_product(float* sums, const float* gradient, float scale, const float* const* w, int k,
                           int64_t width) {
    const float* a = k > 0 ? w[0] : nullptr;
    const float* b = k > 1 ? w[1] : nullptr;
    const float* c = k > 2 ? w[2] : nullptr;
    if (k == 0) {
        for (int64_t d = 0; d < width; ++d) sums[d] += scale * gradient[d];
    } else if (k == 1) {
        for (int64_t d = 0; d < width; ++d) sums[d] += scale * gradient[d] * a[d];
    } else if (k == 2) {
        for (int64_t d = 0; d < width; ++d) sums[d] += scale * gradient[d] * (a[d] * b[d]);
    } else {
        for (int64_t d = 0; d < width; ++d) sums[d] += scale * gradient[d] * (a[d] * b[d] * c[d]);
    }
}

// Any number of partitions, widths, types and operations: one id, given all of its rows, to the sums of one partition.
QR_INLINE void add_gradient(const TableBackward& work, int index, const float* gradient, float scale,
                            const float* const* w, float* sums) {
    const Table& t = *work.table;
    if (t.operation == kConcat) {
        for (int j = 0; j < index; ++j) gradient += work.partitions[j].width;
    }
    const float* rest[kMaxPartitions] = {};
    int k = 0;
    for (int j = 0; t.operation == kMult && j < t.num_partitions; ++j) {
        if (j != index) rest[k++] = w[j];
    }
    add_product(sums, gradient, scale, rest, k, work.partitions[index].width);
}

QR_INLINE float product_with_composed(const TableBackward& work, const float* gradient, const float* const* w) {
    const Table& t = *work.table;
    float total = 0.0f;
    if (t.operation == kConcat) {
        for (int j = 0; j < t.num_partitions; ++j) {
            for (int64_t d = 0; d < work.partitions[j].width; ++d) total += gradient[d] * w[j][d];
            gradient += work.partitions[j].width;
        }
        return total;
    }
    for (int64_t d = 0; d < t.dim; ++d) {
        float composed = w[0][d];
        for (int j = 1; j < t.num_partitions; ++j) {
            composed = t.operation == kMult ? composed * w[j][d] : composed + w[j][d];
        }
        total += gradient[d] * composed;
    }
    return total;
}

QR_INLINE const float* widened(const TableBackward& work, int index, const char* row, float buffer[][kMaxWidth]) {
    const Partition& p = work.partitions[index];
    return as_floats(row, p.weight_type, p.width, buffer[index]);
}

QR_INLINE void sorted_in_memory(const Part& part) {
    TableBackward& work = *part.work;
    const Group& g = *work.group;
    const PartitionRows& pivot = work.rows.partition[work.pivot_index];
    EntriesAhead ahead;
    ahead.next = part.first;
    ahead.last = part.last;
    float sums[kMaxWidth], buffer[kMaxPartitions][kMaxWidth];
    const float* w[kMaxPartitions] = {};
    int64_t row = -1;
    for (int64_t i = part.first; i < part.last; ++i) {
        if (!ahead.reach<0>(part, i)) return;
        const Entry& e = ahead.ring[i % kRing];
        if (e.row != row) {
            if (row >= 0) work.complete(*work.pivot, row, sums);
            row = e.row;
            w[work.pivot_index] = widened(work, work.pivot_index, pivot.weight + row * pivot.row_bytes, buffer);
            for (int64_t d = 0; d < pivot.width; ++d) sums[d] = 0.0f;
        }
        for (int j = 0; j < work.num_sums; ++j) {
            w[work.sums[j].index] = widened(work, work.sums[j].index, e.weight[j], buffer);
        }
        add_gradient(work, work.pivot_index, e.gradient, e.scale, w, sums);
        for (int j = 0; j < work.num_sums; ++j) {
            if (work.sums[j].needed) add_gradient(work, work.sums[j].index, e.gradient, e.scale, w, e.sums[j]);
        }
        if (g.id_weights_gradient) {
            g.id_weights_gradient[e.position] = product_with_composed(work, e.gradient, w);
        }
    }
    if (row >= 0) work.complete(*work.pivot, row, sums);
}

// Bag by bag; W = 0: any number of partitions, widths, types and operations, otherwise K of W floats.
template <typename V, int W, int OP, int K>
QR_INLINE void bag_by_bag(const Part& part) {
    constexpr int NV = W / kLanes<V>;
    TableBackward& work = *part.work;
    const Group& g = *work.group;
    const Table& t = *work.table;
    const int k = K > 0 ? K : t.num_partitions;
    float* sums[kMaxPartitions];
    uint8_t* touched[kMaxPartitions];
    for (int j = 0; j < k; ++j) {
        sums[j] = work.sums[j].needed ? work.sums[j].sums_of(part.part) : nullptr;
        touched[j] = work.sums[j].needed ? work.sums[j].touched_of(part.part) : nullptr;
    }
    float gradient[W > 0 ? W : kMaxPartitions * kMaxWidth], buffer[W > 0 ? 1 : kMaxPartitions][kMaxWidth];
    const int64_t first_bag = t.first_feature * g.num_bags;
    int64_t f = g.pooled ? part.first / g.num_bags : 0, b = g.pooled ? part.first % g.num_bags : part.first;
    for (int64_t bag = part.first; bag < part.last; ++bag, ++b) {
        if (g.pooled && b == g.num_bags) {
            b = 0;
            ++f;
        }
        int64_t n = g.pooled ? integer_at(g.offsets, g.offset_type, first_bag + bag) : work.first_id + bag;
        const int64_t end = g.pooled ? integer_at(g.offsets, g.offset_type, first_bag + bag + 1) : n + 1;
        const float* given = work.gradient + b * work.gradient_stride + f * t.dim;
        if (bag + kAhead < part.last) prefetch(given + kAhead * work.gradient_stride, t.dim * 4);
        V of_bag[NV > 0 ? NV : 1] = {};
        if constexpr (NV > 0) {
            for (int v = 0; v < NV; ++v) of_bag[v] = load<V>(given + v * kLanes<V>);
            for (int v = 0; v < NV; ++v) store(gradient + v * kLanes<V>, of_bag[v]);
        } else {
            for (int64_t d = 0; d < t.dim; ++d) gradient[d] = given[d];
        }
        for (; n < end; ++n) {
            int64_t rows[kMaxPartitions];
            if (__builtin_expect(!work.rows.find<K>(integer_at(g.ids, g.id_type, n), rows, *part.failure), 0)) {
                part.failure->position = n;
                return;
            }
            const char* row[kMaxPartitions];
            for (int j = 0; j < k; ++j) {
                row[j] = work.rows.partition[j].weight + rows[j] * work.rows.partition[j].row_bytes;
                if (touched[j]) touched[j][rows[j]] = 1;
            }
            const float scale = g.id_weights ? g.id_weights[n] : 1.0f;
            if constexpr (NV > 0) {
                const float* first = reinterpret_cast<const float*>(row[0]);
                const float* second = K > 1 ? reinterpret_cast<const float*>(row[1]) : nullptr;
                V x[NV];
                for (int v = 0; v < NV; ++v) x[v] = of_bag[v] * scale;
                if (K == 1 || OP == kAdd) {
                    if (sums[0]) add<V, NV>(sums[0] + rows[0] * W, x);
                    if (K > 1 && sums[1]) add<V, NV>(sums[1] + rows[1] * W, x);
                } else {
                    if (sums[0]) add_times<V, NV>(sums[0] + rows[0] * W, x, second);
                    if (sums[1]) add_times<V, NV>(sums[1] + rows[1] * W, x, first);
                }
                if (g.id_weights_gradient) {
                    g.id_weights_gradient[n] = product_with_composed<V, NV, OP>(gradient, first, second);
                }
            } else {
                const float* w[kMaxPartitions] = {};
                for (int j = 0; j < k; ++j) w[j] = widened(work, j, row[j], buffer);
                for (int j = 0; j < k; ++j) {
                    if (!sums[j]) continue;
                    add_gradient(work, j, gradient, scale, w, sums[j] + rows[j] * work.partitions[j].width);
                }
                if (g.id_weights_gradient) g.id_weights_gradient[n] = product_with_composed(work, gradient, w);
            }
        }
    }
}

template <typename V, int W, int OP, int K>
QR_INLINE void accumulate_k(const Part& part) {
    part.work->bag_by_bag ? bag_by_bag<V, W, OP, K>(part) : sorted_in_registers<V, W, OP, K>(part);
}

template <typename V, int W>
QR_INLINE void accumulate_width(const Part& part) {
    const Table& t = *part.work->table;
    if (t.num_partitions == 1) {
        accumulate_k<V, W, kAdd, 1>(part);
    } else if (t.operation == kMult) {
        accumulate_k<V, W, kMult, 2>(part);
    } else {
        accumulate_k<V, W, kAdd, 2>(part);
    }
}

template <typename V>
QR_INLINE void accumulate_as_body(const Part& part) {
    switch (register_width(*part.work->group, *part.work->table)) {
        case 16: return accumulate_width<V, 16>(part);
        case 32: return accumulate_width<V, 32>(part);
        case 64: return accumulate_width<V, 64>(part);
        case 128: return accumulate_width<V, 128>(part);
        default: return part.work->bag_by_bag ? bag_by_bag<V, 0, kAdd, 0>(part) : sorted_in_memory(part);
    }
}
QR_VERSIONS(accumulate_as, (const Part& part), (part))

}  // namespace

void accumulate(int32_t isa, const Part& part) { accumulate_as(isa, part); }

}  // namespace qr
