// The emulator's settings and counters for a caller in another language.
#include <cxxabi.h>

#include <cstdlib>
#include <iterator>

#include "counters.h"
#include "runtime.h"

namespace cusim {

Counters counters;
std::map<std::tuple<std::string, unsigned, size_t>, uint64_t> launches;

namespace {

// Is told of a launch by its symbol before it runs, and with null for the kernel when it has run.
using Observer = void (*)(const char* kernel, const unsigned* grid, unsigned threads, uint64_t shared_bytes,
                          const void* parameters, uint64_t parameters_bytes);
Observer observer;

}  // namespace

void note_launch(const std::type_info& symbol, dim3 grid, dim3 block, size_t shared_bytes, const void* parameters,
                 size_t parameters_bytes) {
  char* const readable = abi::__cxa_demangle(symbol.name(), nullptr, nullptr, nullptr);
  std::string kernel = readable ? readable : symbol.name();  // cusim::Symbol<&(void f<64>(Params))>
  free(readable);
  const size_t start = kernel.find('('), end = kernel.rfind(')');
  if (start != std::string::npos && start < end) kernel = kernel.substr(start + 1, end - start - 1);
  const unsigned threads = block.x * block.y * block.z, blocks[] = {grid.x, grid.y, grid.z};
  launches[{kernel, threads, shared_bytes}]++;
  if (observer) observer(kernel.c_str(), blocks, threads, shared_bytes, parameters, parameters_bytes);
}

void note_end() {
  if (observer) observer(nullptr, nullptr, 0, 0, nullptr, 0);
}

}  // namespace cusim

#define CUSIM_EXPORT extern "C" __attribute__((visibility("default")))

CUSIM_EXPORT void cusim_configure(uint64_t seed, int order) {
  cusim::options = {seed, static_cast<cusim::Order>(order)};
}

CUSIM_EXPORT void cusim_reset_counters() {
  cusim::counters = {};
  cusim::launches.clear();
}

// The name of counter `index` and its value; null behind the last.
CUSIM_EXPORT const char* cusim_counter(int index, uint64_t* value) {
  struct Named {
    const char* name;
    uint64_t cusim::Counters::* member;
  };
#define CUSIM_NAME(name) {#name, &cusim::Counters::name},
  static const Named all[] = {CUSIM_COUNTERS(CUSIM_NAME)};
#undef CUSIM_NAME
  if (index < 0 || index >= static_cast<int>(std::size(all))) return nullptr;
  *value = cusim::counters.*all[index].member;
  return all[index].name;
}

// The kernel of entry `index` of the launches, and the rest of the entry; null behind the last.
CUSIM_EXPORT const char* cusim_launch(int index, unsigned* threads, uint64_t* shared_bytes, uint64_t* times) {
  if (index < 0 || index >= static_cast<int>(cusim::launches.size())) return nullptr;
  const auto& [key, count] = *std::next(cusim::launches.begin(), index);
  *threads = std::get<1>(key);
  *shared_bytes = std::get<2>(key);
  *times = count;
  return std::get<0>(key).c_str();
}

CUSIM_EXPORT void cusim_observe(cusim::Observer observer) { cusim::observer = observer; }
