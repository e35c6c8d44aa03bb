// A decode step of one sequence in one call: the new token is stored, and its query reads what is held, all of it or
// what a vote of all heads chooses. Nothing is computed that the kernels above do not compute.

// Whether the cosine of two vectors is at least `theta`.
inline bool resembles(const float* a, const float* b, int64_t n, float theta) {
    double dot = 0, aa = 0, bb = 0;
    for (int64_t i = 0; i < n; ++i) {
        dot += double(a[i]) * b[i];
        aa += double(a[i]) * a[i];
        bb += double(b[i]) * b[i];
    }
    return dot >= theta * std::sqrt(aa * bb);
}

template <class T>
void step(const StepArgs& a) {
    const int64_t rows = a.heads * a.groups, dim = a.dim;
    const T *query = static_cast<const T*>(a.query), *key = static_cast<const T*>(a.key);
    std::vector<T> bare_keys, bare(a.pairs ? rows * dim : 0);
    int64_t key_stride = a.key_stride, query_stride = a.query_stride;
    if (a.pairs) {
        bare_keys.resize(a.heads * dim);
        for (int64_t h = 0; h < a.heads; ++h)
            rotate_row(key + h * key_stride, bare_keys.data() + h * dim, a.back_cos, a.back_sin, a.pairs, dim,
                       a.interleaved);
        for (int64_t r = 0; r < rows; ++r)
            rotate_row(query + r * query_stride, bare.data() + r * dim, a.back_cos, a.back_sin, a.pairs, dim,
                       a.interleaved);
        key = bare_keys.data(), query = bare.data(), key_stride = query_stride = dim;
    }
    const std::vector<int64_t> first(a.heads, a.length);
    append<T>({key, a.value, a.type, {0, key_stride, 0}, {0, a.value_stride, 0}, &a.position, 0, 1, a.heads, 1, dim,
               dim, a.lanes, first.data(), a.keys, a.values, a.slot_positions, a.sketch, a.sketch_bits, 1});

    int64_t count = a.length + 1;
    std::vector<int64_t> list;
    if (a.top_k) {
        for (int64_t r = 0; r < rows; ++r)
            rotate_row(query + r * dim, reinterpret_cast<f32*>(a.asked) + r * dim, a.cos + a.asked_at * a.pairs,
                       a.sin + a.asked_at * a.pairs, a.pairs, dim, a.interleaved);
        const int64_t* winners = a.kept;
        *a.reused = winners && resembles(a.asked, a.past, rows * dim, a.theta);
        if (!*a.reused) {
            winners = a.winners;
            // Sketches of fewer tokens than a page do not tell by themselves about which centre they were made.
            const bool sketched = a.sketch && 2 * a.nominate < a.edge - a.sinks && (!a.nominate || a.edge >= PAGE);
            const int64_t nominate = std::min(std::max(a.nominate, a.top_k), a.edge - a.sinks);
            select<T>({{a.asked, a.keys, a.type, a.lanes, sketched ? a.sketch : nullptr, sketched ? a.sketch_bits : 0,
                        a.heads, a.groups, 1, dim, a.sinks, a.edge, &a.edge, nullptr, a.threads},
                       a.top_k, sketched && a.nominate ? nominate : 0, a.winners});
        }
        list.reserve(a.sinks + a.top_k + count - a.edge);
        for (int64_t i = 0; i < a.sinks; ++i) list.push_back(i);
        list.insert(list.end(), winners, winners + a.top_k);
        for (int64_t i = a.edge; i < count; ++i) list.push_back(i);
        count = int64_t(list.size());
    }

    std::vector<float> placed(rows * dim);
    T turned[MAX_DIM];
    for (int64_t r = 0; r < rows; ++r) {
        const T* row = query + r * query_stride;
        if (a.pairs) {
            const int64_t at = (count - 1) * a.pairs;
            rotate_row(row, turned, a.cos + at, a.sin + at, a.pairs, dim, a.interleaved);
            row = turned;
        }
        for (int64_t c = 0; c < dim; c += W) store(placed.data() + r * dim + c, get(row + c));
    }
    decode<T>({placed.data(), a.keys, a.values, a.type, a.lanes, a.heads, a.groups, dim,
               list.empty() ? nullptr : list.data(), a.heads, 0, count, a.cos, a.sin, a.pairs, a.interleaved, a.scale,
               a.softcap, a.out, a.lse, a.threads, nullptr});
}
