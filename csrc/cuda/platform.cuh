// What kernels are written against: CUDA as nvcc compiles it, or the same source built with g++ for the emulator, which
// runs it on the CPU (FLAMINGO_EMULATED; its header cusim.h is found with -I).
//
// A kernel is `template <...> __global__ void f(const Params p)`, declares its shared memory with SHARED_MEMORY, and is
// started by `launch<f<...>>("f", ...)`. There is no <<<>>>, no static __shared__, and no inline PTX outside of
// ptx.cuh.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/stream.h"

#ifdef FLAMINGO_EMULATED
#include <cusim.h>
#define SHARED_MEMORY(T, name) T* const name = static_cast<T*>(cusim::shared_memory())
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
// The shared memory of a block, of as many bytes as the launch says, as T* name.
#define SHARED_MEMORY(T, name)                                       \
  extern __shared__ __align__(128) unsigned char flamingo_shared_[]; \
  T* const name = reinterpret_cast<T*>(flamingo_shared_)
#endif

#define FLAMINGO_DEVICE __device__ __forceinline__

namespace flamingo {

constexpr int64_t kMostBlocks = 2147483647;     // of a grid
constexpr size_t kMostSharedBytes = 99 * 1024;  // of a block, on every chip from sm_80 to sm_120

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Starts `blocks` blocks of `threads` threads with `shared_bytes` of shared memory each. Asynchronous, and nothing that
// a stream under capture forbids.
//
// Raises: std::runtime_error with the kernel's name, if the grid is too large or CUDA refuses.
template <auto kernel, typename Params>
void launch(const char* name, int64_t blocks, int threads, size_t shared_bytes, Stream stream, const Params& params) {
  const auto fail = [name](const std::string& why) { throw std::runtime_error(std::string(name) + ": " + why); };
  if (blocks > kMostBlocks) fail(std::to_string(blocks) + " blocks are more than a grid holds");
  if (shared_bytes > kMostSharedBytes) fail(std::to_string(shared_bytes) + " bytes are more than a block's memory");
  if (blocks <= 0) return;
#ifdef FLAMINGO_EMULATED
  if (stream.device >= 0) fail("the emulated module takes CPU tensors only");
  cusim::launch<kernel>(name, dim3(static_cast<unsigned>(blocks)), dim3(threads), shared_bytes, params);
#else
  const auto check = [&](cudaError_t status) {
    if (status != cudaSuccess) fail(cudaGetErrorString(status));
  };
  if (stream.device < 0) fail("takes CUDA tensors only");
  check(cudaSetDevice(stream.device));  // torch has it current already, but this module has a runtime of its own
  if (shared_bytes > 48 * 1024) {       // to be asked for, once on each device
    static std::atomic<uint64_t> asked{0};
    const uint64_t bit = uint64_t{1} << (stream.device & 63);
    if (stream.device > 63 || !(asked.load() & bit)) {
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
      asked.fetch_or(bit);
    }
  }
  void* arguments[] = {const_cast<Params*>(&params)};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)), dim3(threads),
                         arguments, shared_bytes, static_cast<cudaStream_t>(stream.handle)));
#endif
}

}  // namespace flamingo
