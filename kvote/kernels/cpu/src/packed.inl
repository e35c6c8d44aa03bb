// Scores and attention of packed tokens (pack.inl). Nothing is decoded in order to be read: a query times the scales of a
// group meets the codes, and so do a query's weights times the scales of each token.

// What a page is multiplied with: bfloat16 numbers for a bfloat16 model where one instruction multiplies those.
#if defined(__AVX512BF16__)
template <class T, int BITS>
using Weight = typename std::conditional<std::is_same<T, bf16>::value && BITS != 8, bf16, float>::type;
#else
template <class T, int BITS>
using Weight = float;
#endif

// Asks for two vectors of numbers `ahead` bytes further.
template <class T>
inline void ask_for(const T* p, int64_t ahead) {
    for (int64_t i = 0; i < 2 * W * int64_t(sizeof(T)); i += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(p) + ahead + i, 0, 2);
}

// One thread's scratch: queries times scales of each group of a page, or weights times scales of each group of channels.
template <class U>
struct Folded {
    static constexpr int64_t GROUPS = 8;  // at most 4 of tokens in a page, 8 of channels in a head
    alignas(64) U weights[GROUPS * 4 * MAX_DIM];
    alignas(64) float scores[4 * PACKED];
};

// As `score_page`, where scales are of groups of channels of one token: a query meets the codes of each group as it is.
// What lies outside from .. to within the vectors that are computed becomes 0.
template <class T, int BITS, int Q, class U>
void score_page_by_token(const PackedPage<T>& page, const Form& form, const float* query, int64_t from, int64_t to,
                         Folded<U>& folded, float* scores, int64_t stride, float scale) {
    const int64_t dim = form.dim, G = form.group, groups = (dim + G - 1) / G, tile = dim / STEPS<BITS> * ROW;
    constexpr float zero = ZERO<BITS, U>;
    const vi lanes = (vi)lane_numbers();
    float sums_of_queries[Folded<U>::GROUPS * Q];
    for (int q = 0; q < Q; ++q)
        for (int64_t g = 0; g < groups; ++g) {
            vf total{};
            for (int64_t c = g * G; c < std::min(dim, (g + 1) * G); c += 2 * W) {
                const bool two = c + W < std::min(dim, (g + 1) * G);
                const vf x0 = load<vf>(query + q * dim + c), x1 = two ? load<vf>(query + q * dim + c + W) : vf{};
                put_weights(folded.weights + q * MAX_DIM + c, x0, x1);
                total += x0 + x1;
            }
            sums_of_queries[g * Q + q] = sum(total);
        }
    for (int64_t t = from / (2 * W) * 2 * W; t < to; t += 2 * W) {
        const vi t0 = lanes + int32_t(t), t1 = t0 + W;
        const vi live0 = (t0 >= int32_t(from)) & (t0 < int32_t(to)), live1 = (t1 >= int32_t(from)) & (t1 < int32_t(to));
        const uint8_t* codes = page.codes + t / W * tile;
        vf totals[Q][2] = {};
        for (int64_t g = 0; g < groups; ++g) {
            const T *steps = page.scale + g * PACKED + t, *minima = page.minimum + g * PACKED + t;
            ask_for(steps, page.ahead), ask_for(minima, page.ahead);
            // What is not stored may be anything, even NaN.
            const vf s0 = live0 ? get(steps) : vf{}, s1 = live1 ? get(steps + W) : vf{};
            const vf m0 = (live0 ? get(minima) : vf{}) + s0 * zero, m1 = (live1 ? get(minima + W) : vf{}) + s1 * zero;
            vf sums[Q][2] = {};
            const int64_t rows = std::min(G, dim - g * G) / STEPS<BITS>, first = g * G / STEPS<BITS> * ROW;
            multiply<BITS, Q>(codes + first, codes + tile + first, rows, folded.weights + g * G, MAX_DIM, sums,
                              page.ahead);
            for (int q = 0; q < Q; ++q) {
                totals[q][0] += sums[q][0] * s0 + sums_of_queries[g * Q + q] * m0;
                totals[q][1] += sums[q][1] * s1 + sums_of_queries[g * Q + q] * m1;
            }
        }
        for (int q = 0; q < Q; ++q) {
            store(scores + q * stride + t, totals[q][0] * scale);
            store(scores + q * stride + t + W, totals[q][1] * scale);
        }
    }
}

