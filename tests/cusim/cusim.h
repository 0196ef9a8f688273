// CUDA C++ on a CPU without a GPU: what a kernel's source needs of CUDA, for g++ (README.md beside this file).
//
// Include it in the place of CUDA's headers. NVIDIA's own bfloat16 and half headers give the conversions, so that they
// round as a GPU does. A kernel is an ordinary function here, its loads and stores ordinary C++ that sanitizers see.
#pragma once

#ifdef __CUDACC__
#error "cusim.h is for a host compiler; nvcc has the real thing"
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>
#include <vector_types.h>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __launch_bounds__
#undef __forceinline__
#undef __noinline__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __shared__ static_assert(false, "static shared memory is not emulated: use cusim::shared_memory()");

#include "arithmetic.h"
#include "atomics.h"
#include "matrix.h"
#include "memory.h"
#include "runtime.h"
#include "warp.h"

#define threadIdx (cusim::current->index)
#define blockIdx (cusim::block_index)
#define blockDim (cusim::block_size)
#define gridDim (cusim::grid_size)
constexpr int warpSize = 32;

inline void __syncthreads(cusim::Site site = cusim::Site::here()) { cusim::block_barrier(site); }
inline void __syncwarp(uint32_t mask = 0xffffffffu, cusim::Site site = cusim::Site::here()) {
  cusim::warp_barrier(mask, site);
}
