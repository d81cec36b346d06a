// The forward: rows are read once, composed, weighted and added up in registers, and written to their place in `out`.
#include <algorithm>
#include <atomic>
#include <vector>

#include "check.h"

namespace qr {
namespace {

// How many ids ahead rows are fetched into the cache, and the ring that holds where they lie.
constexpr int kAhead = 16;
constexpr int kRing = 32;

struct Task {
    const Group* group;
    const TableRows* rows;
    const Table* table;
    int64_t first_bag, last_bag;  // offsets[first_bag] … offsets[last_bag]; not pooled: positions of ids
    float* out;                   // of first_bag
    int64_t out_stride;
    Failure* failure;
};

// The rows of the ids from `begin` to `end`, found and fetched in order, some ids before they are needed.
template <int K>
struct RowsAhead {
    const void* row[kRing][kMaxPartitions];
    int64_t next, end;

    QR_INLINE bool reach(const Task& task, int64_t position) {
        const Group& g = *task.group;
        const TableRows& t = *task.rows;
        const int k = K > 0 ? K : t.num_partitions;
        const int64_t until = position + kAhead < end ? position + kAhead : end;
        for (; next < until; ++next) {
            int64_t rows[kMaxPartitions];
            if (__builtin_expect(!t.find<K>(integer_at(g.ids, g.id_type, next), rows, *task.failure), 0)) {
                task.failure->position = next;
                return false;
            }
            for (int j = 0; j < k; ++j) {
                const PartitionRows& p = t.partition[j];
                const char* address = p.weight + rows[j] * p.row_bytes;
                if (p.prefetched) prefetch(address, p.row_bytes);
                row[next % kRing][j] = address;
            }
        }
        return true;
    }
};

template <typename V, int NV, int OP, int K>
QR_INLINE void compose_in_registers(const void* const* row, V* e) {
    for (int v = 0; v < NV; ++v) e[v] = load<V>(static_cast<const float*>(row[0]) + v * kLanes<V>);
    for (int j = 1; j < K; ++j) {
        for (int v = 0; v < NV; ++v) {
            const V x = load<V>(static_cast<const float*>(row[j]) + v * kLanes<V>);
            e[v] = OP == kMult ? e[v] * x : e[v] + x;
        }
    }
}

// `out` += s · e, or `out` = e; rows in less than fp32 are widened into `buffer`.
QR_INLINE void compose_in_memory(const Table& t, const Partition* p, const void* const* row, float s, bool set,
                                 float buffer[][kMaxWidth], float* out) {
    const int k = t.num_partitions;
    const float* w[kMaxPartitions] = {};
    for (int j = 0; j < k; ++j) w[j] = as_floats(row[j], p[j].weight_type, p[j].width, buffer[j]);
    if (t.operation == kConcat) {
        for (int j = 0; j < k; ++j) {
            const float* row = w[j];
            const int64_t width = p[j].width;
            if (set) {
                for (int64_t d = 0; d < width; ++d) out[d] = row[d];
            } else {
                for (int64_t d = 0; d < width; ++d) out[d] += s * row[d];
            }
            out += width;
        }
        return;
    }
    float e[kMaxWidth];
    const float* first = w[0];
    for (int64_t d = 0; d < t.dim; ++d) e[d] = first[d];
    for (int j = 1; j < k; ++j) {
        const float* row = w[j];
        if (t.operation == kMult) {
            for (int64_t d = 0; d < t.dim; ++d) e[d] *= row[d];
        } else {
            for (int64_t d = 0; d < t.dim; ++d) e[d] += row[d];
        }
    }
    if (set) {
        for (int64_t d = 0; d < t.dim; ++d) out[d] = e[d];
    } else {
        for (int64_t d = 0; d < t.dim; ++d) out[d] += s * e[d];
    }
}

template <typename V, int W, int OP, int K>
QR_INLINE void look_up_as(const Task& task) {
    constexpr int NV = W / kLanes<V>;
    const Group& g = *task.group;
    const Table& t = *task.table;
    const Partition* partitions = g.partitions + t.first_partition;
    RowsAhead<K> ahead;
    float buffer[NV > 0 ? 1 : kMaxPartitions][kMaxWidth];
    float* out = task.out;
    if (!g.pooled) {
        ahead.next = task.first_bag;
        ahead.end = task.last_bag;
        for (int64_t n = task.first_bag; n < task.last_bag; ++n, out += task.out_stride) {
            if (!ahead.reach(task, n)) return;
            const void* const* row = ahead.row[n % kRing];
            if constexpr (NV > 0) {
                V e[NV];
                compose_in_registers<V, NV, OP, K>(row, e);
                for (int v = 0; v < NV; ++v) store(out + v * kLanes<V>, e[v]);
            } else {
                compose_in_memory(t, partitions, row, 1.0f, true, buffer, out);
            }
        }
        return;
    }
    int64_t n = integer_at(g.offsets, g.offset_type, task.first_bag);
    ahead.next = n;
    ahead.end = integer_at(g.offsets, g.offset_type, task.last_bag);
    for (int64_t b = task.first_bag; b < task.last_bag; ++b, out += task.out_stride) {
        const int64_t end = integer_at(g.offsets, g.offset_type, b + 1);
        if constexpr (NV > 0) {
            V sum[NV];
            for (int v = 0; v < NV; ++v) sum[v] = V{};
            for (; n < end; ++n) {
                if (!ahead.reach(task, n)) return;
                const float s = g.id_weights ? g.id_weights[n] : 1.0f;
                V e[NV];
                compose_in_registers<V, NV, OP, K>(ahead.row[n % kRing], e);
                for (int v = 0; v < NV; ++v) sum[v] += e[v] * s;
            }
            for (int v = 0; v < NV; ++v) store(out + v * kLanes<V>, sum[v]);
        } else {
            for (int64_t d = 0; d < t.dim; ++d) out[d] = 0.0f;
            for (; n < end; ++n) {
                if (!ahead.reach(task, n)) return;
                const float s = g.id_weights ? g.id_weights[n] : 1.0f;
                compose_in_memory(t, partitions, ahead.row[n % kRing], s, false, buffer, out);
            }
        }
    }
}

template <typename V, int W>
QR_INLINE void look_up_width(const Task& task) {
    if (task.table->num_partitions == 1) {
        look_up_as<V, W, kAdd, 1>(task);
    } else if (task.table->operation == kMult) {
        look_up_as<V, W, kMult, 2>(task);
    } else {
        look_up_as<V, W, kAdd, 2>(task);
    }
}

template <typename V>
QR_INLINE void look_up_body(const Task& task) {
    switch (register_width(*task.group, *task.table)) {
        case 16: return look_up_width<V, 16>(task);
        case 32: return look_up_width<V, 32>(task);
        case 64: return look_up_width<V, 64>(task);
        case 128: return look_up_width<V, 128>(task);
        default: return look_up_as<V, 0, kAdd, 0>(task);
    }
}

QR_VERSIONS(look_up, (const Task& task), (task))

// Bytes of `out` that a block of bags takes. All tables are looked up for one block before the next, so that its pages
// stay in the address translation caches while the tables fill their columns of it.
constexpr int64_t kBlockBytes = 2 << 20;

struct Bounds {
    const void* ids;
    int32_t id_type;
    int64_t first, last;
    int64_t* bounds;
};

template <typename Id>
QR_INLINE void bounds_of(const Id* ids, int64_t n, int64_t* bounds) {
    Id low = ids[0], high = ids[0];
    for (int64_t i = 1; i < n; ++i) {
        low = ids[i] < low ? ids[i] : low;
        high = ids[i] > high ? ids[i] : high;
    }
    bounds[0] = low;
    bounds[1] = high;
}

template <typename V>
QR_INLINE void find_bounds_body(const Bounds& b) {
    if (b.id_type == kInt32) {
        bounds_of(static_cast<const int32_t*>(b.ids) + b.first, b.last - b.first, b.bounds);
    } else {
        bounds_of(static_cast<const int64_t*>(b.ids) + b.first, b.last - b.first, b.bounds);
    }
}
QR_VERSIONS(find_bounds, (const Bounds& b), (b))

}  // namespace
}  // namespace qr

