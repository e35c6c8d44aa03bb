// What the program for the sanitizers draws its inputs with, and how it compares numbers of threads.
#pragma once

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

}  // namespace
