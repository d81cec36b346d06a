// The backward of a group: what runs when, and in how many parts.
#include "backward.h"

#include <algorithm>
#include <new>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace qr {

int32_t TableBackward::prepare(const Group& g, int32_t t, int parts, int32_t isa, Failure* failure) {
    group = &g;
    table = &g.tables[t];
    partitions = g.partitions + table->first_partition;
    isa_ = isa;
    parts_ = parts;
    rows.set(g, t);
    const Spans span = span_of(g, t);
    first_id = span.first_id;
    first_float = span.first_float;
    const int64_t n = span.last_id - span.first_id;

    pivot_index = 0;
    for (int j = 1; j < table->num_partitions; ++j) {
        if (partitions[j].rows > partitions[pivot_index].rows) pivot_index = j;
    }
    pivot = &partitions[pivot_index];
    complete = complete_row(isa, *pivot);
    num_others = 0;
    for (int j = 0; j < table->num_partitions; ++j) {
        if (j == pivot_index) continue;
        Other& other = others[num_others++];
        other.p = &partitions[j];
        other.index = j;
        other.needed = other.p->gradient || other.p->rule != kNoStep;
        other.compact = other.needed && other.p->rows > n;
    }

    if (!sorted.reserve(n, pivot->rows)) return failed(failure, kTooLarge, t, 0, n);
    by_other_.resize(kMaxPartitions - 1);
    for (int j = 0; j < num_others; ++j) {
        if (others[j].compact && !by_other_[j].reserve(n, others[j].p->rows)) return failed(failure, kTooLarge, t, 0, n);
    }
    if (find_rows(failure) != kOk) return failure->code;
    sorted.sort();

    // Whole pivot rows per part.
    bounds_.assign(parts + 1, n);
    bounds_[0] = 0;
    for (int p = 1; p < parts; ++p) {
        int64_t i = std::max(n * p / parts, bounds_[p - 1]);
        while (i > 0 && i < n && sorted.row(i) == sorted.row(i - 1)) ++i;
        bounds_[p] = i;
    }

    pieces_.clear();
    for (int j = 0; j < num_others; ++j) {
        Other& other = others[j];
        other.slots = other.p->rows;
        other.sums.clear();
        other.touched.clear();
        if (!other.needed) continue;
        if (other.compact) {
            by_other_[j].sort();
            const SortedIds& by = by_other_[j];
            other.slot_of.resize(n);
            other.row_of.clear();
            for (int64_t i = 0; i < n; ++i) {
                if (i == 0 || by.row(i) != by.row(i - 1)) other.row_of.push_back(by.row(i));
                other.slot_of[by.position(i)] = static_cast<uint32_t>(other.row_of.size() - 1);
            }
            other.slots = static_cast<int64_t>(other.row_of.size());
        } else {
            other.touched.assign(parts * other.slots, 0);
        }
        // One part may add up in the caller's gradient itself.
        if (other.compact || parts > 1 || !other.p->gradient) other.sums.assign(parts * other.slots * other.p->width, 0.0f);
        const int64_t step = std::max<int64_t>(1024, other.slots / std::max(1, 2 * group->threads));
        for (int64_t slot = 0; slot < other.slots; slot += step) {
            pieces_.push_back({j, slot, std::min(slot + step, other.slots)});
        }
    }
    return kOk;
}

int32_t TableBackward::find_rows(Failure* failure) {
    const Group& g = *group;
    int64_t rows_of_id[kMaxPartitions];
    const int64_t features = g.pooled ? table->num_features : 0;
    const int64_t n = sorted.size();
    mean_scale.clear();
    if (g.pooled) gradient_at.resize(n);
    if (g.pooled && table->mean) mean_scale.resize(n);
    for (int64_t f = 0; f < features; ++f) {
        const int64_t first_bag = (table->first_feature + f) * g.num_bags;
        int64_t position = integer_at(g.offsets, g.offset_type, first_bag) - first_id;
        for (int64_t b = 0; b < g.num_bags; ++b) {
            const int64_t end = integer_at(g.offsets, g.offset_type, first_bag + b + 1) - first_id;
            const int64_t at = b * g.out_stride + table->column + f * table->dim;
            const float scale = 1.0f / static_cast<float>(std::max<int64_t>(end - position, 1));
            for (; position < end; ++position) {
                gradient_at[position] = at;
                if (table->mean) mean_scale[position] = scale;
            }
        }
    }
    for (int64_t position = 0; position < n; ++position) {
        const int64_t id = integer_at(g.ids, g.id_type, first_id + position);
        if (!rows.find<0>(id, rows_of_id, *failure)) {
            failure->position = first_id + position;
            return failure->code;
        }
        sorted.set(position, rows_of_id[pivot_index]);
        for (int j = 0; j < num_others; ++j) {
            if (others[j].compact) by_other_[j].set(position, rows_of_id[others[j].index]);
        }
    }
    return kOk;
}

int32_t TableBackward::accumulate(int part, Failure* failure) {
    failure->code = kOk;
    qr::accumulate(isa_, Part{this, bounds_[part], bounds_[part + 1], part, failure});
    return failure->code;
}

