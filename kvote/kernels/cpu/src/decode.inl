// Attention of one query position per sequence (a decode step), over a range of tokens or a list of them.
//
// Every lane is split over its tokens; the parts are merged by their log-sum-exp, so that one long lane uses all
// threads. A block of tokens is scored for all queries of the key head at once: each key and value is read once.

constexpr int64_t BLOCK = 64;
constexpr int64_t MAX_GROUPS = 16;
constexpr int64_t MAX_DIM = 256;

// Sums of sixteen vectors, sum i in lane i.
inline vf sums_of(vf (&m)[W]) {
    for (int half = 8; half; half >>= 1) {
        vi low, high;
        for (int i = 0; i < W; ++i) {
            low[i] = (i & half) ? W + (i & ~half) : i;
            high[i] = (i & half) ? W + i : (i | half);
        }
        for (int i = 0; i < half; ++i) m[i] = __builtin_shuffle(m[i], m[i + half], low) + __builtin_shuffle(m[i], m[i + half], high);
    }
    return m[0];
}

// Dot products of four keys with the queries `first` to `first` + 3 of `rows`, sum [key * 4 + query].
template <class T>
inline vf dots(const T* const (&key)[4], const float* rows, int64_t first, int64_t dim) {
    const float* query = rows + first * MAX_DIM;
    vf m[W] = {};
    for (int64_t c = 0; c < dim; c += W) {
        vf q0 = load<vf>(query + c), q1 = load<vf>(query + MAX_DIM + c);
        vf q2 = load<vf>(query + 2 * MAX_DIM + c), q3 = load<vf>(query + 3 * MAX_DIM + c);
        for (int k = 0; k < 4; ++k) {
            vf x = get(key[k] + c);
            m[4 * k] += x * q0;
            m[4 * k + 1] += x * q1;
            m[4 * k + 2] += x * q2;
            m[4 * k + 3] += x * q3;
        }
    }
    return sums_of(m);
}

#if defined(__AVX512BF16__)
// bfloat16 keys meet bfloat16 queries (packed behind the floats of each query row) two channels at a time.
template <>
inline vf dots<bf16>(const bf16* const (&key)[4], const float* rows, int64_t first, int64_t dim) {
    if (dim % 32) {
        float wide[4][MAX_DIM];
        const f32* four[4];
        for (int k = 0; k < 4; ++k) {
            for (int64_t c = 0; c < dim; c += W) store(wide[k] + c, get(key[k] + c));
            four[k] = reinterpret_cast<const f32*>(wide[k]);
        }
        return dots<f32>(four, rows, first, dim);
    }
    const char* packed = reinterpret_cast<const char*>(rows + MAX_GROUPS * MAX_DIM) + 2 * first * MAX_DIM;
    __m512 m[W];
    for (auto& x : m) x = _mm512_setzero_ps();
    for (int64_t c = 0; c < dim; c += 32) {
        __m512bh q[4];
        for (int i = 0; i < 4; ++i) q[i] = (__m512bh)_mm512_loadu_si512(packed + 2 * (i * MAX_DIM + c));
        for (int k = 0; k < 4; ++k) {
            __m512bh x = (__m512bh)_mm512_loadu_si512(key[k] + c);
            for (int i = 0; i < 4; ++i) m[4 * k + i] = _mm512_dpbf16_ps(m[4 * k + i], x, q[i]);
        }
    }
    vf sums[W];
    for (int i = 0; i < W; ++i) sums[i] = (vf)m[i];
    return sums_of(sums);
}
#endif

// The running answer of one lane part: unnormalised output, maximum and mass per query.
struct Partial {
    alignas(64) float out[MAX_GROUPS * MAX_DIM];
    float peak[MAX_GROUPS], mass[MAX_GROUPS];
};

