// From a query to the tokens it reads: votes, then the winners. With `nominate`, the votes only nominate that many
// tokens; those are scored again with the keys themselves, every head's softmax is corrected by what that changes, and
// the winners are chosen among them.

constexpr int64_t RESCORED = 64;  // nominated tokens in a block; sums go block by block, whatever the threads

template <class T>
struct Winners {
    const SelectArgs& a;
    int64_t rows = a.votes.groups * a.votes.selections, heads = a.votes.kv_heads * rows;
    int64_t n = a.votes.stop - a.votes.start, m = a.nominate;
    int64_t blocks = (m + RESCORED - 1) / RESCORED, padded = blocks * RESCORED, quads = (rows + 3) / 4 * 4;
    int64_t tiles = tiles_of(a.votes);
    std::vector<TopKSpace> spaces{};
    int64_t *nominated{}, *places{};  // [selections, m], [selections, top_k]
    float *exact{}, *again{};         // [heads, padded] scores, [selections, padded] votes
    float *rough_sums{}, *factor{};   // [heads, tiles], [heads]
    float* shift{};                   // [heads]: scores of what sketches leave out
    float* queries{};                 // [kv_heads, quads, dim]

    std::size_t bytes() const {
        const auto& v = a.votes;
        return v.threads * TopKSpace::bytes(n) +
               (m ? Workspace::bytes<int64_t>(v.selections * m) + Workspace::bytes<int64_t>(v.selections * a.top_k) +
                        Workspace::bytes<float>(heads * padded) + Workspace::bytes<float>(v.selections * padded) +
                        Workspace::bytes<float>(heads * tiles) + 2 * Workspace::bytes<float>(heads) +
                        Workspace::bytes<float>(v.kv_heads * quads * v.dim)
                  : 0);
    }

    void prepare(Workspace& space) {
        const auto& v = a.votes;
        for (int i = 0; i < v.threads; ++i) spaces.emplace_back(space, n);
        if (!m) return;
        nominated = space.take<int64_t>(v.selections * m);
        places = space.take<int64_t>(v.selections * a.top_k);
        exact = space.take<float>(heads * padded);
        again = space.take<float>(v.selections * padded);
        rough_sums = space.take<float>(heads * tiles);
        factor = space.take<float>(heads);
        shift = space.take<float>(heads);
        queries = space.take<float>(v.kv_heads * quads * v.dim);
        std::memset(queries, 0, sizeof(float) * v.kv_heads * quads * v.dim);
        for (int64_t i = 0; i < heads; ++i)
            std::memcpy(queries + (i / rows * quads + i % rows) * v.dim, v.query + i * v.dim, 4 * v.dim);
    }

    int64_t allowed(int64_t selection) const { return a.votes.limits[selection] - a.votes.start; }

    template <class Stored>
    void run(const Team& team, const Weights<Stored>& weights, const float* votes) {
        const auto& v = a.votes;
        const TopKSpace& space = spaces[team.rank];
        for (int64_t r = team.from(v.selections); r < team.to(v.selections); ++r) {
            int64_t* out = m ? nominated + r * m : a.index + r * a.top_k;
            top_k_of_row(votes + r * n, allowed(r), m ? m : a.top_k, space, out);
            if (!m)
                for (int64_t i = 0; i < a.top_k; ++i) out[i] += v.start;
        }
        if (!m) return;
        team.barrier();
        for (int64_t i = team.from(v.selections * blocks); i < team.to(v.selections * blocks); ++i)
            rescore(i / blocks, i % blocks);
        for (int64_t h = team.from(v.kv_heads); h < team.to(v.kv_heads); ++h) left_out(h);
        for (int64_t tile = team.from(tiles); tile < team.to(tiles); ++tile)
            for (int64_t r = 0; r < v.selections; ++r) known_roughly(r, tile, weights);
        team.barrier();
        for (int64_t head = team.from(heads); head < team.to(heads); ++head) correct(head, weights);
        team.barrier();
        for (int64_t i = team.from(v.selections * blocks); i < team.to(v.selections * blocks); ++i)
            count(i / blocks, i % blocks);
        team.barrier();
        for (int64_t r = team.from(v.selections); r < team.to(v.selections); ++r) {
            top_k_of_row(again + r * padded, m, a.top_k, space, places + r * a.top_k);
            for (int64_t i = 0; i < a.top_k; ++i)
                a.index[r * a.top_k + i] = nominated[r * m + places[r * a.top_k + i]] + v.start;
        }
    }

    // What the sketch had given the nominated tokens of one tile for one selection, still relative to the tile. Tile by
    // tile, because that is how weights lie in memory.
    template <class Stored>
    void known_roughly(int64_t r, int64_t tile, const Weights<Stored>& weights) {
        const int64_t* token = nominated + r * m;
        const int64_t offset = a.votes.start % TILE;
        const int64_t* from = std::lower_bound(token, token + m, tile * TILE - offset);
        const int64_t* to = std::lower_bound(from, token + m, (tile + 1) * TILE - offset);
        for (int64_t head = r; head < heads; head += a.votes.selections) {
            const Stored* weight = weights.weight + (tile * heads + head) * TILE;
            float sums[4] = {};
            const int64_t* t = from;
            for (; t + 4 <= to; t += 4)
                for (int i = 0; i < 4; ++i) sums[i] += one(weight + t[i] + offset - tile * TILE);
            for (; t < to; ++t) sums[0] += one(weight + *t + offset - tile * TILE);
            rough_sums[head * tiles + tile] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        }
    }

