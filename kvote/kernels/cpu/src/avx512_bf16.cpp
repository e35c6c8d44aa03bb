#define KVOTE_ISA isa_avx512_bf16
#include "kernels.inl"

namespace kvote {
extern const Kernels avx512_bf16_kernels{"avx512_bf16", KVOTE_ISA::run_votes, KVOTE_ISA::top_k, KVOTE_ISA::run_gather,
                                 KVOTE_ISA::run_sketch, KVOTE_ISA::run_decode};
}
