#define SPARSEGAN_ISA "portable"
#define SPARSEGAN_KERNELS portable_kernels
#include "gather_gemm_impl.h"
