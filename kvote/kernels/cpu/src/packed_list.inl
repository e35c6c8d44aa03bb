// Attention of one query position per sequence over a list of tokens, of which the first are packed: those are decoded
// and rotated a block at a time, in cache, while what the next key head is decoded from comes from memory.

// Asks for what a token is decoded from. `before`: the place on the same page that was asked for last, or -1.
template <class T, int BITS, bool KEYS>
inline void ask_for_token(const PackedPage<T>& page, const Form& form, int64_t place, int64_t before) {
    constexpr int64_t steps = STEPS<BITS>;
    const auto ask = [](const void* p) { __builtin_prefetch(p, 0, 2); };
    const auto fresh = [&](int64_t size) { return before < 0 || before / size != place / size; };
    const int64_t dim = form.dim, G = form.group;
    if (KEYS && fresh(W))
        for (int64_t i = 0; i < dim / steps; ++i) ask(page.codes + (place / W * dim / steps + i) * ROW);
    if (!KEYS && fresh(steps))
        for (int64_t c = 0; c < dim; c += W) ask(page.codes + (c / W * PACKED + place) / steps * ROW);
    if (form.by_token) {
        if (fresh(ROW / int64_t(sizeof(T))))
            for (int64_t g = 0; g < dim; g += G) {
                ask(page.scale + g / G * PACKED + place);
                ask(page.minimum + g / G * PACKED + place);
            }
    } else if (fresh(G)) {
        for (int64_t c = 0; c < dim; c += ROW / int64_t(sizeof(T))) {
            ask(page.scale + place / G * dim + c);
            ask(page.minimum + place / G * dim + c);
        }
    }
}

// One lane's packed pages, token after token.
template <class T>
struct PackedWalk {
    const PackedPool& pool;
    const Form& form;
    int64_t lane;
    Lane::Cursor at{};
    int64_t number = -1, before = -1;  // of the page, and the place on it that was looked at last
    PackedPage<T> page{};

    int64_t go(int64_t token) {
        if (token / PACKED != number) {
            number = token / PACKED, before = -1;
            page = form.page<T>(pool.pages, pool.lanes[lane], token, at);
        }
        return token % PACKED;
    }
};

// Tokens from .. to of the list of one sequence, in all its lanes.
template <class T, int BITS>
void packed_list_part(const PackedDecodeArgs& p, const Form& key_form, const Form& value_form, int64_t sequence,
                      int64_t from, int64_t to, QueryRows* queries, T* decoded, const Partial* parts) {
    const DecodeArgs& a = p.list;
    const T *raw_keys = static_cast<const T*>(a.keys), *raw_values = static_cast<const T*>(a.values);
    const int64_t heads = a.lanes_per_sequence, dim = a.dim, packed = p.packed[sequence], first = p.first[sequence];
    const int64_t* index = a.index + sequence * a.count;
    begin_part(a, sequence, queries, parts, 1);
    Rows<T> rows;
    const Rows<T> none{};
    const auto ask = [&](int64_t token, PackedWalk<T>& key, PackedWalk<T>& value, Lane::Cursor& at) {
        if (token >= packed) {
            const int64_t slot = a.lanes[key.lane].slot(token - first, at);
            prefetch_row(raw_keys + slot * dim, dim), prefetch_row(raw_values + slot * dim, dim);
            return;
        }
        const int64_t place = key.go(token);
        value.go(token);
        ask_for_token<T, BITS, true>(key.page, key_form, place, key.before);
        ask_for_token<T, BITS, false>(value.page, value_form, place, value.before);
        key.before = value.before = place;
    };
    for (int64_t i = from; i < to; i += BLOCK) {
        rows.live = std::min(BLOCK, to - i);
        for (int64_t h = 0; h < heads; ++h) {
            const int64_t lane = sequence * heads + h, ahead = h + 1 < heads ? lane + 1 : sequence * heads;
            const int64_t then = h + 1 < heads ? i : i + BLOCK, due = std::min(BLOCK, to - then);
            PackedWalk<T> key{p.keys, key_form, lane}, value{p.values, value_form, lane};
            PackedWalk<T> next_key{p.keys, key_form, ahead}, next_value{p.values, value_form, ahead};
            Lane::Cursor at, next_at;
            for (int64_t t = 0; t < rows.live; ++t) {
                if (t < due) ask(index[then + t], next_key, next_value, next_at);
                const int64_t token = index[i + t];
                T *key_row = decoded + t * dim, *value_row = decoded + (BLOCK + t) * dim;
                if (token < packed) {
                    const int64_t place = key.go(token);
                    value.go(token);
                    decode_token<T, BITS, true>(key.page, key_form, place, key_row);
                    decode_token<T, BITS, false>(value.page, value_form, place, value_row);
                    rows.keys[t] = key_row, rows.values[t] = value_row;
                } else {
                    const int64_t slot = a.lanes[lane].slot(token - first, at);
                    rows.keys[t] = raw_keys + slot * dim, rows.values[t] = raw_values + slot * dim;
                }
                if (a.pairs) {
                    const int64_t angle = (i + t) * a.pairs;
                    rotate_row(rows.keys[t], key_row, a.cos + angle, a.sin + angle, a.pairs, dim, a.interleaved);
                    rows.keys[t] = key_row;
                }
            }
            attend_block<T>(rows, queries[h], a, parts[h], none);
        }
    }
}

template <class T, int BITS>
void packed_decode_of(const PackedDecodeArgs& p) {
    const Form keys = Form::keys(p.keys), values = Form::values(p.values);
    decode_in_parts<T>(p.list, 2 * BLOCK, [&](int64_t sequence, int64_t from, int64_t to, QueryRows* queries, T* decoded,
                                              const Partial* parts) {
        packed_list_part<T, BITS>(p, keys, values, sequence, from, to, queries, decoded, parts);
    });
}

KVOTE_BY_BITS(packed_decode, packed_decode_of, PackedDecodeArgs, keys)
