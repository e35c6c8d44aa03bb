// What keepers observe: how much attention each token received, without a matrix of queries by tokens. The caller has
// the log-sum-exp of every query from attending; this reads the keys once more and adds e^(score - lse) over queries.

template <class T>
void attention_mass(const MassArgs& a) {
    const T* keys = static_cast<const T*>(a.keys);
    // Scores begin at a multiple of four tokens, as pages do: a run's last four may reach into the next run's first, which
    // are scored after them, but not beyond the tile.
    const int64_t first = a.start / 4 * 4, n = a.stop - a.start;
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
        float* scores = scratch + team.rank * int64_t(Workspace::bytes<float>(padded * TILE) / 4);
        for (int64_t item = team.from(a.lanes_count * tiles); item < team.to(a.lanes_count * tiles); ++item) {
            const int64_t lane = item / tiles, from = first + item % tiles * TILE;
            const int64_t to = from + TILE < a.stop ? from + TILE : a.stop;
            Lane::Cursor at;
            for (int64_t t = from; t < to;) {
                const int64_t stretch = a.lanes[lane].stretch(t, at), end = stretch < to - t ? t + stretch : to;
                score_exactly(keys + a.lanes[lane].slot(t, at) * a.dim, end - t, queries + lane * padded * a.dim,
                              padded, a.dim, scores + (t - from));
                t = end;
            }
            float* out = a.mass + lane * n - a.start;
            for (int64_t t = 0; t < to - from; t += W) {
                vf total{};
                for (int64_t row = 0; row < a.rows; ++row) {
                    const float lse = a.lse[lane * a.rows + row];
                    vf s = load<vf>(scores + row * TILE + t) * a.scale;
                    if (a.softcap > 0)
                        for (int i = 0; i < W; ++i)
                            s[i] = LOG2_E * a.softcap * std::tanh(s[i] / (LOG2_E * a.softcap));
                    const vf share = exp2_of(s - lse * LOG2_E);
                    // Row r sees tokens before limits[r].
                    const int64_t live = a.limits[row] - (from + t);
                    for (int i = 0; i < W; ++i) total[i] += i < live ? share[i] : 0.0f;
                }
                for (int64_t token = std::max(from + t, a.start); token < to && token < from + t + W; ++token)
                    out[token] = total[token - from - t];
            }
        }
    });
}
