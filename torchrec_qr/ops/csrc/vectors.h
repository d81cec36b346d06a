// Rows of floats: as vectors, and rows in fp16 and bf16 widened to fp32 and rounded back to the nearest.
#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"

namespace qr {

template <typename V>
constexpr int kLanes = sizeof(V) / sizeof(float);

template <typename V>
QR_INLINE V load(const float* p) {
    typedef V Unaligned __attribute__((aligned(4), may_alias));
    return *reinterpret_cast<const Unaligned*>(p);
}
template <typename V>
QR_INLINE void store(float* p, const V& v) {
    typedef V Unaligned __attribute__((aligned(4), may_alias));
    *reinterpret_cast<Unaligned*>(p) = v;
}

template <typename V>
QR_INLINE float sum_of(const V& v) {
    float lanes[kLanes<V>];
    store(lanes, v);
    for (int width = kLanes<V> / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    }
    return lanes[0];
}

QR_INLINE uint32_t bits_of(float x) {
    uint32_t u;
    std::memcpy(&u, &x, sizeof u);
    return u;
}
QR_INLINE float float_of(uint32_t u) {
    float x;
    std::memcpy(&x, &u, sizeof x);
    return x;
}

QR_INLINE float widened_half(uint16_t h) {
    const uint32_t magnitude = h & 0x7fffu, sign = static_cast<uint32_t>(h & 0x8000u) << 16;
    // Subnormals by an exact product: no float subnormals arise, which the process may flush to zero.
    const uint32_t subnormal = bits_of(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
    uint32_t normal = (magnitude << 13) + (112u << 23);
    normal = magnitude >= 0x7c00u ? normal | 0x7f800000u : normal;
    return float_of((magnitude < 0x400u ? subnormal : normal) | sign);
}

QR_INLINE uint16_t rounded_half(float x) {
    const uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
    // 1.5 · 2^23 leaves no room for a fraction: the sum is rounded to the nearest even integer.
    const uint32_t subnormal = bits_of(float_of(magnitude) * 0x1p24f + 0x1.8p23f) - bits_of(0x1.8p23f);
    const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
    uint32_t h = magnitude < 0x38800000u ? subnormal : normal;
    h = magnitude >= 0x477ff000u ? 0x7c00u : h;  // from 65,520 on
    h = magnitude > 0x7f800000u ? 0x7e00u : h;
    return static_cast<uint16_t>(h | sign);
}

QR_INLINE float widened_bfloat(uint16_t h) { return float_of(static_cast<uint32_t>(h) << 16); }

QR_INLINE uint16_t rounded_bfloat(float x) {
    const uint32_t u = bits_of(x);
    const uint32_t h = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : h);
}

// The bytes of an element. Rows of quantised values are counted in bytes.
QR_INLINE int64_t bytes_of(int32_t type) { return type == kFloat32 ? 4 : type >= kInt8Rows ? 1 : 2; }

// The row as fp32: itself, or widened into `buffer`.
QR_INLINE const float* as_floats(const void* row, int32_t type, int64_t width, float* buffer) {
    if (type == kFloat32) return static_cast<const float*>(row);
    const uint16_t* stored = static_cast<const uint16_t*>(row);
    if (type == kFloat16) {
        for (int64_t d = 0; d < width; ++d) buffer[d] = widened_half(stored[d]);
    } else {
        for (int64_t d = 0; d < width; ++d) buffer[d] = widened_bfloat(stored[d]);
    }
    return buffer;
}

// Writes back what `as_floats` gave; nothing to do where that was the row itself.
QR_INLINE void round_back(void* row, int32_t type, int64_t width, const float* values) {
    uint16_t* stored = static_cast<uint16_t*>(row);
    if (type == kFloat16) {
        for (int64_t d = 0; d < width; ++d) stored[d] = rounded_half(values[d]);
    } else if (type == kBFloat16) {
        for (int64_t d = 0; d < width; ++d) stored[d] = rounded_bfloat(values[d]);
    }
}

QR_INLINE void prefetch(const void* p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i, 0, 3);
}

}  // namespace qr
