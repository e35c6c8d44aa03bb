// Copies listed tokens of a sequence side by side, keys rotated to the places they take in the list.

template <class T>
void gather(const GatherArgs& a) {
    const T *keys = static_cast<const T*>(a.keys), *values = static_cast<const T*>(a.values);
    T *out_keys = static_cast<T*>(a.out_keys), *out_values = static_cast<T*>(a.out_values);
    const int threads = a.kv_heads * a.count * a.dim > 16384 ? a.threads : 1;
    parallel(threads, [&](const Team& team) {
        for (int64_t h = team.from(a.kv_heads); h < team.to(a.kv_heads); ++h) {
            Lane::Cursor at;
            constexpr int64_t AHEAD = 12;
            int64_t slots[AHEAD];
            for (int64_t i = 0; i < a.count + AHEAD; ++i) {
                int64_t slot = 0;
                if (i < a.count) {
                    slot = a.lanes[h].slot(a.index[i], at);
                    prefetch_row(keys + slot * a.dim, a.dim);
                    prefetch_row(values + slot * a.dim, a.dim);
                }
                if (i >= AHEAD) {
                    const int64_t j = i - AHEAD, from = slots[j % AHEAD] * a.dim, to = (h * a.count + j) * a.dim;
                    if (a.pairs)
                        rotate_row(keys + from, out_keys + to, a.cos + j * a.pairs, a.sin + j * a.pairs, a.pairs,
                                   a.dim, a.interleaved);
                    else
                        std::memcpy(out_keys + to, keys + from, a.dim * sizeof(T));
                    std::memcpy(out_values + to, values + from, a.dim * sizeof(T));
                }
                slots[i % AHEAD] = slot;
            }
        }
    });
}
