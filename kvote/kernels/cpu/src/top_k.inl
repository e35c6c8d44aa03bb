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

// Room that one row of `n` needs while it is looked at.
struct TopKSpace {
    static constexpr int64_t SAMPLE = 2048;
    uint64_t *found, *sorted;
    float* sample;
    static std::size_t bytes(int64_t n) {
        return 2 * Workspace::bytes<uint64_t>(n) + Workspace::bytes<float>(SAMPLE);
    }
    TopKSpace(Workspace& space, int64_t n)
        : found(space.take<uint64_t>(n)), sorted(space.take<uint64_t>(n)), sample(space.take<float>(SAMPLE)) {}
};

// The k-th largest of what was found. Bins of equal width over the range of ranks leave few that must be put in order.
inline uint64_t kth_largest(const TopKSpace& space, int64_t count, int64_t k) {
    constexpr int BINS = 1024;
    uint32_t low = UINT32_MAX, high = 0;
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t rank = uint32_t(space.found[i] >> 32);
        low = std::min(low, rank), high = std::max(high, rank);
    }
    int shift = 0;
    while ((high - low) >> shift >= BINS) ++shift;
    uint32_t bins[BINS] = {};
    auto bin = [&](uint64_t x) { return (uint32_t(x >> 32) - low) >> shift; };
    for (int64_t i = 0; i < count; ++i) ++bins[bin(space.found[i])];
    uint32_t edge = (high - low) >> shift;
    for (; bins[edge] < k; --edge) k -= bins[edge];
    int64_t few = 0;
    for (int64_t i = 0; i < count; ++i) {
        space.sorted[few] = space.found[i];
        few += bin(space.found[i]) == edge;
    }
    std::nth_element(space.sorted, space.sorted + (k - 1), space.sorted + few, std::greater<uint64_t>());
    return space.sorted[k - 1];
}

inline void top_k_of_row(const float* votes, int64_t n, int64_t k, const TopKSpace& space, int64_t* out) {
    constexpr int64_t SAMPLE = TopKSpace::SAMPLE;
    uint32_t least = 0;
    if (n > 2 * SAMPLE) {
        for (int64_t i = 0; i < SAMPLE; ++i) {
            const float x = votes[i * n / SAMPLE];
            space.sample[i] = x == x ? x : -INFINITY;
        }
        const double expected = double(SAMPLE) * k / n;
        const int64_t place = int64_t(1.2 * expected + 3 * std::sqrt(expected)) + 4;
        if (place < SAMPLE) {
            std::nth_element(space.sample, space.sample + place, space.sample + SAMPLE, std::greater<float>());
            least = rank_of(space.sample[place]);
        }
    }
    int64_t count = collect(votes, n, least, space.found);
    if (count < k) count = collect(votes, n, 0, space.found);
    const uint64_t last = kth_largest(space, count, k);
    for (int64_t i = 0; i < count; ++i)
        if (space.found[i] >= last) *out++ = uint32_t(~uint32_t(space.found[i]));
}

inline void top_k(const TopKArgs& a) {
    const int threads = a.rows < a.threads ? int(a.rows) : a.threads;
    Workspace memory(threads * TopKSpace::bytes(a.n));
    std::vector<TopKSpace> spaces;
    for (int i = 0; i < threads; ++i) spaces.emplace_back(memory, a.n);
    parallel(threads, [&](const Team& team) {
        for (int64_t row = team.from(a.rows); row < team.to(a.rows); ++row)
            top_k_of_row(a.votes + row * a.n, a.n, a.k, spaces[team.rank], a.index + row * a.k);
    });
}
