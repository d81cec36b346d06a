#include "complete.h"

#include "check.h"
#include "step.h"

namespace qr {
namespace {

template <typename V, int W, bool DECAYS>
QR_INLINE void complete_body(const Partition& p, int64_t row, float* gradient) {
    const int64_t width = W > 0 ? W : p.width;
    if (p.touched) p.touched[row] = 1;
    if (p.gradient) {
        float* out = p.gradient + row * width;
        for (int64_t d = 0; d < width; ++d) out[d] = gradient[d];
    } else if (p.rule != kNoStep) {
        step_row<V, W, DECAYS>(p, row, gradient);
    }
}

template <int W, bool DECAYS>
void complete_baseline(const Partition& p, int64_t row, float* gradient) {
    complete_body<Vector4, W, DECAYS>(p, row, gradient);
}

#ifdef QR_X86
template <int W, bool DECAYS>
QR_TARGET_AVX2 void complete_avx2(const Partition& p, int64_t row, float* gradient) {
    complete_body<Vector8, W, DECAYS>(p, row, gradient);
}
template <int W, bool DECAYS>
QR_TARGET_AVX512 void complete_avx512(const Partition& p, int64_t row, float* gradient) {
    complete_body<Vector16, W, DECAYS>(p, row, gradient);
}
#endif

template <int W, bool DECAYS>
CompleteRow of_isa(int32_t isa) {
#ifdef QR_X86
    if (isa >= kAvx512) return complete_avx512<W, DECAYS>;
    if (isa == kAvx2) return complete_avx2<W, DECAYS>;
#else
    (void)isa;
#endif
    return complete_baseline<W, DECAYS>;
}

template <int W>
CompleteRow of_width(int32_t isa, const Partition& p) {
    return p.l2 != 0.0f || p.decay != 0.0f ? of_isa<W, true>(isa) : of_isa<W, false>(isa);
}

}  // namespace

CompleteRow complete_row(int32_t isa, const Partition& p) {
    switch (p.weight_type == kFloat32 ? p.width : 0) {
        case 16: return of_width<16>(isa, p);
        case 32: return of_width<32>(isa, p);
        case 64: return of_width<64>(isa, p);
        case 128: return of_width<128>(isa, p);
        default: return of_width<0>(isa, p);
    }
}

}  // namespace qr

int32_t qr_step_rows(const qr::Partition* partition, const int64_t* rows, const float* gradients, int64_t n,
                     int32_t isa, qr::Failure* failure) {
    using namespace qr;
    const Partition& p = *partition;
    *failure = Failure{};
    if (p.width < 1 || p.width > kMaxWidth || p.row_stride < p.width) {
        return failed(failure, kBadArgument, 0, 2, p.width);
    }
    for (int64_t i = 0; i < n; ++i) {
        if (rows[i] < 0 || rows[i] >= p.rows) return failed(failure, kRowOutOfRange, 0, i, rows[i]);
    }
    const CompleteRow complete = complete_row(usable_isa(isa), p);
    float gradient[kMaxWidth];
    for (int64_t i = 0; i < n; ++i) {
        std::memcpy(gradient, gradients + i * p.width, static_cast<size_t>(p.width) * sizeof(float));
        complete(p, rows[i], gradient);
    }
    return kOk;
}
