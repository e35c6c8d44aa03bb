// All kernels for one instruction set; included by one file per set, which names it in KVOTE_ISA.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <type_traits>
#include <vector>

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
#include "thin.inl"
#include "select.inl"
#include "step.inl"
#include "gather.inl"
#include "mass.inl"
#include "scores.inl"
#include "multiply.inl"
#include "pack.inl"
#include "packed.inl"
#include "packed_list.inl"
#include "packed_votes.inl"

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

#define KVOTE_BY_TYPE(name, kernel, Args, type)       \
    inline void name(const Args& a) {                 \
        switch (a.type) {                             \
            case Type::f32: return kernel<f32>(a);    \
            case Type::bf16: return kernel<bf16>(a);  \
            case Type::f16: return kernel<f16>(a);    \
        }                                             \
    }

KVOTE_BY_TYPE(run_votes, votes, VotesArgs, type)
KVOTE_BY_TYPE(run_select, select, SelectArgs, votes.type)
KVOTE_BY_TYPE(run_gather, gather, GatherArgs, type)
KVOTE_BY_TYPE(run_sketch, sketch_lanes, SketchArgs, type)
KVOTE_BY_TYPE(run_decode, decode, DecodeArgs, type)
KVOTE_BY_TYPE(run_turn, turn, TurnArgs, type)
KVOTE_BY_TYPE(run_append, append, AppendArgs, type)
KVOTE_BY_TYPE(run_attention_mass, attention_mass, MassArgs, type)
KVOTE_BY_TYPE(run_scores, scores, ScoreArgs, type)
KVOTE_BY_TYPE(run_label_scores, label_scores, ScoreArgs, type)
KVOTE_BY_TYPE(run_pack, pack, PackArgs, pool.type)
KVOTE_BY_TYPE(run_unpack, unpack_tokens, UnpackArgs, pool.type)
KVOTE_BY_TYPE(run_packed_attend, packed_attend, PackedAttendArgs, keys.type)
KVOTE_BY_TYPE(run_packed_scores, packed_scores, PackedScoresArgs, keys.type)
KVOTE_BY_TYPE(run_packed_select, packed_select, PackedSelectArgs, keys.type)
KVOTE_BY_TYPE(run_packed_decode, packed_decode, PackedDecodeArgs, keys.type)
KVOTE_BY_TYPE(run_thin_decode, thin_decode, ThinArgs, type)
KVOTE_BY_TYPE(run_step, step, StepArgs, type)

#define KVOTE_KERNELS(name)                                                                        \
    {name, run_votes, run_select, top_k, run_gather, run_sketch, run_decode, run_turn, run_append, \
     run_attention_mass, run_scores, run_label_scores, run_pack, run_unpack, run_packed_attend,    \
     run_packed_scores, run_packed_select, run_packed_decode, run_thin_decode, run_step, read_all}

}  // namespace KVOTE_ISA
