// All kernels for one instruction set; included by one file per set, which names it in KVOTE_ISA.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <type_traits>

#include "kernels.hpp"
#include "team.hpp"
#include "vec.hpp"

namespace KVOTE_ISA {

using namespace kvote;

#include "dots.inl"
#include "sketch.inl"
#include "turn.inl"
#include "votes.inl"
#include "top_k.inl"
#include "decode.inl"
#include "gather.inl"
#include "mass.inl"

// Reads memory and does nothing with it: the ceiling that the kernels are measured against.
inline int64_t read_all(const char* memory, int64_t bytes, int threads) {
    std::atomic<int64_t> total{0};
    parallel(threads, [&](const Team& team) {
        vu sum[4] = {};
        const int64_t blocks = bytes / 256;
        for (int64_t i = team.from(blocks); i < team.to(blocks); ++i)
            for (int j = 0; j < 4; ++j) sum[j] ^= load<vu>(memory + 256 * i + 64 * j);
        const vu all = sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
        for (int i = 0; i < W; ++i) total += all[i];
    });
    return total;
}

#define KVOTE_BY_TYPE(kernel, args)                        \
    switch (args.type) {                                   \
        case Type::f32: return kernel<f32>(args);          \
        case Type::bf16: return kernel<bf16>(args);        \
        case Type::f16: return kernel<f16>(args);          \
    }

inline void run_votes(const VotesArgs& a) { KVOTE_BY_TYPE(votes, a) }
inline void run_gather(const GatherArgs& a) { KVOTE_BY_TYPE(gather, a) }
inline void run_decode(const DecodeArgs& a) { KVOTE_BY_TYPE(decode, a) }
inline void run_sketch(const SketchArgs& a) { KVOTE_BY_TYPE(sketch_slots, a) }
inline void run_turn(const TurnArgs& a) { KVOTE_BY_TYPE(turn, a) }
inline void run_append(const AppendArgs& a) { KVOTE_BY_TYPE(append, a) }
inline void run_attention_mass(const MassArgs& a) { KVOTE_BY_TYPE(attention_mass, a) }

#define KVOTE_KERNELS(name)                                                                              \
    {name,     run_votes, top_k,      run_gather,         run_sketch, run_decode,                        \
     run_turn, run_append, run_attention_mass, read_all}

}  // namespace KVOTE_ISA
