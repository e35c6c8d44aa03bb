// Rotary rotations of rows, and storing new tokens with them.

// The first 2 * pairs channels of `in` rotated, pairs (i, i + pairs) or, interleaved, (2i, 2i + 1).
template <class In, class Out>
void rotate_row(const In* in, Out* out, const float* cos, const float* sin, int64_t pairs, int64_t dim,
                bool interleaved) {
    if (!interleaved && pairs % W == 0) {
        for (int64_t c = 0; c < pairs; c += W) {
            const vf x = get(in + c), y = get(in + pairs + c), cs = load<vf>(cos + c), sn = load<vf>(sin + c);
            put(out + c, x * cs - y * sn);
            put(out + pairs + c, y * cs + x * sn);
        }
        for (int64_t c = 2 * pairs; c < dim; c += W) put(out + c, get(in + c));
        return;
    }
    float x[MAX_DIM], turned[MAX_DIM];
    for (int64_t c = 0; c < dim; c += W) store(x + c, get(in + c));
    std::memcpy(turned, x, 4 * dim);
    for (int64_t c = 0; c < pairs; ++c) {
        const int64_t i = interleaved ? 2 * c : c, j = interleaved ? 2 * c + 1 : pairs + c;
        turned[i] = x[i] * cos[c] - x[j] * sin[c];
        turned[j] = x[j] * cos[c] + x[i] * sin[c];
    }
    for (int64_t c = 0; c < dim; c += W) put(out + c, load<vf>(turned + c));
}

// Rows [sequences, heads, count, dim], given by strides in elements, to a contiguous tensor.
template <class T>
void turn(const TurnArgs& a) {
    const T* in = static_cast<const T*>(a.in);
    T* out = static_cast<T*>(a.out);
    const int64_t lanes = a.sequences * a.heads;
    const int threads = lanes * a.count * a.dim > 65536 ? a.threads : 1;
    parallel(threads, [&](const Team& team) {
        for (int64_t row = team.from(lanes * a.count); row < team.to(lanes * a.count); ++row) {
            const int64_t lane = row / a.count, t = row % a.count, b = lane / a.heads;
            const int64_t angle = (b * a.angle_stride + t) * a.pairs;
            rotate_row(in + b * a.sequence_stride + lane % a.heads * a.head_stride + t * a.token_stride,
                       out + row * a.dim, a.cos + angle, a.sin + angle, a.pairs, a.dim, a.interleaved);
        }
    });
}

template <class T>
void append(const AppendArgs& a) {
    const T *key = static_cast<const T*>(a.key), *value = static_cast<const T*>(a.value);
    T *keys = static_cast<T*>(a.keys), *values = static_cast<T*>(a.values);
    const int64_t lanes = a.sequences * a.heads;
    const int threads = lanes * a.count * a.dim > 65536 ? a.threads : 1;
    parallel(threads, [&](const Team& team) {
        for (int64_t lane = team.from(lanes); lane < team.to(lanes); ++lane) {
            const int64_t b = lane / a.heads, h = lane % a.heads;
            Lane::Cursor at;
            for (int64_t t = 0; t < a.count; ++t) {
                const int64_t slot = a.lanes[lane].slot(a.first[lane] + t, at);
                std::memcpy(keys + slot * a.dim,
                            key + b * a.key_strides[0] + h * a.key_strides[1] + t * a.key_strides[2],
                            a.dim * sizeof(T));
                std::memcpy(values + slot * a.value_dim,
                            value + b * a.value_strides[0] + h * a.value_strides[1] + t * a.value_strides[2],
                            a.value_dim * sizeof(T));
                a.slot_positions[slot] = int32_t(a.positions[b * a.position_stride + t]);
            }
            // What a page that was not full yet holds was sketched about another centre.
            const int64_t first = a.first[lane], stop = first + a.count;
            if (a.sketch && a.count)
                sketch_lane(keys, a.sketch, a.lanes[lane], first < PAGE ? 0 : first, stop, stop, a.dim, a.sketch_bits);
        }
    });
}

template <class T>
void sketch_lanes(const SketchArgs& a) {
    constexpr int64_t PIECE = 1024;
    const T* keys = static_cast<const T*>(a.keys);
    const int64_t pieces = (a.stop - a.start + PIECE - 1) / PIECE, units = a.lanes_count * pieces;
    parallel(a.lanes_count * (a.stop - a.start) > 512 ? a.threads : 1, [&](const Team& team) {
        for (int64_t i = team.from(units); i < team.to(units); ++i) {
            const int64_t from = a.start + i % pieces * PIECE, to = std::min(from + PIECE, a.stop);
            sketch_lane(keys, a.sketch, a.lanes[i / pieces], from, to, a.stop, a.dim, a.bits);
        }
    });
}
