// Runs CUDA kernels on the CPU, so that index arithmetic, tails, barriers and shuffles are tested without a GPU.
//
// One block at a time, one fiber (ucontext) per thread. A thread runs until it waits at a barrier or a shuffle or
// leaves the kernel; when nobody can run, whoever waits for the same thing is released. If nobody can be released, the
// threads have diverged: std::runtime_error says who waits where. Sources include this through csrc/cuda/launch.cuh.
//
// To bring out what a GPU shows only now and then:
//   - `reverse` runs blocks and threads last to first: a missing barrier then changes the result;
//   - shared memory is NaN (0xff) at the start of every block;
//   - `grid_limit` launches fewer blocks than asked for: a grid-stride kernel must not notice;
//   - AddressSanitizer sees each shared array, UBSan sees misaligned vector accesses.
// Not covered: races inside one uninterrupted run, memory order, inline PTX, speed. Kernels must have internal linkage.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <new>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#include "cuda_types.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
// A section of their own, so that all of them can be filled between blocks (GCC: -fsanitize-sections=cuda_shared).
#define __shared__ static __attribute__((section("cuda_shared")))

inline dim3 gridDim, blockDim;
inline uint3 blockIdx, threadIdx;

extern "C" {
[[gnu::weak, gnu::visibility("hidden")]] extern unsigned char __start_cuda_shared[];
[[gnu::weak, gnu::visibility("hidden")]] extern unsigned char __stop_cuda_shared[];
}

namespace cuda_emulator {

inline bool reverse = false;
inline unsigned grid_limit = 0;  // 0: none
inline unsigned launches = 0;    // so far

using Where = std::source_location;
constexpr int kSuccess = 0, kInvalidValue = 1, kInvalidConfiguration = 9;  // cudaError_t
constexpr size_t kStack = 128 << 10, kSharedLimit = 48 << 10;
constexpr unsigned kWarp = 32;

struct Fiber {
  enum class State { ready, at_block, at_warp, done } state;
  uint3 thread;
  Where where;     // of the barrier or shuffle it waits at
  unsigned mask;   // at_warp: the lanes that must be there
  int source;      // at_warp: the lane whose value it receives; kBallot: everybody's as bits
  uint64_t value;  // given, and after the release received
  ucontext_t context;
  char* stack;
  void* asan_stack;
};
constexpr int kBallot = -1;

// One reservation for all fibers of the process: touched pages only cost memory.
inline char* stacks() {
  static char* base = static_cast<char*>(
      mmap(nullptr, 1024 * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  return base;
}

class Block {
 public:
  Block(unsigned threads, const std::function<void()>& kernel, unsigned char* shared, size_t shared_bytes)
      : fibers_(threads), kernel_(kernel), shared_(shared), shared_bytes_(shared_bytes) {}

  void run(uint3 index) {
    blockIdx = index;
    poison(__start_cuda_shared, __stop_cuda_shared);
    poison(shared_, shared_ + shared_bytes_);
    unsigned count = unsigned(fibers_.size());
    for (unsigned t = 0; t < count; ++t) start(t);
    do {
      for (unsigned i = 0; i < count; ++i) {
        Fiber& fiber = fibers_[reverse ? count - 1 - i : i];
        if (fiber.state == Fiber::State::ready) resume(fiber);
      }
    } while (release_warps() || release_block());
    for (const Fiber& fiber : fibers_)
      if (fiber.state != Fiber::State::done) throw std::runtime_error(divergence());
  }

  // Called by the running thread: back when everybody it waits for is there.
  void wait(Fiber::State state, const Where& where) {
    Fiber& fiber = *current_;
    fiber.state = state, fiber.where = where;
    leave(fiber, &fiber.asan_stack);
  }

  uint64_t exchange(unsigned mask, uint64_t value, int source, const Where& where) {
    Fiber& fiber = *current_;
    if (!(mask >> lane() & 1u))
      throw std::runtime_error(at(where) + "a thread calls with a mask that lacks its own lane");
    fiber.mask = mask, fiber.source = source, fiber.value = value;
    wait(Fiber::State::at_warp, where);
    return fiber.value;
  }

  unsigned lane() const { return unsigned(current_ - fibers_.data()) % kWarp; }
  unsigned char* shared() { return shared_; }

  static Block*& active() {
    static Block* block = nullptr;
    return block;
  }

 private:
#if defined(__SANITIZE_ADDRESS__)
  __attribute__((no_sanitize_address))  // the section also holds the red zones between the arrays
#endif
  static void poison(unsigned char* begin, unsigned char* end) {
    for (volatile unsigned char* p = begin; p < end; ++p) *p = 0xff;
  }

  void start(unsigned t) {
    Fiber& fiber = fibers_[t];
    fiber = Fiber{};
    fiber.thread = {t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y)};
    fiber.stack = stacks() + t * kStack;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(fiber.stack, kStack);  // of what the stack's previous fiber left behind
#endif
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack, fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, [] { active()->body(); }, 0);
  }

  void body() {
    Fiber& fiber = *current_;
    enter(nullptr);
    try {
      kernel_();
    } catch (...) {
      failure_ = std::current_exception();
    }
    fiber.state = Fiber::State::done;
    leave(fiber, nullptr);
  }

  void resume(Fiber& fiber) {
    current_ = &fiber;
    threadIdx = fiber.thread;
#if defined(__SANITIZE_ADDRESS__)
    void* own = nullptr;
    __sanitizer_start_switch_fiber(&own, fiber.stack, kStack);
#endif
    swapcontext(&scheduler_, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(own, nullptr, nullptr);
#endif
    if (failure_) std::rethrow_exception(failure_);
  }

  void leave(Fiber& fiber, [[maybe_unused]] void** asan_stack) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(asan_stack, scheduler_stack_, scheduler_stack_bytes_);
#endif
    swapcontext(&fiber.context, &scheduler_);
    enter(fiber.asan_stack);
  }
  void enter([[maybe_unused]] void* asan_stack) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(asan_stack, &scheduler_stack_, &scheduler_stack_bytes_);
#endif
  }

