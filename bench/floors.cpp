/* How far the C++ kernels are from what this machine can do: cycles per token and key head where everything lies in
   cache, and the share of what its memory gives where nothing does. Geometry of Llama-3.1-8B, 131,072 tokens, bfloat16.

       g++ -O3 -std=c++17 -march=native -mprefer-vector-width=512 -ffp-contract=fast -fno-math-errno -Wno-psabi \
           -fopenmp -Ikvote/kernels/cpu/src bench/floors.cpp -o /tmp/floors && /tmp/floors 2

   The argument is the number of threads. Every call from memory follows a reading of 256 MiB, which evicts the caches and
   says what memory gives at that moment. Medians. */
#define KVOTE_ISA floors
#include <sys/mman.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "kernels.inl"

using namespace floors;

constexpr int64_t HEADS = 8, GROUPS = 4, DIM = 128, TOKENS = 131072, PAGES = TOKENS / PAGE * HEADS, SWEEP = 1 << 28;
constexpr int64_t SINKS = 128, WINDOW = 512, CHOSEN = 2048, NOMINATED = 4 * CHOSEN;

static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

static double median(std::vector<double> x) {
    std::sort(x.begin(), x.end());
    return x[x.size() / 2];
}

template <class T>
static T* memory(int64_t count) {
    const std::size_t bytes = (count * sizeof(T) + Workspace::HUGE - 1) / Workspace::HUGE * Workspace::HUGE;
    void* p = std::aligned_alloc(Workspace::HUGE, bytes);
    if (!p) std::abort();
    madvise(p, bytes, MADV_HUGEPAGE);
    std::memset(p, 1, bytes);
    return static_cast<T*>(p);
}

// A chain of additions takes a cycle each.
static double hertz() {
    std::vector<double> each;
    for (int i = 0; i < 5; ++i) {
        const double begin = now();
        long x = 1;
        for (long k = 0; k < 20000000; ++k) asm volatile("add $1,%0\nadd $1,%0\nadd $1,%0\nadd $1,%0" : "+r"(x));
        each.push_back(8e7 / (now() - begin));
    }
    return median(each);
}

struct Machine {
    int threads;
    double hertz;
    char* sweep;

    // Seconds of a call, and bytes per second read right before each.
    template <class Call>
    std::pair<double, double> timed(Call&& call) const {
        std::vector<double> seconds, rates;
        for (int i = 0; i < 15; ++i) {
            const double begin = now();
            read_all(sweep, SWEEP, threads);
            const double middle = now();
            call();
            seconds.push_back(now() - middle);
            rates.push_back(SWEEP / (middle - begin));
        }
        return {median(seconds), median(rates)};
    }

    template <class Call>
    void cached(const char* name, double tokens, Call&& call) const {
        const double cycles = timed(call).first * hertz * threads / tokens;
        std::printf("%-34s %6.1f cycles per token and key head\n", name, cycles);
    }

    template <class Call>
    void from_memory(const char* name, double tokens, double bytes, Call&& call) const {
        const auto [seconds, rate] = timed(call);
        std::printf("%-34s %6.1f cycles, %6.2f ms, %3.0f%% of %.1f GB/s\n", name, seconds * hertz * threads / tokens,
                    1e3 * seconds, 100 * bytes / seconds / rate, 1e-9 * rate);
    }
};

