// Shared memory and its 32-bit addresses, cp.async, and loads and stores that are counted.
#pragma once

#include "runtime.h"

namespace cusim {

void* shared_memory();  // of the block that runs
size_t shared_memory_size();

// The 32-bit address that PTX takes, and back; the pointer must lie in shared memory, all `bytes` from the address on
// too.
uint32_t shared_address(const void* pointer, Site site = Site::here());
void* shared_pointer(uint32_t address, size_t bytes, const char* operation, Site site);

// cp.async of 4, 8 or 16 bytes, of which the first `source_bytes` are read and the rest becomes zero. The destination
// is NaN until a wait of the same thread lets the copy land.
void cp_async(uint32_t destination, const void* source, int bytes, int source_bytes, Site site = Site::here());
void cp_async_commit();
void cp_async_wait(int groups_left);  // cp.async.wait_group
void cp_async_wait_all();

// To be called beside a load or store of `bytes`, which must lie on a multiple of their number: what it moves, and in
// shared memory its bank conflicts, are counted.
void global_load(const void* address, size_t bytes, Site site = Site::here());
void global_store(const void* address, size_t bytes, Site site = Site::here());
void shared_load(const void* address, size_t bytes, Site site = Site::here());
void shared_store(const void* address, size_t bytes, Site site = Site::here());

}  // namespace cusim

template <class T>
inline T __ldg(const T* address, cusim::Site site = cusim::Site::here()) {
  cusim::global_load(address, sizeof(T), site);
  return *address;
}
