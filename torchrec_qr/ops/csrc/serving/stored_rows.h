// Rows as they are stored for serving: floats, or FBGEMM's quantised rows of bytes; read in pieces as fp32.
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

typedef uint8_t Bytes16 __attribute__((vector_size(16)));
typedef uint16_t Halves8 __attribute__((vector_size(16)));
typedef uint64_t Words2 __attribute__((vector_size(16)));

template <typename V>
struct Like;  // other elements, as many as V has
template <>
struct Like<Vector4> {
    typedef int32_t Integers __attribute__((vector_size(16)));
    typedef uint16_t Halves __attribute__((vector_size(8)));
};
template <>
struct Like<Vector8> {
    typedef int32_t Integers __attribute__((vector_size(32)));
    typedef uint16_t Halves __attribute__((vector_size(16)));
};
template <>
struct Like<Vector16> {
    typedef int32_t Integers __attribute__((vector_size(64)));
    typedef uint16_t Halves __attribute__((vector_size(32)));
};

// The first kLanes<V> bytes as floats. The instruction is named, because GCC 12 converts vectors of bytes one by one.
template <typename V>
QR_INLINE V widened_bytes(Bytes16 x) {
    typename Like<V>::Integers integers;
    if constexpr (kLanes<V> == 4) {
        const Halves8 pairs = (Halves8)__builtin_shufflevector(x, Bytes16{}, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6,
                                                               22, 7, 23);
        const Halves8 quads = __builtin_shufflevector(pairs, Halves8{}, 0, 8, 1, 9, 2, 10, 3, 11);
        integers = (typename Like<V>::Integers)quads;
    } else {
#ifdef QR_X86
        __asm__("vpmovzxbd %1, %0" : "=v"(integers) : "v"(x));
#endif
    }
    return __builtin_convertvector(integers, V);
}

template <typename V>
QR_INLINE V widened_halves(const uint16_t* p) {
    typename Like<V>::Halves halves;
    std::memcpy(&halves, p, sizeof halves);
    V floats;
    if constexpr (kLanes<V> == 4) {
        float lanes[4];
        for (int i = 0; i < 4; ++i) lanes[i] = widened_half(halves[i]);
        floats = load<V>(lanes);
    } else {
#ifdef QR_X86
        __asm__("vcvtph2ps %1, %0" : "=v"(floats) : "v"(halves));
#endif
    }
    return floats;
}

template <typename V>
QR_INLINE V widened_bfloats(const uint16_t* p) {
    typename Like<V>::Halves halves;
    std::memcpy(&halves, p, sizeof halves);
    return (V)(__builtin_convertvector(halves, typename Like<V>::Integers) << 16);
}

struct Affine {
    float scale, bias;
};
template <typename V>
QR_INLINE Affine affine_at(const uint8_t* p) {
#ifdef QR_X86
    if constexpr (kLanes<V> > 4) {
        uint32_t bits;
        std::memcpy(&bits, p, sizeof bits);
        const Words2 halves = {bits, 0};
        Vector4 both;
        __asm__("vcvtph2ps %1, %0" : "=v"(both) : "v"(halves));
        return {both[0], both[1]};
    }
#endif
    uint16_t bits[2];
    std::memcpy(bits, p, sizeof bits);
    return {widened_half(bits[0]), widened_half(bits[1])};
}

// kLanes<V> columns of a row, from any even one on.
template <typename V, int TYPE>
struct StoredRow {
    const uint8_t* bytes;
    Affine affine;

    QR_INLINE StoredRow(const void* row, int64_t width) : bytes(static_cast<const uint8_t*>(row)), affine{1.0f, 0.0f} {
        if (TYPE == kInt8Rows || TYPE == kInt4Rows) affine = affine_at<V>(bytes + bytes_of_values(TYPE, width));
    }
    QR_INLINE V at(int64_t column) const {
        if constexpr (TYPE == kFloat32) {
            return load<V>(reinterpret_cast<const float*>(bytes) + column);
        } else if constexpr (TYPE == kFloat16) {
            return widened_halves<V>(reinterpret_cast<const uint16_t*>(bytes) + column);
        } else if constexpr (TYPE == kBFloat16) {
            return widened_bfloats<V>(reinterpret_cast<const uint16_t*>(bytes) + column);
        } else {
            Bytes16 x;
            if constexpr (TYPE == kInt8Rows) {
                x = first_bytes<kLanes<V>>(bytes + column);
            } else {
                const Words2 packed = (Words2)first_bytes<kLanes<V> / 2>(bytes + column / 2);
                const Words2 mask = {0x0f0f0f0f0f0f0f0f, 0x0f0f0f0f0f0f0f0f};
                const Bytes16 low = (Bytes16)(packed & mask), high = (Bytes16)((packed >> 4) & mask);
                x = __builtin_shufflevector(low, high, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            }
            return widened_bytes<V>(x) * affine.scale + affine.bias;
        }
    }

private:
    template <int N>
    static QR_INLINE Bytes16 first_bytes(const uint8_t* p) {
        if constexpr (N == 16) {
            Bytes16 x;
            std::memcpy(&x, p, sizeof x);
            return x;
        } else {
            uint64_t word = 0;
            std::memcpy(&word, p, N);
            return (Bytes16)Words2{word, 0};
        }
    }
};

QR_INLINE float stored_value(const void* row, int32_t type, int64_t width, int64_t column) {
    const uint8_t* bytes = static_cast<const uint8_t*>(row);
    if (type == kFloat32) return static_cast<const float*>(row)[column];
    if (type == kFloat16) return widened_half(static_cast<const uint16_t*>(row)[column]);
    if (type == kBFloat16) return widened_bfloat(static_cast<const uint16_t*>(row)[column]);
    const Affine a = affine_at<Vector4>(bytes + bytes_of_values(type, width));
    const int q = type == kInt8Rows ? bytes[column] : (bytes[column / 2] >> (4 * (column % 2))) & 15;
    return a.scale * static_cast<float>(q) + a.bias;
}

}  // namespace qr
