// The backward of one table: gradients of its rows from the values before the step, summed per row, then stepped.
//
// Two ways. Where all rows and their gradients fit a cache, *bag by bag*: gradients add up in a buffer per partition, and
// all rows are stepped at the end. Otherwise *sorted*: by the rows of one partition, the *pivot*, which is the largest.
// All ids of a pivot row then follow each other, so that its gradient is complete, in registers, when the next row
// begins: it is stepped at once, and needs no buffer. The gradients of the other partitions add up in one buffer each, of
// no more rows than ids, and their rows are stepped at the end: until then all gradients are of values before the step.
#pragma once

#include <vector>

#include "check.h"
#include "complete.h"
#include "sort.h"

namespace qr {

// The sums of one partition other than the pivot.
struct Sums {
    const Partition* p;
    int index;                      // in the table
    bool needed;                    // stepped, or its gradient is returned
    bool compact;                   // a slot per row that occurs; else per row
    int64_t slots;
    std::vector<uint32_t> slot_of;  // (n,), compact
    std::vector<int64_t> row_of;    // (slots,), compact
    std::vector<float> sums;        // (parts, slots, width), unless they add up in the caller's gradient
    std::vector<uint8_t> touched;   // (parts, slots), unless compact

    float* sums_of(int part) { return sums.empty() ? p->gradient : sums.data() + part * slots * p->width; }
    uint8_t* touched_of(int part) { return touched.empty() ? nullptr : touched.data() + part * slots; }
};

class TableBackward {
   public:
    // Checks the ids of table t, sorts them, and makes room for `parts` parts to be accumulated independently.
    int32_t prepare(const Group& g, int32_t t, int parts, int32_t isa, Failure* failure);
    // Accumulates one part, and steps its pivot rows.
    int32_t accumulate(int part, Failure* failure);
    // The work that is left once all parts are accumulated, in `pieces` independent pieces.
    int pieces() const { return static_cast<int>(pieces_.size()); }
    void finish(int piece);

    // For the bodies in accumulate.cpp.
    const Group* group = nullptr;
    const Table* table = nullptr;
    const Partition* partitions = nullptr;
    TableRows rows;
    bool bag_by_bag = false;
    Sums sums[kMaxPartitions];  // of all partitions, or of those that are not the pivot
    int num_sums = 0;
    int64_t first_id = 0;
    // The gradient of bag i of the table begins here: the caller's, or a copy whose bags follow each other.
    const float* gradient = nullptr;
    int64_t gradient_stride = 0;

    // Sorted: the pivot, and of each id its row there, with what else is needed of it.
    const Partition* pivot = nullptr;
    int pivot_index = 0;
    CompleteRow complete = nullptr;
    SortedIds sorted;
    // Whether the bag and the rows of all partitions lie in the sorted ids, besides the position; else they are looked up.
    bool packed = false;
    int position_bits = 0, row_bits[kMaxPartitions] = {};
    std::vector<uint32_t> bag_of;  // (n,), unless packed

   private:
    struct Piece {
        int sums;
        int64_t first, last;  // slots
    };
    int32_t prepare_sorted(int32_t t, int64_t n, Failure* failure);
    bool reserve_keys(int64_t n);
    void copy_gradient(int64_t n);
    void make_sums(int64_t n);
    int64_t num_bags(int64_t n) const { return group->pooled ? table->num_features * group->num_bags : n; }

    int32_t isa_ = 0;
    int parts_ = 1;
    std::vector<int64_t> bounds_;  // (parts + 1,), of sorted ids, or of bags
    std::vector<Piece> pieces_;
    SortedIds by_row_[kMaxPartitions];
    std::vector<float> gradient_copy_;
};

// A part of a table: sorted ids, or bags, [first, last).
struct Part {
    TableBackward* work;
    int64_t first, last;
    int part;
    Failure* failure;
};
void accumulate(int32_t isa, const Part& part);

}  // namespace qr
