#define SPARSEGAN_ISA "avx2"
#define SPARSEGAN_KERNELS avx2_kernels
#if defined(__AVX2__)
#include "gather_gemm_impl.h"
#else
#include "gather_gemm.h"
const sparsegan::Kernels* sparsegan::SPARSEGAN_KERNELS() { return nullptr; }
#endif