// Adds weights [query][token] times values to the output, channel by channel group so that sums stay in registers.
template <class T, int Q>
inline void add_values(const T* const* value, int64_t live, const float* weight, float* out, int64_t dim) {
    constexpr int C = 4;
    for (int64_t c = 0; c < dim; c += C * W) {
        const int64_t wide = dim - c < C * W ? (dim - c) / W : C;
        vf acc[Q][C];
        for (int q = 0; q < Q; ++q)
            for (int j = 0; j < C; ++j) acc[q][j] = j < wide ? load<vf>(out + q * MAX_DIM + c + j * W) : vf{};
        if (wide == C) {
            for (int64_t t = 0; t < live; ++t) {
                const T* v = value[t] + c;
                vf x0 = get(v), x1 = get(v + W), x2 = get(v + 2 * W), x3 = get(v + 3 * W);
                for (int q = 0; q < Q; ++q) {
                    vf w = splat(weight[q * BLOCK + t]);
                    acc[q][0] += x0 * w;
                    acc[q][1] += x1 * w;
                    acc[q][2] += x2 * w;
                    acc[q][3] += x3 * w;
                }
            }
        } else {
            for (int64_t t = 0; t < live; ++t)
                for (int j = 0; j < wide; ++j) {
                    vf x = get(value[t] + c + j * W);
                    for (int q = 0; q < Q; ++q) acc[q][j] += x * weight[q * BLOCK + t];
                }
        }
        for (int q = 0; q < Q; ++q)
            for (int j = 0; j < wide; ++j) store(out + q * MAX_DIM + c + j * W, acc[q][j]);
    }
}

template <class K, class V>
void attend_block(const K* const* key, const V* const* value, int64_t live, const float* query, const DecodeArgs& a,
                  Partial& part) {
    alignas(64) float scores[MAX_GROUPS * BLOCK];
    const int64_t groups = (a.groups + 3) / 4 * 4;
    for (int64_t t = 0; t < live; t += 4) {
        const K* four[4];
        for (int64_t k = 0; k < 4; ++k) four[k] = key[t + k < live ? t + k : live - 1];
        for (int64_t g = 0; g < groups; g += 4) {
            vf s = dots<K>(four, query, g, a.dim) * a.scale;
            for (int k = 0; k < 4; ++k)
                for (int i = 0; i < 4; ++i) scores[(g + i) * BLOCK + t + k] = s[4 * k + i];
        }
    }
    const int64_t padded = (live + W - 1) / W * W;
    for (int64_t g = 0; g < a.groups; ++g) {
        float* s = scores + g * BLOCK;
        if (a.softcap > 0)
            for (int64_t t = 0; t < live; ++t) s[t] = a.softcap * std::tanh(s[t] / a.softcap);
        for (int64_t t = live; t < padded; ++t) s[t] = -INFINITY;
        vf best = splat(-INFINITY);
        for (int64_t t = 0; t < padded; t += W) best = vmax(best, load<vf>(s + t));
        float peak = max(best);
        if (peak > part.peak[g]) {
            float shrink = std::exp(part.peak[g] - peak);
            part.mass[g] *= shrink;
            for (int64_t c = 0; c < a.dim; c += W)
                store(part.out + g * MAX_DIM + c, load<vf>(part.out + g * MAX_DIM + c) * shrink);
            part.peak[g] = peak;
        }
        vf mass{};
        for (int64_t t = 0; t < padded; t += W) {
            vf e = exp_of(load<vf>(s + t) - part.peak[g]);
            mass += e;
            store(s + t, e);
        }
        part.mass[g] += sum(mass);
    }
    int64_t g = 0;
    for (; g + 4 <= a.groups; g += 4)
        add_values<V, 4>(value, live, scores + g * BLOCK, part.out + g * MAX_DIM, a.dim);
    for (; g < a.groups; ++g) add_values<V, 1>(value, live, scores + g * BLOCK, part.out + g * MAX_DIM, a.dim);
}

// Queries of one key head as rows of MAX_DIM floats, then the same rows in bfloat16.
inline void lay_out(const float* query, int64_t groups, int64_t dim, std::vector<float>& rows) {
    rows.assign(MAX_GROUPS * MAX_DIM + MAX_GROUPS * MAX_DIM / 2, 0.0f);
    auto* packed = reinterpret_cast<bf16*>(rows.data() + MAX_GROUPS * MAX_DIM);
    for (int64_t g = 0; g < groups; ++g)
        for (int64_t c = 0; c < dim; c += W) {
            vf x = load<vf>(query + g * dim + c);
            store(rows.data() + g * MAX_DIM + c, x);
            put(packed + g * MAX_DIM + c, x);
        }
}

