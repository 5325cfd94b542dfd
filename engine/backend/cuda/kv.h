// The cache of one sequence in device memory, whole from the start (attention.h says how it lies).
#pragma once

#include "backend/cuda/attention.h"
#include "core/bytes.h"

namespace sbd::cuda {

class CudaBackend;

class CudaKv : public KvStorage {
 public:
  CudaKv(CudaBackend& backend, int n_layers, const HeadShape& heads, int n_ctx, DType dtype,
         cudaStream_t stream);
  ~CudaKv() override;  // waits for what is under way

  std::uint8_t* data() const { return memory_.as<std::uint8_t>(); }
  DType dtype() const { return dtype_; }
  int n_ctx() const { return n_ctx_; }
  static int stride(const HeadShape& heads, DType dtype) {
    return round_up(heads.head_dim, dtype == DType::f16 ? 8 : 4);
  }

 private:
  CudaBackend& backend_;
  DType dtype_;
  int n_ctx_;
  DeviceMemory memory_;
};

}  // namespace sbd::cuda
