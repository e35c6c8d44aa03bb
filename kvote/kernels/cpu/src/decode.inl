// Attention of one query position per sequence (a decode step), over a range of tokens or a list of them.
//
// Tokens are split into parts, whose answers are merged by their log-sum-exp, so that one long lane uses all threads
// and many short ones balance. How they are split does not depend on the number of threads, so neither does the answer.
// A block of tokens is scored for all queries of the key head at once: keys and values are read once. Where tokens are a
// list or keys are rotated, the key heads of a sequence take turns block by block, so that the angles of a block are read
// from memory once for all of them; a range is read key head by key head, in the order of its addresses.

constexpr int64_t BLOCK = 64;
static_assert(BLOCK == PAGE, "a page is a block, and no block is more");

// The running answer of one lane part: unnormalised output [groups, dim], maximum and mass per query.
struct Partial {
    float *out, *peak, *mass;
};

// Query rows of one key head: floats [groups, dim], and the same in bfloat16 for the kernel that reads those.
struct QueryRows {
    alignas(64) float wide[MAX_GROUPS * MAX_DIM];
    alignas(64) bf16 narrow[MAX_GROUPS * MAX_DIM];
};

// Rows of one block of tokens of one lane, which lie anywhere ...
template <class T>
struct Rows {
    static constexpr bool STREAM = false;
    const T *keys[BLOCK], *values[BLOCK];
    int64_t live = 0;
    const T* key(int64_t t) const { return keys[t]; }
    const T* value(int64_t t) const { return values[t]; }
};

// ... or behind each other.
template <class T>
struct Together {
    static constexpr bool STREAM = true;
    const T *keys{}, *values{};
    int64_t dim{}, live = 0;
    const T* key(int64_t t) const { return keys + t * dim; }
    const T* value(int64_t t) const { return values + t * dim; }
};

// Reads a row in the order of its addresses, before tiles take a few channels of it at a time: what fetches ahead by
// itself in a processor sees a stream in this order, and none in theirs.
template <class T>
inline void touch_row(const T* row, int64_t dim) {
    for (int64_t c = 0; c < dim * int64_t(sizeof(T)); c += 64)
        static_cast<void>(*(reinterpret_cast<const volatile char*>(row) + c));
}

// Into the second level of the cache, which has room for what is on its way and does not hold up other loads.
template <class T>
inline void prefetch_row(const T* row, int64_t dim) {
    for (int64_t c = 0; c < dim * int64_t(sizeof(T)); c += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(row) + c, 0, 2);
}

template <class T>
inline vf four_by_four(const T* const (&key)[4], const QueryRows& query, int64_t first, int64_t dim) {
#if defined(__AVX512BF16__)
    if constexpr (std::is_same<T, bf16>::value)
        if (dim % 32 == 0) return dots_bf16(key, query.narrow + first * dim, dim, dim);
#endif
    return dots(key, query.wide + first * dim, dim, dim);
}

// Values of a block that are on their way from memory while those of the block before are added up: row after row, and
// as far as the work is done, because only so many lines can be waited for at once.
template <class Block>
struct Coming {
    const Block& block;
    int64_t asked = 0;
    // Channels `c` .. of all tokens up to `t` are done.
    void keep_up(int64_t c, int64_t t, int64_t width, int64_t dim) {
        const int64_t due = c * BLOCK + t * width;
        for (; asked < block.live && asked * dim < due; ++asked) prefetch_row(block.value(asked), dim);
    }
};

