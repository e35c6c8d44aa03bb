// The k largest of each row, ascending, ties to the lower index. Whatever is among them is at least the k-th largest
// tile maximum, so only tiles that reach that are looked into. NaN counts as the least of all.

inline void top_k(const TopKArgs& a) {
    constexpr int64_t TILE_K = 64;
#pragma omp parallel for num_threads(a.threads) schedule(static) if (a.rows > 1)
    for (int64_t row = 0; row < a.rows; ++row) {
        const float* votes = a.votes + row * a.n;
        int64_t tiles = (a.n + TILE_K - 1) / TILE_K;
        std::vector<float> peaks(tiles);
        for (int64_t tile = 0; tile < tiles; ++tile) {
            int64_t from = tile * TILE_K, to = from + TILE_K < a.n ? from + TILE_K : a.n;
            float best = -INFINITY;
            if (to - from == TILE_K) {
                vf m = splat(-INFINITY);
                for (int64_t t = 0; t < TILE_K; t += W) m = vmax(load<vf>(votes + from + t), m);
                best = max(m);
            } else {
                for (int64_t t = from; t < to; ++t) best = votes[t] > best ? votes[t] : best;
            }
            peaks[tile] = best;
        }
        float least = -INFINITY;
        if (tiles > a.k) {
            std::vector<float> sorted(peaks);
            std::nth_element(sorted.begin(), sorted.begin() + (a.k - 1), sorted.end(), std::greater<float>());
            least = sorted[a.k - 1];
        }
        struct Vote {
            float value;
            int64_t token;
        };
        std::vector<Vote> candidates;
        candidates.reserve(4 * a.k);
        for (int64_t tile = 0; tile < tiles; ++tile) {
            if (peaks[tile] < least) continue;
            int64_t to = (tile + 1) * TILE_K < a.n ? (tile + 1) * TILE_K : a.n;
            for (int64_t t = tile * TILE_K; t < to; ++t)
                if (votes[t] >= least) candidates.push_back({votes[t], t});
                else if (votes[t] != votes[t] && least == -INFINITY) candidates.push_back({-INFINITY, t});
        }
        auto stronger = [](const Vote& x, const Vote& y) {
            return x.value > y.value || (x.value == y.value && x.token < y.token);
        };
        if (int64_t(candidates.size()) > a.k)
            std::nth_element(candidates.begin(), candidates.begin() + a.k, candidates.end(), stronger);
        int64_t* out = a.index + row * a.k;
        for (int64_t i = 0; i < a.k; ++i) out[i] = candidates[i].token;
        std::sort(out, out + a.k);
    }
}
