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

// x - 0 is x, bit by bit, so the compiler drops the subtraction; x + 0 is not, where x is -0.
inline vf splat(float x) { return x - vf{}; }

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

// Sixteen 16-bit numbers as 32-bit ones.
inline vu widen(const void* p) {
#if defined(__AVX512F__)
    return (vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#else
    return __builtin_convertvector(load<vh>(p), vu);
#endif
}
inline void narrow(void* p, vu x) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)x));
#else
    store(p, __builtin_convertvector(x, vh));
#endif
}

inline vf get(const bf16* p) { return as_float(widen(p) << 16); }
inline void put(bf16* p, vf x) {
#if defined(__AVX512BF16__)
    // Unlike below, what is smaller than 2^-126 becomes 0, and no NaN becomes a number.
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
    vu bits = as_bits(x);
    vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    narrow(p, rounded);
#endif
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

// The larger one; b where either is NaN.
inline vf vmax(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return a > b ? a : b;
#endif
}

typedef float v8 __attribute__((vector_size(32)));
typedef float v4 __attribute__((vector_size(16)));

// Halves are joined with each other: four steps instead of fifteen that wait for one another.
inline float sum(vf x) {
    v8 halves[2];
    std::memcpy(halves, &x, sizeof x);
    const v8 both = halves[0] + halves[1];
    v4 quarters[2];
    std::memcpy(quarters, &both, sizeof both);
    const v4 four = quarters[0] + quarters[1];
    return (four[0] + four[2]) + (four[1] + four[3]);
}

inline float larger(float a, float b) { return a > b ? a : b; }

inline float max(vf x) {
    v8 halves[2];
    std::memcpy(halves, &x, sizeof x);
    const v8 both = halves[0] > halves[1] ? halves[0] : halves[1];
    v4 quarters[2];
    std::memcpy(quarters, &both, sizeof both);
    const v4 four = quarters[0] > quarters[1] ? quarters[0] : quarters[1];
    return larger(larger(four[0], four[2]), larger(four[1], four[3]));
}

// 2^x for x <= 0 as n + 127 in the exponent and a polynomial of the rest: the bits of the result.
// DEGREE 6: relative error below 2e-7; 3: 1e-4.
template <int DEGREE>
inline vu exp2_bits(vf x) {
    const vf magic = splat(12582912.0f);  // adding it leaves the nearest whole number in the lowest bits
    const vf shifted = x + magic;
    const vf r = x - (shifted - magic);
    vf p;
    if (DEGREE == 6) {
        p = splat(1.5353362e-4f) * r + 1.3398874e-3f;
        p = p * r + 9.6184374e-3f;
        p = p * r + 5.5503325e-2f;
        p = p * r + 2.4022648e-1f;
        p = p * r + 6.9314720e-1f;
    } else {
        p = splat(5.5008920e-2f) * r + 2.4221096e-1f;
        p = p * r + 6.9328293e-1f;
    }
    p = p * r + 1.0f;
    return as_bits(p) + (as_bits(shifted) << 23);
}

// 2^x for x <= 0, relative error below 2e-7; anything below -126 becomes 0, and so does NaN.
inline vf exp2_of(vf x) {
    const vf known = vmax(x, splat(-126.0f));
    return x > splat(-126.0f) ? as_float(exp2_bits<6>(known)) : vf{};
}

constexpr float LOG2_E = 1.4426950408889634f;

// e^x for x <= 0, relative error below 1e-5 (x is rounded when it is scaled) down to e^-87; NaN stays NaN.
inline vf exp_of(vf x) { return x == x ? exp2_of(x * LOG2_E) : x; }

// Sums of sixteen vectors, sum i in lane i: four vectors become one within quarters, and four of those one across them.
inline vf sums_of(const vf (&m)[W]) {
    constexpr vi even = {0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29};
    constexpr vi odd = {2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31};
    constexpr vi first = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
    constexpr vi second = {2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31};
    constexpr vi front = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27};
    constexpr vi back = {4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31};
    vf four[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const vf *x = m + 4 * i;
        const vf a = __builtin_shuffle(x[0], x[1], even) + __builtin_shuffle(x[0], x[1], odd);
        const vf b = __builtin_shuffle(x[2], x[3], even) + __builtin_shuffle(x[2], x[3], odd);
        four[i] = __builtin_shuffle(a, b, first) + __builtin_shuffle(a, b, second);
    }
    const vf a = __builtin_shuffle(four[0], four[1], front) + __builtin_shuffle(four[0], four[1], back);
    const vf b = __builtin_shuffle(four[2], four[3], front) + __builtin_shuffle(four[2], four[3], back);
    return __builtin_shuffle(a, b, front) + __builtin_shuffle(a, b, back);
}

}  // namespace KVOTE_ISA