// Adds weights [query][token] times values to the output [query][dim], so that sums stay in registers.
template <int Q, class Block>
inline void add_values(const Block& rows, const float* weight, float* out, int64_t dim, Coming<Block>& next) {
    constexpr int C = 4;
    for (int64_t c = 0; c < dim; c += C * W) {
        const int64_t wide = dim - c < C * W ? (dim - c) / W : C;
        vf acc[Q][C];
        for (int q = 0; q < Q; ++q)
            for (int j = 0; j < C; ++j) acc[q][j] = j < wide ? load<vf>(out + q * dim + c + j * W) : vf{};
        if (wide == C) {
            for (int64_t t = 0; t < rows.live; ++t) {
                const auto* v = rows.value(t) + c;
                if (Block::STREAM && c == 0) touch_row(rows.value(t), dim);
                next.keep_up(c, t + 1, C * W, dim);
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
            for (int64_t t = 0; t < rows.live; ++t)
                for (int j = 0; j < wide; ++j) {
                    const vf x = get(rows.value(t) + c + j * W);
                    for (int q = 0; q < Q; ++q) acc[q][j] += x * weight[q * BLOCK + t];
                }
        }
        for (int q = 0; q < Q; ++q)
            for (int j = 0; j < wide; ++j) store(out + q * dim + c + j * W, acc[q][j]);
    }
}

#if defined(__AVX512BF16__)
// The same for bfloat16 values, two tokens at a time, with weights rounded to bfloat16; `dim` a multiple of 64. Two
// value rows are zipped into pairs, which leaves channels in an order that is undone where sums enter and leave.
template <int Q, class Block>
inline void add_values_in_pairs(const Block& rows, const float* weight, float* out, int64_t dim, Coming<Block>& next) {
    alignas(64) uint16_t pairs[Q * BLOCK];
    for (int q = 0; q < Q; ++q)
        for (int64_t t = 0; t < rows.live; t += W)
            _mm256_store_si256((__m256i*)(pairs + q * BLOCK + t),
                               (__m256i)_mm512_cvtneps_pbh((__m512)load<vf>(weight + q * BLOCK + t)));
    constexpr vi zip_low = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27};
    constexpr vi zip_high = {4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31};
    constexpr vi unzip_low = {0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23};
    constexpr vi unzip_high = {8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31};
    for (int64_t c = 0; c < dim; c += 64) {
        __m512 acc[Q][4];
        for (int q = 0; q < Q; ++q)
            for (int half = 0; half < 2; ++half) {
                float* from = out + q * dim + c + 32 * half;
                const vf a = load<vf>(from), b = load<vf>(from + W);
                acc[q][2 * half] = (__m512)__builtin_shuffle(a, b, zip_low);
                acc[q][2 * half + 1] = (__m512)__builtin_shuffle(a, b, zip_high);
            }
        for (int64_t t = 0; t < rows.live; t += 2) {
            // An odd last token is paired with itself, at no weight.
            const bf16 *x = rows.value(t) + c, *y = rows.value(t + 1 < rows.live ? t + 1 : t) + c;
            if (Block::STREAM && c == 0) touch_row(x, dim), touch_row(y, dim);
            next.keep_up(c, t + 2, 64, dim);
            __m512i zipped[4];
            for (int half = 0; half < 2; ++half) {
                const __m512i a = _mm512_loadu_si512(x + 32 * half), b = _mm512_loadu_si512(y + 32 * half);
                zipped[2 * half] = _mm512_unpacklo_epi16(a, b);
                zipped[2 * half + 1] = _mm512_unpackhi_epi16(a, b);
            }
            for (int q = 0; q < Q; ++q) {
                int32_t pair;
                std::memcpy(&pair, pairs + q * BLOCK + t, 4);
                const __m512bh w = (__m512bh)_mm512_set1_epi32(pair);
                for (int j = 0; j < 4; ++j) acc[q][j] = _mm512_dpbf16_ps(acc[q][j], (__m512bh)zipped[j], w);
            }
        }
        for (int q = 0; q < Q; ++q)
            for (int half = 0; half < 2; ++half) {
                float* to = out + q * dim + c + 32 * half;
                const vf a = (vf)acc[q][2 * half], b = (vf)acc[q][2 * half + 1];
                store(to, __builtin_shuffle(a, b, unzip_low));
                store(to + W, __builtin_shuffle(a, b, unzip_high));
            }
    }
}
#endif

