#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace sparsegan {
namespace {

std::atomic<const Kernels*> forced{nullptr};

#if defined(__x86_64__)
// Whether the CPU has the matrix unit and bf16 conversions, and the system lets this process use it.
bool has_amx() {
#if defined(SPARSEGAN_EMULATED_TILES)
  return true;
#elif defined(__linux__) && defined(SYS_arch_prctl)
  constexpr unsigned kTileAndInt8 = 3u << 24;  // leaf 7, EDX
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & kTileAndInt8) != kTileAndInt8) return false;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 5 & 1) &&  // AVX512-BF16
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

const Kernels* find(const std::string& name, const char* asked_by) {
  std::string names;
  for (const Kernels* k : available_kernels()) {
    if (name == k->isa) return k;
    names += (names.empty() ? "" : ", ") + std::string(k->isa);
  }
  throw std::invalid_argument(std::string(asked_by) + ": no instruction set '" + name + "' on this machine; it has " + names);
}

}  // namespace

const std::vector<const Kernels*>& available_kernels() {
  static const std::vector<const Kernels*> list = [] {
    std::vector<const Kernels*> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    auto add = [&](bool cpu_has_it, const Kernels* kernels) {
      if (cpu_has_it && kernels) found.push_back(kernels);
    };
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512_vnni = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                             __builtin_cpu_supports("avx512vnni");
    add(avx512_vnni && has_amx(), avx512_amx_kernels());
    add(avx512_vnni, avx512_vnni_kernels());
    // older compilers do not know "avxvnni": leaf 7, subleaf 1, EAX bit 4
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    const bool avx_vnni = __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 4 & 1);
    add(avx2 && avx_vnni, avx2_vnni_kernels());
    add(avx2, avx2_kernels());
#endif
    found.push_back(portable_kernels());
    return found;
  }();
  return list;
}

const Kernels* current_kernels() {
  if (const Kernels* k = forced.load()) return k;
  static const Kernels* const standard = [] {
    const char* name = std::getenv("SPARSEGAN_ISA");
    return name && *name ? find(name, "SPARSEGAN_ISA") : available_kernels().front();
  }();
  return standard;
}

void force_isa(const std::string& name) { forced = name.empty() ? nullptr : find(name, "set_isa"); }

}  // namespace sparsegan
