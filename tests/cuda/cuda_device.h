// The CUDA backend as a Device.
#pragma once

#include <bit>

#include "backend/cuda/kv.h"
#include "cuda_check.h"
#include "device.h"

namespace sbd::cuda {

class CudaDevice : public test::Device {
 public:
  std::string name() const override { return "cuda"; }
  CudaBackend& backend() override { return backend_; }
  std::vector<float> download(const float* values, std::size_t n) override {
    return backend_.download(values, n);
  }

  double stored(const KvStorage& storage, const HeadShape& heads, int layer, bool value, int head,
                int position, int d) override {
    backend_.finish();
    const auto& kv = static_cast<const CudaKv&>(storage);
    const Index plane = (Index{layer} * 2 + value) * heads.num_key_value_heads + head;
    const Index place = plane * kv.info(0).capacity + position % kPagePositions;
    const Index at = place * CudaKv::stride(heads, kv.dtype()) + d;
    const auto* page = kv.pages()[static_cast<std::size_t>(position / kPagePositions)].as<char>();
    const auto size = static_cast<Index>(bytes_per_block(kv.dtype()));
    std::uint32_t bits = 0;
    check(
        cudaMemcpy(&bits, page + at * size, static_cast<std::size_t>(size), cudaMemcpyDeviceToHost),
        "reading a cache");
    switch (kv.dtype()) {
      case DType::f16: return test::half_value(static_cast<std::uint16_t>(bits));
      case DType::bf16: return test::bf16_value(static_cast<std::uint16_t>(bits));
      default: return std::bit_cast<float>(bits);
    }
  }

  DType multiplied(DType cache) const override { return cache; }
  double exp_error() const override { return 2e-6; }
  // Float32 alone: 2e-6. Halves round activations, or queries, keys, values and probabilities, by
  // 2^-12 in the mean; bf16 by 2^-9; layers let these grow some tenfold.
  double logits_error(DType weights, DType cache) const override {
    if (weights == DType::bf16 || cache == DType::bf16) return 2e-2;
    return weights != DType::f32 ? 5e-3 : cache == DType::f32 ? 1e-5 : 3e-3;
  }

 private:
  CudaBackend backend_{0};
};

inline std::vector<test::MakeDevice> cuda_devices() {
  return {[] { return std::make_unique<CudaDevice>(); }};
}

}  // namespace sbd::cuda