template <class T, int Q, class Block>
inline void add(const Block& rows, const float* weight, float* out, int64_t dim, Coming<Block>& next) {
#if defined(__AVX512BF16__)
    if constexpr (std::is_same<T, bf16>::value)
        if (dim % 64 == 0) return add_values_in_pairs<Q>(rows, weight, out, dim, next);
#endif
    add_values<Q>(rows, weight, out, dim, next);
}

// The same for all query heads of a key head.
template <class T, class Block>
inline void add_all(const Block& rows, const float* weight, float* out, int64_t groups, int64_t dim,
                    const Block& next) {
    Coming<Block> coming{next};
    int64_t g = 0;
    for (; g + 4 <= groups; g += 4) add<T, 4>(rows, weight + g * BLOCK, out + g * dim, dim, coming);
    for (; g < groups; ++g) add<T, 1>(rows, weight + g * BLOCK, out + g * dim, dim, coming);
}

// Turns the scores of a block of tokens into weights, in place, relative to the peak so far; where that rises, what was
// summed up before (`out` of `width`, `mass`) shrinks. Tokens from .. live count; the others, up to the next multiple of
// W, weigh nothing.
inline void soften(float* s, int64_t from, int64_t live, float softcap, float* out, float& peak_so_far,
                   float& mass_so_far, int64_t width) {
    const int64_t padded = (live + W - 1) / W * W;
    if (softcap > 0)
        for (int64_t t = 0; t < live; ++t) s[t] = softcap * std::tanh(s[t] / softcap);
    for (int64_t t = 0; t < from; ++t) s[t] = -INFINITY;
    for (int64_t t = live; t < padded; ++t) s[t] = -INFINITY;
    vf best = splat(-INFINITY);
    for (int64_t t = 0; t < padded; t += W) best = vmax(load<vf>(s + t), best);
    const float peak = max(best);
    if (peak > peak_so_far) {
        const float shrink = std::exp(peak_so_far - peak);
        mass_so_far *= shrink;
        for (int64_t c = 0; c < width; c += W) store(out + c, load<vf>(out + c) * shrink);
        peak_so_far = peak;
    }
    vf mass{};
    for (int64_t t = 0; t < padded; t += W) {
        const vf e = exp_of(load<vf>(s + t) - peak_so_far);
        mass += e;
        store(s + t, e);
    }
    mass_so_far += sum(mass);
}

// Reads one block while the next one, of which only the addresses are known, comes from memory.
template <class T, class Block>
void attend_block(const Block& rows, const QueryRows& query, const DecodeArgs& a, const Partial& part,
                  const Block& next) {
    alignas(64) float scores[MAX_GROUPS * BLOCK];
    const int64_t live = rows.live;
    for (int64_t t = 0; t < live; t += 4) {
        const T* four[4];
        for (int64_t k = 0; k < 4; ++k) {
            four[k] = rows.key(t + k < live ? t + k : live - 1);
            if (Block::STREAM) touch_row(four[k], a.dim);
            if (t + k < next.live) prefetch_row(next.key(t + k), a.dim);
        }
        for (int64_t g = 0; g < a.groups; g += 4)
            store_quarters(scores + g * BLOCK + t, BLOCK, four_by_four(four, query, g, a.dim) * a.scale);
    }
    for (int64_t g = 0; g < a.groups; ++g)
        soften(scores + g * BLOCK, 0, live, a.softcap, part.out + g * a.dim, part.peak[g], part.mass[g], a.dim);
    add_all<T>(rows, scores, part.out, a.groups, a.dim, next);
}

// The query rows of one sequence's lanes, and no answer yet.
inline void begin_part(const DecodeArgs& a, int64_t sequence, QueryRows* queries, const Partial* parts, int64_t stride) {
    const int64_t heads = a.lanes_per_sequence;
    for (int64_t h = 0; h < heads; ++h) {
        for (int64_t g = 0; g < a.groups; ++g) {
            float* row = queries[h].wide + g * a.dim;
            std::memcpy(row, a.query + ((sequence * heads + h) * a.groups + g) * a.dim, 4 * a.dim);
            for (int64_t c = 0; c < a.dim; c += W) put(queries[h].narrow + g * a.dim + c, load<vf>(row + c));
            parts[h * stride].peak[g] = -INFINITY, parts[h * stride].mass[g] = 0;
        }
        std::memset(parts[h * stride].out, 0, 4 * a.groups * a.dim);
    }
}

