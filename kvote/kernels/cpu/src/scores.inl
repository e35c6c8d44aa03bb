// Scores of every query with every token, for selections that heads make on their own: from the keys, or from labels,
// which are a few channels of the keys, laid out so that one multiply-add advances sixteen tokens of one channel and no
// sum is ever taken across a register.

// Runs `score` on tiles of tokens of each lane; it writes scores [rows, TILE] of tokens that begin at a page's `slot`.
template <class Score>
void scores_in_tiles(const ScoreArgs& a, Score&& score) {
    const int64_t first = a.start / PAGE * PAGE, n = a.stop - a.start;
    const int64_t padded = (a.rows + 3) / 4 * 4, tiles = (a.stop - first + TILE - 1) / TILE;
    Workspace space(Workspace::bytes<float>(a.lanes_count * padded * a.dim) +
                    a.threads * Workspace::bytes<float>(padded * TILE));
    float* queries = space.take<float>(a.lanes_count * padded * a.dim);
    float* scratch = space.take<float>(0);
    for (int i = 0; i < a.threads; ++i) space.take<float>(padded * TILE);
    parallel(a.threads, [&](const Team& team) {
        for (int64_t i = team.from(a.lanes_count * padded); i < team.to(a.lanes_count * padded); ++i) {
            const int64_t lane = i / padded, row = i % padded;
            if (row < a.rows)
                std::memcpy(queries + i * a.dim, a.query + (lane * a.rows + row) * a.dim, 4 * a.dim);
            else
                std::memset(queries + i * a.dim, 0, 4 * a.dim);
        }
        team.barrier();
        float* tile = scratch + team.rank * int64_t(Workspace::bytes<float>(padded * TILE) / 4);
        for (int64_t item = team.from(a.lanes_count * tiles); item < team.to(a.lanes_count * tiles); ++item) {
            const int64_t lane = item / tiles, from = first + item % tiles * TILE;
            const int64_t to = from + TILE < a.stop ? from + TILE : a.stop;
            Lane::Cursor at;
            for (int64_t t = from; t < to;) {
                const int64_t stretch = a.lanes[lane].stretch(t, at), end = stretch < to - t ? t + stretch : to;
                score(a.lanes[lane].slot(t, at), end - t, queries + lane * padded * a.dim, padded, tile + (t - from));
                t = end;
            }
            const int64_t live = from > a.start ? from : a.start;
            for (int64_t row = 0; row < a.rows; ++row)
                std::memcpy(a.out + (lane * a.rows + row) * n + (live - a.start), tile + row * TILE + (live - from),
                            4 * (to - live));
        }
    });
}

template <class T>
void scores(const ScoreArgs& a) {
    const T* keys = static_cast<const T*>(a.keys);
    scores_in_tiles(a, [&](int64_t slot, int64_t count, const float* query, int64_t rows, float* out) {
        score_exactly(keys + slot * a.dim, count, query, rows, a.dim, out, 1.0f);
    });
}

// The pool is [pages, dim, PAGE]. Whole pages are scored; what lies beyond the last token is not copied out.
template <class T>
void label_scores(const ScoreArgs& a) {
    constexpr int64_t V = PAGE / W;
    const T* labels = static_cast<const T*>(a.keys);
    scores_in_tiles(a, [&](int64_t slot, int64_t count, const float* query, int64_t rows, float* out) {
        for (int64_t t = 0; t < count; t += PAGE) {
            const T* page = labels + (slot + t) * a.dim;
            for (int64_t row = 0; row < rows; row += 4) {
                vf sum[4][V] = {};
                const float* q = query + row * a.dim;
                for (int64_t c = 0; c < a.dim; ++c) {
                    if (row == 0)
                        for (int64_t b = 0; b < PAGE * int64_t(sizeof(T)); b += 64)
                            __builtin_prefetch(reinterpret_cast<const char*>(page + c * PAGE) + 8192 + b);
                    vf x[V];
                    for (int64_t v = 0; v < V; ++v) x[v] = get(page + c * PAGE + v * W);
                    for (int64_t i = 0; i < 4; ++i) {
                        const vf y = splat(q[i * a.dim + c]);
                        for (int64_t v = 0; v < V; ++v) sum[i][v] += x[v] * y;
                    }
                }
                for (int64_t i = 0; i < 4; ++i)
                    for (int64_t v = 0; v < V; ++v) store(out + (row + i) * TILE + t + v * W, sum[i][v]);
            }
        }
    });
}