template <class T>
void decode(const DecodeArgs& a) {
    const int64_t parts = a.parts;
    const T *keys = static_cast<const T*>(a.keys), *values = static_cast<const T*>(a.values);
    const int64_t share = ((a.count + parts - 1) / parts + BLOCK - 1) / BLOCK * BLOCK;
    std::unique_ptr<Partial[]> partial(new Partial[a.lanes_count * parts]);
#pragma omp parallel num_threads(a.threads)
    {
        std::vector<float> query;
        alignas(64) static thread_local float turned[BLOCK * MAX_DIM];
        const T *key[BLOCK], *value[BLOCK];
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < a.lanes_count * parts; ++item) {
            const int64_t h = item / parts;
            const int64_t from = item % parts * share, to = from + share < a.count ? from + share : a.count;
            Partial& part = partial[item];
            std::memset(part.out, 0, sizeof part.out);
            for (int64_t g = 0; g < MAX_GROUPS; ++g) part.peak[g] = -INFINITY, part.mass[g] = 0;
            if (from >= to) continue;
            lay_out(a.query + h * a.groups * a.dim, a.groups, a.dim, query);
            Lane::Cursor at;
            for (int64_t i = from; i < to; i += BLOCK) {
                int64_t live = to - i < BLOCK ? to - i : BLOCK;
                for (int64_t t = 0; t < live; ++t) {
                    int64_t token = a.index ? a.index[i + t] : a.start + i + t;
                    int64_t slot = a.lanes[h].slot(token, at);
                    key[t] = keys + slot * a.dim;
                    value[t] = values + slot * a.dim;
                    if (a.index) {
                        for (int64_t c = 0; c < a.dim * int64_t(sizeof(T)); c += 64) {
                            __builtin_prefetch(reinterpret_cast<const char*>(key[t]) + c);
                            __builtin_prefetch(reinterpret_cast<const char*>(value[t]) + c);
                        }
                    }
                }
                if (a.pairs) {
                    const f32* rows[BLOCK];
                    for (int64_t t = 0; t < live; ++t) {
                        float* row = turned + t * MAX_DIM;
                        for (int64_t c = 0; c < a.dim; c += W) store(row + c, get(key[t] + c));
                        rotate_row(reinterpret_cast<const f32*>(row), reinterpret_cast<f32*>(row),
                                   a.cos + (i + t) * a.pairs, a.sin + (i + t) * a.pairs, a.pairs, a.dim, a.interleaved);
                        rows[t] = reinterpret_cast<const f32*>(row);
                    }
                    attend_block<f32, T>(rows, value, live, query.data(), a, part);
                } else {
                    attend_block<T, T>(key, value, live, query.data(), a, part);
                }
            }
        }
    }
    for (int64_t h = 0; h < a.lanes_count; ++h)
        for (int64_t g = 0; g < a.groups; ++g) {
            float best = -INFINITY, mass = 0;
            for (int64_t p = 0; p < parts; ++p) best = std::max(best, partial[h * parts + p].peak[g]);
            float* out = a.out + (h * a.groups + g) * a.dim;
            for (int64_t c = 0; c < a.dim; ++c) out[c] = 0;
            for (int64_t p = 0; p < parts; ++p) {
                const Partial& part = partial[h * parts + p];
                if (part.mass[g] == 0) continue;
                float weight = std::exp(part.peak[g] - best);
                mass += weight * part.mass[g];
                for (int64_t c = 0; c < a.dim; ++c) out[c] += weight * part.out[g * MAX_DIM + c];
            }
            if (mass != 0)
                for (int64_t c = 0; c < a.dim; ++c) out[c] /= mass;
            a.lse[h * a.groups + g] = mass != 0 ? best + std::log(mass) : -INFINITY;
        }
}