// Tokens from .. to of the range or list of one sequence, in all its lanes, whose answers are `stride` apart.
template <class T>
void decode_part(const DecodeArgs& a, int64_t sequence, int64_t from, int64_t to, QueryRows* queries, T* turned,
                 const Partial* parts, int64_t stride = 1) {
    const T *keys = static_cast<const T*>(a.keys), *values = static_cast<const T*>(a.values);
    const int64_t heads = a.lanes_per_sequence;
    const int64_t* index = a.index ? a.index + sequence * a.count : nullptr;
    const Lane* lanes = a.lanes + sequence * heads;
    begin_part(a, sequence, queries, parts, stride);
    if (!index && !a.pairs) {
        // Nothing is shared between key heads. Blocks end with their page: they are stretches of memory, and the same
        // ones wherever pages lie.
        int64_t h = 0, i = from;
        Lane::Cursor at;
        auto locate = [&] {
            if (i == to) i = from, ++h, at = Lane::Cursor{};
            if (h == heads) return Together<T>{};
            const int64_t token = a.start + i, slot = lanes[h].slot(token, at);
            const int64_t live = std::min(PAGE - token % PAGE, to - i);
            i += live;
            return Together<T>{keys + slot * a.dim, values + slot * a.dim, a.dim, live};
        };
        Together<T> rows = locate();
        while (rows.live) {
            const int64_t head = h;
            const Together<T> next = locate();
            attend_block<T>(rows, queries[head], a, parts[head * stride], next);
            rows = next;
        }
        return;
    }
    Rows<T> blocks[2];
    auto locate = [&](int64_t i, int64_t h, Rows<T>& rows) {
        Lane::Cursor at;
        rows.live = i >= to ? 0 : to - i < BLOCK ? to - i : BLOCK;
        for (int64_t t = 0; t < rows.live; ++t) {
            const int64_t slot = lanes[h].slot(index ? index[i + t] : a.start + i + t, at);
            rows.keys[t] = keys + slot * a.dim;
            rows.values[t] = values + slot * a.dim;
        }
    };
    int64_t step = 0;
    locate(from, 0, blocks[0]);
    for (int64_t i = from; i < to; i += BLOCK)
        for (int64_t h = 0; h < heads; ++h, ++step) {
            Rows<T>& rows = blocks[step % 2];
            Rows<T>& next = blocks[(step + 1) % 2];
            h + 1 < heads ? locate(i, h + 1, next) : locate(i + BLOCK, 0, next);
            if (a.pairs)
                for (int64_t t = 0; t < rows.live; ++t) {
                    T* row = turned + t * a.dim;
                    rotate_row(rows.keys[t], row, a.cos + (i + t) * a.pairs, a.sin + (i + t) * a.pairs, a.pairs, a.dim,
                               a.interleaved);
                    rows.keys[t] = row;
                }
            attend_block<T>(rows, queries[h], a, parts[h * stride], next);
        }
}

// Joins the answers of `parts` parts, `stride` apart, to query g: rows of `width`, of which `dim` are channels.
inline void merge_parts(const Partial* first, int64_t stride, int64_t parts, int64_t g, int64_t width, int64_t dim,
                        float* out, float& lse) {
    float best = -INFINITY, mass = 0;
    for (int64_t p = 0; p < parts; ++p) best = std::max(best, first[p * stride].peak[g]);
    std::memset(out, 0, 4 * dim);
    for (int64_t p = 0; p < parts; ++p) {
        const Partial& part = first[p * stride];
        if (part.mass[g] == 0) continue;
        const float weight = std::exp(part.peak[g] - best);
        mass += weight * part.mass[g];
        for (int64_t c = 0; c < dim; c += W)
            store(out + c, load<vf>(out + c) + load<vf>(part.out + g * width + c) * weight);
    }
    if (mass != 0)
        for (int64_t c = 0; c < dim; c += W) store(out + c, load<vf>(out + c) / mass);
    lse = mass != 0 ? best + std::log(mass) : -INFINITY;
}

