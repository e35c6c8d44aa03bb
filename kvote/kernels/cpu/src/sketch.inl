// Sketches: coarse copies of keys for scoring, laid out for dot products without horizontal sums.
//
// A block holds 32 tokens as two halves of 16. A row of it is 64 bytes for one half: four bytes for each of 16 tokens.
// 8 bit: rows [dim / 4][half], a byte is one channel (code 128 is zero). 4 bit: rows [dim / 8][half], a byte is two
// channels: of 8j .. 8j + 7 the first four in the low bits, the others in the high ones (codes 0 .. 15 stand for
// -7.5 .. 7.5). Behind the rows, one half-precision scale per token. A row times four query channels adds to sixteen
// tokens at once.
//
// What is encoded is a key less the centre of its lane: a constant that no softmax sees.

constexpr int64_t SKETCH_BLOCK = 32;

inline int64_t block_bytes(int64_t dim, int64_t bits) { return SKETCH_BLOCK * (dim * bits / 8 + 2); }

// The mean of the first page of a lane, once that is full; of a lane of fewer tokens 0.
template <class T>
void centre_of(const T* keys, const Lane& lane, int64_t tokens, int64_t dim, float* centre) {
    for (int64_t c = 0; c < dim; ++c) centre[c] = 0;
    if (tokens < PAGE) return;
    Lane::Cursor at;
    const T* first = keys + lane.slot(0, at) * dim;
    // In double precision, so that every order of adding up gives the same bits.
    double sums[MAX_DIM] = {};
    float row[MAX_DIM];
    for (int64_t t = 0; t < PAGE; ++t) {
        for (int64_t c = 0; c < dim; c += W) store(row + c, get(first + t * dim + c));
        for (int64_t c = 0; c < dim; ++c) sums[c] += row[c];
    }
    for (int64_t c = 0; c < dim; ++c) {
        const float mean = float(sums[c] / PAGE);
        // One key that is no number must not make all sketches none.
        centre[c] = mean - mean == 0 ? mean : 0.0f;
    }
}

template <class T>
void encode_slot(const T* keys, uint8_t* sketch, int64_t slot, int64_t dim, int64_t bits, const float* centre) {
    const T* key = keys + slot * dim;
    float row[256];
    vf peak{};
    for (int64_t c = 0; c < dim; c += W) {
        vf x = get(key + c) - load<vf>(centre + c);
        store(row + c, x);
        peak = vmax(peak, vmax(x, -x));
    }
    const float most = bits == 8 ? 127.0f : 7.5f, zero = bits == 8 ? 128.0f : 7.5f;
    // Beyond the range of half precision, codes saturate; an infinite scale would make every score NaN.
    const uint16_t half = float_to_half(std::min(65504.0f, max(peak) / most));
    const float scale = half_to_float(half);
    uint8_t codes[256];
    for (int64_t c = 0; c < dim; ++c) {
        // Divided as the law divides: a product with 1 / scale would round some halves the other way.
        float x = scale > 0 ? row[c] / scale : 0.0f;
        x = x < most ? x : most;
        x = x > -most ? x : -most;
        codes[c] = uint8_t(x + zero + 0.5f);
    }
    uint8_t* block = sketch + slot / SKETCH_BLOCK * block_bytes(dim, bits);
    const int64_t token = slot % SKETCH_BLOCK, place = token / 16 * 64 + token % 16 * 4;
    if (bits == 8) {
        for (int64_t j = 0; j < dim / 4; ++j) std::memcpy(block + j * 128 + place, codes + 4 * j, 4);
    } else {
        for (int64_t j = 0; j < dim / 8; ++j) {
            const uint8_t* c = codes + 8 * j;
            for (int i = 0; i < 4; ++i) block[j * 128 + place + i] = uint8_t(c[i] | c[i + 4] << 4);
        }
    }
    std::memcpy(block + SKETCH_BLOCK * dim * bits / 8 + 2 * token, &half, 2);
}

// Tokens `start` to `stop` of a lane that holds `held`.
template <class T>
void sketch_lane(const T* keys, uint8_t* sketch, const Lane& lane, int64_t start, int64_t stop, int64_t held,
                 int64_t dim, int64_t bits) {
    if (start >= stop) return;
    float centre[MAX_DIM];
    centre_of(keys, lane, held, dim, centre);
    Lane::Cursor at;
    for (int64_t t = start; t < stop; ++t) encode_slot(keys, sketch, lane.slot(t, at), dim, bits, centre);
}

// A query in signed 8-bit codes: q = scale * code.
struct CodedQuery {
    alignas(64) int8_t code[256];
    float scale;
    int32_t sum;

