// The CUDA backend of a build without it.
#include "backend/cuda/cuda.h"
#include "core/error.h"

namespace sbd::cuda {

std::string why_unavailable() {
  return "device cuda: this build has no CUDA: build it where nvcc is, with SBD_CUDA=ON, or use "
         "device cpu";
}

std::unique_ptr<Backend> make_backend(int) { fail(ErrorKind::value, "{}", why_unavailable()); }

}  // namespace sbd::cuda
