#define KVOTE_ISA isa_scalar
#include "kernels.inl"

namespace kvote {
extern const Kernels scalar_kernels{"scalar", KVOTE_ISA::run_votes, KVOTE_ISA::top_k, KVOTE_ISA::run_gather,
                                 KVOTE_ISA::run_sketch, KVOTE_ISA::run_decode};
}
