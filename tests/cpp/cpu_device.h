// The CPU backend as a Device, once for every kernel table.
#pragma once

#include "backend/cpu/cpu_backend.h"
#include "check.h"
#include "device.h"
#include "reference.h"

namespace sbd::test {

class CpuDevice : public Device {
 public:
  explicit CpuDevice(const cpu::Kernels* kernels, int n_threads = 2)
      : kernels_(kernels), forced_(kernels->name), backend_(n_threads) {}

  std::string name() const override { return kernels_->name; }
  Backend& backend() override { return backend_; }
  std::vector<float> download(const float* values, std::size_t n) override {
    return {values, values + n};
  }

  double stored(const KvStorage& storage, const HeadShape& heads, int layer, bool value, int head,
                int position, int d) override {
    const auto& kv = static_cast<const cpu::CpuKv&>(storage);
    const std::uint8_t* base = value ? kv.values(layer, head) : kv.keys(layer, head);
    if (kv.dtype() == DType::q8_0) {
      const int lane = position % 16, of_group = d % 32;
      const cpu::CachedGroup& group = reinterpret_cast<const cpu::CachedGroup*>(
          base)[position / 16 * (heads.head_dim / 32) + d / 32];
      return half_value(group.scales[lane]) *
             group.quants[value ? lane * 32 + of_group : of_group * 16 + lane];
    }
    const int u = kv.interleave();
    CHECK_EQ(u, kv.dtype() == DType::f32 ? 1 : kernels_->short_interleave);
    const int at =
        value ? (position / u * kv.padded_dim() + d) * u + position % u
              : (position / 16 * (heads.head_dim / u) + d / u) * 16 * u + position % 16 * u + d % u;
    if (kv.dtype() == DType::f32) return reinterpret_cast<const float*>(base)[at];
    const std::uint16_t bits = reinterpret_cast<const std::uint16_t*>(base)[at];
    return kv.dtype() == DType::f16 ? half_value(bits) : bf16_value(bits);
  }

  std::vector<DType> cache_types(int head_dim) const override {
    std::vector<DType> types = Device::cache_types(head_dim);
    if (head_dim % 32 == 0) types.push_back(DType::q8_0);
    return types;
  }
  DType multiplied(DType cache) const override {
    const bool is_short = cache == DType::f16 || cache == DType::bf16;
    return is_short && kernels_->short_interleave == 2 ? DType::bf16 : DType::f32;
  }
  double exp_error() const override { return 4e-7; }
  // Float32 alone: 2e-6. Activations are rounded eleven times on the way: to bf16 by about 2^-9 in
  // the mean, to int8 by 1/500 of their group's largest; F16 keys by 2^-12. Layers let these grow
  // to 0.011, 0.026 and 0.0012. Where attention over F16 keys multiplies in bf16, queries, keys,
  // values and probabilities are rounded to it: 0.012. So they are in a BF16 cache.
  double logits_error(DType weights, DType cache) const override {
    if (values_per_block(weights) > 1) return 6e-2;
    if (weights == DType::bf16 || cache == DType::bf16 || multiplied(cache) == DType::bf16) {
      return 3e-2;
    }
    if (cache == DType::q8_0) return 3e-2;  // keys and values as the activations of int8 weights
    return cache == DType::f32 ? 1e-5 : 3e-3;
  }

 private:
  const cpu::Kernels* kernels_;
  ForcedIsa forced_;
  cpu::CpuBackend backend_;
};

inline std::vector<MakeDevice> cpu_devices(int n_threads = 2) {
  std::vector<MakeDevice> devices;
  for (const cpu::Kernels* kernels : tested_kernels()) {
    devices.push_back([=] { return std::make_unique<CpuDevice>(kernels, n_threads); });
  }
  return devices;
}

}  // namespace sbd::test
