#include "serve.h"

#include "stored_rows.h"

namespace qr {
namespace {

// How many ids ahead rows are fetched into the cache, and the ring that holds where they lie.
constexpr int kServedAhead = 16;
constexpr int kServedRing = 32;

// The id that is looked up in place of one outside of [0, S).
QR_INLINE int64_t bounded(const ServedTable& t, int64_t id) {
    const int64_t size = t.rows.num_ids;
    if (t.policy == kClamp) return id < 0 ? 0 : id >= size ? size - 1 : id;
    if (t.policy == kWrap && (id < 0 || id >= size)) return floor_remainder(id, size);
    return id;
}

template <int K>
struct ServedRowsAhead {
    const void* row[kServedRing][kMaxPartitions];
    int64_t next, end;

    QR_INLINE bool reach(const ServedTask& task, int64_t position, Failure& failure) {
        const ServedTable& t = *task.table;
        const int k = K > 0 ? K : t.rows.num_partitions;
        const int64_t until = position + kServedAhead < end ? position + kServedAhead : end;
        for (; next < until; ++next) {
            int64_t rows[kMaxPartitions];
            const int64_t id = bounded(t, integer_at(task.ids, task.id_type, next));
            if (__builtin_expect(!t.rows.find<K>(id, rows, failure), 0)) {
                failure.position = next;
                return false;
            }
            for (int j = 0; j < k; ++j) {
                const PartitionRows& p = t.rows.partition[j];
                const char* address = p.weight + rows[j] * p.row_bytes;
                if (p.prefetched) prefetch(address, p.row_bytes);
                row[next % kServedRing][j] = address;
            }
        }
        return true;
    }
};

template <typename V, int TYPE, int W>
struct Reader {
    const uint8_t* row;
    Affine affine;

