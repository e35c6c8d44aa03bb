// Dot products of keys with several queries at once: each key is loaded once.

constexpr int64_t MAX_GROUPS = 16;
constexpr int64_t MAX_DIM = 256;

// Products of four keys with four query rows of `stride` floats, sum [query * 4 + key].
template <class T>
inline vf dots(const T* const (&key)[4], const float* query, int64_t stride, int64_t dim) {
    vf m[W] = {};
    for (int64_t c = 0; c < dim; c += W) {
        const vf x0 = get(key[0] + c), x1 = get(key[1] + c), x2 = get(key[2] + c), x3 = get(key[3] + c);
        for (int q = 0; q < 4; ++q) {
            const vf y = load<vf>(query + q * stride + c);
            m[4 * q] += x0 * y;
            m[4 * q + 1] += x1 * y;
            m[4 * q + 2] += x2 * y;
            m[4 * q + 3] += x3 * y;
        }
    }
    return sums_of(m);
}

#if defined(__AVX512BF16__)
// bfloat16 keys and bfloat16 query rows of `stride` numbers, two channels at a time; `dim` a multiple of 32.
inline vf dots_bf16(const bf16* const (&key)[4], const bf16* query, int64_t stride, int64_t dim) {
    __m512 m[W];
    for (auto& x : m) x = _mm512_setzero_ps();
    for (int64_t c = 0; c < dim; c += 32) {
        __m512bh x[4];
        for (int k = 0; k < 4; ++k) x[k] = (__m512bh)_mm512_loadu_si512(key[k] + c);
        for (int q = 0; q < 4; ++q) {
            const __m512bh y = (__m512bh)_mm512_loadu_si512(query + q * stride + c);
            for (int k = 0; k < 4; ++k) m[4 * q + k] = _mm512_dpbf16_ps(m[4 * q + k], x[k], y);
        }
    }
    vf sums[W];
    for (int i = 0; i < W; ++i) sums[i] = (vf)m[i];
    return sums_of(sums);
}
#endif

// The four quarters of a vector, to out, out + stride, ...
inline void store_quarters(float* out, int64_t stride, vf x) {
    for (int q = 0; q < 4; ++q) std::memcpy(out + q * stride, reinterpret_cast<const char*>(&x) + 16 * q, 16);
}
