// Huge pages for large memory: with pages of 4 KiB, page walks cost up to a third of the time of a layer on large maps.
#pragma once
#include <cstdint>

namespace sparsegan {

constexpr int64_t kHugePage = int64_t(2) << 20;

// Asks for huge pages where whole ones fit into the memory, which should not have been written yet. A wish: small pages do, too.
void use_huge_pages(void* memory, int64_t bytes);

}  // namespace sparsegan
