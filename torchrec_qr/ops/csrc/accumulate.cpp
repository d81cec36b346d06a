// The gradients of rows from those of bags, added up per row.
#include "backward.h"

namespace qr {
namespace {

constexpr int kAhead = 12;
constexpr int kRing = 16;

// One id: the gradient of its output, its rows of the partitions other than the pivot, and their sums.
struct Entry {
    int64_t row, position;
    const float* gradient;
    float scale, mean;  // of the gradient: w · mean, and mean = 1 or 1 / ids of the bag
    const char* weight[kMaxPartitions - 1];
    float* sums[kMaxPartitions - 1];
};

struct EntriesAhead {
    Entry ring[kRing];
    int64_t next, last;

    template <int K>
    QR_INLINE bool reach(const Part& part, int64_t i) {
        TableBackward& work = *part.work;
        const Group& g = *work.group;
        const int k = K > 0 ? K - 1 : work.num_others;
        const int64_t until = i + kAhead < last ? i + kAhead : last;
        for (; next < until; ++next) {
            Entry& e = ring[next % kRing];
            const int64_t position = work.sorted.position(next);
            int64_t rows[kMaxPartitions];
            const int64_t id = integer_at(g.ids, g.id_type, work.first_id + position);
            if (__builtin_expect(!work.rows.find<K>(id, rows, *part.failure), 0)) {
                part.failure->position = work.first_id + position;
                return false;
            }
            e.row = work.sorted.row(next);
            e.position = work.first_id + position;
            const int64_t at = g.pooled ? work.gradient_at[position] : work.first_float + position * work.table->dim;
            e.gradient = g.out_gradient + at;
            e.mean = work.mean_scale.empty() ? 1.0f : work.mean_scale[position];
            e.scale = g.id_weights ? e.mean * g.id_weights[e.position] : e.mean;
            prefetch(e.gradient, work.table->dim * 4);
            const PartitionRows& pivot = work.rows.partition[work.pivot_index];
            if (pivot.prefetched && (next == part.first || work.sorted.row(next - 1) != e.row)) {
                const Partition& p = *work.pivot;
                prefetch(pivot.weight + e.row * pivot.row_bytes, pivot.row_bytes);
                if (p.rule >= kAdam) prefetch(p.state[1] + e.row * p.width, p.width * 4);
                if (p.rule == kAdagrad || p.rule >= kAdam) prefetch(p.state[0] + e.row * p.width, p.width * 4);
                if (p.rule == kRowWiseAdagrad) prefetch(p.state[0] + e.row, 4);
            }
            for (int j = 0; j < k; ++j) {
                TableBackward::Other& other = work.others[j];
                const PartitionRows& p = work.rows.partition[other.index];
                e.weight[j] = p.weight + rows[other.index] * p.row_bytes;
                if (p.prefetched) prefetch(e.weight[j], p.row_bytes);
                if (!other.needed) continue;
                const int64_t slot = other.compact ? other.slot_of[position] : rows[other.index];
                e.sums[j] = other.sums_of(part.part) + slot * p.width;
                if (p.prefetched) prefetch(e.sums[j], p.width * 4);
                uint8_t* touched = other.touched_of(part.part);
                if (touched) touched[slot] = 1;
            }
        }
        return true;
    }
};

// One or two partitions, rows of W floats.
template <typename V, int W, int OP, int K>
QR_INLINE void accumulate_in_registers(const Part& part) {
    constexpr int NV = W / kLanes<V>;
    TableBackward& work = *part.work;
    const Group& g = *work.group;
    const PartitionRows& pivot = work.rows.partition[work.pivot_index];
    const bool other_needed = K > 1 && work.others[0].needed;
    EntriesAhead ahead;
    ahead.next = part.first;
    ahead.last = part.last;
    float sums[W];
    V mine[NV] = {}, sum[NV] = {};
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
            const float* w = reinterpret_cast<const float*>(pivot.weight + row * pivot.row_bytes);
            for (int v = 0; v < NV; ++v) {
                mine[v] = load<V>(w + v * kLanes<V>);
                sum[v] = V{};
            }
        }
        V x[NV];
        for (int v = 0; v < NV; ++v) x[v] = load<V>(e.gradient + v * kLanes<V>) * e.scale;
        if (K == 1 || OP == kAdd) {
            for (int v = 0; v < NV; ++v) sum[v] += x[v];
            if (other_needed) {
                for (int v = 0; v < NV; ++v) store(e.sums[0] + v * kLanes<V>, load<V>(e.sums[0] + v * kLanes<V>) + x[v]);
            }
        } else {
            const float* other = reinterpret_cast<const float*>(e.weight[0]);
            for (int v = 0; v < NV; ++v) sum[v] += x[v] * load<V>(other + v * kLanes<V>);
            if (other_needed) {
                for (int v = 0; v < NV; ++v) {
                    store(e.sums[0] + v * kLanes<V>, load<V>(e.sums[0] + v * kLanes<V>) + x[v] * mine[v]);
                }
            }
        }
        if (g.id_weights_gradient) {
            V products{};
            for (int v = 0; v < NV; ++v) {
                V composed = mine[v];
                if (K > 1) {
                    const V y = load<V>(reinterpret_cast<const float*>(e.weight[0]) + v * kLanes<V>);
                    composed = OP == kMult ? composed * y : composed + y;
                }
                products += load<V>(e.gradient + v * kLanes<V>) * composed;
            }
            g.id_weights_gradient[e.position] = e.mean * sum_of(products);
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

// Σ_d gradient[d] · (the composed row)[d].
QR_INLINE float product_with_composed(const Table& t, const Partition* p, const float* gradient,
                                      const float* const* w) {
    float total = 0.0f;
    if (t.operation == kConcat) {
        for (int j = 0; j < t.num_partitions; ++j) {
            for (int64_t d = 0; d < p[j].width; ++d) total += gradient[d] * w[j][d];
            gradient += p[j].width;
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

// Any number of partitions, widths, types and operations.
QR_INLINE void accumulate_in_memory(const Part& part) {
    TableBackward& work = *part.work;
    const Group& g = *work.group;
    const Table& t = *work.table;
    const PartitionRows& pivot = work.rows.partition[work.pivot_index];
    int64_t column[kMaxPartitions] = {};
    if (t.operation == kConcat) {
        for (int j = 1; j < t.num_partitions; ++j) column[j] = column[j - 1] + work.partitions[j - 1].width;
    }
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
            w[work.pivot_index] = as_floats(pivot.weight + row * pivot.row_bytes, pivot.weight_type, pivot.width,
                                            buffer[work.pivot_index]);
            for (int64_t d = 0; d < pivot.width; ++d) sums[d] = 0.0f;
        }
        for (int j = 0; j < work.num_others; ++j) {
            const int index = work.others[j].index;
            w[index] = as_floats(e.weight[j], work.partitions[index].weight_type, work.partitions[index].width,
                                 buffer[index]);
        }
        for (int j = -1; j < work.num_others; ++j) {
            if (j >= 0 && !work.others[j].needed) continue;
            const int index = j < 0 ? work.pivot_index : work.others[j].index;
            const float* rest[kMaxPartitions] = {};
            int k = 0;
            for (int other = 0; t.operation == kMult && other < t.num_partitions; ++other) {
                if (other != index) rest[k++] = w[other];
            }
            add_product(j < 0 ? sums : e.sums[j], e.gradient + column[index], e.scale, rest, k,
                        work.partitions[index].width);
        }
        if (g.id_weights_gradient) {
            g.id_weights_gradient[e.position] = e.mean * product_with_composed(t, work.partitions, e.gradient, w);
        }
    }
    if (row >= 0) work.complete(*work.pivot, row, sums);
}

template <typename V, int W>
QR_INLINE void accumulate_width(const Part& part) {
    if (part.work->num_others == 0) {
        accumulate_in_registers<V, W, kAdd, 1>(part);
    } else if (part.work->table->operation == kMult) {
        accumulate_in_registers<V, W, kMult, 2>(part);
    } else {
        accumulate_in_registers<V, W, kAdd, 2>(part);
    }
}

template <typename V>
QR_INLINE void accumulate_as_body(const Part& part) {
    switch (register_width(*part.work->group, *part.work->table)) {
        case 16: return accumulate_width<V, 16>(part);
        case 32: return accumulate_width<V, 32>(part);
        case 64: return accumulate_width<V, 64>(part);
        case 128: return accumulate_width<V, 128>(part);
        default: return accumulate_in_memory(part);
    }
}
QR_VERSIONS(accumulate_as, (const Part& part), (part))

}  // namespace

void accumulate(int32_t isa, const Part& part) { accumulate_as(isa, part); }

}  // namespace qr
