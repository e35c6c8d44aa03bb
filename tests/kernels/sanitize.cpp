// Calls every kernel of every instruction set with ragged pages, odd shapes and one to four threads, for the sanitizers
// to watch (`make sanitize`). Every buffer is exactly as large as its contract says, and more threads must give the same
// bits as one. Whether answers are right is what tests/kernels/test_cpu.py is for.
#include "kernels.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

using namespace kvote;
using std::int32_t;
using std::int64_t;
using std::uint8_t;
using Bytes = std::vector<uint8_t>;

namespace {

std::mt19937 chance(1);
int64_t any(int64_t from, int64_t to) { return std::uniform_int_distribution<int64_t>(from, to)(chance); }
template <class T>
T one_of(std::initializer_list<T> all) {
    return all.begin()[any(0, int64_t(all.size()) - 1)];
}

std::vector<float> floats(int64_t count) {
    std::vector<float> out(count);
    std::normal_distribution<float> normal;
    for (float& x : out) x = normal(chance);
    return out;
}

// Elements of a storage type, all finite; now and then the bits are whatever they are, NaN and infinity among them.
Bytes elements(int64_t count, Type type, bool wild) {
    Bytes out(count * (type == Type::f32 ? 4 : 2));
    for (int64_t i = 0; i < count; ++i) {
        const float x = std::normal_distribution<float>()(chance);
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        if (wild) bits = uint32_t(chance());
        if (type == Type::f16 && !wild) bits = (bits & 0x80000000u) | uint32_t(any(0x2c00, 0x4000)) << 16;
        if (type == Type::f32) std::memcpy(&out[4 * i], &bits, 4);
        else out[2 * i] = uint8_t(bits >> 16), out[2 * i + 1] = uint8_t(bits >> 24);
    }
    return out;
}

// Lanes of `n` tokens over a pool of pages without a spare one, in runs of any length.
struct Pages {
    std::vector<std::vector<Run>> runs;
    std::vector<Lane> lanes;
    int64_t pages = 0;
    Pages(int64_t count, int64_t n) : runs(count) {
        std::vector<std::pair<int64_t, int64_t>> chunks;
        const int64_t most = one_of<int64_t>({1, 3, 1 << 20});
        for (int64_t lane = 0; lane < count; ++lane)
            for (int64_t left = (n + PAGE - 1) / PAGE; left;) {
                chunks.push_back({lane, any(1, std::min(left, most))});
                left -= chunks.back().second;
            }
        std::shuffle(chunks.begin(), chunks.end(), chance);
        for (auto [lane, length] : chunks) {
            if (runs[lane].empty() && any(0, 1)) runs[lane].push_back({pages, 0});
            runs[lane].push_back({pages, length});
            pages += length;
        }
        for (auto& of_lane : runs) lanes.push_back({of_lane.data(), int64_t(of_lane.size())});
    }
    int64_t slots() const { return pages * PAGE; }
};

std::vector<int64_t> ascending(int64_t count, int64_t n) {
    std::vector<int64_t> all(n);
    for (int64_t i = 0; i < n; ++i) all[i] = i;
    std::shuffle(all.begin(), all.end(), chance);
    all.resize(count);
    std::sort(all.begin(), all.end());
    return all;
}

template <class T>
void keep(Bytes& answer, const std::vector<T>& part) {
    const auto* from = reinterpret_cast<const uint8_t*>(part.data());
    answer.insert(answer.end(), from, from + part.size() * sizeof(T));
}

// Runs a kernel, which answers with the bytes it wrote, with one and with more threads.
void try_threads(const Kernels& kernels, const char* what, const std::function<Bytes(int threads)>& run) {
    const Bytes alone = run(1);
    for (int threads = 2; threads <= 4; ++threads)
        if (run(threads) != alone) {
            std::printf("%s %s: %d threads give other bits than one\n", kernels.name, what, threads);
            std::exit(1);
        }
}

int64_t sketch_bytes(int64_t slots, int64_t dim, int64_t bits) { return slots * (dim * bits / 8 + 2); }

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
}

void try_all(const Kernels& kernels) {
    try_packed(kernels);
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
