// Python's view of the kernels. Tensors arrive as addresses and sizes, checked by kvote/kernels/cpu/__init__.py.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <sys/mman.h>

#include <array>
#include <string>
#include <vector>

#include "kernels.hpp"

namespace nb = nanobind;
using namespace kvote;
using Address = std::uintptr_t;

namespace {

// Kernels that this machine can run, fastest last.
std::vector<const Kernels*> runnable() {
    std::vector<const Kernels*> sets{&scalar_kernels};
#if defined(__x86_64__)
    __builtin_cpu_init();
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

const Kernels* active = runnable().back();

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// The lanes of a call: all their runs in a row, and where each lane's begin [count + 1].
struct LaneTable {
    std::vector<Lane> lanes;
    LaneTable(Address runs, Address begins, std::int64_t count) {
        for (std::int64_t i = 0; i < count; ++i) {
            const auto* edges = at<const std::int64_t>(begins) + i;
            lanes.push_back({at<const Run>(runs) + edges[0], edges[1] - edges[0]});
        }
    }
};

// A packed pool as Python names it: pages, type, runs, begins, lanes, bits, group, dim, by token.
using Pool = std::array<std::int64_t, 9>;

struct PoolTable : LaneTable {
    PackedPool pool;
    explicit PoolTable(const Pool& p)
        : LaneTable(Address(p[2]), Address(p[3]), p[4]),
          pool{at<std::uint8_t>(Address(p[0])), Type(p[1]), lanes.data(), p[4], p[5], p[6], p[7], p[8] != 0} {}
};

// Tokens that are not packed as Python names them: keys, values, runs, begins, lanes, lanes per sequence, start, count.
using Recent = std::array<std::int64_t, 8>;

// Tokens behind packed ones as Python names them: keys, values, runs, begins, lanes.
using Tail = std::array<std::int64_t, 5>;

}  // namespace

NB_MODULE(_cpu, m) {
    m.def("instruction_set", [] { return std::string(active->name); });
    m.def("instruction_sets", [] {
        std::vector<std::string> names;
        for (const Kernels* kernels : runnable()) names.push_back(kernels->name);
        return names;
    });
    m.def("use", [](const std::string& name) {
        for (const Kernels* kernels : runnable())
            if (name == kernels->name) {
                active = kernels;
                return true;
            }
        return false;
    });
    m.def("votes", [](Address query, Address keys, int type, Address runs, Address begins, std::int64_t lanes,
                      Address sketch, std::int64_t sketch_bits, std::int64_t groups, std::int64_t selections,
                      std::int64_t dim, std::int64_t start, std::int64_t stop,
                      const std::vector<std::int64_t>& limits, Address out, int threads) {
        nb::gil_scoped_release release;
        LaneTable table(runs, begins, lanes);
        active->votes({at<const float>(query), at<const void>(keys), Type(type), table.lanes.data(),
                       at<const std::uint8_t>(sketch), sketch_bits, lanes, groups, selections, dim, start, stop,
                       limits.data(), at<float>(out), threads});
    });
    m.def("select", [](Address query, Address keys, int type, Address runs, Address begins, std::int64_t lanes,
                       Address sketch, std::int64_t sketch_bits, std::int64_t groups, std::int64_t selections,
                       std::int64_t dim, std::int64_t start, std::int64_t stop,
                       const std::vector<std::int64_t>& limits, std::int64_t top_k, std::int64_t nominate,
                       Address index, int threads) {
        nb::gil_scoped_release release;
        LaneTable table(runs, begins, lanes);
        active->select({{at<const float>(query), at<const void>(keys), Type(type), table.lanes.data(),
                         at<const std::uint8_t>(sketch), sketch_bits, lanes, groups, selections, dim, start, stop,
                         limits.data(), nullptr, threads},
                        top_k, nominate, at<std::int64_t>(index)});
    });
    m.def("top_k", [](Address votes, std::int64_t rows, std::int64_t n, std::int64_t k, Address index, int threads) {
        nb::gil_scoped_release release;
        active->top_k({at<const float>(votes), rows, n, k, at<std::int64_t>(index), threads});
    });
    m.def("gather", [](Address keys, Address values, int type, Address runs, Address begins, std::int64_t lanes,
                       std::int64_t dim, std::int64_t count, Address index, Address cos, Address sin,
                       std::int64_t pairs, bool interleaved, Address out_keys, Address out_values, int threads) {
        nb::gil_scoped_release release;
        LaneTable table(runs, begins, lanes);
        active->gather({at<const void>(keys), at<const void>(values), Type(type), table.lanes.data(), lanes, dim,
                        count, at<const std::int64_t>(index), at<const float>(cos), at<const float>(sin), pairs,
                        interleaved, at<void>(out_keys), at<void>(out_values), threads});
    });
    m.def("decode", [](Address query, Address keys, Address values, int type, Address runs, Address begins,
                       std::int64_t lanes, std::int64_t groups, std::int64_t dim, Address index,
                       std::int64_t lanes_per_sequence, std::int64_t start, std::int64_t count, Address cos, Address sin,
                       std::int64_t pairs, bool interleaved, float scale, float softcap, Address out, Address lse,
                       int threads) {
        nb::gil_scoped_release release;
        LaneTable table(runs, begins, lanes);
        active->decode({at<const float>(query), at<const void>(keys), at<const void>(values), Type(type),
                        table.lanes.data(), lanes, groups, dim, at<const std::int64_t>(index), lanes_per_sequence, start,
                        count, at<const float>(cos), at<const float>(sin), pairs, interleaved, scale, softcap,
                        at<float>(out), at<float>(lse), threads, nullptr});
    });
    // The same over a range of which lane i reads what stands before ends[i].
    m.def("decode_ragged", [](Address query, Address keys, Address values, int type, Address runs, Address begins,
                              std::int64_t lanes, std::int64_t groups, std::int64_t dim, std::int64_t start,
                              std::int64_t count, const std::vector<std::int64_t>& ends, Address cos, Address sin,
                              std::int64_t pairs, bool interleaved, float scale, float softcap, Address out,
                              Address lse, int threads) {
        nb::gil_scoped_release release;
        LaneTable table(runs, begins, lanes);
        active->decode({at<const float>(query), at<const void>(keys), at<const void>(values), Type(type),
                        table.lanes.data(), lanes, groups, dim, nullptr, 1, start, count, at<const float>(cos),
                        at<const float>(sin), pairs, interleaved, scale, softcap, at<float>(out), at<float>(lse),
                        threads, ends.data()});
    });
    m.def("turn", [](Address in, int type, std::int64_t sequences, std::int64_t heads, std::int64_t count,
                     std::int64_t dim, std::int64_t sequence_stride, std::int64_t head_stride,
                     std::int64_t token_stride, Address cos, Address sin, std::int64_t angle_stride,
                     std::int64_t pairs, bool interleaved, Address out, int threads) {
        nb::gil_scoped_release release;
        active->turn({at<const void>(in), Type(type), sequences, heads, count, dim, sequence_stride, head_stride,
                      token_stride, at<const float>(cos), at<const float>(sin), angle_stride, pairs, interleaved,
                      at<void>(out), threads});
    });
    m.def("append", [](Address key, Address value, int type, std::array<std::int64_t, 3> key_strides,
                       std::array<std::int64_t, 3> value_strides, Address positions, std::int64_t position_stride,
                       std::int64_t sequences, std::int64_t heads, std::int64_t count, std::int64_t dim,
                       std::int64_t value_dim, Address runs, Address begins, std::int64_t lanes,
                       const std::vector<std::int64_t>& first, Address keys, Address values, Address slot_positions, Address sketch, std::int64_t sketch_bits,
                       int threads) {
        nb::gil_scoped_release release;
        LaneTable table(runs, begins, lanes);
        active->append({at<const void>(key), at<const void>(value), Type(type),
                        {key_strides[0], key_strides[1], key_strides[2]},
                        {value_strides[0], value_strides[1], value_strides[2]}, at<const std::int64_t>(positions),
                        position_stride, sequences, heads, count, dim, value_dim, table.lanes.data(), first.data(),
                        at<void>(keys), at<void>(values), at<std::int32_t>(slot_positions), at<std::uint8_t>(sketch),
                        sketch_bits, threads});
    });
    m.def("sketch", [](Address keys, int type, Address sketch, std::int64_t bits, std::int64_t dim, Address runs,
                       Address begins, std::int64_t lanes, std::int64_t start, std::int64_t stop, int threads) {
        nb::gil_scoped_release release;
        LaneTable table(runs, begins, lanes);
        active->sketch({at<const void>(keys), Type(type), at<std::uint8_t>(sketch), bits, dim, table.lanes.data(),
                        lanes, start, stop, threads});
    });
    m.def("attention_mass", [](Address query, Address lse, Address keys, int type, Address runs, Address begins,
                               std::int64_t lanes, std::int64_t rows, std::int64_t dim, std::int64_t start,
                               std::int64_t stop, const std::vector<std::int64_t>& limits, float scale,
                               float softcap, Address mass, int threads) {
        nb::gil_scoped_release release;
        LaneTable table(runs, begins, lanes);
        active->attention_mass({at<const float>(query), at<const float>(lse), at<const void>(keys), Type(type),
                                table.lanes.data(), lanes, rows, dim, start, stop, limits.data(),
                                scale, softcap, at<float>(mass), threads});
    });
    m.def("scores", [](Address query, Address keys, int type, Address runs, Address begins, std::int64_t lanes,
                       std::int64_t rows, std::int64_t dim, std::int64_t start, std::int64_t stop, Address out,
                       int threads) {
        nb::gil_scoped_release release;
        LaneTable table(runs, begins, lanes);
        active->scores({at<const float>(query), at<const void>(keys), Type(type), table.lanes.data(), lanes, rows,
                        dim, start, stop, at<float>(out), threads});
    });
    m.def("label_scores", [](Address query, Address keys, int type, Address runs, Address begins, std::int64_t lanes,
                       std::int64_t rows, std::int64_t dim, std::int64_t start, std::int64_t stop, Address out,
                       int threads) {
        nb::gil_scoped_release release;
        LaneTable table(runs, begins, lanes);
        active->label_scores({at<const float>(query), at<const void>(keys), Type(type), table.lanes.data(), lanes, rows,
                        dim, start, stop, at<float>(out), threads});
    });
    m.def("pack", [](const Pool& pool, bool are_keys, Address in, std::int64_t lane_stride, std::int64_t token_stride,
                     std::int64_t count, const std::vector<std::int64_t>& first, int threads) {
        nb::gil_scoped_release release;
        PoolTable table(pool);
        active->pack({table.pool, are_keys, at<const void>(in), lane_stride, token_stride, count, first.data(), threads});
    });
    m.def("unpack", [](const Pool& pool, bool are_keys, Address index, std::int64_t lanes_per_sequence,
                       std::int64_t start, std::int64_t count, Address out, std::int64_t out_stride, int threads) {
        nb::gil_scoped_release release;
        PoolTable table(pool);
        active->unpack({table.pool, are_keys, at<const std::int64_t>(index), lanes_per_sequence, start, count,
                        at<void>(out), out_stride, threads});
    });
    m.def("packed_attend", [](Address query, const Pool& keys, const Pool& values, const Recent& recent,
                              std::int64_t groups, std::int64_t start, std::int64_t stop, float scale, float softcap,
                              Address out, Address lse, int threads) {
        nb::gil_scoped_release release;
        PoolTable key_table(keys), value_table(values);
        LaneTable raw{Address(recent[2]), Address(recent[3]), recent[4]};
        const RecentTokens tokens{at<const void>(Address(recent[0])), at<const void>(Address(recent[1])),
                                  raw.lanes.data(), recent[5], recent[6], recent[7]};
        active->packed_attend({at<const float>(query), key_table.pool, value_table.pool, tokens, groups, start, stop,
                               scale, softcap, at<float>(out), at<float>(lse), threads});
    });
    m.def("packed_scores", [](Address query, const Pool& keys, std::int64_t rows, std::int64_t start,
                              std::int64_t stop, Address scores, int threads) {
        nb::gil_scoped_release release;
        PoolTable table(keys);
        active->packed_scores({at<const float>(query), table.pool, rows, start, stop, at<float>(scores), threads});
    });
    // Sequence by sequence; of each, how many tokens are packed and which token the lanes behind those begin with.
    // index 0: only votes; votes 0: only the winners.
    m.def("packed_select", [](Address query, const Pool& keys, const Tail& tail, const std::vector<std::int64_t>& packed,
                              const std::vector<std::int64_t>& first, std::int64_t groups, std::int64_t selections,
                              std::int64_t start, std::int64_t stop, const std::vector<std::int64_t>& limits,
                              std::int64_t top_k, Address votes, Address index, int threads) {
        nb::gil_scoped_release release;
        PoolTable table(keys);
        LaneTable raw{Address(tail[2]), Address(tail[3]), tail[4]};
        const std::int64_t heads = tail[4] / std::int64_t(packed.size()), rows = heads * groups * selections;
        for (std::size_t i = 0; i < packed.size(); ++i) {
            PackedPool pool = table.pool;
            pool.lanes += i * heads, pool.lanes_count = heads;
            active->packed_select(
                {{{at<const float>(query) + i * rows * pool.dim, at<const void>(Address(tail[0])), pool.type,
                   raw.lanes.data() + i * heads, nullptr, 0, heads, groups, selections, pool.dim, start, stop,
                   limits.data(), votes ? at<float>(votes) + i * selections * (stop - start) : nullptr, threads},
                  top_k, 0, index ? at<std::int64_t>(index) + i * selections * top_k : nullptr},
                 pool, packed[i], first[i]});
        }
    });
    m.def("packed_decode", [](Address query, const Pool& keys, const Pool& values, const Tail& tail,
                              const std::vector<std::int64_t>& packed, const std::vector<std::int64_t>& first,
                              std::int64_t groups, Address index, std::int64_t count, Address cos, Address sin,
                              std::int64_t pairs, bool interleaved, float scale, float softcap, Address out, Address lse,
                              int threads) {
        nb::gil_scoped_release release;
        PoolTable key_table(keys), value_table(values);
        LaneTable raw{Address(tail[2]), Address(tail[3]), tail[4]};
        const PackedPool& pool = key_table.pool;
        active->packed_decode(
            {{at<const float>(query), at<const void>(Address(tail[0])), at<const void>(Address(tail[1])), pool.type,
              raw.lanes.data(), tail[4], groups, pool.dim, at<const std::int64_t>(index),
              tail[4] / std::int64_t(packed.size()), 0, count, at<const float>(cos), at<const float>(sin), pairs,
              interleaved, scale, softcap, at<float>(out), at<float>(lse), threads, nullptr},
             pool, value_table.pool, packed.data(), first.data()});
    });
    m.def("thin_decode", [](Address query, Address keys, Address values, int type, std::int64_t heads,
                            std::int64_t groups, std::int64_t stride, std::int64_t kept, std::int64_t dim,
                            std::int64_t pages, std::int64_t tokens, std::int64_t stop, float scale, float softcap,
                            Address out, Address lse, int threads) {
        nb::gil_scoped_release release;
        active->thin_decode({at<const float>(query), at<const void>(keys), at<const void>(values), Type(type), heads,
                             groups, stride, kept, dim, pages, tokens, stop, scale, softcap, at<float>(out),
                             at<float>(lse), threads});
    });
    // rows: addresses and strides of query, key and value. pools: keys, values, positions, sketch, bits. turn: cosines
    // and sines back and of positions, pairs, interleaved. choice: top_k, sinks, edge, nominate, asked_at, and the
    // addresses of past, kept, asked and winners. Returns whether a selection was reused.
    m.def("step", [](const std::array<std::int64_t, 6>& rows, int type, std::int64_t position, Address runs,
                     Address begins, std::int64_t lanes, std::int64_t groups, std::int64_t dim, std::int64_t length,
                     const std::array<std::int64_t, 5>& pools, const std::array<std::int64_t, 6>& turn,
                     const std::array<std::int64_t, 9>& choice, float theta, float scale, float softcap, Address out,
                     Address lse, int threads) {
        nb::gil_scoped_release release;
        LaneTable table(runs, begins, lanes);
        bool reused = false;
        active->step({at<const void>(rows[0]), at<const void>(rows[2]), at<const void>(rows[4]), Type(type), rows[1],
                      rows[3], rows[5], position, table.lanes.data(), lanes, groups, dim, length, at<void>(pools[0]),
                      at<void>(pools[1]), at<std::int32_t>(pools[2]), at<std::uint8_t>(pools[3]), pools[4],
                      at<const float>(turn[0]), at<const float>(turn[1]), at<const float>(turn[2]),
                      at<const float>(turn[3]), turn[4], turn[5] != 0, choice[0], choice[1], choice[2], choice[3],
                      choice[4], theta, at<const float>(choice[5]), at<const std::int64_t>(choice[6]),
                      at<float>(choice[7]), at<std::int64_t>(choice[8]), &reused, scale, softcap, at<float>(out),
                      at<float>(lse), threads});
        return reused;
    });
    m.def("read_all", [](Address memory, std::int64_t bytes, int threads) {
        nb::gil_scoped_release release;
        return active->read_all(at<const char>(memory), bytes, threads);
    });
    // Asks the system for large pages behind a block of memory that is about to be written.
    m.def("use_large_pages", [](Address memory, std::int64_t bytes) {
        constexpr Address LARGE = Address(1) << 21;
        const Address from = (memory + LARGE - 1) / LARGE * LARGE, to = (memory + Address(bytes)) / LARGE * LARGE;
#if defined(MADV_HUGEPAGE)
        if (to > from) madvise(at<void>(from), to - from, MADV_HUGEPAGE);
#endif
    });
}
