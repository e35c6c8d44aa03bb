// Attention of one query position per sequence (a decode step), over a range of tokens or a list of them.
//
// Every lane is split over its tokens and the parts are merged by their log-sum-exp, so that one long lane uses all
// threads and many short ones balance. How lanes are split does not depend on the number of threads, so neither does
// the answer. A block of tokens is scored for all queries of the key head at once: keys and values are read once.

constexpr int64_t BLOCK = 64;

// The running answer of one lane part: unnormalised output [groups, dim], maximum and mass per query.
struct Partial {
    float *out, *peak, *mass;
};

// Adds weights [query][token] times values to the output, channel by channel group so that sums stay in registers.
template <class T, int Q>
inline void add_values(const T* const* value, int64_t live, const float* weight, float* out, int64_t dim) {
    constexpr int C = 4;
    for (int64_t c = 0; c < dim; c += C * W) {
        const int64_t wide = dim - c < C * W ? (dim - c) / W : C;
        vf acc[Q][C];
        for (int q = 0; q < Q; ++q)
            for (int j = 0; j < C; ++j) acc[q][j] = j < wide ? load<vf>(out + q * dim + c + j * W) : vf{};
        if (wide == C) {
            for (int64_t t = 0; t < live; ++t) {
                const T* v = value[t] + c;
                const vf x0 = get(v), x1 = get(v + W), x2 = get(v + 2 * W), x3 = get(v + 3 * W);
                for (int q = 0; q < Q; ++q) {
                    const vf w = splat(weight[q * BLOCK + t]);
                    acc[q][0] += x0 * w;
                    acc[q][1] += x1 * w;
                    acc[q][2] += x2 * w;
                    acc[q][3] += x3 * w;
                }
            }
        } else {
            for (int64_t t = 0; t < live; ++t)
                for (int j = 0; j < wide; ++j) {
                    const vf x = get(value[t] + c + j * W);
                    for (int q = 0; q < Q; ++q) acc[q][j] += x * weight[q * BLOCK + t];
                }
        }
        for (int q = 0; q < Q; ++q)
            for (int j = 0; j < wide; ++j) store(out + q * dim + c + j * W, acc[q][j]);
    }
}

// Query rows of one key head: floats [padded groups, dim], and the same in bfloat16 where the kernel reads those.
struct QueryRows {
    alignas(64) float wide[MAX_GROUPS * MAX_DIM];
    alignas(64) uint16_t narrow[MAX_GROUPS * MAX_DIM];
};

template <class K>
inline vf four_by_four(const K* const (&key)[4], const QueryRows& query, int64_t first, int64_t dim) {
    return dots(key, query.wide + first * dim, dim, dim);
}

#if defined(__AVX512BF16__)
inline vf four_by_four(const bf16* const (&key)[4], const QueryRows& query, int64_t first, int64_t dim) {
    if (dim % 32) return dots(key, query.wide + first * dim, dim, dim);
    return dots_bf16(key, reinterpret_cast<const bf16*>(query.narrow) + first * dim, dim, dim);
}
#endif

template <class K, class V>
void attend_block(const K* const* key, const V* const* value, int64_t live, const QueryRows& query,
                  const DecodeArgs& a, const Partial& part) {
    alignas(64) float scores[MAX_GROUPS * BLOCK];
    for (int64_t t = 0; t < live; t += 4) {
        const K* four[4];
        for (int64_t k = 0; k < 4; ++k) four[k] = key[t + k < live ? t + k : live - 1];
        for (int64_t g = 0; g < a.groups; g += 4)
            store_quarters(scores + g * BLOCK + t, BLOCK, four_by_four(four, query, g, a.dim) * a.scale);
    }
    const int64_t padded = (live + W - 1) / W * W;
    for (int64_t g = 0; g < a.groups; ++g) {
        float* s = scores + g * BLOCK;
        if (a.softcap > 0)
            for (int64_t t = 0; t < live; ++t) s[t] = a.softcap * std::tanh(s[t] / a.softcap);
        for (int64_t t = live; t < padded; ++t) s[t] = -INFINITY;
        vf best = splat(-INFINITY);
        for (int64_t t = 0; t < padded; t += W) best = vmax(best, load<vf>(s + t));
        const float peak = max(best);
        if (peak > part.peak[g]) {
            const float shrink = std::exp(part.peak[g] - peak);
            part.mass[g] *= shrink;
            for (int64_t c = 0; c < a.dim; c += W)
                store(part.out + g * a.dim + c, load<vf>(part.out + g * a.dim + c) * shrink);
            part.peak[g] = peak;
        }
        vf mass{};
        for (int64_t t = 0; t < padded; t += W) {
            const vf e = exp_of(load<vf>(s + t) - part.peak[g]);
            mass += e;
            store(s + t, e);
        }
        part.mass[g] += sum(mass);
    }
    int64_t g = 0;
    for (; g + 4 <= a.groups; g += 4)
        add_values<V, 4>(value, live, scores + g * BLOCK, part.out + g * a.dim, a.dim);
    for (; g < a.groups; ++g) add_values<V, 1>(value, live, scores + g * BLOCK, part.out + g * a.dim, a.dim);
}

