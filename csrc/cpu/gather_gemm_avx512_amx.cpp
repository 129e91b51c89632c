#define SPARSEGAN_ISA "avx512_amx"
#define SPARSEGAN_KERNELS avx512_amx_kernels
#if defined(__AMX_INT8__) || defined(SPARSEGAN_EMULATED_TILES)
#include "gather_gemm_impl.h"
#else
#include "gather_gemm.h"
const sparsegan::Kernels* sparsegan::SPARSEGAN_KERNELS() { return nullptr; }
#endif
