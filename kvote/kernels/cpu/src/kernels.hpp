// The kernels' contracts, as plain pointers. `kvote/kernels/reference.py` says what each must compute.
#pragma once

#include <cstdint>

#include "lanes.hpp"

namespace kvote {

enum class Type : int { f32 = 0, bf16 = 1, f16 = 2 };

struct VotesArgs {
    const float* query;  // [kv_heads, rows, dim]; row = group * selections + selection
    const void* keys;    // pool [pages, PAGE, dim]
    Type type;
    const Lane* lanes;  // [kv_heads]
    const std::uint8_t* sketch;  // pool [pages, PAGE / 16, 16 * dim + 32], or null for exact scores
    std::int64_t kv_heads, groups, selections, dim, start, stop;
    const std::int64_t* limits;  // [selections]: tokens from here on are no candidates
    float* votes;                // out [selections, stop - start]
    int threads;
};

struct TopKArgs {
    const float* votes;  // [rows, n]
    std::int64_t rows, n, k;
    std::int64_t* index;  // out [rows, k], ascending; ties go to the lower index
    int threads;
};

struct GatherArgs {
    const void *keys, *values;  // pools
    Type type;
    const Lane* lanes;
    std::int64_t kv_heads, dim, count;
    const std::int64_t* index;  // [count], ascending
    const float *cos, *sin;     // [count, pairs]; pairs 0: keys are copied as they are
    std::int64_t pairs;
    bool interleaved;
    void *out_keys, *out_values;  // [kv_heads, count, dim]
    int threads;
};

struct DecodeArgs {
    const float* query;  // [lanes, groups, dim]
    const void *keys, *values;  // pools
    Type type;
    const Lane* lanes;
    std::int64_t lanes_count, groups, dim;
    const std::int64_t* index;  // [count] tokens, ascending, or null for start .. start + count - 1
    std::int64_t start, count;
    const float *cos, *sin;  // [count, pairs]; pairs 0: keys are read as they are
    std::int64_t pairs;
    bool interleaved;
    float scale, softcap;  // softcap 0: none
    std::int64_t parts;    // into which each lane is split
    float *out, *lse;      // [lanes, groups, dim], [lanes, groups]
    int threads;
};

struct SketchArgs {
    const void* keys;  // pool
    Type type;
    std::uint8_t* sketch;  // pool
    std::int64_t dim;
    const std::int64_t* slots;  // [count]: pool slots to encode
    std::int64_t count;
    int threads;
};

struct Kernels {
    const char* name;
    void (*votes)(const VotesArgs&);
    void (*top_k)(const TopKArgs&);
    void (*gather)(const GatherArgs&);
    void (*sketch)(const SketchArgs&);
    void (*decode)(const DecodeArgs&);
};

extern const Kernels scalar_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
extern const Kernels avx512_bf16_kernels;
#endif

}  // namespace kvote
