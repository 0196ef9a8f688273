#include "accesses.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <tuple>

#include "counters.h"

namespace cusim {
namespace {

struct Instruction {
  Space space;
  int bytes;  // of a lane
  bool active[32] = {};
  uintptr_t address[32];
};

// 32 banks of 4 bytes serve in one pass 32 lanes of up to 4 bytes, 16 of 8, or 8 of 16. More passes are needed where
// lanes want different words of a bank.
void count_banks(const Instruction& instruction, uint64_t& wavefronts, uint64_t& least) {
  const int lanes_at_once = std::min(32, 128 / instruction.bytes);
  for (int first = 0; first < 32; first += lanes_at_once) {
    std::vector<uintptr_t> words[32];
    size_t worst = 0;
    for (int lane = first; lane < first + lanes_at_once; lane++) {
      if (!instruction.active[lane]) continue;
      const uintptr_t start = instruction.address[lane] / 4;
      for (uintptr_t word = start; word < start + (instruction.bytes + 3) / 4; word++) {
        auto& of_bank = words[word % 32];
        if (std::find(of_bank.begin(), of_bank.end(), word) == of_bank.end()) of_bank.push_back(word);
        worst = std::max(worst, of_bank.size());
      }
    }
    wavefronts += worst;
    least += worst > 0;
  }
}

void count_sectors(const Instruction& instruction, uint64_t& sectors) {
  uintptr_t seen[32];
  int count = 0;
  for (int lane = 0; lane < 32; lane++)
    if (instruction.active[lane])
      seen[count++] = instruction.address[lane] / 32;  // an aligned access lies in one sector
  std::sort(seen, seen + count);
  sectors += std::unique(seen, seen + count) - seen;
}

void count(const Instruction& instruction) {
  switch (instruction.space) {
    case Space::shared:
      return count_banks(instruction, counters.shared_wavefronts, counters.shared_least);
    case Space::copy:
      return count_banks(instruction, counters.cp_async_wavefronts, counters.cp_async_least);
    case Space::global_read:
      return count_sectors(instruction, counters.global_sectors_read);
    case Space::global_write:
      return count_sectors(instruction, counters.global_sectors_written);
  }
}

using Lanes = std::vector<Access>* const (&)[32];

bool same_instruction(const Access& a, const Access& b) {
  return a.site.line == b.site.line && a.site.file == b.site.file && a.space == b.space && a.bytes == b.bytes;
}

// Whether all lanes that did anything went the same way, so that the n-th accesses belong together.
bool together(Lanes lanes, const std::vector<Access>& way) {
  for (const auto* lane : lanes)
    if (lane && !lane->empty() && !std::equal(lane->begin(), lane->end(), way.begin(), way.end(), same_instruction))
      return false;
  return true;
}

void add(Instruction& instruction, int lane, const Access& access) {
  instruction.space = access.space;
  instruction.bytes = access.bytes;
  instruction.active[lane] = true;
  instruction.address[lane] = access.address;
}

void count_in_step(Lanes lanes, size_t length) {
  for (size_t n = 0; n < length; n++) {
    Instruction instruction;
    for (int lane = 0; lane < 32; lane++)
      if (lanes[lane] && !lanes[lane]->empty()) add(instruction, lane, (*lanes[lane])[n]);
    count(instruction);
  }
}

void count_by_place(Lanes lanes) {
  // (place, space, bytes, how many times this lane was there before)
  std::map<std::tuple<const char*, int, Space, int, int>, Instruction> instructions;
  for (int lane = 0; lane < 32; lane++) {
    if (!lanes[lane]) continue;
    std::map<std::tuple<const char*, int, Space, int>, int> times;
    for (const Access& access : *lanes[lane]) {
      const int time = times[{access.site.file, access.site.line, access.space, access.bytes}]++;
      add(instructions[{access.site.file, access.site.line, access.space, access.bytes, time}], lane, access);
    }
  }
  for (const auto& [key, instruction] : instructions) count(instruction);
}

}  // namespace

void count_accesses(std::vector<Access>* const (&lanes)[32]) {
  const auto first = std::find_if(lanes, lanes + 32, [](const auto* lane) { return lane && !lane->empty(); });
  if (first == lanes + 32) return;
  if (together(lanes, **first))
    count_in_step(lanes, (*first)->size());
  else
    count_by_place(lanes);
  for (auto* lane : lanes)
    if (lane) lane->clear();
}

}  // namespace cusim
