#define KVOTE_ISA isa_avx512_bf16
#include "kernels.inl"

namespace kvote {
using namespace isa_avx512_bf16;
extern const Kernels avx512_bf16_kernels KVOTE_KERNELS("avx512_bf16");
}
