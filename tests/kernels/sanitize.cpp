// Calls every kernel of every instruction set with ragged pages, odd shapes and one to four threads, for the sanitizers
// to watch (`make sanitize`). Every buffer is exactly as large as its contract says, and more threads must give the same
// bits as one. Whether answers are right is what tests/kernels/test_cpu.py is for.
#include "sanitize.hpp"

namespace {

// Keys and values in a few bits, in pools and with lists of their own.
void try_packed(const Kernels& kernels) {
    const Type type = one_of({Type::f32, Type::bf16, Type::f16});
    const int64_t dim = one_of<int64_t>({16, 32, 64, 80, 96, 128, 256}), heads = any(1, 2), sequences = any(1, 2);
    const int64_t groups = one_of<int64_t>({1, 2, 3, 4, 7, 8, 16}), bits = one_of<int64_t>({2, 4, 8});
    const int64_t group = one_of<int64_t>({32, 64, 128}), size = type == Type::f32 ? 4 : 2, lanes = sequences * heads;
    const int64_t whole = group * any(1, 8), n = whole - any(0, group - 1);
    const Pages pages(lanes, (whole + PACKED - 1) / PACKED * PAGE);
    const int64_t codes = PACKED * dim * bits / 8;
    Bytes pools[2] = {Bytes(pages.pages * (codes + 2 * PACKED / group * dim * size)),
                      Bytes(pages.pages * (codes + 2 * (dim + group - 1) / group * PACKED * size))};
    PackedPool views[2];
    const bool wild = any(0, 9) == 0;
    for (const bool are_keys : {true, false}) {
        Bytes& pool = pools[!are_keys];
        const int64_t count = are_keys ? whole : n;
        const Bytes in = elements(lanes * count * dim, type, wild);
        const std::vector<int64_t> first(lanes, 0);
        views[!are_keys] = {pool.data(), type, pages.lanes.data(), lanes, bits, group, dim, false};
        try_threads(kernels, "pack", [&](int threads) {
            std::fill(pool.begin(), pool.end(), uint8_t(255));
            kernels.pack({views[!are_keys], are_keys, in.data(), count * dim, dim, count, first.data(), threads});
            return pool;
        });
        const int64_t m = any(0, n);
        std::vector<int64_t> index;
        for (int64_t i = 0; i < sequences; ++i)
            for (int64_t token : ascending(m, n)) index.push_back(token);
        for (const int64_t* list : {static_cast<const int64_t*>(nullptr), static_cast<const int64_t*>(index.data())})
            try_threads(kernels, "unpack", [&](int threads) {
                Bytes out(lanes * m * dim * size);
                kernels.unpack({views[!are_keys], are_keys, list, heads, n - m, m, out.data(), m * dim, threads});
                return out;
            });
    }
    const int64_t start = any(0, n - 1), stop = any(start + 1, n);
    const auto query = floats(lanes * groups * dim);
    const float softcap = any(0, 1) ? 3.0f : 0.0f;
    const int64_t behind = any(0, 1) * any(1, 300);
    const Pages raw(lanes, behind);
    const Bytes raw_keys = elements(raw.slots() * dim, type, wild), raw_values = elements(raw.slots() * dim, type, wild);
    const int64_t skipped = any(0, behind);
    const RecentTokens recent{raw_keys.data(), raw_values.data(), raw.lanes.data(), heads, skipped, behind - skipped};
    try_threads(kernels, "packed_attend", [&](int threads) {
        std::vector<float> out(lanes * groups * dim), lse(lanes * groups);
        kernels.packed_attend({query.data(), views[0], views[1], recent, groups, start, stop, 0.1f, softcap,
                               out.data(), lse.data(), threads});
        Bytes answer;
        keep(answer, out);
        keep(answer, lse);
        return answer;
    });
    try_threads(kernels, "packed_scores", [&](int threads) {
        std::vector<float> out(lanes * groups * (stop - start));
        kernels.packed_scores({query.data(), views[0], groups, start, stop, out.data(), threads});
        Bytes answer;
        keep(answer, out);
        return answer;
    });

    // The first `packed` tokens are read from their codes, all others from raw pages that begin with token `first`.
    const int64_t packed = any(0, n), first = any(0, packed), all = packed + behind;
    const Pages tail(lanes, all - first);
    const Bytes tail_keys = elements(tail.slots() * dim, type, wild), tail_values = elements(tail.slots() * dim, type, wild);
    if (all) {
        const int64_t from = any(0, all - 1), limit = any(from + 1, all), k = any(1, limit - from);
        for (const bool wins : {false, true})
            try_threads(kernels, wins ? "packed_select" : "packed votes", [&](int threads) {
                std::vector<float> votes(limit - from);
                std::vector<int64_t> index(k, -1);
                PackedPool own = views[0];
                own.lanes_count = heads;
                kernels.packed_select({{{query.data(), tail_keys.data(), type, tail.lanes.data(), nullptr, 0, heads,
                                         groups, 1, dim, from, limit, &limit, wins ? nullptr : votes.data(), threads},
                                        k, 0, wins ? index.data() : nullptr},
                                       own, packed, first});
                Bytes answer;
                keep(answer, votes);
                keep(answer, index);
                return answer;
            });
    }
    const int64_t listed = any(0, all), pairs = any(0, dim / 2);
    std::vector<int64_t> lists;
    for (int64_t i = 0; i < sequences; ++i)
        for (int64_t token : ascending(listed, all)) lists.push_back(token);
    const std::vector<int64_t> ends(sequences, packed), begins(sequences, first);
    const auto cos = floats(listed * pairs), sin = floats(listed * pairs);
    const bool interleaved = any(0, 1);
    try_threads(kernels, "packed_decode", [&](int threads) {
        std::vector<float> out(lanes * groups * dim), lse(lanes * groups);
        kernels.packed_decode({{query.data(), tail_keys.data(), tail_values.data(), type, tail.lanes.data(), lanes,
                                groups, dim, lists.data(), heads, 0, listed, cos.data(), sin.data(), pairs, interleaved,
                                0.1f, softcap, out.data(), lse.data(), threads, nullptr},
                               views[0], views[1], ends.data(), begins.data()});
        Bytes answer;
        keep(answer, out);
        keep(answer, lse);
        return answer;
    });
}

// The decode step of one sequence: tokens are held, one comes, and all or a selection of them are read.
void try_step(const Kernels& kernels) {
    const Type type = one_of({Type::f32, Type::bf16, Type::f16});
    const int64_t dim = one_of<int64_t>({16, 64, 80, 128, 256}), heads = any(1, 3), groups = one_of<int64_t>({1, 3, 4, 16});
    const int64_t length = one_of<int64_t>({0, 1, 63, 64, 500, 2100}), rows = heads * groups;
    const int64_t bits = one_of<int64_t>({0, 4, 8}), pairs = any(0, 3) ? any(1, dim / 2) : 0;
    const Pages pages(heads, length + 1);
    const Bytes query = elements(rows * dim, type, false), key = elements(heads * dim, type, false);
    const Bytes value = elements(heads * dim, type, false), keys = elements(pages.slots() * dim, type, false);
    const Bytes values = elements(pages.slots() * dim, type, false);
    Bytes sketch(bits ? sketch_bytes(pages.slots(), dim, bits) : 0);
    if (bits) kernels.sketch({keys.data(), type, sketch.data(), bits, dim, pages.lanes.data(), heads, 0, length, 1});
    const int64_t sinks = any(0, length), edge = any(sinks, length), top_k = pairs && edge > sinks ? any(1, edge - sinks) : 0;
    const int64_t asked_at = any(0, 9), most = std::max(length, asked_at) + 1, nominate = bits == 4 ? any(0, length) : 0;
    const auto back_cos = floats(pairs), back_sin = floats(pairs), cos = floats(most * pairs), sin = floats(most * pairs);
    const auto past = floats(rows * dim);
    std::vector<int64_t> kept = ascending(top_k, edge - sinks);
    for (int64_t& token : kept) token += sinks;
    const float theta = one_of({-2.0f, 0.0f, 2.0f});
    const bool reuses = any(0, 1);
    try_threads(kernels, "step", [&](int threads) {
        Bytes held_keys = keys, held_values = values, held_sketch = sketch, answer;
        std::vector<int32_t> positions(pages.slots());
        std::vector<float> asked(top_k ? rows * dim : 0), out(rows * dim), lse(rows);
        std::vector<int64_t> winners(top_k);
        bool reused = false;
        kernels.step({query.data(), key.data(), value.data(), type, dim, dim, dim, 7, pages.lanes.data(), heads, groups,
                      dim, length, held_keys.data(), held_values.data(), positions.data(),
                      bits ? held_sketch.data() : nullptr, bits, back_cos.data(), back_sin.data(), cos.data(), sin.data(),
                      pairs, true, top_k, sinks, edge, nominate, asked_at, theta, reuses && top_k ? past.data() : nullptr,
                      reuses && top_k ? kept.data() : nullptr, asked.data(), winners.data(), &reused, 0.1f, 0.0f,
                      out.data(), lse.data(), threads});
        for (const Bytes* part : {&held_keys, &held_values, &held_sketch}) keep(answer, *part);
        keep(answer, positions);
        keep(answer, winners);
        keep(answer, asked);
        keep(answer, out);
        keep(answer, lse);
        return answer;
    });
}

void try_all(const Kernels& kernels) {
    try_packed(kernels);
    try_step(kernels);
    const Type type = one_of({Type::f32, Type::bf16, Type::f16});
    const int64_t dim = one_of<int64_t>({16, 32, 64, 80, 128, 256}), heads = any(1, 3), sequences = any(1, 3);
    const int64_t groups = one_of<int64_t>({1, 2, 3, 4, 7, 8, 16}), bits = one_of<int64_t>({4, 8});
    const int64_t n = one_of<int64_t>({1, 63, 64, 65, 500, 2100, 4200}), count = any(0, n), pairs = any(0, dim / 2);
    const bool wild = any(0, 9) == 0, interleaved = any(0, 1);
    const int64_t size = type == Type::f32 ? 4 : 2, lanes = sequences * heads;
    const Pages pages(lanes, n);
    const Bytes keys = elements(pages.slots() * dim, type, wild), values = elements(pages.slots() * dim, type, wild);

    const int64_t start = any(0, n - 1), selections = any(1, 3);
    std::vector<int64_t> limits(selections);
    for (int64_t& limit : limits) limit = any(start + 1, n);
    const int64_t stop = *std::max_element(limits.begin(), limits.end());
    const int64_t fewest = *std::min_element(limits.begin(), limits.end()) - start;
    auto query = floats(lanes * groups * selections * dim);
    for (float& x : query)
        if (wild && any(0, 99) == 0) x = one_of({INFINITY, NAN, 1e-42f, 3e38f});
    const auto cos = floats(std::max(count, n) * pairs * sequences), sin = floats(std::max(count, n) * pairs * sequences);

    Bytes sketches(sketch_bytes(pages.slots(), dim, bits));
    try_threads(kernels, "sketch", [&](int threads) {
        kernels.sketch({keys.data(), type, sketches.data(), bits, dim, pages.lanes.data(), lanes, start, n, threads});
        return sketches;
    });
    for (const uint8_t* sketch : {static_cast<const uint8_t*>(nullptr), static_cast<const uint8_t*>(sketches.data())}) {
        std::vector<float> votes(selections * (stop - start));
        auto args = [&](int threads) {
            return VotesArgs{query.data(), keys.data(), type, pages.lanes.data(), sketch, bits, heads, groups,
                             selections, dim, start, stop, limits.data(), votes.data(), threads};
        };
        try_threads(kernels, "votes", [&](int threads) {
            kernels.votes(args(threads));
            Bytes answer;
            keep(answer, votes);
            return answer;
        });
        const int64_t k = any(1, fewest), nominate = sketch ? any(0, 1) * any(k, fewest) : 0;
        try_threads(kernels, "select", [&](int threads) {
            std::vector<int64_t> index(selections * k, -1);
            VotesArgs given = args(threads);
            if (any(0, 1)) given.votes = nullptr;
            kernels.select({given, k, nominate, index.data()});
            Bytes answer;
            keep(answer, index);
            return answer;
        });
    }

    const int64_t rows = any(1, 5), many = one_of<int64_t>({1, 15, 100, 5000}), k = any(1, many);
    auto ballots = floats(rows * many);
    for (float& x : ballots)
        if (any(0, 9) == 0) x = one_of({-INFINITY, NAN, 0.0f, -0.0f});
    try_threads(kernels, "top_k", [&](int threads) {
        std::vector<int64_t> index(rows * k);
        kernels.top_k({ballots.data(), rows, many, k, index.data(), threads});
        Bytes answer;
        keep(answer, index);
        return answer;
    });

    std::vector<int64_t> lists;
    for (int64_t i = 0; i < sequences; ++i)
        for (int64_t token : ascending(count, n)) lists.push_back(token);
    const float softcap = one_of({0.0f, 5.0f});
    for (const int64_t* index : {static_cast<const int64_t*>(nullptr), static_cast<const int64_t*>(lists.data())})
        try_threads(kernels, "decode", [&](int threads) {
            std::vector<float> out(lanes * groups * dim), lse(lanes * groups);
            kernels.decode({query.data(), keys.data(), values.data(), type, pages.lanes.data(), lanes, groups, dim,
                            index, heads, n - count, count, cos.data(), sin.data(), pairs, interleaved, 0.1f, softcap,
                            out.data(), lse.data(), threads, nullptr});
            Bytes answer;
            keep(answer, out);
            keep(answer, lse);
            return answer;
        });
    std::vector<int64_t> ends;
    for (int64_t i = 0; i < lanes; ++i) ends.push_back(i % 3 ? n - count / (i + 1) : 0);
    try_threads(kernels, "decode of lanes that end apart", [&](int threads) {
        std::vector<float> out(lanes * groups * dim), lse(lanes * groups);
        kernels.decode({query.data(), keys.data(), values.data(), type, pages.lanes.data(), lanes, groups, dim, nullptr,
                        heads, n - count, count, cos.data(), sin.data(), pairs, interleaved, 0.1f, softcap, out.data(),
                        lse.data(), threads, ends.data()});
        Bytes answer;
        keep(answer, out);
        keep(answer, lse);
        return answer;
    });
    try_threads(kernels, "gather", [&](int threads) {
        Bytes out_keys(heads * count * dim * size), out_values(heads * count * dim * size), answer;
        kernels.gather({keys.data(), values.data(), type, pages.lanes.data(), heads, dim, count, lists.data(),
                        cos.data(), sin.data(), pairs, interleaved, out_keys.data(), out_values.data(), threads});
        keep(answer, out_keys);
        keep(answer, out_values);
        return answer;
    });

    // Rows that lie [sequences, n, heads, dim], as a model's projections leave them.
    const Bytes fresh = elements(lanes * n * dim, type, wild);
    const bool shared = any(0, 1);
    try_threads(kernels, "turn", [&](int threads) {
        Bytes out(lanes * n * dim * size);
        kernels.turn({fresh.data(), type, sequences, heads, n, dim, n * heads * dim, dim, heads * dim, cos.data(),
                      sin.data(), shared ? 0 : n, pairs, interleaved, out.data(), threads});
        return out;
    });
    std::vector<int64_t> positions(sequences * count, 7), first(lanes);
    for (int64_t& at : first) at = any(0, n - count);
    try_threads(kernels, "append", [&](int threads) {
        Bytes to_keys(keys.size()), to_values(keys.size()), to_sketches(sketches.size()), answer;
        std::vector<int32_t> to_positions(pages.slots());
        const int64_t s = n * heads * dim;
        kernels.append({fresh.data(), fresh.data(), type, {s, dim, heads * dim}, {s, dim, heads * dim},
                        positions.data(), count, sequences, heads, count, dim, dim, pages.lanes.data(), first.data(),
                        to_keys.data(), to_values.data(), to_positions.data(), bits == 4 ? to_sketches.data() : nullptr,
                        bits, threads});
        for (const Bytes* part : {&to_keys, &to_values, &to_sketches}) keep(answer, *part);
        keep(answer, to_positions);
        return answer;
    });

    // Rows of every lane: [groups, selections], with what each saw.
    std::vector<int64_t> edges;
    for (int64_t g = 0; g < groups; ++g) edges.insert(edges.end(), limits.begin(), limits.end());
    const std::vector<float> lse = floats(lanes * groups * selections);
    try_threads(kernels, "attention_mass", [&](int threads) {
        std::vector<float> mass(lanes * (stop - start));
        kernels.attention_mass({query.data(), lse.data(), keys.data(), type, pages.lanes.data(), lanes,
                                groups * selections, dim, start, stop, edges.data(), 0.1f, softcap, mass.data(),
                                threads});
        Bytes answer;
        keep(answer, mass);
        return answer;
    });
    for (const bool labels : {false, true})
        try_threads(kernels, labels ? "label_scores" : "scores", [&](int threads) {
            const int64_t rows = groups * selections;
            std::vector<float> out(lanes * rows * (stop - start));
            const auto run = labels ? kernels.label_scores : kernels.scores;
            run({query.data(), keys.data(), type, pages.lanes.data(), lanes, rows, dim, start, stop, out.data(),
                 threads});
            Bytes answer;
            keep(answer, out);
            return answer;
        });
    // Keys of one sequence, channel by channel.
    const int64_t kept = any(1, dim), stride = (kept + 31) / 32 * 32, thin_pages = (n + PAGE - 1) / PAGE;
    const Bytes thin = elements(heads * thin_pages * kept * PAGE, type, wild);
    const Bytes thin_values = elements(heads * n * dim, type, wild);
    const std::vector<float> thin_query = floats(heads * groups * stride);
    const int64_t thin_stop = any(1, n);
    try_threads(kernels, "thin_decode", [&](int threads) {
        std::vector<float> out(heads * groups * dim), lse(heads * groups);
        kernels.thin_decode({thin_query.data(), thin.data(), thin_values.data(), type, heads, groups, stride, kept, dim,
                             thin_pages, n, thin_stop, 0.1f, softcap, out.data(), lse.data(), threads});
        Bytes answer;
        keep(answer, out);
        keep(answer, lse);
        return answer;
    });
    try_threads(kernels, "read_all", [&](int threads) {
        kernels.read_all(reinterpret_cast<const char*>(keys.data()), int64_t(keys.size()), threads);
        return Bytes{};
    });
}

std::vector<const Kernels*> runnable() {
    std::vector<const Kernels*> sets{&scalar_kernels};
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        sets.push_back(&avx2_kernels);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni")) {
        sets.push_back(&avx512_kernels);
        if (__builtin_cpu_supports("avx512bf16")) sets.push_back(&avx512_bf16_kernels);
    }
#endif
    return sets;
}

}  // namespace

int main(int count, char** words) {
    const int rounds = count > 1 ? std::atoi(words[1]) : 40;
    for (const Kernels* kernels : runnable()) {
        chance.seed(1);
        for (int round = 0; round < rounds; ++round) try_all(*kernels);
        std::printf("%s: %d rounds\n", kernels->name, rounds);
    }
}
