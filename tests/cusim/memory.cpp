// Shared memory, cp.async, fences, and what loads and stores move.
#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "atomics.h"
#include "block.h"
#include "counters.h"
#include "sanitizers.h"

namespace cusim {
namespace {

constexpr size_t margin = 4096;  // bytes before and behind a block's shared memory
constexpr unsigned char margin_fill = 0xA5;
constexpr uint32_t window_start = 1024;  // the 32-bit address at which shared memory begins
size_t mapped_size;

size_t whole_margins(size_t size) { return (size + margin - 1) / margin * margin; }

void check_alignment(const char* operation, const void* address, size_t bytes, Site site) {
  if (reinterpret_cast<uintptr_t>(address) % bytes)
    fail("%s:%d: %s of %zu bytes at %p, which is not a multiple of them", site.file, site.line, operation, bytes,
         address);
}

void note(Space space, const void* address, size_t bytes, Site site) {
  const sanitizer::Quiet quiet;
  self().accesses.push_back({site, reinterpret_cast<uintptr_t>(address), static_cast<uint8_t>(bytes), space});
}

void shared_access(const char* operation, const void* address, size_t bytes, Site site) {
  shared_pointer(shared_address(address, site), bytes, operation, site);
  check_alignment(operation, address, bytes, site);
  note(Space::shared, address, bytes, site);
}

void land(const std::vector<CopyInFlight>& copies) {
  for (const CopyInFlight& copy : copies) {
    sanitizer::writes(copy.destination, copy.bytes);
    const sanitizer::Quiet quiet;
    memcpy(copy.destination, copy.data, copy.bytes);
  }
}

}  // namespace

// Pages of their own, margins of which nothing may be written: [margin, shared memory, margin, tokens].
void allocate_shared_memory(size_t size) {
  const size_t guarded = margin + whole_margins(size) + margin;
  mapped_size = guarded + sizeof(Tokens);
  void* memory = mmap(nullptr, mapped_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  auto* start = static_cast<char*>(memory);
  block.shared = start + margin;
  block.shared_size = size;
  block.tokens = reinterpret_cast<Tokens*>(start + guarded);
  memset(start, margin_fill, guarded);
  memset(block.shared, 0xff, size);  // NaN in every format
  sanitizer::forbid(start, margin);
  sanitizer::forbid(block.shared + size, guarded - margin - size);
}

void check_shared_memory_margins() {
  if (sanitizer::addresses) return;  // which has said so
  const auto* bytes = reinterpret_cast<const unsigned char*>(block.shared);
  const auto size = static_cast<ptrdiff_t>(block.shared_size);
  const auto end = static_cast<ptrdiff_t>(whole_margins(block.shared_size) + margin);
  for (ptrdiff_t i = -static_cast<ptrdiff_t>(margin); i < end; i++)
    if ((i < 0 || i >= size) && bytes[i] != margin_fill)
      fail("block (%u, %u, %u) wrote at offset %td of its %td bytes of shared memory", block_index.x, block_index.y,
           block_index.z, i, size);
}

void release_shared_memory() {
  char* start = block.shared - margin;
  sanitizer::allow(start, mapped_size);
  munmap(start, mapped_size);
  block.shared = nullptr;
  block.tokens = nullptr;
}

void* shared_memory() { return block.shared; }
size_t shared_memory_size() { return block.shared_size; }

uint32_t shared_address(const void* pointer, Site site) {
  const ptrdiff_t offset = static_cast<const char*>(pointer) - block.shared;
  if (offset < 0 || offset > static_cast<ptrdiff_t>(block.shared_size))
    fail("%s:%d: the shared address of a pointer outside of shared memory (offset %td of %zu bytes)", site.file,
         site.line, offset, block.shared_size);
  return window_start + static_cast<uint32_t>(offset);
}

void* shared_pointer(uint32_t address, size_t bytes, const char* operation, Site site) {
  const int64_t offset = int64_t{address} - window_start;
  if (offset < 0 || offset + bytes > block.shared_size)
    fail("%s:%d: %s of %zu bytes at offset %ld of %zu bytes of shared memory", site.file, site.line, operation, bytes,
         static_cast<long>(offset), block.shared_size);
  return block.shared + offset;
}

void cp_async(uint32_t destination, const void* source, int bytes, int source_bytes, Site site) {
  if (bytes != 4 && bytes != 8 && bytes != 16) fail("%s:%d: cp.async of %d bytes", site.file, site.line, bytes);
  if (source_bytes < 0 || source_bytes > bytes)
    fail("%s:%d: cp.async of %d bytes reads %d", site.file, site.line, bytes, source_bytes);
  CopyInFlight copy{shared_pointer(destination, bytes, "cp.async", site), bytes, {}};
  check_alignment("cp.async into shared memory", copy.destination, bytes, site);
  check_alignment("cp.async from global memory", source, bytes, site);
  note(Space::copy, copy.destination, bytes, site);
  if (source_bytes) note(Space::global_read, source, bytes, site);
  sanitizer::writes(copy.destination, bytes);
  if (source_bytes) sanitizer::reads(source, source_bytes);
  const sanitizer::Quiet quiet;
  memcpy(copy.data, source, source_bytes);
  memset(copy.destination, 0xff, bytes);
  self().open_copies.push_back(copy);
  counters.cp_async++;
  counters.global_bytes_read += source_bytes;
}

void cp_async_commit() {
  const sanitizer::Quiet quiet;
  ThreadState& thread = self();
  thread.copy_groups.push_back(std::move(thread.open_copies));
  thread.open_copies.clear();
}

void cp_async_wait(int groups_left) {
  auto& groups = self().copy_groups;
  while (static_cast<int>(groups.size()) > groups_left) {
    land(groups.front());
    const sanitizer::Quiet quiet;
    groups.pop_front();
  }
}

void cp_async_wait_all() {
  cp_async_commit();
  cp_async_wait(0);
}

void global_load(const void* address, size_t bytes, Site site) {
  check_alignment("load", address, bytes, site);
  counters.global_bytes_read += bytes;
  note(Space::global_read, address, bytes, site);
}

void global_store(const void* address, size_t bytes, Site site) {
  check_alignment("store", address, bytes, site);
  counters.global_bytes_written += bytes;
  note(Space::global_write, address, bytes, site);
}

void shared_load(const void* address, size_t bytes, Site site) { shared_access("load", address, bytes, site); }
void shared_store(const void* address, size_t bytes, Site site) { shared_access("store", address, bytes, site); }

void count_accesses_of(int warp) {
  std::vector<Access>* lanes[32] = {};
  const int end = std::min(32, static_cast<int>(block.threads.size()) - 32 * warp);
  for (int lane = 0; lane < end; lane++) lanes[lane] = &block.threads[32 * warp + lane].accesses;
  count_accesses(lanes);
}

// A fence before an atomic operation publishes what came before; one after it receives what the operation saw
// published.
void fence() {
  const sanitizer::Quiet quiet;
  self().fenced = true;
  for (void* address : self().atomics) sanitizer::acquire(address);
}

void before_atomic(void* address) {
  const sanitizer::Quiet quiet;
  if (self().fenced) sanitizer::release(address);
  auto& atomics = self().atomics;
  if (std::find(atomics.begin(), atomics.end(), address) == atomics.end()) atomics.push_back(address);
}

}  // namespace cusim