    void encode(const float* query, int64_t dim) {
        float peak = 0;
        for (int64_t c = 0; c < dim; ++c) peak = query[c] > peak ? query[c] : -query[c] > peak ? -query[c] : peak;
        scale = peak / 127.0f;
        sum = 0;
        for (int64_t c = 0; c < dim; ++c) {
            float x = scale > 0 ? query[c] / scale : 0.0f;
            if (!(std::abs(x) < 127.5f)) x = 0;  // NaN has no code
            code[c] = int8_t(x + (x < 0 ? -0.5f : 0.5f));
            sum += code[c];
        }
    }
};

// Sixteen running sums plus, for each, the product of four codes with four query channels.
inline vi dot4(vi sums, vu codes, const int8_t* query) {
    int32_t four;
    std::memcpy(&four, query, 4);
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, _mm512_set1_epi32(four));
#elif defined(__AVX2__)
    // Pairs of 16-bit products are exact, which the shorter 8-bit multiply-add of this instruction set is not.
    const __m256i q = _mm256_cvtepi8_epi16(_mm_set1_epi32(four)), ones = _mm256_set1_epi32(0x00ff00ff);
    const __m256i even = _mm256_shufflelo_epi16(_mm256_shufflehi_epi16(q, 0x88), 0x88);
    const __m256i odd = _mm256_shufflelo_epi16(_mm256_shufflehi_epi16(q, 0xdd), 0xdd);
    for (int half = 0; half < 2; ++half) {
        __m256i c, s;
        std::memcpy(&c, reinterpret_cast<const char*>(&codes) + 32 * half, 32);
        std::memcpy(&s, reinterpret_cast<const char*>(&sums) + 32 * half, 32);
        s = _mm256_add_epi32(s, _mm256_madd_epi16(_mm256_and_si256(c, ones), even));
        s = _mm256_add_epi32(s, _mm256_madd_epi16(_mm256_and_si256(_mm256_srli_epi16(c, 8), ones), odd));
        std::memcpy(reinterpret_cast<char*>(&sums) + 32 * half, &s, 32);
    }
    return sums;
#else
    for (int c = 0; c < 4; ++c)
        sums += (vi)((codes >> (8 * c)) & 0xffu) * int32_t(query[c]);
    return sums;
#endif
}

// Scores in units of log 2 of 32 tokens for R queries, to out[row * stride]. Codes and query channels are loaded once
// for all, and the chains of multiply-adds are independent, which hides their latency.
template <int BITS, int R>
inline void score_rows_of(const uint8_t* block, int64_t dim, const CodedQuery* query, float* out, int64_t stride) {
    vi sum[R][2] = {};
    constexpr int64_t CHANNELS = 32 / BITS;
    for (int64_t j = 0; j < dim / CHANNELS; ++j) {
        const vu a = load<vu>(block + 128 * j), b = load<vu>(block + 128 * j + 64);
        for (int half = 0; half < 8 / BITS; ++half) {
            const vu x = BITS == 8 ? a : (half ? a >> 4 : a) & 0x0f0f0f0fu;
            const vu y = BITS == 8 ? b : (half ? b >> 4 : b) & 0x0f0f0f0fu;
            for (int r = 0; r < R; ++r) {
                const int8_t* q = query[r].code + CHANNELS * j + 4 * half;
                sum[r][0] = dot4(sum[r][0], x, q);
                sum[r][1] = dot4(sum[r][1], y, q);
            }
        }
    }
    const f16* scales = reinterpret_cast<const f16*>(block + SKETCH_BLOCK * dim * BITS / 8);
    for (int half = 0; half < 2; ++half) {
        const vf scale = get(scales + W * half) * LOG2_E;
        for (int r = 0; r < R; ++r) {
            // Twice the offset of a 4-bit code is a whole number; 2 * sum stays far below 2^24 and is exact.
            const vi centred = BITS == 8 ? sum[r][half] - 128 * query[r].sum : 2 * sum[r][half] - 15 * query[r].sum;
            const float unit = BITS == 8 ? query[r].scale : 0.5f * query[r].scale;
            store(out + r * stride + W * half, __builtin_convertvector(centred, vf) * (scale * unit));
        }
    }
}

template <int BITS>
inline void score_block(const uint8_t* block, int64_t dim, const CodedQuery* query, int64_t rows, float* out,
                        int64_t stride) {
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4) score_rows_of<BITS, 4>(block, dim, query + row, out + row * stride, stride);
    if (rows - row == 3) score_rows_of<BITS, 3>(block, dim, query + row, out + row * stride, stride);
    if (rows - row == 2) score_rows_of<BITS, 2>(block, dim, query + row, out + row * stride, stride);
    if (rows - row == 1) score_rows_of<BITS, 1>(block, dim, query + row, out + row * stride, stride);
}
