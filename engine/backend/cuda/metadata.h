// What a forward sends to the device: its rows' numbers, in one block of pinned memory that is
// copied in one transfer. The same forward shape puts the same things at the same addresses, which
// is what lets its graph be replayed.
#pragma once

#include <cstring>
#include <span>

#include "backend/cuda/runtime.h"
#include "core/bytes.h"

namespace sbd::cuda {

class Metadata {
 public:
  std::size_t size() const { return host_.size(); }

  // Empty, with room for so many bytes. Where that is more than before, nothing may be under way
  // that reads what was added: its memory is freed.
  void clear(std::size_t bytes) {
    sent_.wait();
    used_ = 0;
    if (host_.size() >= bytes) return;
    host_ = PinnedMemory(bytes);
    device_ = DeviceMemory(bytes, "a forward's rows");
  }

  // Where the values will be on the device.
  template <typename T>
  const T* add(std::span<const T> values) {
    const std::size_t at = used_;
    const std::size_t end = round_up(at + values.size_bytes(), 16);
    SBD_CHECK(end <= host_.size(), "a forward's rows need {} bytes, expected at most {}", end,
              host_.size());
    if (!values.empty()) std::memcpy(host_.data() + at, values.data(), values.size_bytes());
    used_ = end;
    return reinterpret_cast<const T*>(device_.as<std::byte>() + at);
  }

  void send(cudaStream_t stream) {
    if (used_ == 0) return;
    check(cudaMemcpyAsync(device_.data(), host_.data(), used_, cudaMemcpyHostToDevice, stream),
          "sending a forward's rows");
    sent_.record(stream);
  }

 private:
  PinnedMemory host_;
  DeviceMemory device_;
  std::size_t used_ = 0;
  Event sent_{cudaEventDisableTiming};
};

}  // namespace sbd::cuda
