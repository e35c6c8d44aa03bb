// All kernels for one instruction set; included by one file per set, which names it in KVOTE_ISA.
#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <vector>

#include "kernels.hpp"
#include "vec.hpp"

namespace KVOTE_ISA {

using namespace kvote;

#include "sketch.inl"
#include "votes.inl"
#include "top_k.inl"
#include "gather.inl"
#include "decode.inl"

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

}  // namespace KVOTE_ISA