int main(int count, char** arguments) {
    const Machine machine{count > 1 ? std::atoi(arguments[1]) : 2, hertz(), memory<char>(SWEEP)};
    std::printf("%d threads at %.2f GHz\n", machine.threads, 1e-9 * machine.hertz);
    std::mt19937 random(1);
    bf16 *keys = memory<bf16>(PAGES * PAGE * DIM), *values = memory<bf16>(PAGES * PAGE * DIM);
    for (int64_t i = 0; i < PAGES * PAGE * DIM; ++i) {
        keys[i].raw = uint16_t(0x3c00 + (random() & 0x81ff));
        values[i].raw = uint16_t(0x3c00 + (random() & 0x81ff));
    }
    std::vector<float> query(HEADS * GROUPS * DIM), out(HEADS * GROUPS * DIM), lse(HEADS * GROUPS), votes(TOKENS);
    for (float& x : query) x = float(int(random() % 2001) - 1000) / 1000;

    // The same tokens behind each other, and 512 of them again and again, which stay in cache.
    std::vector<Run> runs(HEADS), again(TOKENS / PAGE / 8, Run{0, 8});
    std::vector<Lane> lanes(HEADS), hot(HEADS, Lane{again.data(), int64_t(again.size())});
    for (int64_t h = 0; h < HEADS; ++h) {
        runs[h] = {h * (TOKENS / PAGE), TOKENS / PAGE};
        lanes[h] = {&runs[h], 1};
    }
    constexpr double ALL = double(TOKENS) * HEADS;

    DecodeArgs dense{};
    dense.query = query.data(), dense.keys = keys, dense.values = values, dense.type = Type::bf16;
    dense.lanes_count = dense.lanes_per_sequence = HEADS, dense.groups = GROUPS, dense.dim = DIM, dense.count = TOKENS;
    dense.scale = 0.088f, dense.out = out.data(), dense.lse = lse.data(), dense.threads = machine.threads;
    dense.lanes = hot.data();
    machine.cached("dense, in cache", ALL, [&] { decode<bf16>(dense); });
    dense.lanes = lanes.data();
    machine.from_memory("dense", ALL, 4.0 * ALL * DIM, [&] { decode<bf16>(dense); });

    std::vector<int64_t> list;
    for (int64_t i = 0; i < CHOSEN; ++i) list.push_back(SINKS + int64_t(random() % (TOKENS - SINKS - WINDOW)));
    for (int64_t i = 0; i < SINKS; ++i) list.push_back(i);
    for (int64_t i = 0; i < WINDOW; ++i) list.push_back(TOKENS - WINDOW + i);
    std::sort(list.begin(), list.end());
    const double listed = double(list.size()) * HEADS;
    std::vector<float> cos(list.size() * DIM / 2, 0.8f), sin(list.size() * DIM / 2, 0.6f);
    DecodeArgs few = dense;
    few.index = list.data(), few.count = int64_t(list.size());
    machine.from_memory("list of 2,688", listed, 4 * listed * DIM, [&] { decode<bf16>(few); });
    few.cos = cos.data(), few.sin = sin.data(), few.pairs = DIM / 2;
    machine.from_memory("list of 2,688, rotated", listed, 4 * listed * DIM, [&] { decode<bf16>(few); });
    // Its keys and values alone, as rows that are read and not used.
    machine.from_memory("its rows, only read", listed, 4 * listed * DIM, [&] {
        parallel(machine.threads, [&](const Team& team) {
            for (int64_t h = team.from(HEADS); h < team.to(HEADS); ++h)
                for (const int64_t token : list)
                    for (const bf16* pool : {keys, values}) {
                        const auto* row = reinterpret_cast<const volatile char*>(pool + (h * TOKENS + token) * DIM);
                        for (int64_t c = 0; c < 2 * DIM; c += 64) static_cast<void>(row[c]);
                    }
        });
    });

    const int64_t limit = TOKENS - WINDOW;
    std::vector<int64_t> winners(CHOSEN);
    for (const int64_t bits : {8, 4}) {
        uint8_t* sketch = memory<uint8_t>(PAGES * PAGE / SKETCH_BLOCK * block_bytes(DIM, bits));
        std::vector<int64_t> slots(PAGES * PAGE);
        for (int64_t i = 0; i < PAGES * PAGE; ++i) slots[i] = i;
        sketch_slots<bf16>({keys, Type::bf16, sketch, bits, DIM, slots.data(), PAGES * PAGE, machine.threads});
        VotesArgs asked{};
        asked.query = query.data(), asked.keys = keys, asked.type = Type::bf16, asked.sketch = sketch;
        asked.sketch_bits = bits, asked.kv_heads = HEADS, asked.groups = GROUPS, asked.selections = 1, asked.dim = DIM;
        asked.start = SINKS, asked.stop = limit, asked.limits = &limit, asked.votes = votes.data();
        asked.threads = machine.threads, asked.lanes = hot.data();
        std::printf("%ld bits\n", long(bits));
        machine.cached("  votes, in cache", ALL, [&] { floors::votes<bf16>(asked); });
        asked.lanes = lanes.data();
        const double bytes = double(PAGES * PAGE / SKETCH_BLOCK * block_bytes(DIM, bits));
        machine.from_memory("  votes", ALL, bytes, [&] { floors::votes<bf16>(asked); });
        asked.votes = nullptr;
        const SelectArgs selected{asked, CHOSEN, bits == 4 ? NOMINATED : 0, winners.data()};
        machine.from_memory("  winners", ALL, bytes, [&] { select<bf16>(selected); });
        std::free(sketch);
    }
}
