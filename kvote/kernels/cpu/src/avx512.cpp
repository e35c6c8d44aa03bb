#define KVOTE_ISA isa_avx512
#include "kernels.inl"

namespace kvote {
extern const Kernels avx512_kernels{"avx512", KVOTE_ISA::run_votes, KVOTE_ISA::top_k, KVOTE_ISA::run_gather,
                                 KVOTE_ISA::run_sketch, KVOTE_ISA::run_decode};
}