    QR_INLINE explicit Reader(const void* stored) : row(static_cast<const uint8_t*>(stored)), affine{1.0f, 0.0f} {
        if (TYPE == kInt8Rows) affine = affine_at(row + W);
    }
    QR_INLINE V at(int v) const {
        if (TYPE == kFloat32) return load<V>(reinterpret_cast<const float*>(row) + v * kLanes<V>);
        return widened_bytes<V>(row + v * kLanes<V>) * affine.scale + affine.bias;
    }
};

template <typename V, int TYPE, int W, int OP, int K>
QR_INLINE void compose_served(const void* const* row, V* e) {
    constexpr int NV = W / kLanes<V>;
    const Reader<V, TYPE, W> first(row[0]);
    for (int v = 0; v < NV; ++v) e[v] = first.at(v);
    for (int j = 1; j < K; ++j) {
        const Reader<V, TYPE, W> other(row[j]);
        for (int v = 0; v < NV; ++v) e[v] = OP == kMult ? e[v] * other.at(v) : e[v] + other.at(v);
    }
}

// Writes compose_j( W_j[row_j] ) into `e`.
QR_INLINE void compose_any(const ServedTable& t, const void* const* row, float* e) {
    float buffer[kMaxWidth];
    for (int j = 0; j < t.rows.num_partitions; ++j) {
        const PartitionRows& p = t.rows.partition[j];
        const float* values = dequantised(row[j], p.weight_type, p.width, buffer);
        if (j == 0 || t.operation == kConcat) {
            for (int64_t d = 0; d < p.width; ++d) e[d] = values[d];
            if (t.operation == kConcat) e += p.width;
        } else if (t.operation == kMult) {
            for (int64_t d = 0; d < p.width; ++d) e[d] *= values[d];
        } else {
            for (int64_t d = 0; d < p.width; ++d) e[d] += values[d];
        }
    }
}

template <typename V, int TYPE, int W, int OP, int K>
QR_INLINE bool serve_as(const ServedTask& task, Failure& failure) {
    constexpr int NV = W / kLanes<V>;
    const ServedTable& t = *task.table;
    float* out = task.out;
    ServedRowsAhead<K> ahead;
    float e_in_memory[W > 0 ? 1 : kMaxWidth * kMaxPartitions];
    if (!task.offsets) {
        ahead.next = task.first;
        ahead.end = task.last;
        for (int64_t n = task.first; n < task.last; ++n, out += task.out_stride) {
            if (!ahead.reach(task, n, failure)) return false;
            const void* const* row = ahead.row[n % kServedRing];
            if constexpr (W > 0) {
                V e[NV];
                compose_served<V, TYPE, W, OP, K>(row, e);
                for (int v = 0; v < NV; ++v) store(out + v * kLanes<V>, e[v]);
            } else {
                compose_any(t, row, out);
            }
        }
        return true;
    }
    int64_t n = task.offsets[task.first];
    ahead.next = n;
    ahead.end = task.offsets[task.last];
    for (int64_t b = task.first; b < task.last; ++b, out += task.out_stride) {
        const int64_t begin = n, end = task.offsets[b + 1];
        const float divisor = t.mean && end - begin > 1 ? static_cast<float>(end - begin) : 1.0f;
        if constexpr (W > 0) {
            V sum[NV];
            for (int v = 0; v < NV; ++v) sum[v] = V{};
            for (; n < end; ++n) {
                if (!ahead.reach(task, n, failure)) return false;
                V e[NV];
                compose_served<V, TYPE, W, OP, K>(ahead.row[n % kServedRing], e);
                if (task.id_weights) {
                    for (int v = 0; v < NV; ++v) sum[v] += e[v] * task.id_weights[n];
                } else {
                    for (int v = 0; v < NV; ++v) sum[v] += e[v];
                }
            }
            if (divisor != 1.0f) {
                for (int v = 0; v < NV; ++v) sum[v] /= divisor;
            }
            for (int v = 0; v < NV; ++v) store(out + v * kLanes<V>, sum[v]);
        } else {
            for (int64_t d = 0; d < t.dim; ++d) out[d] = 0.0f;
            for (; n < end; ++n) {
                if (!ahead.reach(task, n, failure)) return false;
                compose_any(t, ahead.row[n % kServedRing], e_in_memory);
                const float s = task.id_weights ? task.id_weights[n] : 1.0f;
                for (int64_t d = 0; d < t.dim; ++d) out[d] += e_in_memory[d] * s;
            }
            if (divisor != 1.0f) {
                for (int64_t d = 0; d < t.dim; ++d) out[d] /= divisor;
            }
        }
    }
    return true;
}

template <typename V, int TYPE, int W>
QR_INLINE bool serve_width(const ServedTask& task, Failure& failure) {
    if (task.table->rows.num_partitions == 1) return serve_as<V, TYPE, W, kAdd, 1>(task, failure);
    if (task.table->operation == kMult) return serve_as<V, TYPE, W, kMult, 2>(task, failure);
    return serve_as<V, TYPE, W, kAdd, 2>(task, failure);
}

template <typename V, int TYPE>
QR_INLINE bool serve_type(const ServedTask& task, Failure& failure) {
    switch (task.table->width_of_registers) {
        case 16: return serve_width<V, TYPE, 16>(task, failure);
        case 32: return serve_width<V, TYPE, 32>(task, failure);
        case 64: return serve_width<V, TYPE, 64>(task, failure);
        default: return serve_width<V, TYPE, 128>(task, failure);
    }
}

struct Call {
    const ServedTask& task;
    Failure& failure;
    bool* found;
};

template <typename V>
QR_INLINE void serve_by_body(const Call& call) {
    if (!call.task.table->width_of_registers) {
        *call.found = serve_as<V, kFloat32, 0, kAdd, 0>(call.task, call.failure);
    } else if (call.task.table->rows.partition[0].weight_type == kInt8Rows) {
        *call.found = serve_type<V, kInt8Rows>(call.task, call.failure);
    } else {
        *call.found = serve_type<V, kFloat32>(call.task, call.failure);
    }
}
QR_VERSIONS(serve_by, (const Call& call), (call))

}  // namespace

bool serve(int32_t isa, const ServedTask& task, Failure& failure) {
    bool found = false;
    serve_by(isa, Call{task, failure, &found});
    return found;
}

int64_t served_register_width(const ServedTable& t) {
    const int k = t.rows.num_partitions;
    if (k > 2 || (t.operation == kConcat && k > 1)) return 0;
    const int32_t type = t.rows.partition[0].weight_type;
    if (type != kFloat32 && type != kInt8Rows) return 0;
    for (int j = 1; j < k; ++j) {
        if (t.rows.partition[j].weight_type != type) return 0;
    }
    return t.dim == 16 || t.dim == 32 || t.dim == 64 || t.dim == 128 ? t.dim : 0;
}

}  // namespace qr
