// The k largest of each row, ascending, ties to the lower index, without sorting the row: a histogram of the upper bits
// tells which bin the k-th largest is in; what lies above is in, and only that bin is looked into. NaN counts as the
// least of all.

constexpr int64_t BINS = 8192;

// Unsigned integers in the order of the floats.
inline uint32_t rank_of(float x) {
    if (x != x) return 0;
    x += 0.0f;  // -0 is 0
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

inline vu ranks_of(vf x) {
    const vu bits = as_bits(x + 0.0f);
    const vu flipped = bits ^ ((vu)((vi)bits >> 31) | 0x80000000u);
    return x == x ? flipped : vu{};
}

inline void top_k(const TopKArgs& a) {
    constexpr int SHIFT = 19;
    const int64_t n = a.n;
    // A short row is not worth a second thread.
    const int threads = n >= 16384 ? a.threads : 1;
    Workspace space(threads * Workspace::bytes<uint32_t>(BINS) + Workspace::bytes<int64_t>(2 * threads + 2) +
                    Workspace::bytes<uint32_t>(a.k) + Workspace::bytes<uint64_t>(n));
    uint32_t* counts = space.take<uint32_t>(threads * BINS);
    int64_t* begins = space.take<int64_t>(2 * threads + 2);  // per thread: where its sure and its close ones go
    uint32_t* sure = space.take<uint32_t>(a.k);
    uint64_t* close = space.take<uint64_t>(n);
    int64_t edge = 0;

    parallel(threads, [&](const Team& team) {
        uint32_t* mine = counts + team.rank * BINS;
        for (int64_t row = 0; row < a.rows; ++row) {
            const float* votes = a.votes + row * n;
            const int64_t from = team.from(n), to = team.to(n);
            std::memset(mine, 0, BINS * sizeof(uint32_t));
            int64_t t = from;
            for (; t + W <= to; t += W) {
                const vu bins = ranks_of(load<vf>(votes + t)) >> SHIFT;
                for (int i = 0; i < W; ++i) ++mine[bins[i]];
            }
            for (; t < to; ++t) ++mine[rank_of(votes[t]) >> SHIFT];
            team.barrier();

            if (team.rank == 0) {
                int64_t above = 0, inside = 0;
                for (edge = BINS - 1;; --edge) {
                    inside = 0;
                    for (int i = 0; i < team.size; ++i) inside += counts[i * BINS + edge];
                    if (above + inside >= a.k || edge == 0) break;
                    above += inside;
                }
                int64_t sure_at = 0, close_at = 0;
                for (int i = 0; i < team.size; ++i) {
                    begins[2 * i] = sure_at, begins[2 * i + 1] = close_at;
                    for (int64_t bin = edge + 1; bin < BINS; ++bin) sure_at += counts[i * BINS + bin];
                    close_at += counts[i * BINS + edge];
                }
                begins[2 * team.size] = sure_at, begins[2 * team.size + 1] = close_at;
            }
            team.barrier();

            uint32_t* next_sure = sure + begins[2 * team.rank];
            uint64_t* next_close = close + begins[2 * team.rank + 1];
            const uint32_t least = uint32_t(edge) << SHIFT;
            auto look = [&](int64_t token) {
                const uint32_t rank = rank_of(votes[token]);
                if (rank >> SHIFT > uint32_t(edge))
                    *next_sure++ = uint32_t(token);
                else if (rank >= least)
                    *next_close++ = uint64_t(rank) << 32 | uint32_t(~uint32_t(token));
            };
            for (t = from; t + W <= to; t += W) {
                const vu ranks = ranks_of(load<vf>(votes + t));
#if defined(__AVX512F__)
                unsigned found = _mm512_cmpge_epu32_mask((__m512i)ranks, _mm512_set1_epi32(int(least)));
                for (; found; found &= found - 1) look(t + __builtin_ctz(found));
#else
                for (int i = 0; i < W; ++i)
                    if (ranks[i] >= least) look(t + i);
#endif
            }
            for (; t < to; ++t) look(t);
            team.barrier();

            if (team.rank == 0) {
                const int64_t sure_count = begins[2 * team.size], wanted = a.k - sure_count;
                std::nth_element(close, close + wanted, close + begins[2 * team.size + 1], std::greater<uint64_t>());
                for (int64_t i = 0; i < wanted; ++i) close[i] = uint32_t(~uint32_t(close[i]));
                std::sort(close, close + wanted);
                std::merge(sure, sure + sure_count, close, close + wanted, a.index + row * a.k);
            }
            team.barrier();
        }
    });
}
