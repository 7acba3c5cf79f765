// Kernels that show what the emulator runs and what it reports. All on n floats, one block unless said otherwise.
#pragma once

#include <cstdint>

namespace emulator_kernels {

int block_sums(const float* in, int64_t n, float* out, int blocks,
               int threads);                                     // out[blocks]: shuffles, then shared memory
int reversed(const float* in, int n, float* out, bool barrier);  // out[i] = in[n - 1 - i] by dynamic shared memory
int shared_at_start(float* out, int blocks);  // what a block finds in shared memory before it writes there
int kept_positive(const float* in, int n, float* out, int* count);  // in order, by ballot, popc and atomicAdd; n <= 32
int shuffles(int* out);    // [5, 32]: what each lane of a warp receives from each kind of shuffle
int two_groups(int* out);  // [32]: each half of a warp shuffles on its own, one half twice
int scaled_by_four(const float* in, int n, float* out);  // float4 loads and stores
int to_half_and_back(const float* in, int n, uint16_t* half, uint16_t* bfloat, float* from_half, float* from_bfloat);

// Mistakes. Each must be reported, or change the result, and never pass for correct.
int barrier_in_a_branch(int threads);  // half the block waits, the others leave
int different_barriers(int threads);   // each half waits at a barrier of its own
int shuffle_without_everybody(int threads);
int shuffle_from_outside_the_mask();
int one_past_shared();                               // for AddressSanitizer
int misaligned_vector(const float* in, float* out);  // for UBSan
int launch_only(unsigned grid, unsigned block, int64_t shared_bytes);

}  // namespace emulator_kernels
