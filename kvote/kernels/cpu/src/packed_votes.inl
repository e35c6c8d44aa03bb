// Votes on packed tokens, and on those behind them that are not: a tile's packed tokens are scored from their codes.

// Weights that come of products rounded to bfloat16 are kept in 16 bits.
template <class T, int BITS>
struct ByCodes {
    using U = Weight<T, BITS>;
    using Stored = typename std::conditional<std::is_same<U, float>::value, f32, weight16>::type;
    const PackedSelectArgs& p;
    const VotesArgs& a = p.select.votes;
    Form form = Form::keys(p.keys);
    ByKeys<T> raw{a};
    Folded<U>* folded{};
    float* beside{};  // scores of what is not packed

    // Tokens that are scored there at a time: a page less than a row has room for.
    static constexpr int64_t SOME = TILE - PAGE;
    int64_t room() const { return raw.padded * TILE; }

    std::size_t bytes() const {
        return raw.bytes() + Workspace::bytes<Folded<U>>(a.threads) + Workspace::bytes<float>(a.threads * room());
    }
    void prepare(Workspace& space) {
        raw.prepare(space);
        folded = space.take<Folded<U>>(a.threads);
        beside = space.take<float>(a.threads * room());
    }
    void load(const Team& team) const { raw.load(team); }

    void score(const Team& team, int64_t h, int64_t base, int64_t from, int64_t to, float* scores) const {
        const int64_t edge = std::min(to, p.packed);
        if (from < edge) score_packed(folded[team.rank], h, base, from, edge, to, scores);
        float* own = beside + team.rank * room();
        for (int64_t t = std::max(from, edge); t < to; t += SOME) {
            const int64_t end = std::min(to, t + SOME);
            score_raw(h, t - p.first, end - p.first, own);
            for (int64_t row = 0; row < raw.rows; ++row)
                std::memcpy(scores + row * TILE + t - base, own + row * TILE, 4 * (end - t));
        }
    }

    // Whole groups of keys are scored, so that this comes before what lies behind them.
    void score_packed(Folded<U>& own, int64_t h, int64_t base, int64_t from, int64_t edge, int64_t to,
                      float* scores) const {
        Lane::Cursor at, then;
        auto page = form.page<T>(p.keys.pages, p.keys.lanes[h], from, at);
        for (int64_t token = from / PACKED * PACKED; token < edge; token += PACKED) {
            // Read next are this lane's next page, the same tokens of the next lane, or the first lane's next tile.
            const bool last = token + PACKED >= edge, more = h + 1 < a.kv_heads;
            const int64_t lane = !last ? h : more ? h + 1 : 0, ahead = !last ? token + PACKED : more ? from : to;
            auto next = page;
            if (ahead < std::min(a.stop, p.packed))
                next = form.page<T>(p.keys.pages, p.keys.lanes[lane], ahead, last ? then : at);
            page.ahead = next.codes - page.codes;
            const int64_t begin = std::max<int64_t>(from - token, 0), end = std::min(edge - token, PACKED);
            by_few(raw.rows, [&](int64_t q, auto Q) {
                score_page<T, BITS, decltype(Q)::value>(page, form, a.query + (h * raw.rows + q) * a.dim, begin, end, own,
                                                        scores + q * TILE + (token - base), TILE, LOG2_E);
            });
            page = next;
        }
    }

    // Rows of scores, TILE apart, of tokens from .. to of a lane of what is not packed. Four are scored at a time, of
    // which the last may be none: they are written over by what follows.
    void score_raw(int64_t h, int64_t from, int64_t to, float* out) const {
        Lane::Cursor at;
        for (int64_t t = from; t < to;) {
            const int64_t stretch = a.lanes[h].stretch(t, at), end = stretch < to - t ? t + stretch : to;
            score_exactly(static_cast<const T*>(a.keys) + a.lanes[h].slot(t, at) * a.dim, end - t,
                          raw.queries + h * raw.padded * a.dim, raw.padded, a.dim, out + (t - from));
            t = end;
        }
    }
};

template <class T, int BITS>
void packed_select_of(const PackedSelectArgs& p) {
    const VotesArgs& v = p.select.votes;
    if (!p.select.index) return votes_of(v, ByCodes<T, BITS>{p}, 0, Nothing{});
    Winners<T> winners{p.select};
    votes_of(v, ByCodes<T, BITS>{p}, winners.bytes(), winners);
}

KVOTE_BY_BITS(packed_select, packed_select_of, PackedSelectArgs, keys)
