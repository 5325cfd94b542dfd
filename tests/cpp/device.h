// A backend that tests of every backend run on, and what it may be off by.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "backend/backend.h"

namespace sbd::test {

class Device {
 public:
  virtual ~Device() = default;
  virtual std::string name() const = 0;
  virtual Backend& backend() = 0;
  virtual std::vector<float> download(const float* values, std::size_t n) = 0;
  // An element of a cache, out of its memory.
  virtual double stored(const KvStorage& kv, const HeadShape& heads, int layer, bool value,
                        int head, int position, int d) = 0;

  // Types of caches of heads of this size.
  virtual std::vector<DType> cache_types(int /*head_dim*/) const {
    return {DType::f32, DType::f16, DType::bf16};
  }
  // The type that attention rounds what it multiplies to; F32: only what the cache rounded.
  virtual DType multiplied(DType cache) const = 0;
  // Of attention's probabilities before they are rounded, as a share of them.
  virtual double exp_error() const = 0;
  // Of a tiny model's logits, over their size.
  virtual double logits_error(DType weights, DType cache) const = 0;
};

using MakeDevice = std::function<std::unique_ptr<Device>()>;

}  // namespace sbd::test