template <class T>
inline void prefetch_row(const T* row, int64_t dim) {
    for (int64_t c = 0; c < dim * int64_t(sizeof(T)); c += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(row) + c);
}

// One part of a lane: tokens from .. to of the range or list.
template <class T>
void decode_part(const DecodeArgs& a, int64_t lane, int64_t from, int64_t to, QueryRows& query, const Partial& part) {
    const T *keys = static_cast<const T*>(a.keys), *values = static_cast<const T*>(a.values);
    const int64_t* index = a.index ? a.index + lane / a.lanes_per_list * a.count : nullptr;
    alignas(64) static thread_local float turned[BLOCK * MAX_DIM];
    // Two blocks: one that is read, and the next one, which is on its way from memory meanwhile.
    const T *key[2][BLOCK], *value[2][BLOCK];
    Lane::Cursor at;
    auto locate = [&](int64_t i, int which) {
        const int64_t live = to - i < BLOCK ? to - i : BLOCK;
        for (int64_t t = 0; t < live; ++t) {
            const int64_t slot = a.lanes[lane].slot(index ? index[i + t] : a.start + i + t, at);
            key[which][t] = keys + slot * a.dim;
            value[which][t] = values + slot * a.dim;
            prefetch_row(key[which][t], a.dim);
            prefetch_row(value[which][t], a.dim);
        }
    };
    for (int64_t g = 0; g < a.groups; ++g) {
        float* row = query.wide + g * a.dim;
        std::memcpy(row, a.query + (lane * a.groups + g) * a.dim, 4 * a.dim);
        for (int64_t c = 0; c < a.dim; c += W)
            put(reinterpret_cast<bf16*>(query.narrow) + g * a.dim + c, load<vf>(row + c));
        part.peak[g] = -INFINITY, part.mass[g] = 0;
    }
    std::memset(part.out, 0, 4 * a.groups * a.dim);
    locate(from, 0);
    int which = 0;
    for (int64_t i = from; i < to; i += BLOCK, which ^= 1) {
        const int64_t live = to - i < BLOCK ? to - i : BLOCK;
        if (i + BLOCK < to) locate(i + BLOCK, which ^ 1);
        if (!a.pairs) {
            attend_block<T, T>(key[which], value[which], live, query, a, part);
            continue;
        }
        const f32* rows[BLOCK];
        for (int64_t t = 0; t < live; ++t) {
            f32* row = reinterpret_cast<f32*>(turned + t * a.dim);
            rotate_row(key[which][t], row, a.cos + (i + t) * a.pairs, a.sin + (i + t) * a.pairs, a.pairs, a.dim,
                       a.interleaved);
            rows[t] = row;
        }
        attend_block<f32, T>(rows, value[which], live, query, a, part);
    }
}

template <class T>
void decode(const DecodeArgs& a) {
    // Parts of at least 256 tokens, about 64 of them in all.
    int64_t share = (a.count * a.lanes_count / 64 + BLOCK - 1) / BLOCK * BLOCK;
    share = share < 256 ? 256 : share;
    const int64_t parts = (a.count + share - 1) / share, items = a.lanes_count * parts;
    Workspace space(Workspace::bytes<float>(items * a.groups * (a.dim + 2)) + a.threads * Workspace::bytes<QueryRows>(1));
    float* memory = space.take<float>(items * a.groups * (a.dim + 2));
    QueryRows* queries = space.take<QueryRows>(a.threads);
    auto partial = [&](int64_t item) {
        float *out = memory + item * a.groups * a.dim, *rest = memory + items * a.groups * a.dim;
        return Partial{out, rest + 2 * item * a.groups, rest + (2 * item + 1) * a.groups};
    };
    std::atomic<int64_t> next{0};
    const int threads = items > 1 ? a.threads : 1;
    parallel(threads, [&](const Team& team) {
        // Rows beyond the groups are read, never used.
        QueryRows& query = queries[team.rank];
        std::memset(&query, 0, sizeof query);
        for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) {
            const int64_t from = item % parts * share, to = from + share < a.count ? from + share : a.count;
            decode_part<T>(a, item / parts, from, to, query, partial(item));
        }
    });
    for (int64_t lane = 0; lane < a.lanes_count; ++lane)
        for (int64_t g = 0; g < a.groups; ++g) {
            float best = -INFINITY, mass = 0;
            for (int64_t p = 0; p < parts; ++p) {
                const float peak = partial(lane * parts + p).peak[g];
                best = peak > best ? peak : best;
            }
            float* out = a.out + (lane * a.groups + g) * a.dim;
            std::memset(out, 0, 4 * a.dim);
            for (int64_t p = 0; p < parts; ++p) {
                const Partial part = partial(lane * parts + p);
                if (part.mass[g] == 0) continue;
                const float weight = std::exp(part.peak[g] - best);
                mass += weight * part.mass[g];
                for (int64_t c = 0; c < a.dim; c += W)
                    store(out + c, load<vf>(out + c) + load<vf>(part.out + g * a.dim + c) * weight);
            }
            if (mass != 0)
                for (int64_t c = 0; c < a.dim; c += W) store(out + c, load<vf>(out + c) / mass);
            a.lse[lane * a.groups + g] = mass != 0 ? best + std::log(mass) : -INFINITY;
        }
}
