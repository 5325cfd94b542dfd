// Weights in device memory.
#pragma once

#include "backend/backend.h"
#include "backend/cuda/tape.h"
#include "backend/cuda/units.h"

namespace sbd::cuda {

// What a weight of a file's type takes: nearly what it takes there, or as f16.
double packed_bytes(DType dtype, double rows, double cols);

// Whether a product of such a weight also takes the sums of its inputs.
bool has_mins(DType dtype);

// In stages [feature blocks][chunks], where formats.h has the type; f32 row-major; the other types
// become f16.
class PackedWeight : public Weight {
 public:
  // The tensor's data may be the host's or the device's.
  PackedWeight(const Tensor& tensor, cudaStream_t stream);
  static const PackedWeight& of(const Weight& weight) {
    return static_cast<const PackedWeight&>(weight);
  }

  const std::uint8_t* data() const { return memory_.as<std::uint8_t>(); }
  std::size_t size() const { return memory_.size(); }
  int n_blocks() const { return ceil_div(rows(), kBlockFeatures); }
  int n_chunks() const { return ceil_div(cols(), kChunk); }

 private:
  DeviceMemory memory_;
};

// A row of the matrix in float32, for the embedding.
struct EmbedArgs {
  const std::uint8_t* weight;
  DType dtype;
  int cols;
  const TokenId* tokens;  // [rows]
  const float* mask;      // [cols], of kMaskSlot; null where there is none
  float* out;             // [rows, cols]
  bool operator==(const EmbedArgs&) const = default;
};
void embed(Tape& tape, const EmbedArgs& args, int n_rows);

}  // namespace sbd::cuda
