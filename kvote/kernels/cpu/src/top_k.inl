// The k largest of each row, ascending, ties to the lower index, without sorting the row. A sample guesses a value that
// a few more than k reach; if it guessed too high, everything is looked at. NaN counts as the least of all.

// Unsigned integers in the order of the floats.
inline vu ranks_of(vf x) {
    const vu bits = as_bits(x + 0.0f);  // -0 is 0
    const vu flipped = bits ^ ((vu)((vi)bits >> 31) | 0x80000000u);
    return x == x ? flipped : vu{};
}

inline uint32_t rank_of(float x) { return ranks_of(splat(x))[0]; }

// Candidates in order of their index, as numbers that compare like them: rank, then the lower index first.
inline int64_t collect(const float* votes, int64_t n, uint32_t least, uint64_t* out) {
    uint64_t* next = out;
    auto add = [&](int64_t token, uint32_t rank) { *next++ = uint64_t(rank) << 32 | uint32_t(~uint32_t(token)); };
    int64_t t = 0;
    for (; t + W <= n; t += W) {
        alignas(64) uint32_t ranks[W];
        const vu all = ranks_of(load<vf>(votes + t));
#if defined(__AVX512F__)
        unsigned found = _mm512_cmpge_epu32_mask((__m512i)all, _mm512_set1_epi32(int(least)));
        if (!found) continue;
        store(ranks, all);
        for (; found; found &= found - 1) add(t + __builtin_ctz(found), ranks[__builtin_ctz(found)]);
#else
        store(ranks, all);
        for (int i = 0; i < W; ++i)
            if (ranks[i] >= least) add(t + i, ranks[i]);
#endif
    }
    for (; t < n; ++t)
        if (rank_of(votes[t]) >= least) add(t, rank_of(votes[t]));
    return next - out;
}

inline void top_k(const TopKArgs& a) {
    constexpr int64_t SAMPLE = 2048;
    const int64_t n = a.n, threads = a.rows < a.threads ? a.rows : a.threads;
    Workspace space(threads * (2 * Workspace::bytes<uint64_t>(n) + Workspace::bytes<float>(SAMPLE)));
    char* memory = space.take<char>(0);
    parallel(int(threads), [&](const Team& team) {
        char* mine = memory + team.rank * (2 * Workspace::bytes<uint64_t>(n) + Workspace::bytes<float>(SAMPLE));
        uint64_t* found = reinterpret_cast<uint64_t*>(mine);
        uint64_t* sorted = reinterpret_cast<uint64_t*>(mine + Workspace::bytes<uint64_t>(n));
        float* sample = reinterpret_cast<float*>(mine + 2 * Workspace::bytes<uint64_t>(n));
        for (int64_t row = team.from(a.rows); row < team.to(a.rows); ++row) {
            const float* votes = a.votes + row * n;
            uint32_t least = 0;
            if (n > 2 * SAMPLE) {
                for (int64_t i = 0; i < SAMPLE; ++i) {
                    const float x = votes[i * n / SAMPLE];
                    sample[i] = x == x ? x : -INFINITY;
                }
                const double expected = double(SAMPLE) * a.k / n;
                const int64_t place = int64_t(1.2 * expected + 3 * std::sqrt(expected)) + 4;
                if (place < SAMPLE) {
                    std::nth_element(sample, sample + place, sample + SAMPLE, std::greater<float>());
                    least = rank_of(sample[place]);
                }
            }
            int64_t count = collect(votes, n, least, found);
            if (count < a.k) count = collect(votes, n, 0, found);
            std::memcpy(sorted, found, count * sizeof(uint64_t));
            std::nth_element(sorted, sorted + (a.k - 1), sorted + count, std::greater<uint64_t>());
            const uint64_t last = sorted[a.k - 1];
            int64_t* out = a.index + row * a.k;
            for (int64_t i = 0; i < count; ++i)
                if (found[i] >= last) *out++ = uint32_t(~uint32_t(found[i]));
        }
    });
}
