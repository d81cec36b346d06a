// Ids by row: a stable radix sort, so that the ids of a row follow each other in the order in which they were given.
#pragma once

#include <cstdint>
#include <vector>

#include "isa.h"

namespace qr {

// Bits that hold 0 … values - 1.
inline int bits_for(uint64_t values) {
    int bits = 0;
    while (values > 1 && (values - 1) >> bits) ++bits;
    return bits;
}

// 64 bits per id: its row on top, by which they are sorted, and below it whatever else the caller packs.
class SortedIds {
   public:
    // Room for n ids of `rows` rows with `rest_bits` bits below; false if that is too much.
    bool reserve(int64_t n, int64_t rows, int rest_bits) {
        rest_bits_ = rest_bits;
        row_bits_ = bits_for(static_cast<uint64_t>(rows));
        if (rest_bits_ + row_bits_ > 63 || n > INT64_C(0xffffffff)) return false;
        size_ = n;
        if (static_cast<int64_t>(keys_.size()) < n) {
            keys_.resize(n);
            other_.resize(n);
        }
        return true;
    }
    QR_INLINE void set(int64_t i, int64_t row, uint64_t rest) {
        keys_[i] = static_cast<uint64_t>(row) << rest_bits_ | rest;
    }
    // By the bits of rows alone, and stable.
    void sort() {
        const int passes = (row_bits_ + kMaxDigit - 1) / kMaxDigit;
        int done = 0;
        for (int pass = 0; pass < passes; ++pass) {
            const int digit = (row_bits_ - done + passes - pass - 1) / (passes - pass);
            const int shift = rest_bits_ + done;
            const uint64_t mask = (uint64_t{1} << digit) - 1;
            uint32_t starts[1 << kMaxDigit] = {};
            uint64_t* from = keys_.data();
            uint64_t* to = other_.data();
            for (int64_t i = 0; i < size_; ++i) ++starts[from[i] >> shift & mask];
            uint32_t start = 0;
            for (uint64_t d = 0; d <= mask; ++d) {
                const uint32_t count = starts[d];
                starts[d] = start;
                start += count;
            }
            for (int64_t i = 0; i < size_; ++i) to[starts[from[i] >> shift & mask]++] = from[i];
            keys_.swap(other_);
            done += digit;
        }
    }
    QR_INLINE int64_t row(int64_t i) const { return static_cast<int64_t>(keys_[i] >> rest_bits_); }
    QR_INLINE uint64_t rest(int64_t i) const { return keys_[i] & ((uint64_t{1} << rest_bits_) - 1); }

   private:
    static constexpr int kMaxDigit = 11;
    std::vector<uint64_t> keys_, other_;
    int64_t size_ = 0;
    int rest_bits_ = 0, row_bits_ = 0;
};

}  // namespace qr
