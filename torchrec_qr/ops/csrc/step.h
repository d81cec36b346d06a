// One exact step of an optimizer on one row, from the gradient summed over the batch. Formulas: `update_rules.py`.
#pragma once

#include <cmath>

#include "vectors.h"

namespace qr {

template <typename V, int W>
QR_INLINE float sum_of_squares(const float* x, int64_t width) {
    V squares{};
    int64_t d = 0;
    for (; d + kLanes<V> <= width; d += kLanes<V>) {
        const V y = load<V>(x + d);
        squares += y * y;
    }
    float total = sum_of(squares);
    if (W == 0) {
        for (; d < width; ++d) total += x[d] * x[d];
    }
    return total;
}

// Partial rowwise Adam, and LAMB with either second moment. The direction takes the place of the gradient.
template <typename V, int W>
QR_INLINE void step_moments(const Partition& p, int64_t row, float* gradient, float* w) {
    const int64_t width = W > 0 ? W : p.width;
    const float b1 = p.beta1, b2 = p.beta2, c1 = 1.0f - p.beta1, c2 = 1.0f - p.beta2;
    const float scale = 1.0f / p.correction1, root = 1.0f / std::sqrt(p.correction2), eps = p.eps;
    float* mean = p.state[0] + row * width;
    if (p.rule == kLamb) {
        float* square = p.state[1] + row * width;
        for (int64_t d = 0; d < width; ++d) {
            const float g = gradient[d];
            const float m = b1 * mean[d] + c1 * g;
            const float v = b2 * square[d] + c2 * (g * g);
            mean[d] = m;
            square[d] = v;
            gradient[d] = m * scale / (std::sqrt(v) * root + eps);
        }
    } else {
        const float v = b2 * p.state[1][row] + c2 * (sum_of_squares<V, W>(gradient, width) / static_cast<float>(width));
        p.state[1][row] = v;
        const float bound = std::sqrt(v) * root + eps;
        for (int64_t d = 0; d < width; ++d) {
            const float m = b1 * mean[d] + c1 * gradient[d];
            mean[d] = m;
            gradient[d] = m * scale / bound;
        }
    }
    float rate = p.learning_rate;
    if (p.rule != kPartialRowWiseAdam) {
        for (int64_t d = 0; d < width; ++d) gradient[d] += p.decay * w[d];
        const float norm = std::sqrt(sum_of_squares<V, W>(gradient, width));
        rate = norm > 0.0f ? rate * (std::sqrt(sum_of_squares<V, W>(w, width)) / norm) : 0.0f;
    }
    for (int64_t d = 0; d < width; ++d) w[d] -= rate * gradient[d];
}

// W > 0: the row's width, known to the compiler. DECAYS: whether the rule has weight decay.
template <typename V, int W, bool DECAYS>
QR_INLINE void step_row(const Partition& p, int64_t row, float* gradient) {
    const int64_t width = W > 0 ? W : p.width;
    const float limit = p.max_gradient;
    if (limit >= 0.0f) {
        for (int64_t d = 0; d < width; ++d) {
            const float g = gradient[d];
            gradient[d] = g > limit ? limit : g < -limit ? -limit : g;
        }
    }
    float buffer[W > 0 ? 1 : kMaxWidth];
    char* const stored = static_cast<char*>(p.weight) + row * p.row_stride * bytes_of(p.weight_type);
    float* w = reinterpret_cast<float*>(stored);
    if constexpr (W == 0) {
        if (p.weight_type != kFloat32) {
            as_floats(stored, p.weight_type, width, buffer);
            w = buffer;
        }
    }
    const float lr = p.learning_rate, eps = p.eps;
    if constexpr (DECAYS) {
        for (int64_t d = 0; d < width; ++d) gradient[d] += p.l2 * w[d];
        const float kept = p.rule < kLamb ? 1.0f - lr * p.decay : 1.0f;
        for (int64_t d = 0; d < width; ++d) w[d] *= kept;
    }
    switch (p.rule) {
        case kSgd:
            for (int64_t d = 0; d < width; ++d) w[d] -= lr * gradient[d];
            break;
        case kAdagrad: {
            float* sums = p.state[0] + row * width;
            for (int64_t d = 0; d < width; ++d) {
                const float g = gradient[d], sum = sums[d] + g * g;
                sums[d] = sum;
                w[d] -= lr * (g / (std::sqrt(sum) + eps));
            }
            break;
        }
        case kRowWiseAdagrad: {
            p.state[0][row] += sum_of_squares<V, W>(gradient, width) / static_cast<float>(width);
            const float scale = lr / (std::sqrt(p.state[0][row]) + eps);
            for (int64_t i = 0; i < width; ++i) w[i] -= scale * gradient[i];
            break;
        }
        case kAdam:
        case kAmsGrad: {
            float* mean = p.state[0] + row * width;
            float* square = p.state[1] + row * width;
            float* largest = p.rule == kAmsGrad ? p.state[2] + row * width : nullptr;
            const float b1 = p.beta1, b2 = p.beta2, c1 = 1.0f - p.beta1, c2 = 1.0f - p.beta2;
            const float rate = lr / p.correction1, root = 1.0f / std::sqrt(p.correction2);
            for (int64_t d = 0; d < width; ++d) {
                const float g = gradient[d];
                const float m = b1 * mean[d] + c1 * g;
                const float v = b2 * square[d] + c2 * (g * g);
                mean[d] = m;
                square[d] = v;
                float bound = v;
                if (largest) {
                    bound = largest[d] > v ? largest[d] : v;
                    largest[d] = bound;
                }
                w[d] -= rate * (m / (std::sqrt(bound) * root + eps));
            }
            break;
        }
        case kPartialRowWiseAdam:
        case kLamb:
        case kPartialRowWiseLamb: step_moments<V, W>(p, row, gradient, w); break;
        default: break;
    }
    if constexpr (W == 0) round_back(stored, p.weight_type, width, buffer);
}

}  // namespace qr
