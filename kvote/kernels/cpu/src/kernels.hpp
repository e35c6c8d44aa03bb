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
    const Lane* lanes;           // [kv_heads]
    const std::uint8_t* sketch;  // pool of blocks as in sketch.inl, or null for exact scores
    std::int64_t sketch_bits, kv_heads, groups, selections, dim, start, stop;
    const std::int64_t* limits;  // [selections]: tokens from here on are no candidates
    float* votes;                // out [selections, stop - start]
    int threads;
};

struct SelectArgs {
    VotesArgs votes;  // its `votes` may be null: they are then kept to the call
    std::int64_t top_k, nominate;  // 0: the votes decide; else no more than the candidates of any selection
    std::int64_t* index;           // out [selections, top_k] tokens, ascending
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
    const std::int64_t* index;  // [sequences, count] tokens, ascending, or null for start .. + count - 1
    std::int64_t lanes_per_sequence, start, count;
    const float *cos, *sin;  // [count, pairs]; pairs 0: keys are read as they are
    std::int64_t pairs;
    bool interleaved;
    float scale, softcap;  // softcap 0: none
    float *out, *lse;      // [lanes, groups, dim], [lanes, groups]
    int threads;
    const std::int64_t* ends;  // [lanes]: tokens of the range from here on are not read in this lane; null: all are read
};

struct TurnArgs {
    const void* in;
    Type type;
    std::int64_t sequences, heads, count, dim;
    std::int64_t sequence_stride, head_stride, token_stride;  // of `in`, in elements
    const float *cos, *sin;                                   // [sequences or 1, count, pairs]
    std::int64_t angle_stride, pairs;                         // tokens between sequences' angles; 0: all share them
    bool interleaved;
    void* out;  // [sequences, heads, count, dim]
    int threads;
};

struct AppendArgs {
    const void *key, *value;  // [sequences, heads, count, dim or value_dim] by strides in elements
    Type type;
    std::int64_t key_strides[3], value_strides[3];
    const std::int64_t* positions;  // [sequences, count]
    std::int64_t position_stride, sequences, heads, count, dim, value_dim;
    const Lane* lanes;
    const std::int64_t* first;  // [sequences * heads]: token of its lane that the first new one becomes
    void *keys, *values;  // pools
    std::int32_t* slot_positions;
    std::uint8_t* sketch;  // or null
    std::int64_t sketch_bits;
    int threads;
};

struct SketchArgs {
    const void* keys;  // pool
    Type type;
    std::uint8_t* sketch;  // pool
    std::int64_t bits, dim;
    const Lane* lanes;  // of `stop` tokens each, of which those from `start` on are encoded
    std::int64_t lanes_count, start, stop;
    int threads;
};

struct MassArgs {
    const float* query;  // [lanes, rows, dim]
    const float* lse;    // [lanes, rows]
    const void* keys;    // pool
    Type type;
    const Lane* lanes;
    std::int64_t lanes_count, rows, dim, start, stop;
    const std::int64_t* limits;  // [rows]
    float scale, softcap;
    float* mass;  // out [lanes, stop - start]
    int threads;
};

struct ScoreArgs {
    const float* query;  // [lanes, rows, dim]
    const void* keys;    // pool [pages, PAGE, dim], of labels [pages, dim, PAGE]
    Type type;
    const Lane* lanes;
    std::int64_t lanes_count, rows, dim, start, stop;
    float* out;  // [lanes, rows, stop - start]
    int threads;
};

// Pages of packed keys or values (packed.inl), each of PACKED tokens, and where lanes lie in them.
struct PackedPool {
    std::uint8_t* pages;
    Type type;  // of scales and minima, and of what is packed or unpacked
    const Lane* lanes;
    std::int64_t lanes_count, bits, group, dim;
    bool by_token;  // keys: groups of channels of one token, as values are
};

struct PackArgs {
    PackedPool pool;
    bool are_keys;
    const void* in;  // [lanes, count, dim] by strides in elements
    std::int64_t lane_stride, token_stride, count;
    const std::int64_t* first;  // [lanes]: token of its lane that the first one becomes
    int threads;
};

struct UnpackArgs {
    PackedPool pool;
    bool are_keys;
    const std::int64_t* index;  // [sequences, count] tokens, or null for start .. + count - 1
    std::int64_t lanes_per_sequence, start, count;
    void* out;  // [lanes, count, dim], lanes `out_stride` elements apart
    std::int64_t out_stride;
    int threads;
};

// Tokens of the same lanes that are not packed, and are read with those that are.
struct RecentTokens {
    const void *keys, *values;  // pools of raw pages, of the type of the packed ones
    const Lane* lanes;
    std::int64_t lanes_per_sequence, start, count;  // count 0: none
};

