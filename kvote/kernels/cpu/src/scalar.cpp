#define KVOTE_ISA isa_scalar
#include "kernels.inl"

namespace kvote {
using namespace isa_scalar;
extern const Kernels scalar_kernels KVOTE_KERNELS("scalar");
}
