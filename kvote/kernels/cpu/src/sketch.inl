// 8-bit sketches of keys: per token 8-bit codes and one scale, laid out for dot products without horizontal sums.
//
// A block of 16 tokens holds [dim / 4][16 tokens][4 channels] unsigned codes (128 is zero), then 16 half-precision
// scales. One 64-byte row of it times four query channels adds to sixteen tokens at once.

inline int64_t block_bytes(int64_t dim) { return 16 * dim + 32; }

template <class T>
void sketch_slots(const SketchArgs& a) {
    const T* keys = static_cast<const T*>(a.keys);
#pragma omp parallel for num_threads(a.threads) schedule(static) if (a.count > 512)
    for (int64_t i = 0; i < a.count; ++i) {
        int64_t slot = a.slots[i], dim = a.dim;
        const T* key = keys + slot * dim;
        float row[256];
        vf peak = vf{};
        for (int64_t c = 0; c < dim; c += W) {
            vf x = get(key + c);
            store(row + c, x);
            peak = vmax(peak, vmax(x, -x));
        }
        float scale = max(peak) / 127.0f;
        uint16_t half = float_to_half(scale);
        scale = half_to_float(half);
        float inverse = scale > 0 ? 1.0f / scale : 0.0f;
        uint8_t* block = a.sketch + slot / 16 * block_bytes(dim);
        int64_t token = slot % 16;
        for (int64_t c = 0; c < dim; ++c) {
            float code = row[c] * inverse;
            code = code > 127.0f ? 127.0f : code < -127.0f ? -127.0f : code;
            block[(c / 4) * 64 + token * 4 + c % 4] = uint8_t(int(code + (code < 0 ? -0.5f : 0.5f)) + 128);
        }
        std::memcpy(block + 16 * dim + 2 * token, &half, 2);
    }
}

// A query as two signed 8-bit parts, 15 bits together: q = scale * (high + low / 128).
struct CodedQuery {
    alignas(64) int8_t high[256], low[256];
    float scale;
    int32_t high_sum, low_sum;

    void encode(const float* query, int64_t dim) {
        float peak = 0;
        for (int64_t c = 0; c < dim; ++c) peak = query[c] > peak ? query[c] : -query[c] > peak ? -query[c] : peak;
        scale = peak / 126.0f;
        float inverse = scale > 0 ? 1.0f / scale : 0.0f;
        high_sum = low_sum = 0;
        for (int64_t c = 0; c < dim; ++c) {
            float x = query[c] * inverse;
            int h = int(x + (x < 0 ? -0.5f : 0.5f));
            float rest = (x - float(h)) * 128.0f;
            int l = int(rest + (rest < 0 ? -0.5f : 0.5f));
            high[c] = int8_t(h);
            low[c] = int8_t(l);
            high_sum += h;
            low_sum += l;
        }
    }
};

inline vi dot4(vi sums, const uint8_t* codes, const int8_t* query) {
#if defined(__AVX512VNNI__)
    int32_t four;
    std::memcpy(&four, query, 4);
    return (vi)_mm512_dpbusd_epi32((__m512i)sums, _mm512_loadu_si512(codes), _mm512_set1_epi32(four));
#else
    for (int i = 0; i < W; ++i)
        for (int c = 0; c < 4; ++c) sums[i] += int32_t(codes[4 * i + c]) * query[c];
    return sums;
#endif
}

// Scores of 16 tokens for R coded queries, to out[row * stride]. Codes are loaded once for all of them, and the chains
// of multiply-adds are independent, which hides their latency.
template <int R>
inline void score_rows_of(const uint8_t* block, int64_t dim, const CodedQuery* query, float* out, int64_t stride) {
    vi high[R] = {}, low[R] = {};
    for (int64_t c = 0; c < dim; c += 4) {
        const uint8_t* codes = block + 16 * c;
        for (int r = 0; r < R; ++r) {
            high[r] = dot4(high[r], codes, query[r].high + c);
            low[r] = dot4(low[r], codes, query[r].low + c);
        }
    }
    vf scales = get(reinterpret_cast<const f16*>(block + 16 * dim));
    for (int r = 0; r < R; ++r) {
        vf coarse = __builtin_convertvector(high[r] - 128 * query[r].high_sum, vf);
        vf fine = __builtin_convertvector(low[r] - 128 * query[r].low_sum, vf);
        store(out + r * stride, (coarse + fine * 0.0078125f) * scales * query[r].scale);
    }
}

inline void score_block(const uint8_t* block, int64_t dim, const CodedQuery* query, int64_t rows, float* out,
                        int64_t stride) {
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4) score_rows_of<4>(block, dim, query + row, out + row * stride, stride);
    for (; row < rows; ++row) score_rows_of<1>(block, dim, query + row, out + row * stride, stride);
}
