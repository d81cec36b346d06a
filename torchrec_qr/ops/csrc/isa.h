// One source for several instruction sets: a body is inlined into a function per set, chosen at run time.
//
// A body and all that it calls must be QR_INLINE: what is called, and not inlined, keeps the baseline's instructions.
// No lambdas and no standard algorithms inside of bodies, for the same reason.
#pragma once

#include "lookup.h"

#define QR_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__) && defined(__GNUC__)
#define QR_X86 1
#define QR_TARGET_AVX2 __attribute__((target("avx2,fma,bmi,bmi2")))
#define QR_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2")))
#endif

namespace qr {

// The vectors of an instruction set, no wider than its registers: wider ones would live in memory.
typedef float Vector4 __attribute__((vector_size(16)));
typedef float Vector8 __attribute__((vector_size(32)));
typedef float Vector16 __attribute__((vector_size(64)));

}  // namespace qr

#ifdef QR_X86
// Defines `name(isa, …)`, which calls `name##_body<V>(…)` compiled for `isa`, V being its vectors.
#define QR_VERSIONS(name, parameters, arguments)                                                  \
    static void name##_baseline parameters { name##_body<::qr::Vector4> arguments; }              \
    QR_TARGET_AVX2 static void name##_avx2 parameters { name##_body<::qr::Vector8> arguments; }   \
    QR_TARGET_AVX512 static void name##_avx512 parameters { name##_body<::qr::Vector16> arguments; } \
    template <typename... Arguments>                                                              \
    static void name(int32_t isa, Arguments&&... a) {                                             \
        if (isa >= ::qr::kAvx512) {                                                               \
            name##_avx512(a...);                                                                  \
        } else if (isa == ::qr::kAvx2) {                                                          \
            name##_avx2(a...);                                                                    \
        } else {                                                                                  \
            name##_baseline(a...);                                                                \
        }                                                                                         \
    }
#else
#define QR_VERSIONS(name, parameters, arguments)                                     \
    static void name##_baseline parameters { name##_body<::qr::Vector4> arguments; } \
    template <typename... Arguments>                                                 \
    static void name(int32_t, Arguments&&... a) {                                    \
        name##_baseline(a...);                                                       \
    }
#endif

namespace qr {

inline int32_t best_isa() {
#ifdef QR_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                      __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx512 ? kAvx512 : avx2 ? kAvx2 : kBaseline;
#else
    return kBaseline;
#endif
}

// The instruction set of the caller, but never more than the machine has.
inline int32_t usable_isa(int32_t chosen) {
    const int32_t best = best_isa();
    return chosen < best ? chosen : best;
}

}  // namespace qr
