// The kernel of gan_loss of one ISA level.
#pragma once

#include "../gan_loss.h"

namespace perfvl {

using GanLossKernel = void (*)(const GanLoss&);

}  // namespace perfvl
