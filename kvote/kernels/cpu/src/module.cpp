// Python's view of the kernels. Tensors arrive as addresses and sizes, checked by kvote/kernels/cpu/__init__.py.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

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

// Runs of all lanes in a row, and where each lane's begin: [lanes + 1].
std::vector<Lane> lanes_of(Address runs, const std::vector<std::int64_t>& begins) {
    std::vector<Lane> lanes;
    for (std::size_t i = 0; i + 1 < begins.size(); ++i)
        lanes.push_back({at<const Run>(runs) + begins[i], begins[i + 1] - begins[i]});
    return lanes;
}

}  // namespace

NB_MODULE(_cpu, m) {
    m.def("instruction_set", [] { return std::string(active->name); });
    m.def("use", [](const std::string& name) {
        for (const Kernels* kernels : runnable())
            if (name == kernels->name) {
                active = kernels;
                return true;
            }
        return false;
    });
    m.def("votes", [](Address query, Address keys, int type, Address runs, std::vector<std::int64_t> begins,
                      Address sketch, std::int64_t groups, std::int64_t selections, std::int64_t dim,
                      std::int64_t start, std::int64_t stop, Address limits, Address out, int threads) {
        nb::gil_scoped_release release;
        auto lanes = lanes_of(runs, begins);
        active->votes({at<const float>(query), at<const void>(keys), Type(type), lanes.data(),
                       at<const std::uint8_t>(sketch), std::int64_t(lanes.size()), groups, selections, dim, start,
                       stop, at<const std::int64_t>(limits), at<float>(out), threads});
    });
    m.def("top_k", [](Address votes, std::int64_t rows, std::int64_t n, std::int64_t k, Address index, int threads) {
        nb::gil_scoped_release release;
        active->top_k({at<const float>(votes), rows, n, k, at<std::int64_t>(index), threads});
    });
    m.def("gather", [](Address keys, Address values, int type, Address runs, std::vector<std::int64_t> begins,
                       std::int64_t dim, std::int64_t count, Address index, Address cos, Address sin,
                       std::int64_t pairs, bool interleaved, Address out_keys, Address out_values, int threads) {
        nb::gil_scoped_release release;
        auto lanes = lanes_of(runs, begins);
        active->gather({at<const void>(keys), at<const void>(values), Type(type), lanes.data(),
                        std::int64_t(lanes.size()), dim, count, at<const std::int64_t>(index), at<const float>(cos),
                        at<const float>(sin), pairs, interleaved, at<void>(out_keys), at<void>(out_values), threads});
    });
    m.def("decode", [](Address query, Address keys, Address values, int type, Address runs,
                       std::vector<std::int64_t> begins, std::int64_t groups, std::int64_t dim, Address index,
                       std::int64_t start, std::int64_t count, Address cos, Address sin, std::int64_t pairs,
                       bool interleaved, float scale, float softcap, std::int64_t parts, Address out, Address lse,
                       int threads) {
        nb::gil_scoped_release release;
        auto lanes = lanes_of(runs, begins);
        active->decode({at<const float>(query), at<const void>(keys), at<const void>(values), Type(type), lanes.data(),
                        std::int64_t(lanes.size()), groups, dim, at<const std::int64_t>(index), start, count,
                        at<const float>(cos), at<const float>(sin), pairs, interleaved, scale, softcap, parts,
                        at<float>(out), at<float>(lse), threads});
    });
    m.def("sketch", [](Address keys, int type, Address sketch, std::int64_t dim, Address slots, std::int64_t count,
                       int threads) {
        nb::gil_scoped_release release;
        active->sketch({at<const void>(keys), Type(type), at<std::uint8_t>(sketch), dim,
                        at<const std::int64_t>(slots), count, threads});
    });
}