// Scores [q][PACKED] times `scale` of Q query rows [dim] with the tokens from .. to (within the page; whole groups are computed).
template <class T, int BITS, int Q, class U>
void score_page(const PackedPage<T>& page, const Form& form, const float* query, int64_t from, int64_t to,
                Folded<U>& folded, float* scores, int64_t stride, float scale) {
    if (form.by_token)
        return score_page_by_token<T, BITS, Q>(page, form, query, from, to, folded, scores, stride, scale);
    const int64_t dim = form.dim, G = form.group, first = from / G, groups = (to + G - 1) / G - first;
    constexpr float zero = ZERO<BITS, U>;
    vf constants[W] = {};
    for (int64_t g = 0; g < groups; ++g) {
        const T *steps = page.scale + (first + g) * dim, *minima = page.minimum + (first + g) * dim;
        U* weights = folded.weights + g * 4 * MAX_DIM;
        vf sum[Q] = {};
        for (int64_t c = 0; c < dim; c += 2 * W) {
            const bool two = c + W < dim;
            const vf s0 = get(steps + c), s1 = two ? get(steps + c + W) : vf{};
            ask_for(steps + c, page.ahead), ask_for(minima + c, page.ahead);
            const vf m0 = get(minima + c) + s0 * zero, m1 = two ? get(minima + c + W) + s1 * zero : vf{};
            for (int q = 0; q < Q; ++q) {
                const vf x0 = load<vf>(query + q * dim + c), x1 = two ? load<vf>(query + q * dim + c + W) : vf{};
                put_weights(weights + q * MAX_DIM + c, x0 * s0, x1 * s1);
                sum[q] += x0 * m0;
                sum[q] += x1 * m1;
            }
        }
        for (int q = 0; q < Q; ++q) constants[g * Q + q] = sum[q];
    }
    const vf constant = sums_of(constants);
    const int64_t tile = dim / STEPS<BITS> * ROW;
    for (int64_t t = first * G; t < (first + groups) * G; t += 2 * W) {
        const int64_t g = t / G - first;
        const uint8_t* codes = page.codes + t / W * tile;
        vf sums[Q][2] = {};
        multiply<BITS, Q>(codes, codes + tile, dim / STEPS<BITS>, folded.weights + g * 4 * MAX_DIM, MAX_DIM, sums,
                          page.ahead);
        // Last, so that no product waits for them.
        for (int q = 0; q < Q; ++q) {
            store(scores + q * stride + t, (sums[q][0] + constant[g * Q + q]) * scale);
            store(scores + q * stride + t + W, (sums[q][1] + constant[g * Q + q]) * scale);
        }
    }
}

