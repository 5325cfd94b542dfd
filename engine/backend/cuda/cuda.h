// The door to the CUDA backend. A build without CUDA has it too (absent.cpp), and says so.
#pragma once

#include <memory>
#include <string>

#include "backend/backend.h"

namespace sbd::cuda {

// Why no GPU can be used here, one line; "" where one can.
std::string why_unavailable();

// The GPU of this index; where it cannot be used, an error of one line.
std::unique_ptr<Backend> make_backend(int device);

}  // namespace sbd::cuda
