// The backward of a group: what runs when, and in how many parts.
#include "backward.h"

#include <algorithm>
#include <new>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace qr {
namespace {

// Rows and sums of a table that lie in the second-level cache: bag by bag is faster than sorted.
constexpr int64_t kBagByBagBytes = 1 << 20;

// Ids per bag from which the table's columns of the gradient are copied side by side: sorted ids read them at random,
// and in the caller's tensor each bag lies on a page of its own.
constexpr int64_t kIdsPerCopiedBag = 2;

}  // namespace

int32_t TableBackward::prepare(const Group& g, int32_t t, int parts, int32_t isa, Failure* failure) {
    group = &g;
    table = &g.tables[t];
    partitions = g.partitions + table->first_partition;
    isa_ = isa;
    parts_ = parts;
    rows.set(g, t);
    const Spans span = span_of(g, t);
    first_id = span.first_id;
    const int64_t n = span.last_id - span.first_id;
    gradient = g.out_gradient + (g.pooled ? table->column : span.first_float);
    gradient_stride = g.pooled ? g.out_stride : table->dim;

    int64_t bytes = 0, all_rows = 0;
    pivot_index = 0;
    for (int j = 0; j < table->num_partitions; ++j) {
        all_rows += partitions[j].rows;
        bytes += 2 * partitions[j].rows * partitions[j].width * 4;
        if (partitions[j].rows > partitions[pivot_index].rows) pivot_index = j;
    }
    bag_by_bag = bytes <= kBagByBagBytes && all_rows <= 2 * n;
    pivot = &partitions[pivot_index];
    complete = complete_row(isa, *pivot);
    num_sums = 0;
    for (int j = 0; j < table->num_partitions; ++j) {
        if (!bag_by_bag && j == pivot_index) continue;
        Sums& s = sums[num_sums++];
        s.p = &partitions[j];
        s.index = j;
        s.needed = s.p->gradient || s.p->rule != kNoStep;
        s.compact = s.needed && !bag_by_bag && s.p->rows > n;
    }
    if (bag_by_bag) {
        bounds_.resize(parts + 1);
        for (int p = 0; p <= parts; ++p) bounds_[p] = num_bags(n) * p / parts;
    } else if (prepare_sorted(t, n, failure) != kOk) {
        return failure->code;
    }
    make_sums(n);
    return kOk;
}

bool TableBackward::reserve_keys(int64_t n) {
    position_bits = bits_for(static_cast<uint64_t>(n));
    int rest_bits = position_bits + bits_for(static_cast<uint64_t>(num_bags(n)));
    for (int j = 0; j < num_sums; ++j) {
        row_bits[j] = bits_for(static_cast<uint64_t>(sums[j].p->rows));
        rest_bits += row_bits[j];
        if (sums[j].compact && !by_row_[j].reserve(n, sums[j].p->rows, position_bits)) return false;
    }
    packed = sorted.reserve(n, pivot->rows, rest_bits);
    return packed || sorted.reserve(n, pivot->rows, position_bits);
}

int32_t TableBackward::prepare_sorted(int32_t t, int64_t n, Failure* failure) {
    const Group& g = *group;
    if (!reserve_keys(n)) return failed(failure, kTooLarge, t, 0, n);
    if (!packed) bag_of.resize(n);
    const int64_t bags = num_bags(n), first_bag = table->first_feature * g.num_bags;
    int64_t rows_of_id[kMaxPartitions], position = 0;
    for (int64_t bag = 0; bag < bags; ++bag) {
        const int64_t end = g.pooled ? integer_at(g.offsets, g.offset_type, first_bag + bag + 1) - first_id : bag + 1;
        for (; position < end; ++position) {
            const int64_t id = integer_at(g.ids, g.id_type, first_id + position);
            if (!rows.find<0>(id, rows_of_id, *failure)) {
                failure->position = first_id + position;
                return failure->code;
            }
            uint64_t rest = 0;
            if (packed) {
                rest = static_cast<uint64_t>(bag);
                for (int j = 0; j < num_sums; ++j) {
                    rest = rest << row_bits[j] | static_cast<uint64_t>(rows_of_id[sums[j].index]);
                }
            } else {
                bag_of[position] = static_cast<uint32_t>(bag);
            }
            sorted.set(position, rows_of_id[pivot_index], rest << position_bits | static_cast<uint64_t>(position));
            for (int j = 0; j < num_sums; ++j) {
                if (!sums[j].compact) continue;
                by_row_[j].set(position, rows_of_id[sums[j].index], static_cast<uint64_t>(position));
            }
        }
    }
    sorted.sort();
    copy_gradient(n);
    // Whole pivot rows per part.
    bounds_.assign(parts_ + 1, n);
    bounds_[0] = 0;
    for (int p = 1; p < parts_; ++p) {
        int64_t i = std::max(n * p / parts_, bounds_[p - 1]);
        while (i > 0 && i < n && sorted.row(i) == sorted.row(i - 1)) ++i;
        bounds_[p] = i;
    }
    return kOk;
}

