// The backward of one table: gradients of its rows from the values before the step, summed per row, then stepped.
//
// The ids are sorted by their rows of one partition, the *pivot*, which is the largest. All ids of a pivot row then follow
// each other, so that its gradient is complete, in registers, when the next row begins: it is stepped at once, and needs
// no buffer. The gradients of the other partitions add up in one buffer each, of no more rows than ids, and their rows
// are stepped at the end: until then all gradients are of their values before the step.
#pragma once

#include <vector>

#include "check.h"
#include "complete.h"
#include "sort.h"

namespace qr {

class TableBackward {
   public:
    // Checks the ids of table t, sorts them, and makes room for `parts` parts to be accumulated independently.
    int32_t prepare(const Group& g, int32_t t, int parts, int32_t isa, Failure* failure);
    // Accumulates one part, which is a run of whole pivot rows, and steps those.
    int32_t accumulate(int part, Failure* failure);
    // The work that is left once all parts are accumulated, in `pieces` independent pieces.
    int pieces() const { return static_cast<int>(pieces_.size()); }
    void finish(int piece);

    // For the bodies.
    struct Other {
        const Partition* p;
        int index;                    // in the table
        bool needed;                  // stepped, or a gradient is asked for
        bool compact;                 // a slot per row that occurs; else per row
        int64_t slots;
        std::vector<uint32_t> slot_of;   // (n,), compact
        std::vector<int64_t> row_of;     // (slots,), compact
        std::vector<float> sums;         // (parts, slots, width), unless they add up in the caller's gradient
        std::vector<uint8_t> touched;    // (parts, slots), unless compact

        float* sums_of(int part) { return sums.empty() ? p->gradient : sums.data() + part * slots * p->width; }
        uint8_t* touched_of(int part) { return touched.empty() ? nullptr : touched.data() + part * slots; }
    };

    const Group* group = nullptr;
    const Table* table = nullptr;
    const Partition* partitions = nullptr;
    const Partition* pivot = nullptr;
    TableRows rows;
    SortedIds sorted;
    std::vector<int64_t> gradient_at;  // (n,), pooled: where the gradient of the id's bag begins
    std::vector<float> mean_scale;     // (n,), MEAN: 1 / ids of the bag
    CompleteRow complete = nullptr;  // of the pivot
    Other others[kMaxPartitions - 1];
    int pivot_index = 0, num_others = 0;
    int64_t first_id = 0, first_float = 0;

   private:
    struct Piece {
        int other;
        int64_t first, last;  // slots
    };
    int32_t find_rows(Failure* failure);

    int32_t isa_ = 0;
    int parts_ = 1;
    std::vector<int64_t> bounds_;  // (parts + 1,), of sorted ids
    std::vector<Piece> pieces_;
    std::vector<SortedIds> by_other_;
};

// In accumulate.cpp.
struct Part {
    TableBackward* work;
    int64_t first, last;
    int part;
    Failure* failure;
};
void accumulate(int32_t isa, const Part& part);

}  // namespace qr