// Cuts what each sequence reads into parts, has threads answer them by `part(sequence, from, to, queries, scratch,
// parts)`, with room for `room` rows of T of their own, and joins the answers.
template <class T, class Part>
void decode_in_parts(const DecodeArgs& a, int64_t room, Part&& part) {
    const int64_t heads = a.lanes_per_sequence, sequences = a.lanes_count / heads;
    auto read_by = [&](int64_t sequence) {
        return a.ends ? std::min(std::max<int64_t>(a.ends[sequence] - a.start, 0), a.count) : a.count;
    };
    int64_t all = 0;
    for (int64_t i = 0; i < sequences; ++i) all += read_by(i);
    // Parts of whole blocks, at least two, 32 parts or so in all.
    int64_t share = (all / 32 + BLOCK - 1) / BLOCK * BLOCK;
    share = share < 2 * BLOCK ? 2 * BLOCK : share;
    // Where the parts of each sequence begin.
    std::vector<int64_t> begins(sequences + 1);
    for (int64_t i = 0; i < sequences; ++i) begins[i + 1] = begins[i] + (read_by(i) + share - 1) / share;
    const int64_t items = begins[sequences], slots = items * heads;
    const int threads = std::max(1, items < a.threads ? int(items) : a.threads);
    Workspace space(Workspace::bytes<float>(slots * a.groups * (a.dim + 2)) + Workspace::bytes<Partial>(slots) +
                    threads * (Workspace::bytes<QueryRows>(heads) + Workspace::bytes<T>(room * a.dim)));
    float* memory = space.take<float>(slots * a.groups * (a.dim + 2));
    Partial* partial = space.take<Partial>(slots);
    QueryRows* queries = space.take<QueryRows>(threads * heads);
    T* scratch = space.take<T>(threads * room * a.dim);
    for (int64_t i = 0; i < slots; ++i) {
        float* rest = memory + slots * a.groups * a.dim + 2 * i * a.groups;
        partial[i] = {memory + i * a.groups * a.dim, rest, rest + a.groups};
    }
    std::atomic<int64_t> next{0};
    parallel(threads, [&](const Team& team) {
        QueryRows* mine = queries + team.rank * heads;
        // Rows beyond the groups are read, four at a time, and never used.
        const int64_t read = (a.groups + 3) / 4 * 4 * a.dim;
        for (int64_t h = 0; h < heads; ++h) {
            std::memset(mine[h].wide, 0, read * sizeof(float));
            std::memset(static_cast<void*>(mine[h].narrow), 0, read * sizeof(bf16));
        }
        for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) {
            const int64_t sequence = std::upper_bound(begins.begin(), begins.end(), item) - begins.begin() - 1;
            const int64_t from = (item - begins[sequence]) * share, to = std::min(from + share, read_by(sequence));
            part(sequence, from, to, mine, scratch + team.rank * room * a.dim, partial + item * heads);
        }
    });
    for (int64_t lane = 0; lane < a.lanes_count; ++lane) {
        const int64_t first = begins[lane / heads], parts = begins[lane / heads + 1] - first;
        for (int64_t g = 0; g < a.groups; ++g)
            merge_parts(partial + first * heads + lane % heads, heads, parts, g, a.dim, a.dim,
                        a.out + (lane * a.groups + g) * a.dim, a.lse[lane * a.groups + g]);
    }
}

template <class T>
void decode(const DecodeArgs& given) {
    DecodeArgs a = given;
    // Lanes with ends of their own are sequences of one head: a range is read key head by key head anyway.
    if (a.ends) a.lanes_per_sequence = 1;
    decode_in_parts<T>(a, BLOCK, [&](int64_t sequence, int64_t from, int64_t to, QueryRows* queries, T* turned,
                                     const Partial* parts) {
        decode_part<T>(a, sequence, from, to, queries, turned, parts);
    });
}
