// The cache of one sequence in device memory (attention.h says how it lies). A device has no memory
// that is there once it is touched, so a cache takes pages as its positions are used.
#pragma once

#include <vector>

#include "backend/cuda/attention.h"
#include "backend/cuda/runtime.h"
#include "core/bytes.h"

namespace sbd::cuda {

class CudaBackend;

// Pages of caches that ended, for those that begin or grow: asking a device for memory, and giving
// it back, waits for all that is under way, so a server's steady state does neither.
class PagePool {
 public:
  DeviceMemory take(std::size_t bytes);
  void give(std::vector<DeviceMemory> pages);
  // Gives all to the device; false where there was none. Nothing may be under way that uses them.
  bool release();

 private:
  std::vector<DeviceMemory> pages_;
};

class CudaKv : public KvStorage {
 public:
  CudaKv(CudaBackend& backend, int n_layers, const HeadShape& heads, int n_ctx, DType dtype);
  ~CudaKv() override;

  // What n positions take.
  static std::size_t bytes(int n_layers, const HeadShape& heads, int n_ctx, DType dtype,
                           int n_positions);
  void copy(const KvStorage& from, int n_positions) override;
  void truncate(int n_positions) override;

  // Room for so many positions, n_ctx at most. What is there stays where it is.
  void reserve(int n_positions);

  SequenceInfo info(int first_row) const { return {page_positions_, first_row}; }
  const std::vector<DeviceMemory>& pages() const { return pages_; }
  int max_pages() const { return ceil_div(n_ctx_, kPagePositions); }
  DType dtype() const { return dtype_; }
  static int stride(const HeadShape& heads, DType dtype) {
    return round_up(heads.head_dim, 16 / static_cast<int>(bytes_per_block(dtype)));
  }

 private:
  CudaBackend& backend_;
  DType dtype_;
  int n_ctx_;
  int page_positions_;
  std::size_t n_planes_;  // of a page: the positions of a layer's keys or values in a head
  std::size_t page_bytes_;
  bool padded_;  // zeros behind head_dim
  std::vector<DeviceMemory> pages_;
};

}  // namespace sbd::cuda
