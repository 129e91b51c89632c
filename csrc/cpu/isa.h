// The instruction set in use: the best that this CPU and this build have, or the one that was forced.
#pragma once
#include <string>
#include <vector>

#include "gather_gemm.h"

namespace sparsegan {

// Kernel tables that were compiled in and that this CPU can run, best first; the portable one is always there.
const std::vector<const Kernels*>& available_kernels();

// The forced one, else $SPARSEGAN_ISA, else the best. Throws std::invalid_argument for a name that is not available.
const Kernels* current_kernels();

// Forces a table by name; an empty name goes back to the default.
void force_isa(const std::string& name);

}  // namespace sparsegan
