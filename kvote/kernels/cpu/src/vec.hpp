// Sixteen floats at a time, in the compiler's vector extensions: one source for AVX-512, AVX2, NEON and plain C++.
// The file is compiled once per instruction set, each time in a namespace of its own (KVOTE_ISA).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

namespace KVOTE_ISA {

using std::int32_t;
using std::int64_t;
using std::uint16_t;
using std::uint32_t;
using std::uint8_t;

constexpr int W = 16;

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));

template <class V, class T>
inline V load(const T* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

template <class V, class T>
inline void store(T* p, V v) {
    std::memcpy(p, &v, sizeof v);
}

inline vf splat(float x) { return vf{} + x; }

inline vf as_float(vu bits) {
    vf v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
}

inline vu as_bits(vf x) {
    vu v;
    std::memcpy(&v, &x, sizeof v);
    return v;
}

// Storage types: what a tensor element is in memory, and how sixteen of them become floats and back.
struct f32 {
    float raw;
};
struct bf16 {
    uint16_t raw;
};
struct f16 {
    uint16_t raw;
};

inline float half_to_float(uint16_t h) {
    uint32_t sign = uint32_t(h & 0x8000u) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
    uint32_t bits;
    if (exponent == 31) {
        bits = sign | 0x7f800000u | (mantissa << 13);
    } else if (exponent) {
        bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
    } else {
        float tiny = float(mantissa) * 0x1p-24f;
        std::memcpy(&bits, &tiny, 4);
        bits |= sign;
    }
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

inline uint16_t float_to_half(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return sign | 0x7e00;
    if (bits >= 0x477ff000u) return sign | 0x7c00;
    if (bits < 0x38800000u) {  // below the smallest normal half: round on the subnormal grid
        float a;
        std::memcpy(&a, &bits, 4);
        float grid = a + 0.5f;  // ulp of [0.5, 1) is 2^-24, the subnormal step
        uint32_t g;
        std::memcpy(&g, &grid, 4);
        return sign | uint16_t(g - 0x3f000000u);
    }
    uint32_t odd = (bits >> 13) & 1;
    return sign | uint16_t((bits - 0x38000000u + 0xfff + odd) >> 13);
}

inline vf get(const f32* p) { return load<vf>(p); }
inline void put(f32* p, vf x) { store(p, x); }

inline vf get(const bf16* p) { return as_float(__builtin_convertvector(load<vh>(p), vu) << 16); }
inline void put(bf16* p, vf x) {
    vu bits = as_bits(x);
    vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    store(p, __builtin_convertvector(rounded, vh));
}

inline vf get(const f16* p) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
    vf v;
    for (int i = 0; i < W; i += 8) {
        __m256 half = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + i)));
        std::memcpy((float*)&v + i, &half, sizeof half);
    }
    return v;
#else
    vf v;
    for (int i = 0; i < W; ++i) v[i] = half_to_float(p[i].raw);
    return v;
#endif
}
inline void put(f16* p, vf x) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
    for (int i = 0; i < W; i += 8) {
        __m256 half;
        std::memcpy(&half, (float*)&x + i, sizeof half);
        _mm_storeu_si128((__m128i*)(p + i), _mm256_cvtps_ph(half, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
#else
    for (int i = 0; i < W; ++i) p[i].raw = float_to_half(x[i]);
#endif
}

inline vf vmax(vf a, vf b) { return a > b ? a : b; }

inline float sum(vf x) {
    float total = 0;
    for (int i = 0; i < W; ++i) total += x[i];
    return total;
}

inline float max(vf x) {
    float best = x[0];
    for (int i = 1; i < W; ++i) best = x[i] > best ? x[i] : best;
    return best;
}

// 2^x for x <= 0; anything below -126 becomes 0, and so does NaN. DEGREE 6: relative error below 2e-7; 4: 5e-6.
template <int DEGREE>
inline vf exp2_of(vf x) {
    vf known = x > splat(-126.0f) ? x : splat(-126.0f);
#if defined(__AVX512F__)
    vf n = (vf)_mm512_roundscale_ps((__m512)known, 0);
#else
    const vf magic = splat(12582912.0f);
    vf n = known + magic;
    vi power = (vi)as_bits(n) - (vi)as_bits(magic);
    n -= magic;
#endif
    vf r = known - n, p;
    if (DEGREE == 6) {
        p = splat(1.5353362e-4f) * r + 1.3398874e-3f;
        p = p * r + 9.6184374e-3f;
        p = p * r + 5.5503325e-2f;
        p = p * r + 2.4022648e-1f;
        p = p * r + 6.9314720e-1f;
    } else {
        p = splat(9.5828500e-3f) * r + 5.5906430e-2f;
        p = p * r + 2.4024099e-1f;
        p = p * r + 6.9312419e-1f;
    }
    p = p * r + 1.0f;
#if defined(__AVX512F__)
    vf power_of = (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    vf power_of = as_float(as_bits(p) + ((vu)power << 23));
#endif
    return x > splat(-126.0f) ? power_of : vf{};
}

constexpr float LOG2_E = 1.4426950408889634f;

// e^x for x <= 0, relative error below 1e-5 (x is rounded when it is scaled) down to e^-87; NaN stays NaN.
inline vf exp_of(vf x) { return x == x ? exp2_of<6>(x * LOG2_E) : x; }

// Transposes a 16 x 16 block held in sixteen vectors.
inline void transpose(vf (&m)[W]) {
    for (int half = 8; half; half >>= 1) {
        vi low, high;
        for (int i = 0; i < W; ++i) {
            low[i] = (i & half) ? W + (i & ~half) : i;
            high[i] = (i & half) ? W + i : (i | half);
        }
        for (int i = 0; i < W; ++i) {
            if (i & half) continue;
            vf a = m[i], b = m[i | half];
            m[i] = __builtin_shuffle(a, b, low);
            m[i | half] = __builtin_shuffle(a, b, high);
        }
    }
}

}  // namespace KVOTE_ISA