void TableBackward::finish(int piece) {
    Other& other = others[pieces_[piece].other];
    const Partition& p = *other.p;
    const CompleteRow complete_other = complete_row(isa_, p);
    for (int64_t slot = pieces_[piece].first; slot < pieces_[piece].last; ++slot) {
        bool touched = other.compact;
        for (int part = 0; part < parts_ && !touched; ++part) touched = other.touched_of(part)[slot];
        if (!touched) continue;
        const int64_t row = other.compact ? other.row_of[slot] : slot;
        if (other.sums.empty()) {
            if (p.touched) p.touched[row] = 1;  // the sums are the caller's gradient already
            continue;
        }
        float* sums = other.sums_of(0) + slot * p.width;
        for (int part = 1; part < parts_; ++part) {
            const float* more = other.sums_of(part) + slot * p.width;
            for (int64_t d = 0; d < p.width; ++d) sums[d] += more[d];
        }
        complete_other(p, row, sums);
    }
}

namespace {

bool has_work(const Group& g, const Table& t) {
    bool needed = g.id_weights_gradient != nullptr;
    for (int j = 0; j < t.num_partitions; ++j) {
        const Partition& p = g.partitions[t.first_partition + j];
        needed |= p.gradient || p.rule != kNoStep;
    }
    return needed;
}

// Ids below which a part costs more than it saves.
constexpr int64_t kIdsPerPart = 4096;

// Table after table, each by one thread, in the same memory: for one thread, or for many tables of like size.
void by_tables(const Group& g, const std::vector<int32_t>& tables, int32_t isa, std::vector<Failure>& failures) {
    std::vector<TableBackward> work(g.threads);
    const int64_t count = static_cast<int64_t>(tables.size());
#pragma omp parallel for schedule(dynamic, 1) num_threads(g.threads) if (g.threads > 1)
    for (int64_t i = 0; i < count; ++i) {
#if defined(_OPENMP)
        TableBackward& mine = work[omp_get_thread_num()];
#else
        TableBackward& mine = work[0];
#endif
        Failure& failure = failures[i];
        try {
            if (mine.prepare(g, tables[i], 1, isa, &failure) != kOk) continue;
            if (mine.accumulate(0, &failure) != kOk) continue;
            for (int piece = 0; piece < mine.pieces(); ++piece) mine.finish(piece);
        } catch (const std::bad_alloc&) {
            failed(&failure, kNoMemory, tables[i], 0, 0);
        }
    }
}

// All tables at once, the larger ones in parts.
void by_parts(const Group& g, const std::vector<int32_t>& tables, const std::vector<int64_t>& ids, int32_t isa,
              std::vector<Failure>& failures) {
    const int64_t count = static_cast<int64_t>(tables.size());
    std::vector<TableBackward> work(count);
    struct Task {
        int64_t table;
        int number;
    };
    std::vector<Task> parts, pieces;
    std::vector<int> num_parts(count);
    for (int64_t i = 0; i < count; ++i) {
        num_parts[i] = static_cast<int>(std::clamp<int64_t>(ids[i] / kIdsPerPart, 1, g.threads));
        for (int p = 0; p < num_parts[i]; ++p) parts.push_back({i, p});
    }
    std::vector<Failure> part_failures(parts.size());
#pragma omp parallel num_threads(g.threads)
    {
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < count; ++i) {
            try {
                work[i].prepare(g, tables[i], num_parts[i], isa, &failures[i]);
            } catch (const std::bad_alloc&) {
                failed(&failures[i], kNoMemory, tables[i], 0, 0);
            }
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < static_cast<int64_t>(parts.size()); ++i) {
            if (failures[parts[i].table].code == kOk) work[parts[i].table].accumulate(parts[i].number, &part_failures[i]);
        }
#pragma omp single
        {
            for (size_t i = 0; i < parts.size(); ++i) {
                if (part_failures[i].code != kOk) failures[parts[i].table] = part_failures[i];
            }
            for (int64_t i = 0; i < count; ++i) {
                for (int p = 0; failures[i].code == kOk && p < work[i].pieces(); ++p) pieces.push_back({i, p});
            }
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < static_cast<int64_t>(pieces.size()); ++i) {
            work[pieces[i].table].finish(pieces[i].number);
        }
    }
}

}  // namespace
}  // namespace qr

int32_t qr_backward(const qr::Group* group, qr::Failure* failure) try {
    using namespace qr;
    if (check(*group, failure) != kOk) return failure->code;
    const Group& g = *group;
    std::vector<int32_t> tables;
    std::vector<int64_t> ids;
    int64_t total = 0, most = 0;
    for (int32_t t = 0; t < g.num_tables; ++t) {
        const Spans span = span_of(g, t);
        if (!has_work(g, g.tables[t]) || span.last_id == span.first_id) continue;
        tables.push_back(t);
        ids.push_back(span.last_id - span.first_id);
        total += ids.back();
        most = std::max(most, ids.back());
    }
    std::vector<Failure> failures(tables.size());
    const int32_t isa = usable_isa(g.isa);
    const bool even = static_cast<int64_t>(tables.size()) >= 2 * g.threads && most * g.threads <= total;
    if (g.threads == 1 || even || total < kIdsPerPart) {
        by_tables(g, tables, isa, failures);
    } else {
        by_parts(g, tables, ids, isa, failures);
    }
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
