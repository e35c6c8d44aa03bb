// Decode attention of one sequence over keys with few channels. The keys of a page lie channel by channel, so scores of
// neighbouring tokens are added up side by side, any number of channels serves, and no sum is taken across a register.

// Scores [q][PAGE] of Q query rows of `stride` floats with the `kept` channels of a page.
template <class T, int Q>
inline void score_thin(const T* page, const float* query, int64_t stride, int64_t kept, float* scores) {
    constexpr int C = PAGE / W;
    vf acc[Q][C] = {};
    for (int64_t c = 0; c < kept; ++c, page += PAGE) {
        prefetch_row(page + kept * PAGE, PAGE);
        vf x[C];
        for (int j = 0; j < C; ++j) x[j] = get(page + j * W);
        for (int q = 0; q < Q; ++q)
            for (int j = 0; j < C; ++j) acc[q][j] += x[j] * query[q * stride + c];
    }
    for (int q = 0; q < Q; ++q)
        for (int j = 0; j < C; ++j) store(scores + q * PAGE + j * W, acc[q][j]);
}

#if defined(__AVX512BF16__)
// The same for bfloat16 keys and queries, two channels at a time; an odd last channel meets a query of zero.
template <int Q>
inline void score_thin_in_pairs(const bf16* page, const bf16* query, int64_t stride, int64_t kept, float* scores) {
    constexpr vi unzip_low = {0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23};
    constexpr vi unzip_high = {8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31};
    __m512 acc[Q][4];
    for (int q = 0; q < Q; ++q)
        for (auto& x : acc[q]) x = _mm512_setzero_ps();
    for (int64_t c = 0; c < kept; c += 2) {
        const bf16 *first = page + c * PAGE, *second = c + 1 < kept ? first + PAGE : first;
        prefetch_row(first + kept * PAGE, PAGE);
        prefetch_row(second + kept * PAGE, PAGE);
        __m512i zipped[4];
        for (int half = 0; half < 2; ++half) {
            const __m512i a = _mm512_loadu_si512(first + 32 * half), b = _mm512_loadu_si512(second + 32 * half);
            zipped[2 * half] = _mm512_unpacklo_epi16(a, b);
            zipped[2 * half + 1] = _mm512_unpackhi_epi16(a, b);
        }
        for (int q = 0; q < Q; ++q) {
            int32_t pair;
            std::memcpy(&pair, query + q * stride + c, 4);
            const __m512bh y = (__m512bh)_mm512_set1_epi32(pair);
            for (int j = 0; j < 4; ++j) acc[q][j] = _mm512_dpbf16_ps(acc[q][j], (__m512bh)zipped[j], y);
        }
    }
    for (int q = 0; q < Q; ++q)
        for (int half = 0; half < 2; ++half) {
            const vf a = (vf)acc[q][2 * half], b = (vf)acc[q][2 * half + 1];
            store(scores + q * PAGE + 32 * half, __builtin_shuffle(a, b, unzip_low));
            store(scores + q * PAGE + 32 * half + W, __builtin_shuffle(a, b, unzip_high));
        }
}
#endif

template <int Q, class T>
inline void scores_of_page(const T* page, const QueryRows& query, int64_t first, const ThinArgs& a, float* scores) {
#if defined(__AVX512BF16__)
    if constexpr (std::is_same<T, bf16>::value)
        return score_thin_in_pairs<Q>(page, query.narrow + first * a.stride, a.stride, a.kept, scores);
#endif
    score_thin<T, Q>(page, query.wide + first * a.stride, a.stride, a.kept, scores);
}

// The tokens of pages from .. to of one key head, as far as they lie in start .. stop.
template <class T>
void thin_part(const ThinArgs& a, int64_t head, int64_t from, int64_t to, QueryRows& query, const Partial& part) {
    const T* keys = static_cast<const T*>(a.keys) + head * a.pages * a.kept * PAGE;
    const T* values = static_cast<const T*>(a.values) + head * a.tokens * a.dim;
    std::memcpy(query.wide, a.query + head * a.groups * a.stride, 4 * a.groups * a.stride);
    for (int64_t c = 0; c < a.groups * a.stride; c += W) put(query.narrow + c, load<vf>(query.wide + c));
    std::memset(part.out, 0, 4 * a.groups * a.dim);
    for (int64_t g = 0; g < a.groups; ++g) part.peak[g] = -INFINITY, part.mass[g] = 0;
    Rows<T> blocks[2];
    auto locate = [&](int64_t page, Rows<T>& rows) {
        const int64_t stop = std::min((page + 1) * PAGE, a.stop);
        rows.live = page < to ? stop - page * PAGE : 0;
        for (int64_t t = 0; t < rows.live; ++t) rows.values[t] = values + (page * PAGE + t) * a.dim;
    };
    locate(from, blocks[from % 2]);
    for (int64_t page = from; page < to; ++page) {
        const Rows<T>& rows = blocks[page % 2];
        Rows<T>& next = blocks[(page + 1) % 2];
        locate(page + 1, next);
        alignas(64) float scores[MAX_GROUPS * PAGE];
        const T* own = keys + page * a.kept * PAGE;
        int64_t g = 0;
        for (; g + 4 <= a.groups; g += 4) scores_of_page<4>(own, query, g, a, scores + g * PAGE);
        for (; g < a.groups; ++g) scores_of_page<1>(own, query, g, a, scores + g * PAGE);
        for (g = 0; g < a.groups; ++g) {
            float* s = scores + g * PAGE;
            for (int64_t t = 0; t < PAGE; t += W) store(s + t, load<vf>(s + t) * a.scale);
            soften(s, 0, rows.live, a.softcap, part.out + g * a.dim, part.peak[g], part.mass[g], a.dim);
        }
        add_all<T>(rows, scores, part.out, a.groups, a.dim, next);
    }
}

template <class T>
void thin_decode(const ThinArgs& a) {
    const int64_t pages = (a.stop + PAGE - 1) / PAGE;
    // Parts of whole pages, 32 or so in all.
    const int64_t share = std::max<int64_t>(2, (pages * a.heads + 31) / 32), parts = (pages + share - 1) / share;
    const int64_t items = a.heads * parts;
    const int threads = std::max(1, items < a.threads ? int(items) : a.threads);
    Workspace space(Workspace::bytes<float>(items * a.groups * (a.dim + 2)) + Workspace::bytes<Partial>(items) +
                    Workspace::bytes<QueryRows>(threads));
    float* memory = space.take<float>(items * a.groups * (a.dim + 2));
    Partial* partial = space.take<Partial>(items);
    QueryRows* queries = space.take<QueryRows>(threads);
    std::atomic<int64_t> next{0};
    parallel(threads, [&](const Team& team) {
        for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) {
            float *own = memory + item * a.groups * (a.dim + 2), *rest = own + a.groups * a.dim;
            partial[item] = {own, rest, rest + a.groups};
            const int64_t from = item % parts * share, to = std::min(from + share, pages);
            thin_part<T>(a, item / parts, from, to, queries[team.rank], partial[item]);
        }
    });
    for (int64_t head = 0; head < a.heads; ++head)
        for (int64_t g = 0; g < a.groups; ++g)
            merge_parts(partial + head * parts, 1, parts, g, a.dim, a.dim, a.out + (head * a.groups + g) * a.dim,
                        a.lse[head * a.groups + g]);
}
