// Which GPU, and what it and this build can do.
#pragma once

#include "backend/cuda/runtime.h"

namespace sbd::cuda {

// The device, made current: before anything is made on it.
int choose_device(int device);

// Whether a kernel may start before the last one's end, where its code waits for it (ptx.h).
bool may_overlap(const cudaDeviceProp& properties);

}  // namespace sbd::cuda
