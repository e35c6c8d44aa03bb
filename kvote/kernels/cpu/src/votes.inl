// TokenSelect's votes in two passes over tiles of tokens. The first scores a tile for all heads and leaves
// 2^(score - tile maximum) while the tile is in cache, with the tile's maximum and sum; the second weighs and adds
// them. One exponential per score, and no pass that only looks for a maximum.

constexpr int64_t TILE = 2048;

// A weight of [2^-126, 1] in 16 bits: 7 of exponent and 9 of mantissa, the upper bits of a float whose first two are
// always 0. Half precision has not the range that ranks weak tokens, bfloat16 not the precision that parts close ones.
struct weight16 {
    uint16_t raw;
};

inline vf get(const weight16* p) { return as_float(widen(p) << 14); }
inline float one(const weight16* p) {
    const uint32_t bits = uint32_t(p->raw) << 14;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline float one(const f32* p) { return p->raw; }

// 2^x as it is stored, and as it counts in the sum.
inline vf put_exp2(weight16* p, vf x) {
    const vu bits = exp2_bits<3>(vmax(x, splat(-126.0f)));
    narrow(p, (bits + 0x2000u) >> 14);
    return as_float(bits);
}
inline vf put_exp2(f32* p, vf x) {
    const vf e = exp2_of(x);
    put(p, e);
    return e;
}

// Exact scores times `unit`, of `count` tokens (slots in a row) for `rows` (a multiple of 4) query rows.
template <class T>
void score_exactly(const T* keys, int64_t count, const float* query, int64_t rows, int64_t dim, float* out,
                   float unit = LOG2_E) {
    for (int64_t t = 0; t < count; t += 4) {
        const T* four[4];
        for (int64_t k = 0; k < 4; ++k) {
            four[k] = keys + (t + k < count ? t + k : count - 1) * dim;
            for (int64_t c = 0; c < dim * int64_t(sizeof(T)); c += 64)
                __builtin_prefetch(reinterpret_cast<const char*>(four[k]) + 4096 + c);
        }
        for (int64_t row = 0; row < rows; row += 4)
            store_quarters(out + row * TILE + t, TILE, dots(four, query + row * dim, dim, dim) * unit);
    }
}

// Turns the scores of a tile into weights relative to its maximum, and returns maximum and sum. What lies before
// `first` or from `live` on is no candidate.
template <class Stored>
inline void weigh(float* scores, int64_t first, int64_t live, Stored* out, float& peak, float& mass) {
    for (int64_t t = 0; t < first; ++t) scores[t] = -INFINITY;
    for (int64_t t = live; t < TILE && t % W; ++t) scores[t] = -INFINITY;
    const int64_t end = (live + W - 1) / W * W;
    vf best0 = splat(-INFINITY), best1 = best0;
    int64_t t = 0;
    for (; t + 2 * W <= end; t += 2 * W) {
        best0 = vmax(load<vf>(scores + t), best0);
        best1 = vmax(load<vf>(scores + t + W), best1);
    }
    if (t < end) best0 = vmax(load<vf>(scores + t), best0);
    peak = max(vmax(best0, best1));
    const vf shift = splat(peak == -INFINITY ? 0.0f : peak);
    vf total{};
    for (t = 0; t < end; t += W) {
        const vf e = put_exp2(out + t, load<vf>(scores + t) - shift);
        total += e;
    }
    for (; t < TILE; t += W) put_exp2(out + t, splat(-INFINITY));
    mass = peak == -INFINITY ? 0.0f : sum(total);
}

// The weights behind the votes: what head `h` gave to token `t` (counted from the first tile) is its weight there times
// the factor of the tile. `lse` is the log-sum-exp of each head's scores in units of log 2.
template <class Stored>
struct Weights {
    const Stored* weight;  // [tiles, heads, TILE]
    const float *factor, *lse;  // [heads, tiles], [heads]
};

inline int64_t tiles_of(const VotesArgs& a) { return (a.stop + TILE - 1) / TILE - a.start / TILE; }

// What scores a tile of tokens: the keys themselves. `load` is called by every thread before any tile is scored; `score`
// leaves scores times log2 e of tokens from .. to of a key head in rows, TILE apart, that begin with token `base`, and
// may write more within a block of tokens. How weights are stored goes with it: exact ones keep what they have.
template <class T>
struct ByKeys {
    using Stored = f32;
    const VotesArgs& a;
    int64_t rows = a.groups * a.selections, padded = (rows + 3) / 4 * 4;
    float* queries{};

    std::size_t bytes() const { return Workspace::bytes<float>(a.kv_heads * padded * a.dim); }
    void prepare(Workspace& space) { queries = space.take<float>(a.kv_heads * padded * a.dim); }
    void load(const Team& team) const {
        for (int64_t i = team.from(a.kv_heads * padded); i < team.to(a.kv_heads * padded); ++i) {
            const int64_t h = i / padded, row = i % padded;
            if (row < rows)
                std::memcpy(queries + i * a.dim, a.query + (h * rows + row) * a.dim, 4 * a.dim);
            else
                std::memset(queries + i * a.dim, 0, 4 * a.dim);
        }
    }
    void score(const Team&, int64_t h, int64_t base, int64_t from, int64_t to, float* scores) const {
        Lane::Cursor at;
        for (int64_t t = from / SKETCH_BLOCK * SKETCH_BLOCK; t < to;) {
            const int64_t stretch = a.lanes[h].stretch(t, at), end = stretch < to - t ? t + stretch : to;
            score_exactly(static_cast<const T*>(a.keys) + a.lanes[h].slot(t, at) * a.dim, end - t,
                          queries + h * padded * a.dim, padded, a.dim, scores + (t - base));
            t = end;
        }
    }
};

// ... or their sketches, whose own error is far above that of 16 bits.
template <int BITS>
struct BySketch {
    using Stored = weight16;
    const VotesArgs& a;
    int64_t rows = a.groups * a.selections;
    CodedQuery* coded{};

    std::size_t bytes() const { return Workspace::bytes<CodedQuery>(a.kv_heads * rows); }
    void prepare(Workspace& space) { coded = space.take<CodedQuery>(a.kv_heads * rows); }
    void load(const Team& team) const {
        for (int64_t i = team.from(a.kv_heads * rows); i < team.to(a.kv_heads * rows); ++i)
            coded[i].encode(a.query + i * a.dim, a.dim);
    }
    void score(const Team&, int64_t h, int64_t base, int64_t from, int64_t to, float* scores) const {
        Lane::Cursor at;
        for (int64_t t = from / SKETCH_BLOCK * SKETCH_BLOCK; t < to;) {
            const int64_t stretch = a.lanes[h].stretch(t, at), end = stretch < to - t ? t + stretch : to;
            int64_t slot = a.lanes[h].slot(t, at);
            for (; t < end; t += SKETCH_BLOCK, slot += SKETCH_BLOCK)
                score_block<BITS>(a.sketch + slot / SKETCH_BLOCK * block_bytes(a.dim, BITS), a.dim, coded + h * rows,
                                  rows, scores + (t - base), TILE);
        }
    }
};

// `then` is called by every thread, with the weights and the votes, when all are counted. It may use `more` bytes.
template <class Scorer, class Then>
void votes_of(const VotesArgs& a, Scorer&& by, std::size_t more, Then&& then) {
    using Stored = typename std::decay_t<Scorer>::Stored;
    const int64_t n = a.stop - a.start, rows = a.groups * a.selections, heads = a.kv_heads * rows;
    const int64_t padded = (rows + 3) / 4 * 4;
    // Tiles begin at multiples of TILE of the token index, so that a sketch block never straddles two of them.
    const int64_t first = a.start / TILE, tiles = tiles_of(a);
    const int64_t row_floats = padded * TILE + 2 * SKETCH_BLOCK;

    Workspace space(more + by.bytes() + (a.votes ? 0 : Workspace::bytes<float>(a.selections * n)) + Workspace::bytes<Stored>(heads * tiles * TILE) +
                    2 * Workspace::bytes<float>(heads * tiles) + Workspace::bytes<float>(heads) +
                    a.threads * Workspace::bytes<float>(row_floats));
    Stored* weights = space.take<Stored>(heads * tiles * TILE);
    float *peaks = space.take<float>(heads * tiles), *sums = space.take<float>(heads * tiles);
    float* lse = space.take<float>(heads);
    float* scratch = space.take<float>(0);
    for (int i = 0; i < a.threads; ++i) space.take<float>(row_floats);
    by.prepare(space);

    float* votes = a.votes ? a.votes : space.take<float>(a.selections * n);
    const Weights<Stored> result{weights, peaks, lse};
    then.prepare(space);

    parallel(a.threads, [&](const Team& team) {
        by.load(team);
        team.barrier();

        float* scores = scratch + team.rank * int64_t(Workspace::bytes<float>(row_floats) / 4);
        for (int64_t tile = team.from(tiles); tile < team.to(tiles); ++tile) {
            const int64_t base = (first + tile) * TILE;
            const int64_t from = base > a.start ? base : a.start, to = base + TILE < a.stop ? base + TILE : a.stop;
            for (int64_t h = 0; h < a.kv_heads; ++h) {
                // What lies outside the range is no candidate and overwritten.
                by.score(team, h, base, from, to, scores);
                for (int64_t row = 0; row < rows; ++row) {
                    const int64_t limit = a.limits[row % a.selections] - base;
                    const int64_t live = limit < to - base ? (limit > 0 ? limit : 0) : to - base;
                    const int64_t head = h * rows + row;
                    weigh(scores + row * TILE, from - base, live, weights + (tile * heads + head) * TILE,
                                        peaks[head * tiles + tile], sums[head * tiles + tile]);
                }
            }
        }
        team.barrier();

        // From tile maxima and sums to the factor that makes the tile's entries votes.
        for (int64_t head = team.from(heads); head < team.to(heads); ++head) {
            float *peak = peaks + head * tiles, *total = sums + head * tiles;
            float best = -INFINITY;
            for (int64_t i = 0; i < tiles; ++i) best = peak[i] > best ? peak[i] : best;
            double mass = 0;
            for (int64_t i = 0; i < tiles; ++i) {
                peak[i] = best > -INFINITY ? std::exp2(peak[i] - best) : 0.0f;
                mass += double(peak[i]) * total[i];
            }
            for (int64_t i = 0; i < tiles; ++i) peak[i] = mass > 0 ? float(peak[i] / mass) : 0.0f;
            lse[head] = mass > 0 ? best + float(std::log2(mass)) : -INFINITY;
        }
        team.barrier();

        for (int64_t tile = team.from(tiles); tile < team.to(tiles); ++tile) {
            const int64_t base = (first + tile) * TILE;
            const int64_t from = base > a.start ? base : a.start, to = base + TILE < a.stop ? base + TILE : a.stop;
            for (int64_t r = 0; r < a.selections; ++r) {
                float* out = votes + r * n;
                for (int64_t t = (from - base) / (4 * W) * 4 * W; t < to - base; t += 4 * W) {
                    vf total[4] = {};
                    for (int64_t head = r; head < heads; head += a.selections) {
                        const Stored* w = weights + (tile * heads + head) * TILE + t;
                        const float factor = peaks[head * tiles + tile];
                        for (int i = 0; i < 4; ++i) total[i] += get(w + i * W) * factor;
                    }
                    const int64_t place = base + t - a.start;
                    for (int i = 0; i < 4; ++i) {
                        const int64_t p = place + i * W;
                        if (p >= 0 && p + W <= n) {
                            store(out + p, total[i]);
                        } else {
                            for (int64_t j = 0; j < W; ++j)
                                if (p + j >= 0 && p + j < n) out[p + j] = total[i][j];
                        }
                    }
                }
            }
        }
        team.barrier();
        then.run(team, result, votes);
    });
}

struct Nothing {
    void prepare(Workspace&) {}
    template <class Stored>
    void run(const Team&, const Weights<Stored>&, const float*) {}
};

template <class T>
void votes(const VotesArgs& a) {
    if (!a.sketch) return votes_of(a, ByKeys<T>{a}, 0, Nothing{});
    if (a.sketch_bits == 8) return votes_of(a, BySketch<8>{a}, 0, Nothing{});
    votes_of(a, BySketch<4>{a}, 0, Nothing{});
}