// Adds weights [q][PACKED], zero outside from .. to, times values to rows [width]: dim channels, then for each group of
// channels sixteen sums of what its minima give.
template <class T, int BITS, int Q, class U>
void add_page(const PackedPage<T>& page, const Form& form, const float* weight, int64_t from, int64_t to,
              Folded<U>& folded, float* out, int64_t width) {
    const int64_t dim = form.dim, G = form.group, groups = (dim + G - 1) / G;
    constexpr float zero = ZERO<BITS, U>;
    constexpr int64_t steps = STEPS<BITS>;
    const int64_t first = from / (2 * W) * 2 * W, rows = (to + steps - 1) / steps - first / steps;
    const vi lanes = (vi)lane_numbers();
    for (int64_t g = 0; g < groups; ++g) {
        U* weights = folded.weights + g * 4 * PACKED;
        vf sum[Q];
        for (int q = 0; q < Q; ++q) sum[q] = load<vf>(out + q * width + dim + g * W);
        for (int64_t t = first; t < to; t += 2 * W) {
            const T *scale = page.scale + g * PACKED + t, *minimum = page.minimum + g * PACKED + t;
            ask_for(scale, page.ahead), ask_for(minimum, page.ahead);
            vf s0 = get(scale), s1 = get(scale + W), m0 = get(minimum), m1 = get(minimum + W);
            if (t < from || to < t + 2 * W) {  // what is not stored may be anything, even NaN
                const vi t0 = lanes + int32_t(t), t1 = t0 + W;
                const vi live0 = (t0 >= int32_t(from)) & (t0 < int32_t(to));
                const vi live1 = (t1 >= int32_t(from)) & (t1 < int32_t(to));
                s0 = live0 ? s0 : vf{}, m0 = live0 ? m0 : vf{}, s1 = live1 ? s1 : vf{}, m1 = live1 ? m1 : vf{};
            }
            m0 += s0 * zero, m1 += s1 * zero;
            for (int q = 0; q < Q; ++q) {
                const vf p0 = load<vf>(weight + q * PACKED + t), p1 = load<vf>(weight + q * PACKED + t + W);
                put_weights(weights + q * PACKED + t, p0 * s0, p1 * s1);
                sum[q] += p0 * m0;
                sum[q] += p1 * m1;
            }
        }
        for (int q = 0; q < Q; ++q) store(out + q * width + dim + g * W, sum[q]);
    }
    const int64_t tile = PACKED / steps * ROW;
    for (int64_t c = 0; c < dim; c += 2 * W) {
        const bool two = c + W < dim;
        const uint8_t* codes = page.codes + c / W * tile + first / steps * ROW;
        vf sums[Q][2];
        for (int q = 0; q < Q; ++q) {
            sums[q][0] = load<vf>(out + q * width + c);
            sums[q][1] = two ? load<vf>(out + q * width + c + W) : vf{};
        }
        multiply<BITS, Q>(codes, two ? codes + tile : codes, rows, folded.weights + c / G * 4 * PACKED + first, PACKED,
                          sums, page.ahead);
        for (int q = 0; q < Q; ++q) {
            store(out + q * width + c, sums[q][0]);
            if (two) store(out + q * width + c + W, sums[q][1]);
        }
    }
}

// What a page of one lane adds to the answers of Q of its queries.
template <class T, int BITS, int Q, class U>
void attend_page(const PackedPage<T>& key, const PackedPage<T>& value, const Form& keys, const Form& values,
                 const PackedAttendArgs& a, const float* query, int64_t from, int64_t to, const Partial& part,
                 int64_t width, Folded<U>& folded) {
    float* scores = folded.scores;
    score_page<T, BITS, Q>(key, keys, query, from, to, folded, scores, PACKED, a.scale);
    const int64_t first = from / W * W;
    for (int q = 0; q < Q; ++q) {
        float* s = scores + q * PACKED;
        soften(s + first, from - first, to - first, a.softcap, part.out + q * width, part.peak[q], part.mass[q], width);
        for (int64_t t = from / (2 * W) * 2 * W; t < first; ++t) s[t] = 0;
        for (int64_t t = (to + W - 1) / W * W; t < (to + 2 * W - 1) / (2 * W) * 2 * W; ++t) s[t] = 0;
    }
    add_page<T, BITS, Q>(value, values, scores, from, to, folded, part.out, width);
}

// Calls `body` with the number of queries, as a constant: as many at a time as there are registers for their sums.
template <class Body>
inline void by_few(int64_t count, Body&& body) {
    int64_t q = 0;
#if defined(__AVX512F__)
    for (; q + 4 <= count; q += 4) body(q, std::integral_constant<int, 4>{});
    if (count - q == 3) return body(q, std::integral_constant<int, 3>{});
#endif
    for (; q + 2 <= count; q += 2) body(q, std::integral_constant<int, 2>{});
    if (q < count) body(q, std::integral_constant<int, 1>{});
}

// Pages begin .. end of a lane.
struct Stretch {
    int64_t lane, begin, end;
};

