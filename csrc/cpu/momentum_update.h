// The kernel of momentum_update_ of one ISA level.
#pragma once

#include "../momentum_update.h"

namespace perfvl {

using MomentumKernel = void (*)(const MomentumPair* pairs, int64_t count, const MomentumWeights&, const Host&);

}  // namespace perfvl
