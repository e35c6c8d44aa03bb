#define KVOTE_ISA isa_avx512
#include "kernels.inl"

namespace kvote {
using namespace isa_avx512;
extern const Kernels avx512_kernels KVOTE_KERNELS("avx512");
}
