#pragma once

#include "../key_queue.h"

namespace perfvl::cuda {

// Writes a batch into a ring (csrc/key_queue.h) in one launch; all pointers are of the device but that to the payloads'
// descriptions, of which there are at most kMaxPayloads. Nothing may write the cursor meanwhile. Without rows nothing
// is launched. A cursor is taken modulo K from -2^47 to 2^47; beyond, rows still land inside the ring, but where, and
// what becomes of the cursor, is not said. `stream` is a cudaStream_t. Returns a cudaError_t.
int key_queue(const RingWrite& write, void* stream);

}  // namespace perfvl::cuda