void qr_id_bounds(const void* ids, int32_t id_type, const int64_t* starts, int64_t n, int32_t isa, int64_t* bounds) {
    for (int64_t f = 0; f < n; ++f) {
        bounds[2 * f] = 0;
        bounds[2 * f + 1] = -1;
        if (starts[f] == starts[f + 1]) continue;
        qr::find_bounds(qr::usable_isa(isa), qr::Bounds{ids, id_type, starts[f], starts[f + 1], bounds + 2 * f});
    }
}

int32_t qr_forward(const qr::Group* group, qr::Failure* failure) try {
    using namespace qr;
    if (check(*group, failure) != kOk) return failure->code;
    const Group& g = *group;
    std::vector<TableRows> rows(g.num_tables);
    std::vector<Task> tasks;
    for (int32_t t = 0; t < g.num_tables; ++t) rows[t].set(g, t);
    if (g.pooled) {
        const int64_t step = std::clamp<int64_t>(kBlockBytes / (4 * std::max<int64_t>(g.out_stride, 1)), 64, 1024);
        for (int64_t b = 0; b < g.num_bags; b += step) {
            const int64_t bags = std::min(step, g.num_bags - b);
            for (int32_t t = 0; t < g.num_tables; ++t) {
                const Table& table = g.tables[t];
                for (int64_t f = 0; f < table.num_features; ++f) {
                    const int64_t first = (table.first_feature + f) * g.num_bags + b;
                    float* out = g.out + b * g.out_stride + table.column + f * table.dim;
                    tasks.push_back({&g, &rows[t], &table, first, first + bags, out, g.out_stride, nullptr});
                }
            }
        }
    } else {
        for (int32_t t = 0; t < g.num_tables; ++t) {
            const Table& table = g.tables[t];
            const Spans span = span_of(g, t);
            const int64_t step = std::max<int64_t>(kBlockBytes / (4 * table.dim), 64);
            for (int64_t n = span.first_id; n < span.last_id; n += step) {
                float* out = g.out + span.first_float + (n - span.first_id) * table.dim;
                tasks.push_back({&g, &rows[t], &table, n, std::min(n + step, span.last_id), out, table.dim, nullptr});
            }
        }
    }
    std::vector<Failure> failures(tasks.size());
    const int32_t isa = usable_isa(g.isa);
    const int64_t count = static_cast<int64_t>(tasks.size());
#pragma omp parallel for schedule(dynamic, 1) num_threads(g.threads) if (g.threads > 1 && count > 1)
    for (int64_t i = 0; i < count; ++i) {
        tasks[i].failure = &failures[i];
        look_up(isa, tasks[i]);
    }
    // The first in the order of positions, whatever the threads did.
    for (const Failure& f : failures) {
        if (f.code != kOk) {
            *failure = f;
            return f.code;
        }
    }
    return kOk;
} catch (const std::bad_alloc&) {
    return qr::failed(failure, qr::kNoMemory, -1, 0, 0);
}

int32_t qr_best_isa() { return qr::best_isa(); }

void qr_struct_sizes(int64_t* sizes) {
    sizes[0] = sizeof(qr::Partition);
    sizes[1] = sizeof(qr::Table);
    sizes[2] = sizeof(qr::Group);
    sizes[3] = sizeof(qr::Failure);
}
