#define SPARSEGAN_ISA "avx512_vnni"
#define SPARSEGAN_KERNELS avx512_vnni_kernels
#if defined(__AVX512VNNI__)
#include "gather_gemm_impl.h"
#else
#include "gather_gemm.h"
const sparsegan::Kernels* sparsegan::SPARSEGAN_KERNELS() { return nullptr; }
#endif
