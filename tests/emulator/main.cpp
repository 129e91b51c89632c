// Runs the checks of the emulated kernels: main [--small] [--only TEXT] [quantize] [group_norm] [gather_gemm]
//
// --small: few cases, for the sanitizers. --only: of the cases, those whose text contains TEXT. No check named: all of them.
// Prints a line for each check. Exit code: 0 all hold; 1 a wrong result; 2 a fault that the emulator found (a race that
// deadlocks, a bad address, ...); 3 a wrong command line. What a sanitizer finds ends the process with the sanitizer's own code
// and report.
#include "checks.h"

using namespace checks;

int main(int count, char** arguments) {
  struct Check {
    const char* name;
    void (*run)(const Effort&, std::string&);
    bool wanted;
  } all[] = {
      {"quantize", check_quantize, false}, {"group_norm", check_group_norm, false}, {"gather_gemm", check_gather_gemm, false}};
  Effort effort;
  bool some = false;
  for (int i = 1; i < count; i++) {
    const std::string word = arguments[i];
    bool known = word == "--small" || (word == "--only" && i + 1 < count);
    if (word == "--small") effort.small = true;
    if (known && word == "--only") effort.only = arguments[++i];
    for (Check& check : all)
      if (word == check.name) known = some = check.wanted = true;
    if (!known) {
      std::printf("unknown argument '%s'\n", arguments[i]);
      return 3;
    }
  }
  int code = 0;
  for (const Check& check : all) {
    if (some && !check.wanted) continue;
    std::string at = "start";
    try {
      check.run(effort, at);
      std::printf("ok %s\n", check.name);
    } catch (const emu::Error& error) {
      std::printf("FAULT %s: %s: %s\n", check.name, at.c_str(), error.what());
      code = 2;
    } catch (const Wrong& error) {
      std::printf("WRONG %s: %s: %s\n", check.name, at.c_str(), error.what());
      code = code ? code : 1;
    }
    std::fflush(stdout);
  }
  return code;
}
