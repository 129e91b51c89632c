#define SPARSEGAN_ISA "avx2_vnni"
#define SPARSEGAN_KERNELS avx2_vnni_kernels
#if defined(__AVXVNNI__)
#include "gather_gemm_impl.h"
#else
#include "gather_gemm.h"
const sparsegan::Kernels* sparsegan::SPARSEGAN_KERNELS() { return nullptr; }
#endif