  static bool same_place(const Where& a, const Where& b) {
    return a.line() == b.line() && a.column() == b.column() && !std::strcmp(a.file_name(), b.file_name());
  }

  // Every group of lanes whose members all wait at the same place with the same mask goes on.
  bool release_warps() {
    bool any = false;
    for (size_t first = 0; first < fibers_.size(); first += kWarp) {
      size_t lanes = std::min<size_t>(kWarp, fibers_.size() - first);
      for (size_t l = 0; l < lanes; ++l)
        if (fibers_[first + l].state == Fiber::State::at_warp)
          any |= release_group(&fibers_[first], lanes, fibers_[first + l]);
    }
    return any;
  }
  bool release_group(Fiber* warp, size_t lanes, const Fiber& caller) {
    unsigned mask = caller.mask;
    uint64_t given[kWarp] = {}, ballot = 0;
    for (size_t l = 0; l < lanes; ++l) {
      if (!(mask >> l & 1u)) continue;
      if (warp[l].state != Fiber::State::at_warp || warp[l].mask != mask || !same_place(warp[l].where, caller.where))
        return false;
      given[l] = warp[l].value;
      if (warp[l].value) ballot |= uint64_t(1) << l;
    }
    for (size_t l = 0; l < lanes; ++l) {
      if (!(mask >> l & 1u)) continue;
      int source = warp[l].source;
      if (source != kBallot && (size_t(source) >= lanes || !(mask >> source & 1u)))
        throw std::runtime_error(at(caller.where) + "lane " + std::to_string(l) + " reads lane " +
                                 std::to_string(source) + ", which takes no part");
      warp[l].value = source == kBallot ? ballot : given[source];
      warp[l].state = Fiber::State::ready;
    }
    return true;
  }

  bool release_block() {
    for (const Fiber& fiber : fibers_)
      if (fiber.state != Fiber::State::at_block || !same_place(fiber.where, fibers_[0].where)) return false;
    for (Fiber& fiber : fibers_) fiber.state = Fiber::State::ready;
    return true;
  }

  static std::string at(const Where& where) {
    return std::string(where.file_name()) + ":" + std::to_string(where.line()) + ": ";
  }
  // One thread of each kind: that is enough to see who took which branch.
  std::string divergence() const {
    std::string text = "divergence in block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
                       std::to_string(blockIdx.z) + "):";
    std::vector<const Fiber*> seen;
    for (const Fiber& fiber : fibers_) {
      bool known = std::any_of(seen.begin(), seen.end(), [&](const Fiber* other) {
        return other->state == fiber.state &&
               (fiber.state == Fiber::State::done || same_place(other->where, fiber.where));
      });
      if (known) continue;
      seen.push_back(&fiber);
      text += " thread " + std::to_string(&fiber - fibers_.data());
      text += fiber.state == Fiber::State::done ? " left the kernel;" : " waits at " + at(fiber.where);
    }
    return text;
  }