void TableBackward::copy_gradient(int64_t n) {
    const Group& g = *group;
    if (!g.pooled) return;
    if (table->num_features == 1 && n < kIdsPerCopiedBag * g.num_bags) return;
    gradient_copy_.resize(num_bags(n) * table->dim);
    for (int64_t f = 0; f < table->num_features; ++f) {
        for (int64_t b = 0; b < g.num_bags; ++b) {
            const int64_t bag = f * g.num_bags + b;
            const float* from = gradient + b * gradient_stride + f * table->dim;
            float* to = gradient_copy_.data() + bag * table->dim;
            for (int64_t d = 0; d < table->dim; ++d) to[d] = from[d];
        }
    }
    gradient = gradient_copy_.data();
    gradient_stride = table->dim;
}

void TableBackward::make_sums(int64_t n) {
    pieces_.clear();
    for (int j = 0; j < num_sums; ++j) {
        Sums& s = sums[j];
        s.slots = s.p->rows;
        s.sums.clear();
        s.touched.clear();
        if (!s.needed) continue;
        if (s.compact) {
            SortedIds& by = by_row_[j];
            by.sort();
            s.slot_of.resize(n);
            s.row_of.clear();
            for (int64_t i = 0; i < n; ++i) {
                if (i == 0 || by.row(i) != by.row(i - 1)) s.row_of.push_back(by.row(i));
                s.slot_of[by.rest(i)] = static_cast<uint32_t>(s.row_of.size() - 1);
            }
            s.slots = static_cast<int64_t>(s.row_of.size());
        } else {
            s.touched.assign(parts_ * s.slots, 0);
        }
        // One part may add up in the caller's gradient itself.
        if (s.compact || parts_ > 1 || !s.p->gradient) s.sums.assign(parts_ * s.slots * s.p->width, 0.0f);
        const int64_t step = std::max<int64_t>(1024, s.slots / std::max(1, 2 * group->threads));
        for (int64_t slot = 0; slot < s.slots; slot += step) {
            pieces_.push_back({j, slot, std::min(slot + step, s.slots)});
        }
    }
}

int32_t TableBackward::accumulate(int part, Failure* failure) {
    failure->code = kOk;
    qr::accumulate(isa_, Part{this, bounds_[part], bounds_[part + 1], part, failure});
    return failure->code;
}

void TableBackward::finish(int piece) {
    Sums& s = sums[pieces_[piece].sums];
    const Partition& p = *s.p;
    const CompleteRow complete_this = complete_row(isa_, p);
    for (int64_t slot = pieces_[piece].first; slot < pieces_[piece].last; ++slot) {
        bool touched = s.compact;
        for (int part = 0; part < parts_ && !touched; ++part) touched = s.touched_of(part)[slot];
        if (!touched) continue;
        const int64_t row = s.compact ? s.row_of[slot] : slot;
        if (s.sums.empty()) {
            if (p.touched) p.touched[row] = 1;  // the sums are the caller's gradient already
            continue;
        }
        float* total = s.sums_of(0) + slot * p.width;
        for (int part = 1; part < parts_; ++part) {
            const float* more = s.sums_of(part) + slot * p.width;
            for (int64_t d = 0; d < p.width; ++d) total[d] += more[d];
        }
        complete_this(p, row, total);
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
