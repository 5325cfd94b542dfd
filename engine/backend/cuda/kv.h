// The cache of one sequence in device memory (attention.h says how it lies). A device has no pages
// that are there once they are touched, so the memory grows with the positions in use.
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

  std::size_t bytes(int n_positions) const override;
  void copy(const KvStorage& from, int n_positions) override;

  // Room for so many positions, n_ctx at most. What is under way may go on with the cache as it is,
  // kernels on a tape may not.
  void reserve(int n_positions, cudaStream_t stream);

  SequenceInfo info(int first_row) const {
    return {memory_.as<std::uint8_t>(), capacity_, first_row};
  }
  DType dtype() const { return dtype_; }
  static int stride(const HeadShape& heads, DType dtype) {
    return round_up(heads.head_dim, 16 / static_cast<int>(bytes_per_block(dtype)));
  }

 private:
  CudaBackend& backend_;
  DType dtype_;
  int n_ctx_;
  std::size_t n_runs_;     // of positions: [layers][keys, values][kv_heads]
  std::size_t row_bytes_;  // of a position in a run
  bool padded_;            // zeros behind head_dim
  int capacity_ = 0;
  DeviceMemory memory_;  // [runs][capacity][stride]
};

}  // namespace sbd::cuda