// Pages of one lane. `then` is what is read after them, the first page of which is asked for in good time.
template <class T, int BITS, class U>
void attend_pages(const PackedAttendArgs& a, const Form& keys, const Form& values, const Stretch& own,
                  const Stretch& then, const Partial& part, int64_t width, Folded<U>& folded) {
    const int64_t dim = keys.dim, groups = a.groups, lane = own.lane;
    std::memset(part.out, 0, 4 * groups * width);
    for (int64_t g = 0; g < groups; ++g) part.peak[g] = -INFINITY, part.mass[g] = 0;
    Lane::Cursor key_at, value_at, key_then, value_then;
    auto key = keys.page<T>(a.keys.pages, a.keys.lanes[lane], own.begin * PACKED, key_at);
    auto value = values.page<T>(a.values.pages, a.values.lanes[lane], own.begin * PACKED, value_at);
    for (int64_t page = own.begin; page < own.end; ++page) {
        const bool last = page + 1 == own.end;
        const int64_t token = page * PACKED, after = (last ? then.begin : page + 1) * PACKED, on = last ? then.lane : lane;
        const auto next_key = keys.page<T>(a.keys.pages, a.keys.lanes[on], after, last ? key_then : key_at);
        const auto next_value = values.page<T>(a.values.pages, a.values.lanes[on], after, last ? value_then : value_at);
        key.ahead = next_key.codes - key.codes, value.ahead = next_value.codes - value.codes;
        const int64_t from = std::max<int64_t>(a.start - token, 0), to = std::min(a.stop - token, PACKED);
        by_few(groups, [&](int64_t q, auto Q) {
            const Partial some{part.out + q * width, part.peak + q, part.mass + q};
            attend_page<T, BITS, decltype(Q)::value>(key, value, keys, values, a,
                                                     a.query + (lane * groups + q) * dim, from, to, some, width, folded);
        });
        key = next_key, value = next_value;
    }
    for (int64_t g = 0; g < groups; ++g)
        for (int64_t c = 0; c < dim; c += W) {
            float* out = part.out + g * width;
            store(out + c, load<vf>(out + c) + sum(load<vf>(out + dim + c / values.group * W)));
        }
}

// The tokens of one sequence that are not packed, in all its lanes, whose answers are `stride` apart.
template <class T>
void attend_recent(const PackedAttendArgs& a, int64_t sequence, QueryRows* queries, const Partial* parts,
                   int64_t stride, int64_t width) {
    const RecentTokens& recent = a.recent;
    const int64_t dim = a.keys.dim, groups = a.groups;
    // Rows beyond the groups are read, never used.
    std::memset(static_cast<void*>(queries), 0, recent.lanes_per_sequence * sizeof *queries);
    const DecodeArgs args{a.query, recent.keys, recent.values, a.keys.type, recent.lanes, a.keys.lanes_count, groups,
                          dim, nullptr, recent.lanes_per_sequence, recent.start, recent.count, nullptr, nullptr, 0,
                          false, a.scale, a.softcap, nullptr, nullptr, 1, nullptr};
    decode_part<T>(args, sequence, 0, recent.count, queries, nullptr, parts, stride);
    for (int64_t h = 0; h < recent.lanes_per_sequence; ++h)
        for (int64_t g = groups - 1; g > 0; --g)
            std::memmove(parts[h * stride].out + g * width, parts[h * stride].out + g * dim, 4 * dim);
}

