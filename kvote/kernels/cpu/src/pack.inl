// Keys and values in 2, 4 or 8 bits with a scale and a minimum per group: pages of them, and how tokens are packed and
// decoded.
//
// `kvote/kernels/packing.py` is the law of codes and of the layout. A page holds PACKED tokens. Keys: rows
// [token / 16][channel / STEPS], then the scales [token / group][channel] and the minima in the dtype of the model.
// Values: rows [channel / 16][token / STEPS], then the scales [channel / group][token] and the minima.

template <class T>
struct PackedPage {
    const uint8_t* codes;
    const T *scale, *minimum;
    int64_t ahead = 0;  // bytes from here to the page that is read next
};

// Where things lie in pages of keys or values.
struct Form {
    int64_t bits, group, dim, params;  // params: scales in a page
    bool by_token;                     // scales are of groups of channels of one token, as those of values
    static Form keys(const PackedPool& p) {
        return p.by_token ? values(p) : Form{p.bits, p.group, p.dim, PACKED / p.group * p.dim, false};
    }
    static Form values(const PackedPool& p) {
        return {p.bits, p.group, p.dim, (p.dim + p.group - 1) / p.group * PACKED, true};
    }
    int64_t codes() const { return PACKED * dim * bits / 8; }
    template <class T>
    int64_t bytes() const {
        return codes() + 2 * params * int64_t(sizeof(T));
    }
    // The page that holds a token of a lane.
    template <class T>
    PackedPage<T> page(uint8_t* pool, const Lane& lane, int64_t token, Lane::Cursor& at) const {
        uint8_t* start = pool + lane.slot(token / PACKED * PAGE, at) / PAGE * bytes<T>();
        const T* scale = reinterpret_cast<const T*>(start + codes());
        return {start, scale, scale + params, 0};
    }
};

template <class T>
inline vf rounded_to(vf x) {
    T row[W];
    put(row, x);
    return get(row);
}
template <>
inline vf rounded_to<f32>(vf x) {
    return x;
}

template <class T>
constexpr float LARGEST = std::is_same<T, f16>::value ? 65504.0f : 3.3895314e38f;

inline vf vmin(vf a, vf b) { return -vmax(-a, -b); }

// Scale and codes of numbers whose group spans least .. most, each step rounded to T as the law's are.
template <class T>
inline vf scale_of(vf least, vf most, float top) {
    return rounded_to<T>(vmin(rounded_to<T>(most - least), splat(LARGEST<T>)) / top);
}
template <class T>
inline vu codes_of(vf x, vf least, vf scale, float top) {
    const vf step = scale > vf{} ? scale : splat(1.0f);
    vf code = rounded_to<T>(rounded_to<T>(x - least) / step);
    code = vmin(vmax(code, vf{}), splat(top));
    const vf magic = splat(12582912.0f);  // adding it rounds to whole numbers, halves to even ones
    return as_bits(code + magic) & 0xffu;
}

inline vu lane_numbers() {
    vu lanes;
    for (int i = 0; i < W; ++i) lanes[i] = uint32_t(i);
    return lanes;
}

// The bit at which step i of a row begins in its lane.
inline int64_t shift_of(int64_t bits, int64_t step) { return 16 * (step % 2) + bits * (step / 2); }

template <class T>
void pack_keys(const PackArgs& a) {
    const Form form = Form::keys(a.pool);
    const int64_t dim = form.dim, G = form.group, steps = 32 / form.bits, groups = a.count / G;
    const float top = float((1 << form.bits) - 1);
    vu shifts;
    for (int i = 0; i < W; ++i) shifts[i] = uint32_t(shift_of(form.bits, i % steps));
    parallel(a.pool.lanes_count * a.count * dim > 16384 ? a.threads : 1, [&](const Team& team) {
        for (int64_t item = team.from(a.pool.lanes_count * groups); item < team.to(a.pool.lanes_count * groups); ++item) {
            const int64_t lane = item / groups, from = item % groups * G, token = a.first[lane] + from;
            const T* in = static_cast<const T*>(a.in) + lane * a.lane_stride + from * a.token_stride;
            Lane::Cursor at;
            const PackedPage<T> page = form.page<T>(a.pool.pages, a.pool.lanes[lane], token, at);
            uint8_t* codes = const_cast<uint8_t*>(page.codes);
            T *scales = const_cast<T*>(page.scale), *minima = const_cast<T*>(page.minimum);
            for (int64_t c = 0; c < dim; c += W) {
                vf least = get(in + c), most = least;
                for (int64_t t = 1; t < G; ++t) {
                    const vf x = get(in + t * a.token_stride + c);
                    least = vmin(x, least), most = vmax(x, most);
                }
                const vf scale = scale_of<T>(least, most, top);
                put(scales + token % PACKED / G * dim + c, scale);
                put(minima + token % PACKED / G * dim + c, least);
                for (int64_t t = 0; t < G; ++t) {
                    const vu code = codes_of<T>(get(in + t * a.token_stride + c), least, scale, top) << shifts;
                    const int64_t place = token % PACKED + t;
                    for (int64_t i = 0; i < W; i += steps) {
                        uint32_t word = 0;
                        for (int64_t j = i; j < i + steps && j < W; ++j) word |= code[j];
                        std::memcpy(codes + (place / W * dim + c + i) / steps * ROW + 4 * (place % W), &word, 4);
                    }
                }
            }
        }
    });
}

