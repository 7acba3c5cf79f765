// The ISA levels in this build (PVL_HAVE_<level>), what this CPU can run, and the level in use.
#pragma once

#include <cstring>
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/activation_units.h"
#include "cpu/color_transform.h"
#include "cpu/conditioning.h"
#include "cpu/gan_loss.h"
#include "cpu/info_nce.h"
#include "cpu/key_queue.h"
#include "cpu/momentum_update.h"
#include "cpu/norm_act.h"
#include "cpu/pooling.h"
#include "cpu/separable_conv.h"
#include "cpu/small_loss.h"
#include "cpu/upsample_conv.h"

namespace perfvl {

struct Level {
  const char* name;
  bool (*supported)();
  const ActivationKernel* activation;
  const ColorTransformKernel* color_transform;
  const ConditioningKernel* conditioning;
  const GanLossKernel* gan_loss;
  const InfoNceKernel* info_nce;
  const MomentumKernel* momentum_update;
  const RingKernel* key_queue;
  const NormActKernel* norm_act;
  const PoolingKernel* pooling;
  const SeparableConvKernel* separable_conv;
  const SmallLossKernel* small_loss;
  const UpsampleConvKernel* upsample_conv;
};

#if defined(__x86_64__)
inline bool cpuid_bit(unsigned leaf, unsigned subleaf, int reg, int bit) {
  unsigned r[4] = {0, 0, 0, 0};
  return __get_cpuid_count(leaf, subleaf, &r[0], &r[1], &r[2], &r[3]) && (r[reg] >> bit & 1u);
}
inline bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && cpuid_bit(1, 0, 2, 29);  // the last: F16C
}
inline bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && has_avx2();
}
inline bool has_avx512_bf16() { return has_avx512() && cpuid_bit(7, 1, 0, 5); }
inline bool has_amx() {
  // AMX tiles are off until the process asks Linux for them: ARCH_REQ_XCOMP_PERM of XTILEDATA.
  constexpr long request_permission = 0x1023, xtiledata = 18;
  return has_avx512_bf16() && cpuid_bit(7, 0, 3, 22) && cpuid_bit(7, 0, 3, 24) &&
         syscall(SYS_arch_prctl, request_permission, xtiledata) == 0;
}
#endif
inline bool has_baseline() { return true; }

#define PVL_DECLARE(level)                           \
  namespace level {                                  \
  extern const ActivationKernel activation;          \
  extern const ColorTransformKernel color_transform; \
  extern const ConditioningKernel conditioning;      \
  extern const GanLossKernel gan_loss;               \
  extern const InfoNceKernel info_nce;               \
  extern const MomentumKernel momentum_update;       \
  extern const RingKernel key_queue;                 \
  extern const NormActKernel norm_act;               \
  extern const PoolingKernel pooling;                \
  extern const SeparableConvKernel separable_conv;   \
  extern const SmallLossKernel small_loss;           \
  extern const UpsampleConvKernel upsample_conv;     \
  }
#define PVL_LEVEL(level)    \
  {#level,                  \
   has_##level,             \
   &level::activation,      \
   &level::color_transform, \
   &level::conditioning,    \
   &level::gan_loss,        \
   &level::info_nce,        \
   &level::momentum_update, \
   &level::key_queue,       \
   &level::norm_act,        \
   &level::pooling,         \
   &level::separable_conv,  \
   &level::small_loss,      \
   &level::upsample_conv},

#if defined(PVL_HAVE_amx)
PVL_DECLARE(amx)
#endif
#if defined(PVL_HAVE_avx512_bf16)
PVL_DECLARE(avx512_bf16)
#endif
#if defined(PVL_HAVE_avx512)
PVL_DECLARE(avx512)
#endif
#if defined(PVL_HAVE_avx2)
PVL_DECLARE(avx2)
#endif
PVL_DECLARE(baseline)

// Best first.
inline const Level* levels_begin() {
  static const Level levels[] = {
#if defined(PVL_HAVE_amx)
      PVL_LEVEL(amx)
#endif
#if defined(PVL_HAVE_avx512_bf16)
          PVL_LEVEL(avx512_bf16)
#endif
#if defined(PVL_HAVE_avx512)
              PVL_LEVEL(avx512)
#endif
#if defined(PVL_HAVE_avx2)
                  PVL_LEVEL(avx2)
#endif
                      PVL_LEVEL(baseline){},
  };
  return levels;
}

// The level of this name if the CPU can run it, else null. Without a name: the best this CPU can run.
inline const Level* find_level(const char* name) {
  for (const Level* level = levels_begin(); level->name; ++level)
    if ((!name || !std::strcmp(name, level->name)) && level->supported()) return level;
  return nullptr;
}

inline const Level*& current_level() {
  static const Level* level = find_level(nullptr);
  return level;
}

}  // namespace perfvl