template <class T, int BITS>
void packed_attend_of(const PackedAttendArgs& a) {
    using U = Weight<T, BITS>;
    const Form keys = Form::keys(a.keys), values = Form::values(a.values);
    const int64_t lanes = a.keys.lanes_count, dim = keys.dim, groups = a.groups;
    const int64_t width = dim + (dim + values.group - 1) / values.group * W;
    // Parts of whole pages, 64 or so in all, and for each sequence one of what is not packed.
    const int64_t first = a.start / PACKED, pages = a.stop > a.start ? (a.stop + PACKED - 1) / PACKED - first : 0;
    const int64_t share = std::max<int64_t>(1, (pages * lanes + 63) / 64), parts = (pages + share - 1) / share;
    const int64_t heads = a.recent.lanes_per_sequence, sequences = a.recent.count ? lanes / heads : 0;
    const int64_t items = sequences + lanes * parts, each = groups * (width + 2), slots = (sequences > 0) + parts;
    const int threads = std::max(1, items < a.threads ? int(items) : a.threads);
    Workspace space(Workspace::bytes<float>(lanes * slots * each) + Workspace::bytes<Partial>(lanes * slots) +
                    Workspace::bytes<Folded<U>>(threads) +
                    Workspace::bytes<QueryRows>(sequences ? threads * heads : 0));
    float* memory = space.take<float>(lanes * slots * each);
    Partial* partial = space.take<Partial>(lanes * slots);
    Folded<U>* folded = space.take<Folded<U>>(threads);
    QueryRows* queries = space.take<QueryRows>(sequences ? threads * heads : 0);
    // What is not packed comes first among a lane's parts.
    for (int64_t i = 0; i < lanes * slots; ++i) {
        float* rows = memory + i * each;
        partial[i] = {rows, rows + groups * width, rows + groups * (width + 1)};
    }
    const auto stretch = [&](int64_t item) {
        const int64_t begin = first + (item - sequences) % parts * share;
        return Stretch{(item - sequences) / parts, begin, std::min(begin + share, first + pages)};
    };
    std::atomic<int64_t> next{0};
    parallel(threads, [&](const Team& team) {
        const auto claim = [&] { return next.fetch_add(1, std::memory_order_relaxed); };
        for (int64_t item = claim(), after; item < items; item = after) {
            after = claim();  // early, so that its first page can be asked for
            if (item < sequences) {
                attend_recent<T>(a, item, queries + team.rank * heads, partial + item * heads * slots, slots, width);
                continue;
            }
            const Stretch own = stretch(item), then = after < items ? stretch(after) : own;
            const int64_t part = own.lane * slots + slots - parts + (item - sequences) % parts;
            attend_pages<T, BITS>(a, keys, values, own, then, partial[part], width, folded[team.rank]);
        }
    });
    for (int64_t lane = 0; lane < lanes; ++lane)
        for (int64_t g = 0; g < groups; ++g)
            merge_parts(partial + lane * slots, 1, slots, g, width, dim, a.out + (lane * groups + g) * dim,
                        a.lse[lane * groups + g]);
}

template <class T, int BITS>
void packed_scores_of(const PackedScoresArgs& a) {
    using U = Weight<T, BITS>;
    const Form keys = Form::keys(a.keys);
    const int64_t lanes = a.keys.lanes_count, n = a.stop - a.start;
    const int64_t first = a.start / PACKED, pages = n > 0 ? (a.stop + PACKED - 1) / PACKED - first : 0;
    Workspace space(Workspace::bytes<Folded<U>>(a.threads));
    Folded<U>* folded = space.take<Folded<U>>(a.threads);
    parallel(a.threads, [&](const Team& team) {
        Folded<U>& mine = folded[team.rank];
        for (int64_t item = team.from(lanes * pages); item < team.to(lanes * pages); ++item) {
            const int64_t lane = item / pages, token = (first + item % pages) * PACKED;
            Lane::Cursor at;
            const auto page = keys.page<T>(a.keys.pages, a.keys.lanes[lane], token, at);
            const int64_t from = std::max<int64_t>(a.start - token, 0), to = std::min(a.stop - token, PACKED);
            by_few(a.rows, [&](int64_t q, auto Q) {
                score_page<T, BITS, decltype(Q)::value>(page, keys, a.query + (lane * a.rows + q) * keys.dim, from, to,
                                                        mine, mine.scores, PACKED, 1.0f);
                for (int64_t i = 0; i < Q; ++i)
                    std::memcpy(a.scores + (lane * a.rows + q + i) * n + token + from - a.start,
                                mine.scores + i * PACKED + from, 4 * (to - from));
            });
        }
    });
}

KVOTE_BY_BITS(packed_attend, packed_attend_of, PackedAttendArgs, keys)
KVOTE_BY_BITS(packed_scores, packed_scores_of, PackedScoresArgs, keys)
