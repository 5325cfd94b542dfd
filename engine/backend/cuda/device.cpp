#include "backend/cuda/device.h"

#include "backend/cuda/cuda.h"

namespace sbd::cuda {

namespace {

std::string why_unusable(int device) {
  cudaDeviceProp properties;
  const cudaError_t status = cudaGetDeviceProperties(&properties, device);
  if (status != cudaSuccess) {
    return format("device cuda:{}: {}; use device cpu", device, cudaGetErrorString(status));
  }
  if (properties.major >= 8) return "";
  return format(
      "device cuda:{}: {} has compute capability {}.{}, expected 8.0 or higher; use device cpu",
      device, properties.name, properties.major, properties.minor);
}

}  // namespace

int choose_device(int device) {
  refuse_after_failure();
  int n = 0;
  const cudaError_t status = cudaGetDeviceCount(&n);
  SBD_CHECK(status == cudaSuccess && n > 0, "{}", why_unavailable());
  SBD_CHECK(device >= 0 && device < n, "device cuda:{}: expected an index below the {} GPUs here",
            device, n);
  const std::string why = why_unusable(device);
  SBD_CHECK(why.empty(), "{}", why);
  const cudaError_t made_current = cudaSetDevice(device);
  SBD_CHECK(made_current == cudaSuccess, "device cuda:{}: {}; use device cpu", device,
            cudaGetErrorString(made_current));
  return device;
}

std::string why_unavailable() {
  const std::string lost = failure();
  if (!lost.empty()) return lost;
  int n = 0;
  const cudaError_t status = cudaGetDeviceCount(&n);
  cudaGetLastError();
  if (status == cudaSuccess && n > 0) return why_unusable(0);
  return format("device cuda: no usable NVIDIA GPU: {}; use device cpu",
                status == cudaSuccess ? "none found" : cudaGetErrorString(status));
}

}  // namespace sbd::cuda