struct PackedAttendArgs {
    const float* query;  // [lanes, groups, dim]
    PackedPool keys, values;
    RecentTokens recent;
    std::int64_t groups, start, stop;
    float scale, softcap;  // softcap 0: none
    float *out, *lse;      // [lanes, groups, dim], [lanes, groups]
    int threads;
};

struct PackedScoresArgs {
    const float* query;  // [lanes, rows, dim]
    PackedPool keys;
    std::int64_t rows, start, stop;
    float* scores;  // out [lanes, rows, stop - start]
    int threads;
};

// Votes of one sequence on packed tokens and on those behind them that are not.
struct PackedSelectArgs {
    SelectArgs select;  // whose pool and lanes are of what is not packed; no sketch; `index` null: only votes are counted
    PackedPool keys;
    std::int64_t packed, first;  // tokens before `packed` are packed; token `first` is the first that the others' lanes hold
};

// Attention over lists of packed tokens and of tokens behind them that are not.
struct PackedDecodeArgs {
    DecodeArgs list;  // whose pools and lanes are of what is not packed
    PackedPool keys, values;
    const std::int64_t *packed, *first;  // [sequences], as above
};

struct ThinArgs {
    const float* query;  // [heads, groups, stride], of which `kept` are channels and the rest 0; stride at most MAX_DIM
    const void* keys;    // [heads, pages, kept, PAGE]
    const void* values;  // [heads, tokens, dim]
    Type type;
    std::int64_t heads, groups, stride, kept, dim, pages, tokens, stop;  // tokens before `stop` are read
    float scale, softcap;  // softcap 0: none
    float *out, *lse;      // [heads, groups, dim], [heads, groups]
    int threads;
};

// The decode step of one sequence: rows of one head are contiguous, heads are strides in elements apart.
struct StepArgs {
    const void *query, *key, *value;  // [heads * groups, dim], [heads, dim], [heads, dim]
    Type type;
    std::int64_t query_stride, key_stride, value_stride, position;
    const Lane* lanes;  // [heads]
    std::int64_t heads, groups, dim, length;  // `length` tokens are held before
    void *keys, *values;  // pools
    std::int32_t* slot_positions;
    std::uint8_t* sketch;  // or null
    std::int64_t sketch_bits;
    // Where keys are held at position 0: what takes the model's rotation out of these rows [pairs], and the rotations
    // of positions 0 .. [n, pairs], up to that of the last token read and `asked_at`. pairs 0: they are held as given.
    const float *back_cos, *back_sin, *cos, *sin;
    std::int64_t pairs;
    bool interleaved;
    // Reads the first `sinks` tokens, those from `edge` on, and `top_k` between; top_k 0: all, and the rest is not read.
    std::int64_t top_k, sinks, edge, nominate, asked_at;
    float theta;              // from this cosine with `past` on, `kept` [top_k] is read; null: what is selected anew
    const float* past;        // [heads * groups, dim]
    const std::int64_t* kept;
    float* asked;             // out: the query at position `asked_at`, as it scores
    std::int64_t* winners;    // out [top_k], where a selection was made
    bool* reused;             // out
    float scale, softcap;     // softcap 0: none
    float *out, *lse;         // [heads * groups, dim], [heads * groups]
    int threads;
};

struct Kernels {
    const char* name;
    void (*votes)(const VotesArgs&);
    void (*select)(const SelectArgs&);
    void (*top_k)(const TopKArgs&);
    void (*gather)(const GatherArgs&);
    void (*sketch)(const SketchArgs&);
    void (*decode)(const DecodeArgs&);
    void (*turn)(const TurnArgs&);
    void (*append)(const AppendArgs&);
    void (*attention_mass)(const MassArgs&);
    void (*scores)(const ScoreArgs&);
    void (*label_scores)(const ScoreArgs&);
    void (*pack)(const PackArgs&);
    void (*unpack)(const UnpackArgs&);
    void (*packed_attend)(const PackedAttendArgs&);
    void (*packed_scores)(const PackedScoresArgs&);
    void (*packed_select)(const PackedSelectArgs&);
    void (*packed_decode)(const PackedDecodeArgs&);
    void (*thin_decode)(const ThinArgs&);
    void (*step)(const StepArgs&);
    std::int64_t (*read_all)(const char* memory, std::int64_t bytes, int threads);  // to measure the bandwidth
};

extern const Kernels scalar_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
extern const Kernels avx512_bf16_kernels;
#endif

}  // namespace kvote
