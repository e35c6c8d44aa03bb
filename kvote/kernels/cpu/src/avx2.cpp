#define KVOTE_ISA isa_avx2
#include "kernels.inl"

namespace kvote {
using namespace isa_avx2;
extern const Kernels avx2_kernels KVOTE_KERNELS("avx2");
}
