// Copies listed tokens of a sequence side by side, keys rotated to the places they take in the list.

template <class T>
void rotate_row(const T* in, T* out, const float* cos, const float* sin, int64_t pairs, int64_t dim, bool interleaved) {
    if (!interleaved && pairs % W == 0) {
        for (int64_t c = 0; c < pairs; c += W) {
            vf x = get(in + c), y = get(in + pairs + c), cs = load<vf>(cos + c), sn = load<vf>(sin + c);
            put(out + c, x * cs - y * sn);
            put(out + pairs + c, y * cs + x * sn);
        }
        std::memcpy(out + 2 * pairs, in + 2 * pairs, (dim - 2 * pairs) * sizeof(T));
        return;
    }
    float x[256] = {}, turned[256];
    for (int64_t c = 0; c < dim; c += W) store(x + c, get(in + c));
    std::memcpy(turned, x, sizeof turned);
    for (int64_t c = 0; c < pairs; ++c) {
        int64_t i = interleaved ? 2 * c : c, j = interleaved ? 2 * c + 1 : pairs + c;
        turned[i] = x[i] * cos[c] - x[j] * sin[c];
        turned[j] = x[j] * cos[c] + x[i] * sin[c];
    }
    for (int64_t c = 0; c < dim; c += W) put(out + c, load<vf>(turned + c));
}

template <class T>
void gather(const GatherArgs& a) {
    const T *keys = static_cast<const T*>(a.keys), *values = static_cast<const T*>(a.values);
    T *out_keys = static_cast<T*>(a.out_keys), *out_values = static_cast<T*>(a.out_values);
#pragma omp parallel for num_threads(a.threads) schedule(static) if (a.kv_heads * a.count * a.dim > 16384)
    for (int64_t h = 0; h < a.kv_heads; ++h) {
        Lane::Cursor at;
        constexpr int64_t AHEAD = 12;
        int64_t slots[AHEAD];
        for (int64_t i = 0; i < a.count + AHEAD; ++i) {
            int64_t slot = 0;
            if (i < a.count) {
                slot = a.lanes[h].slot(a.index[i], at);
                __builtin_prefetch(keys + slot * a.dim);
                __builtin_prefetch(values + slot * a.dim);
            }
            if (i >= AHEAD) {
                int64_t j = i - AHEAD, from = slots[j % AHEAD] * a.dim, to = (h * a.count + j) * a.dim;
                if (a.pairs)
                    rotate_row(keys + from, out_keys + to, a.cos + j * a.pairs, a.sin + j * a.pairs, a.pairs, a.dim,
                               a.interleaved);
                else
                    std::memcpy(out_keys + to, keys + from, a.dim * sizeof(T));
                std::memcpy(out_values + to, values + from, a.dim * sizeof(T));
            }
            slots[i % AHEAD] = slot;
        }
    }
}
