// Weights repacked at load into the panels that the kernels read (kernels.h).
#pragma once

#include "backend/backend.h"
#include "backend/cpu/kernels.h"
#include "backend/cpu/memory.h"
#include "backend/cpu/thread_pool.h"

namespace sbd::cpu {

class PackedWeight : public Weight {
 public:
  // The tensor is a matrix; the panels are packed in parallel. NaN and infinity are errors.
  PackedWeight(const Tensor& tensor, Arena& arena, ThreadPool& pool);

  PackedMatrix matrix() const { return {dtype(), rows(), cols(), panel_bytes_, panels_.get()}; }
  int n_panels() const { return (rows() + kPanel - 1) / kPanel; }

  // The weight as this backend made it.
  static const PackedWeight& of(const Weight& weight) {
    return static_cast<const PackedWeight&>(weight);
  }

  // One row as float32, [cols].
  void dequantize_row(int row, float* out) const;

 private:
  Index panel_bytes_;
  std::shared_ptr<std::uint8_t> panels_;
};

}  // namespace sbd::cpu
