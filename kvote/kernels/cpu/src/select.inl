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
    std::vector<TopKSpace> spaces{};
    int64_t *nominated{}, *places{};  // [selections, m], [selections, top_k]
    float *exact{}, *again{};         // [heads, padded] scores, [selections, padded] votes
    float *rough_sums{}, *lse{};      // [heads, blocks], [heads]
    float* queries{};                 // [kv_heads, quads, dim]

    std::size_t bytes() const {
        const auto& v = a.votes;
        return v.threads * TopKSpace::bytes(n) +
               (m ? Workspace::bytes<int64_t>(v.selections * m) + Workspace::bytes<int64_t>(v.selections * a.top_k) +
                        Workspace::bytes<float>(heads * padded) + Workspace::bytes<float>(v.selections * padded) +
                        Workspace::bytes<float>(heads * blocks) + Workspace::bytes<float>(heads) +
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
        rough_sums = space.take<float>(heads * blocks);
        lse = space.take<float>(heads);
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
            rescore(i / blocks, i % blocks, weights);
        team.barrier();
        for (int64_t head = team.from(heads); head < team.to(heads); ++head) correct(head, weights.lse[head]);
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

    // Exact scores of one block of nominated tokens for one selection, and what the sketch had given them.
    template <class Stored>
    void rescore(int64_t r, int64_t block, const Weights<Stored>& weights) {
        const auto& v = a.votes;
        const int64_t from = block * RESCORED, live = m - from < RESCORED ? m - from : RESCORED;
        const int64_t* token = nominated + r * m + from;
        const int64_t offset = v.start % TILE;
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
            for (int64_t row = r; row < rows; row += v.selections) {
                const int64_t head = h * rows + row;
                for (int64_t i = live; i < RESCORED; ++i) exact[head * padded + from + i] = -INFINITY;
                float rough = 0;
                for (int64_t i = 0; i < live; ++i) rough += weights.of(head, token[i] + offset);
                rough_sums[head * blocks + block] = rough;
            }
        }
    }

    bool holds(int64_t quad, int64_t r) const {
        for (int64_t row = quad; row < quad + 4; ++row)
            if (row % a.votes.selections == r) return true;
        return false;
    }

    // The head's log-sum-exp with the nominated tokens' terms replaced by exact ones.
    void correct(int64_t head, float rough_lse) {
        double known = 0;
        for (int64_t b = 0; b < blocks; ++b) known += rough_sums[head * blocks + b];
        const double rest = known < 1 ? 1 - known : 0;
        const float* s = exact + head * padded;
        float peak = rough_lse;
        for (int64_t i = 0; i < m; ++i) peak = s[i] > peak ? s[i] : peak;
        vf total{};
        for (int64_t i = 0; i < padded; i += W) total += exp2_of(load<vf>(s + i) - peak);
        lse[head] = peak + float(std::log2(double(sum(total)) + rest * std::exp2(double(rough_lse) - peak)));
    }

    // Votes of one block of nominated tokens.
    void count(int64_t r, int64_t block) {
        for (int64_t i = block * RESCORED; i < (block + 1) * RESCORED; i += W) {
            vf votes{};
            for (int64_t head = r; head < heads; head += a.votes.selections)
                votes += exp2_of(load<vf>(exact + head * padded + i) - lse[head]);
            store(again + r * padded + i, votes);
        }
    }
};

template <class T>
void select(const SelectArgs& a) {
    Winners<T> winners{a};
    const auto& v = a.votes;
    if (!v.sketch) return votes_of<T, 0>(v, winners.bytes(), winners);
    if (v.sketch_bits == 8) return votes_of<T, 8>(v, winners.bytes(), winners);
    votes_of<T, 4>(v, winners.bytes(), winners);
}
