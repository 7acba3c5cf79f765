// The kernel of enqueue_ of one ISA level.
#pragma once

#include "../key_queue.h"

namespace perfvl {

using RingKernel = void (*)(const RingWrite&, const Host&);

}  // namespace perfvl
