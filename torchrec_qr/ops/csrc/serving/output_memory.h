// Memory of outputs that were freed, for those to come.
//
// The system grants memory page by page as it is first written. For a large output that takes longer than the lookup,
// and whether malloc gives such memory back at each free depends on what else the process has allocated.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>

namespace qr {

// Below, malloc keeps memory by itself.
constexpr int64_t kRecycledFrom = 64 << 10;

class OutputMemory {
public:
    // At least so many bytes, aligned to cache lines.
    static void* take(int64_t bytes) {
        if (void* memory = kept().find(bytes)) return memory;
        int64_t capacity = kRecycledFrom;
        while (capacity < bytes) capacity *= 2;
        void* block = std::aligned_alloc(kHeader, static_cast<size_t>(kHeader + capacity));
        if (!block) throw std::bad_alloc();
        *static_cast<int64_t*>(block) = capacity;
        return static_cast<char*>(block) + kHeader;
    }
    static void give_back(void* memory) { kept().keep(memory); }

private:
    static constexpr int64_t kHeader = 64;
    static constexpr int kKept = 8;
    std::mutex mutex_;
    void* blocks_[kKept];  // the one that was freed last comes last
    int count_ = 0;

    // Never destroyed, because tensors may be freed while the process ends.
    static OutputMemory& kept() {
        static OutputMemory* const only = new OutputMemory;
        return *only;
    }
    static void* start(void* memory) { return static_cast<char*>(memory) - kHeader; }

    void* find(int64_t bytes) {
        const std::lock_guard<std::mutex> lock(mutex_);
        for (int i = count_ - 1; i >= 0; --i) {
            void* const memory = blocks_[i];
            const int64_t capacity = *static_cast<const int64_t*>(start(memory));
            if (capacity < bytes || capacity > 4 * bytes) continue;
            std::copy(blocks_ + i + 1, blocks_ + count_--, blocks_ + i);
            return memory;
        }
        return nullptr;
    }
    void keep(void* memory) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (count_ == kKept) {
            std::free(start(blocks_[0]));
            std::copy(blocks_ + 1, blocks_ + count_--, blocks_);
        }
        blocks_[count_++] = memory;
    }
};

}  // namespace qr
