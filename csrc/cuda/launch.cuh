// How every kernel is launched, and the vectors and 16-bit conversions they share. Knows no torch.
// Without nvcc the same sources compile with g++ against tests/native/cuda_emulator.h, which runs kernels on the CPU.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "cuda_emulator.h"
#endif

namespace perfvl::cuda {

// Returns the cudaError_t of this very launch: cudaGetLastError() after <<<>>> would also report somebody else's.
// Arguments are converted to what the kernel takes, and copied by the driver alone: a table may be 32 kB long.
template <class... Parameters>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
           const std::type_identity_t<Parameters>&... arguments) {
#if defined(__CUDACC__)
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes, config.stream = static_cast<cudaStream_t>(stream);
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))..., nullptr};
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), pointers);
#else
  (void)stream;
  return cuda_emulator::launch(grid, block, shared_bytes, [&] { kernel(arguments...); });
#endif
}

// The block's dynamic shared memory, 16-byte aligned.
template <class T>
__device__ T* dynamic_shared() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) unsigned char bytes[];
#else
  unsigned char* bytes = cuda_emulator::dynamic_shared();
#endif
  return reinterpret_cast<T*>(bytes);
}

// What one thread moves at once: up to 16 bytes by one instruction.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Vector {
  T values[kCount];
};

inline bool aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Rounds to nearest even.
template <class T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

}  // namespace perfvl::cuda
