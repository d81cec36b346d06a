// Ids by row: a stable radix sort of (row, position), so that the ids of a row follow each other in their given order.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "isa.h"

namespace qr {

inline int bits_for(uint64_t values) {
    int bits = 0;
    while (bits < 64 && (values - 1) >> bits) ++bits;
    return values > 1 ? bits : 0;
}

// row << position_bits | position, sorted.
class SortedIds {
   public:
    // Room for n ids of `rows` rows; false if they do not fit 64 bits.
    bool reserve(int64_t n, int64_t rows) {
        position_bits_ = bits_for(static_cast<uint64_t>(n));
        row_bits_ = bits_for(static_cast<uint64_t>(rows));
        if (position_bits_ + row_bits_ > 64 || n > INT64_C(0xffffffff)) return false;
        size_ = n;
        if (static_cast<int64_t>(keys_.size()) < n) {
            keys_.resize(n);
            other_.resize(n);
        }
        return true;
    }
    QR_INLINE void set(int64_t position, int64_t row) {
        keys_[position] = static_cast<uint64_t>(row) << position_bits_ | static_cast<uint64_t>(position);
    }
    // By the bits of rows alone: positions were set in order, and the sort is stable.
    void sort() {
        const int passes = (row_bits_ + kMaxDigit - 1) / kMaxDigit;
        int done = 0;
        for (int pass = 0; pass < passes; ++pass) {
            const int digit = (row_bits_ - done + passes - pass - 1) / (passes - pass);
            const int shift = position_bits_ + done;
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
    QR_INLINE int64_t size() const { return size_; }
    QR_INLINE int64_t row(int64_t i) const {
        return static_cast<int64_t>(position_bits_ < 64 ? keys_[i] >> position_bits_ : 0);
    }
    QR_INLINE int64_t position(int64_t i) const {
        return static_cast<int64_t>(keys_[i] & ((uint64_t{1} << position_bits_) - 1));
    }

   private:
    static constexpr int kMaxDigit = 11;
    std::vector<uint64_t> keys_, other_;
    int64_t size_ = 0;
    int position_bits_ = 0, row_bits_ = 0;
};

}  // namespace qr