// Least and most of the channels `in` .. of one token, in every lane.
template <class T>
inline void span_of(const T* in, int64_t channels, vf& least, vf& most) {
    vf low = get(in), high = low;
    for (int64_t c = W; c < channels; c += W) {
        const vf x = get(in + c);
        low = vmin(x, low), high = vmax(x, high);
    }
    least = splat(-max(-low)), most = splat(max(high));
}

template <class T>
void pack_keys_by_token(const PackArgs& a) {
    const Form form = Form::keys(a.pool);
    const int64_t dim = form.dim, G = form.group, steps = 32 / form.bits, items = a.pool.lanes_count * a.count;
    const float top = float((1 << form.bits) - 1);
    vu shifts;
    for (int i = 0; i < W; ++i) shifts[i] = uint32_t(shift_of(form.bits, i % steps));
    parallel(items * dim > 16384 ? a.threads : 1, [&](const Team& team) {
        for (int64_t item = team.from(items); item < team.to(items); ++item) {
            const int64_t lane = item / a.count, t = item % a.count, token = a.first[lane] + t, place = token % PACKED;
            const T* in = static_cast<const T*>(a.in) + lane * a.lane_stride + t * a.token_stride;
            Lane::Cursor at;
            const PackedPage<T> page = form.page<T>(a.pool.pages, a.pool.lanes[lane], token, at);
            for (int64_t from = 0; from < dim; from += G) {
                const int64_t to = std::min(from + G, dim);
                vf least, most;
                span_of(in + from, to - from, least, most);
                const vf scale = scale_of<T>(least, most, top);
                T row[W];
                put(row, scale);
                const_cast<T*>(page.scale)[from / G * PACKED + place] = row[0];
                put(row, least);
                const_cast<T*>(page.minimum)[from / G * PACKED + place] = row[0];
                for (int64_t c = from; c < to; c += W) {
                    const vu code = codes_of<T>(get(in + c), least, scale, top) << shifts;
                    for (int64_t i = 0; i < W; i += steps) {
                        uint32_t word = 0;
                        for (int64_t j = i; j < i + steps && j < W; ++j) word |= code[j];
                        uint8_t* to_word = const_cast<uint8_t*>(page.codes) + (place / W * dim + c + i) / steps * ROW;
                        std::memcpy(to_word + 4 * (place % W), &word, 4);
                    }
                }
            }
        }
    });
}

template <class T>
void pack_values(const PackArgs& a) {
    const Form form = Form::values(a.pool);
    const int64_t dim = form.dim, G = form.group, steps = 32 / form.bits, lanes = a.pool.lanes_count;
    const float top = float((1 << form.bits) - 1);
    // Tokens of one row of codes must not be written by two threads, so lanes are shared out, not tokens.
    parallel(lanes * a.count * dim > 16384 ? a.threads : 1, [&](const Team& team) {
        for (int64_t lane = team.from(lanes); lane < team.to(lanes); ++lane) {
            Lane::Cursor at;
            for (int64_t t = 0; t < a.count; ++t) {
                const int64_t token = a.first[lane] + t, place = token % PACKED;
                const T* in = static_cast<const T*>(a.in) + lane * a.lane_stride + t * a.token_stride;
                const PackedPage<T> page = form.page<T>(a.pool.pages, a.pool.lanes[lane], token, at);
                const uint32_t shift = uint32_t(shift_of(form.bits, place % steps)), mask = (1u << form.bits) - 1;
                for (int64_t from = 0; from < dim; from += G) {
                    const int64_t to = std::min(from + G, dim);
                    vf low = get(in + from), high = low;
                    for (int64_t c = from + W; c < to; c += W) {
                        const vf x = get(in + c);
                        low = vmin(x, low), high = vmax(x, high);
                    }
                    const vf least = splat(-max(-low)), scale = scale_of<T>(least, splat(max(high)), top);
                    T row[W];
                    put(row, scale);
                    const_cast<T*>(page.scale)[from / G * PACKED + place] = row[0];
                    put(row, least);
                    const_cast<T*>(page.minimum)[from / G * PACKED + place] = row[0];
                    for (int64_t c = from; c < to; c += W) {
                        uint8_t* to_row = const_cast<uint8_t*>(page.codes) + (c / W * PACKED + place) / steps * ROW;
                        const vu code = codes_of<T>(get(in + c), least, scale, top);
                        store(to_row, (load<vu>(to_row) & ~(mask << shift)) | code << shift);
                    }
                }
            }
        }
    });
}

