// TokenSelect's votes in two passes over tiles of tokens. The first scores a tile for all heads and leaves
// e^(score - tile maximum) while the tile is in cache, with the tile's maximum and sum; the second weighs and adds
// them. One exponential per score, and no pass that only looks for a maximum. The weights stay in float32: half
// precision has not the range that ranks weak tokens, and bfloat16 not the precision that parts close ones.

constexpr int64_t TILE = 512;

// Exact scores of `count` tokens from `token` on (slots in a row) for the rows of one key head.
template <class T>
void score_rows(const T* keys, int64_t count, const float* query, int64_t rows, int64_t dim, float* out) {
    alignas(64) float columns[256 * W];
    for (int64_t t = 0; t < count; t += W) {
        int64_t live = count - t < W ? count - t : W;
        for (int64_t c = 0; c < dim; c += W) {
            vf m[W];
            for (int64_t i = 0; i < W; ++i) m[i] = get(keys + (t + (i < live ? i : live - 1)) * dim + c);
            transpose(m);
            for (int64_t i = 0; i < W; ++i) store(columns + (c + i) * W, m[i]);
        }
        int64_t row = 0;
        for (; row + 4 <= rows; row += 4) {
            const float *a = query + row * dim, *b = a + dim, *p = b + dim, *q = p + dim;
            vf sa{}, sb{}, sp{}, sq{};
            for (int64_t c = 0; c < dim; ++c) {
                vf k = load<vf>(columns + c * W);
                sa += k * a[c];
                sb += k * b[c];
                sp += k * p[c];
                sq += k * q[c];
            }
            store(out + row * TILE + t, sa);
            store(out + (row + 1) * TILE + t, sb);
            store(out + (row + 2) * TILE + t, sp);
            store(out + (row + 3) * TILE + t, sq);
        }
        for (; row < rows; ++row) {
            vf s{};
            for (int64_t c = 0; c < dim; ++c) s += load<vf>(columns + c * W) * query[row * dim + c];
            store(out + row * TILE + t, s);
        }
    }
}

template <class T>
void votes(const VotesArgs& a) {
    const int64_t n = a.stop - a.start, rows = a.groups * a.selections, heads = a.kv_heads * rows;
    // Tiles begin at multiples of TILE of the token index, so that a sketch block never straddles two of them.
    const int64_t first = a.start / TILE, tiles = (a.stop + TILE - 1) / TILE - first;
    std::vector<CodedQuery> coded(a.sketch ? heads : 0);
    for (int64_t i = 0; i < int64_t(coded.size()); ++i) coded[i].encode(a.query + i * a.dim, a.dim);
    std::unique_ptr<f32[]> weights(new f32[heads * tiles * TILE]);
    std::unique_ptr<float[]> peaks(new float[heads * tiles]), sums(new float[heads * tiles]);
    const T* keys = static_cast<const T*>(a.keys);

#pragma omp parallel num_threads(a.threads)
    {
        std::vector<float> buffer(rows * TILE + 2 * W);
        std::vector<Lane::Cursor> at(a.kv_heads);
        float* scores = buffer.data();
#pragma omp for schedule(static)
        for (int64_t tile = 0; tile < tiles; ++tile) {
            int64_t base = (first + tile) * TILE;
            int64_t from = base > a.start ? base : a.start, to = base + TILE < a.stop ? base + TILE : a.stop;
            for (int64_t h = 0; h < a.kv_heads; ++h) {
                // Whole blocks of 16 are scored; what lies outside the range is overwritten below.
                int64_t aligned = from / 16 * 16;
                for (int64_t t = aligned; t < to;) {
                    int64_t stretch = a.lanes[h].stretch(t, at[h]), end = stretch < to - t ? t + stretch : to;
                    int64_t slot = a.lanes[h].slot(t, at[h]);
                    if (a.sketch) {
                        for (; t < end; t += 16, slot += 16)
                            score_block(a.sketch + slot / 16 * block_bytes(a.dim), a.dim, &coded[h * rows], rows,
                                        scores + (t - base), TILE);
                    } else {
                        score_rows(keys + slot * a.dim, end - t, a.query + h * rows * a.dim, rows, a.dim,
                                   scores + (t - base));
                        t = end;
                    }
                }
                for (int64_t row = 0; row < rows; ++row) {
                    float* s = scores + row * TILE;
                    int64_t limit = a.limits[row % a.selections] - base;
                    int64_t live = limit < to - base ? (limit > 0 ? limit : 0) : to - base;
                    for (int64_t t = 0; t < from - base; ++t) s[t] = -INFINITY;
                    int64_t end = (to - base + W - 1) / W * W;
                    for (int64_t t = live; t < end; ++t) s[t] = -INFINITY;
                    vf best = splat(-INFINITY);
                    for (int64_t t = 0; t < end; t += W) best = vmax(best, load<vf>(s + t));
                    float peak = max(best);
                    int64_t place = (h * rows + row) * tiles + tile;
                    vf total{};
                    vf shift = splat(peak == -INFINITY ? 0.0f : peak);
                    f32* w = weights.get() + ((h * rows + row) * tiles + tile) * TILE;
                    for (int64_t t = 0; t < end; t += W) {
                        vf e = exp_of(load<vf>(s + t) - shift);
                        total += e;
                        put(w + t, e);
                    }
                    peaks[place] = peak;
                    sums[place] = sum(total);
                }
            }
        }
        // One thread's share each: from tile maxima and sums to the factor that makes the tile's entries votes.
#pragma omp for schedule(static)
        for (int64_t head = 0; head < heads; ++head) {
            float *peak = &peaks[head * tiles], *total = &sums[head * tiles];
            float best = -INFINITY;
            for (int64_t i = 0; i < tiles; ++i) best = peak[i] > best ? peak[i] : best;
            double mass = 0;
            for (int64_t i = 0; i < tiles; ++i)
                if (peak[i] > -INFINITY) mass += double(total[i]) * std::exp(double(peak[i] - best));
            for (int64_t i = 0; i < tiles; ++i)
                peak[i] = peak[i] > -INFINITY ? float(std::exp(double(peak[i] - best)) / mass) : 0.0f;
        }
#pragma omp for schedule(static)
        for (int64_t tile = 0; tile < tiles; ++tile) {
            int64_t base = (first + tile) * TILE;
            int64_t from = base > a.start ? base : a.start, to = base + TILE < a.stop ? base + TILE : a.stop;
            for (int64_t r = 0; r < a.selections; ++r) {
                float* out = a.votes + r * n;
                for (int64_t t = (from - base) / W * W; t < to - base; t += W) {
                    vf total{};
                    for (int64_t head = r; head < heads; head += a.selections)
                        total += get(weights.get() + (head * tiles + tile) * TILE + t) * peaks[head * tiles + tile];
                    int64_t place = base + t - a.start;
                    if (place >= 0 && place + W <= n) {
                        store(out + place, total);
                    } else {
                        for (int64_t i = 0; i < W; ++i)
                            if (place + i >= 0 && place + i < n) out[place + i] = total[i];
                    }
                }
            }
        }
    }
}
