// Rows as they are stored for serving: floats, or FBGEMM's quantised rows of bytes.
//
// A quantised row is D values of 8 or 4 bits, a scale and a bias, both fp16: value = scale · q + bias. Its bytes may be
// followed by padding. Of two values in one byte, the first has the low bits.
#pragma once

#include "../vectors.h"

namespace qr {

QR_INLINE bool is_quantised(int32_t type) { return type == kInt8Rows || type == kInt4Rows; }

QR_INLINE int64_t bytes_of_values(int32_t type, int64_t width) {
    switch (type) {
        case kFloat32: return 4 * width;
        case kInt8Rows: return width;
        case kInt4Rows: return (width + 1) / 2;
        default: return 2 * width;
    }
}
QR_INLINE int64_t bytes_of_row(int32_t type, int64_t width) {
    return bytes_of_values(type, width) + (is_quantised(type) ? 4 : 0);
}

struct Affine {
    float scale, bias;
};
QR_INLINE Affine affine_at(const uint8_t* p) {
    uint16_t bits[2];
    std::memcpy(bits, p, sizeof bits);
    return {widened_half(bits[0]), widened_half(bits[1])};
}

template <typename V>
struct BytesOf;
template <>
struct BytesOf<Vector4> {
    typedef uint8_t Type __attribute__((vector_size(4)));
};
template <>
struct BytesOf<Vector8> {
    typedef uint8_t Type __attribute__((vector_size(8)));
};
template <>
struct BytesOf<Vector16> {
    typedef uint8_t Type __attribute__((vector_size(16)));
};

// kLanes<V> bytes as floats.
template <typename V>
QR_INLINE V widened_bytes(const uint8_t* p) {
    typename BytesOf<V>::Type bytes;
    std::memcpy(&bytes, p, sizeof bytes);
    return __builtin_convertvector(bytes, V);
}

// The row as fp32: itself, or written into `buffer`.
QR_INLINE const float* dequantised(const void* stored, int32_t type, int64_t width, float* buffer) {
    if (!is_quantised(type)) return as_floats(stored, type, width, buffer);
    const uint8_t* row = static_cast<const uint8_t*>(stored);
    const Affine a = affine_at(row + bytes_of_values(type, width));
    if (type == kInt8Rows) {
        for (int64_t d = 0; d < width; ++d) buffer[d] = a.scale * static_cast<float>(row[d]) + a.bias;
    } else {
        for (int64_t d = 0; d < width; ++d) {
            buffer[d] = a.scale * static_cast<float>((row[d / 2] >> (4 * (d % 2))) & 15) + a.bias;
        }
    }
    return buffer;
}

}  // namespace qr