inline float number(const f32* p) { return p->raw; }
inline float number(const bf16* p) {
    const uint32_t bits = uint32_t(p->raw) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline float number(const f16* p) { return half_to_float(p->raw); }

// The token at a place of a page as it decodes, [dim].
template <class T, int BITS, bool KEYS>
inline void decode_token(const PackedPage<T>& page, const Form& form, int64_t place, T* out) {
    constexpr int64_t steps = STEPS<BITS>;
    constexpr uint32_t mask = (1u << BITS) - 1;
    const int64_t dim = form.dim, G = form.group;
    const vu own = lane_numbers();
    vu shifts;
    for (int i = 0; i < W; ++i) shifts[i] = uint32_t(shift_of(BITS, i % steps));
    const int64_t params = form.by_token ? place : place / G * dim;
    const uint8_t* codes = page.codes + (KEYS ? place / W * dim / steps * ROW + 4 * (place % W) : place / steps * ROW);
    for (int64_t c = 0; c < dim; c += W) {
        vu words{};
        if (KEYS) {
            for (int64_t j = 0; j < W; j += steps, codes += ROW) {
                uint32_t word;
                std::memcpy(&word, codes, 4);
                words = own >= uint32_t(j) ? vu{} + word : words;
            }
            words >>= shifts;
        } else {
            words = load<vu>(codes) >> uint32_t(shift_of(BITS, place % steps));
            codes += PACKED / steps * ROW;
        }
        const vf code = __builtin_convertvector((vi)(words & mask), vf);
        if (form.by_token) {
            const int64_t g = params + c / G * PACKED;
            put(out + c, code * splat(number(page.scale + g)) + splat(number(page.minimum + g)));
        } else {
            put(out + c, code * get(page.scale + params + c) + get(page.minimum + params + c));
        }
    }
}

// Tokens [lanes, count, dim] as they decode: those listed for the lane's sequence, or `start` and what follows.
template <class T, int BITS, bool KEYS>
void unpack(const UnpackArgs& a) {
    const Form form = KEYS ? Form::keys(a.pool) : Form::values(a.pool);
    const int64_t dim = form.dim, items = a.pool.lanes_count * a.count;
    parallel(items * dim > 16384 ? a.threads : 1, [&](const Team& team) {
        Lane::Cursor at;
        int64_t last = -1;
        for (int64_t item = team.from(items); item < team.to(items); ++item) {
            const int64_t lane = item / a.count, i = item % a.count;
            if (lane != last) at = Lane::Cursor{}, last = lane;
            const int64_t token = a.index ? a.index[lane / a.lanes_per_sequence * a.count + i] : a.start + i;
            const PackedPage<T> page = form.page<T>(a.pool.pages, a.pool.lanes[lane], token, at);
            decode_token<T, BITS, KEYS>(page, form, token % PACKED, static_cast<T*>(a.out) + lane * a.out_stride + i * dim);
        }
    });
}

#define KVOTE_BY_BITS(name, kernel, Args, pool) \
    template <class T>                          \
    void name(const Args& a) {                  \
        switch (a.pool.bits) {                  \
            case 2: return kernel<T, 2>(a);     \
            case 4: return kernel<T, 4>(a);     \
            case 8: return kernel<T, 8>(a);     \
        }                                       \
    }

template <class T, int BITS>
void unpack_either(const UnpackArgs& a) {
    a.are_keys ? unpack<T, BITS, true>(a) : unpack<T, BITS, false>(a);
}

KVOTE_BY_BITS(unpack_tokens, unpack_either, UnpackArgs, pool)

template <class T>
void pack(const PackArgs& a) {
    if (!a.are_keys) return pack_values<T>(a);
    a.pool.by_token ? pack_keys_by_token<T>(a) : pack_keys<T>(a);
}