    // Exact scores of one block of nominated tokens for one selection.
    void rescore(int64_t r, int64_t block) {
        const auto& v = a.votes;
        const int64_t from = block * RESCORED, live = m - from < RESCORED ? m - from : RESCORED;
        const int64_t* token = nominated + r * m + from;
        // Keys of one key head are scored while those of the next come from memory.
        const T* keys[2][RESCORED];
        auto locate = [&](int64_t h) {
            Lane::Cursor at;
            for (int64_t i = 0; i < live; ++i)
                keys[h % 2][i] = static_cast<const T*>(v.keys) + v.lanes[h].slot(token[i] + v.start, at) * v.dim;
        };
        locate(0);
        for (int64_t i = 0; i < live; ++i) prefetch_row(keys[0][i], v.dim);
        for (int64_t h = 0; h < v.kv_heads; ++h) {
            const T* const* key = keys[h % 2];
            const bool more = h + 1 < v.kv_heads;
            if (more) locate(h + 1);
            for (int64_t i = 0; i < live; i += 4) {
                for (int64_t k = i; more && k < i + 4 && k < live; ++k) prefetch_row(keys[(h + 1) % 2][k], v.dim);
                const T* four[4];
                for (int64_t k = 0; k < 4; ++k) four[k] = key[i + k < live ? i + k : live - 1];
                for (int64_t quad = 0; quad < rows; quad += 4) {
                    if (v.selections > 1 && !holds(quad, r)) continue;
                    const vf s = dots(four, queries + (h * quads + quad) * v.dim, v.dim, v.dim) * LOG2_E;
                    float* out = exact + (h * rows + quad) * padded + from + i;
                    if (v.selections == 1 && quad + 4 <= rows) {
                        store_quarters(out, padded, s);
                        continue;
                    }
                    // All rows of the key head were scored; those of this selection are kept.
                    for (int64_t row = 0; row < 4 && quad + row < rows; ++row)
                        if ((quad + row) % v.selections == r)
                            for (int64_t k = 0; k < 4; ++k) out[row * padded + k] = s[4 * row + k];
                }
            }
            for (int64_t row = r; row < rows; row += v.selections)
                for (int64_t i = live; i < RESCORED; ++i) exact[(h * rows + row) * padded + from + i] = -INFINITY;
        }
    }

    // A head's scores from the sketch lack the product of its query with the centre of its lane; those from keys do not.
    void left_out(int64_t h) {
        const auto& v = a.votes;
        float centre[MAX_DIM];
        centre_of(static_cast<const T*>(v.keys), v.lanes[h], v.stop, v.dim, centre);
        for (int64_t head = h * rows; head < (h + 1) * rows; ++head) {
            vf product{};
            for (int64_t c = 0; c < v.dim; c += W) product += load<vf>(v.query + head * v.dim + c) * load<vf>(centre + c);
            shift[head] = sum(product) * LOG2_E;
        }
    }

    bool holds(int64_t quad, int64_t r) const {
        for (int64_t row = quad; row < quad + 4; ++row)
            if (row % a.votes.selections == r) return true;
        return false;
    }

    // Exact scores become weights, and the head's sum of weights one in which those of the nominated tokens are exact.
    template <class Stored>
    void correct(int64_t head, const Weights<Stored>& weights) {
        double known = 0;
        for (int64_t i = 0; i < tiles; ++i)
            known += double(weights.factor[head * tiles + i]) * rough_sums[head * tiles + i];
        const float rough_lse = weights.lse[head] + shift[head];
        const double rest = known < 1 ? 1 - known : 0;
        float* s = exact + head * padded;
        vf best = splat(rest > 0 ? rough_lse : -INFINITY);
        for (int64_t i = 0; i < padded; i += W) best = vmax(load<vf>(s + i), best);
        const float peak = max(best);
        vf total{};
        for (int64_t i = 0; i < padded; i += W) {
            const vf e = exp2_of(load<vf>(s + i) - peak);
            store(s + i, e);
            total += e;
        }
        // A head whose scores are no numbers has no say.
        const double mass = double(sum(total)) + (rest > 0 ? rest * std::exp2(double(rough_lse) - peak) : 0);
        factor[head] = mass > 0 ? float(1 / mass) : 0.0f;
    }

    // Votes of one block of nominated tokens.
    void count(int64_t r, int64_t block) {
        for (int64_t i = block * RESCORED; i < (block + 1) * RESCORED; i += W) {
            vf votes{};
            for (int64_t head = r; head < heads; head += a.votes.selections)
                votes += load<vf>(exact + head * padded + i) * factor[head];
            store(again + r * padded + i, votes);
        }
    }
};

template <class T>
void select(const SelectArgs& a) {
    Winners<T> winners{a};
    const auto& v = a.votes;
    if (!v.sketch) return votes_of(v, ByKeys<T>{v}, winners.bytes(), winners);
    if (v.sketch_bits == 8) return votes_of(v, BySketch<8>{v}, winners.bytes(), winners);
    votes_of(v, BySketch<4>{v}, winners.bytes(), winners);
}