  std::vector<Fiber> fibers_;
  const std::function<void()>& kernel_;
  unsigned char* shared_;
  size_t shared_bytes_;
  Fiber* current_ = nullptr;
  std::exception_ptr failure_;
  ucontext_t scheduler_;
  [[maybe_unused]] const void* scheduler_stack_ = nullptr;
  [[maybe_unused]] size_t scheduler_stack_bytes_ = 0;
};

// Returns the error a GPU would give for such a launch, as cudaError_t.
inline int launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  uint64_t threads = uint64_t(block.x) * block.y * block.z;
  bool grid_fits = grid.x && grid.y && grid.z && grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535;
  if (!grid_fits || !threads || threads > 1024 || block.z > 64) return kInvalidConfiguration;
  if (shared_bytes > kSharedLimit) return kInvalidValue;
  if (grid_limit) grid = dim3(std::min(grid.x, grid_limit), std::min(grid.y, grid_limit), std::min(grid.z, grid_limit));
  gridDim = grid, blockDim = block, ++launches;
  auto free_shared = [](unsigned char* p) { ::operator delete(p, std::align_val_t(16)); };
  std::unique_ptr<unsigned char, decltype(free_shared)> shared(
      static_cast<unsigned char*>(::operator new(shared_bytes, std::align_val_t(16))), free_shared);
  Block runner(unsigned(threads), kernel, shared.get(), shared_bytes);
  Block::active() = &runner;
  uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks; ++i) {
    uint64_t b = reverse ? blocks - 1 - i : i;
    runner.run({unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)});
  }
  return kSuccess;
}

inline unsigned char* dynamic_shared() { return Block::active()->shared(); }

template <class T>
T shuffle(unsigned mask, T value, int source, const Where& where) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  uint64_t raw = 0;
  std::memcpy(&raw, &value, sizeof value);
  raw = Block::active()->exchange(mask, raw, source, where);
  std::memcpy(&value, &raw, sizeof value);
  return value;
}
inline int lane() { return int(Block::active()->lane()); }

}  // namespace cuda_emulator

inline void __syncthreads(cuda_emulator::Where where = cuda_emulator::Where::current()) {
  cuda_emulator::Block::active()->wait(cuda_emulator::Fiber::State::at_block, where);
}
inline unsigned __ballot_sync(unsigned mask, int predicate,
                              cuda_emulator::Where where = cuda_emulator::Where::current()) {
  return unsigned(cuda_emulator::Block::active()->exchange(mask, predicate != 0, cuda_emulator::kBallot, where));
}
inline void __syncwarp(unsigned mask = 0xffffffffu, cuda_emulator::Where where = cuda_emulator::Where::current()) {
  cuda_emulator::Block::active()->exchange(mask, 0, cuda_emulator::kBallot, where);
}
// A lane whose partner lies outside its group of `width` lanes receives its own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              cuda_emulator::Where where = cuda_emulator::Where::current()) {
  int lane = cuda_emulator::lane();
  return cuda_emulator::shuffle(mask, value, (lane & ~(width - 1)) | (source & (width - 1)), where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 cuda_emulator::Where where = cuda_emulator::Where::current()) {
  int lane = cuda_emulator::lane(), source = lane - int(delta);
  return cuda_emulator::shuffle(mask, value, source < (lane & ~(width - 1)) ? lane : source, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   cuda_emulator::Where where = cuda_emulator::Where::current()) {
  int lane = cuda_emulator::lane(), source = lane + int(delta);
  return cuda_emulator::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source, where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  cuda_emulator::Where where = cuda_emulator::Where::current()) {
  int lane = cuda_emulator::lane(), source = lane ^ lane_mask;
  return cuda_emulator::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source, where);
}

inline uint32_t __float_as_uint(float x) { return cuda_emulator::bit_cast<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return cuda_emulator::bit_cast<float>(x); }

inline void __threadfence() {}  // blocks run one after the other

using cudaStream_t = void*;
constexpr int cudaSuccess = cuda_emulator::kSuccess;
inline int cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

template <class T>
T atomicAdd(T* address, T value) {
  T before = *address;
  *address = before + value;
  return before;
}
