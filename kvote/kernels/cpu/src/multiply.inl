// Products of packed codes with weights: the inner loop of both halves of attention over packed tokens.
//
// A row is 64 bytes: sixteen 32-bit lanes, each with N = 16 / BITS codes in its lower 16 bits and N in its upper ones.
// Steps of a row are pairs: pair k is bits BITS * k of both halves. Keys: lanes are tokens, steps channels. Values:
// lanes are channels, steps tokens. Two rows at once (of two tiles of sixteen lanes) share what a weight costs to fetch,
// and Q weights per step what a code costs to unpack.

template <int BITS>
constexpr int64_t STEPS = 32 / BITS;

constexpr int64_t ROW = 64;

// What is taken off every code before it is multiplied. Codes about zero leave half of the rounding of a bfloat16 weight.
template <int BITS, class U>
constexpr float ZERO = std::is_same<U, float>::value ? 0.0f : float((1 << BITS) - 1) / 2;

// sums[q][i] += products of tile i with weights[q * stride + step], over `rows` rows. What lies `ahead` bytes further is
// asked for from memory on the way.
template <int BITS, int Q>
inline void multiply(const uint8_t* a, const uint8_t* b, int64_t rows, const float* weights, int64_t stride,
                     vf (&sums)[Q][2], int64_t ahead) {
    constexpr uint32_t MASK = (1u << BITS) - 1;
    for (int64_t row = 0; row < rows; ++row, a += ROW, b += ROW, weights += STEPS<BITS>) {
        const vu x = load<vu>(a), y = load<vu>(b);
        __builtin_prefetch(a + ahead, 0, 2);
        __builtin_prefetch(b + ahead, 0, 2);
        for (int k = 0; k < 16 / BITS; ++k)
            for (int half = 0; half < 2; ++half) {
                const int shift = BITS * k + 16 * half;
                const vf u = __builtin_convertvector((vi)((x >> shift) & MASK), vf);
                const vf v = __builtin_convertvector((vi)((y >> shift) & MASK), vf);
                for (int q = 0; q < Q; ++q) {
                    const float w = weights[q * stride + 2 * k + half];
                    sums[q][0] += u * w;
                    sums[q][1] += v * w;
                }
            }
    }
}

#if defined(__AVX512BF16__)
// Codes about zero in bfloat16, by the lowest five bits of a 16-bit index, of which only the BITS from `from` on count.
template <int BITS>
inline __m512i code_table(int from) {
    alignas(64) uint16_t table[32];
    for (int i = 0; i < 32; ++i) {
        const float x = float((i >> from) % (1 << BITS)) - ZERO<BITS, bf16>;
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        table[i] = uint16_t(bits >> 16);
    }
    return _mm512_load_si512(table);
}

template <int BITS, int Q>
inline void multiply(const uint8_t* a, const uint8_t* b, int64_t rows, const bf16* weights, int64_t stride,
                     vf (&sums)[Q][2], int64_t ahead) {
    // Enough independent sums to hide the latency of an addition.
    constexpr int CHAINS = Q >= 3 ? 1 : 4 / Q;
    // Two codes of 2 bits lie within five bits, which saves to shift every other one.
    const __m512i tables[2] = {code_table<BITS>(0), code_table<BITS>(BITS == 2 ? 2 : 0)};
    __m512 acc[CHAINS][Q][2];
    for (int q = 0; q < Q; ++q)
        for (int i = 0; i < 2; ++i) {
            acc[0][q][i] = (__m512)sums[q][i];
            for (int chain = 1; chain < CHAINS; ++chain) acc[chain][q][i] = _mm512_setzero_ps();
        }
    for (int64_t row = 0; row < rows; ++row, a += ROW, b += ROW, weights += STEPS<BITS>) {
        const __m512i x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b);
        __builtin_prefetch(a + ahead, 0, 2);
        __builtin_prefetch(b + ahead, 0, 2);
#pragma GCC unroll 8
        for (int k = 0; k < 16 / BITS; ++k) {
            const int shift = BITS == 2 ? BITS * (k & ~1) : BITS * k;
            const __m512bh u = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(x, shift), tables[k % 2]);
            const __m512bh v = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(y, shift), tables[k % 2]);
            for (int q = 0; q < Q; ++q) {
                int32_t pair;
                std::memcpy(&pair, weights + q * stride + 2 * k, 4);
                const __m512bh w = (__m512bh)_mm512_set1_epi32(pair);
                acc[k % CHAINS][q][0] = _mm512_dpbf16_ps(acc[k % CHAINS][q][0], u, w);
                acc[k % CHAINS][q][1] = _mm512_dpbf16_ps(acc[k % CHAINS][q][1], v, w);
            }
        }
    }
    for (int q = 0; q < Q; ++q)
        for (int i = 0; i < 2; ++i) {
            sums[q][i] = (vf)acc[0][q][i];
            for (int chain = 1; chain < CHAINS; ++chain) sums[q][i] += (vf)acc[chain][q][i];
        }
}
#endif

// Weights of two neighbouring steps-of-sixteen, as they are multiplied.
inline void put_weights(float* to, vf a, vf b) {
    store(to, a);
    store(to + W, b);
}
#if defined(__AVX512BF16__)
inline void put_weights(bf16* to, vf a, vf b) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
}
#endif
