// Norm, RoPE, cache and attention, on the cases of every backend; and a cache's pages.
#include <cmath>

#include "attention_cases.h"
#include "backend/cuda/kv.h"
#include "cuda_device.h"

namespace sbd::cuda {
namespace {

using namespace test;

// The first row, the middle one and the last one alone.
void check_cuda(const HeadShape& heads, const std::vector<int>& kv_end) {
  check_attention(cuda_devices(), heads, kv_end, {0, kv_end.size() / 2, kv_end.size() - 1});
}

TEST(cuda_attention_of_every_head_shape) {
  for (const int dim : {2, 8, 10, 24, 64, 80, 128, 256}) {
    for (const int group : {1, 3, 40}) {
      if (dim > 80 && group != 3) continue;
      const int kv_heads = group == 40 ? 1 : 2;
      check_cuda({group * kv_heads, kv_heads, dim}, {1, 2, 16, 17, 63, 64, 65, 100});
    }
  }
}

TEST(cuda_attention_over_long_contexts) {
  check_cuda({4, 2, 64}, {1023, 1, 1024, 500, 2047, 2048, 2049, 2100, 64});
  check_cuda({2, 1, 16}, {4097, 3073, 3072, 1});
}

TEST(cuda_attention_leaves_out_what_is_unseen) {
  check_unseen(cuda_devices(), {4, 2, 32});
  check_unseen(cuda_devices(), {3, 1, 80});
}

// A cache takes pages as positions are used.
TEST(cuda_attention_over_a_cache_that_has_grown) {
  CudaDevice device;
  for (const DType dtype : kCacheTypes) {
    Random random(4);
    const HeadShape heads{2, 2, 10};
    FilledCache cache(device, heads, 5000, dtype, random);
    const std::size_t position = 2 * 10;  // floats
    cache.kv = device.backend().allocate_kv(2, heads, 5000, dtype);
    for (const auto& [first, end] : {std::pair{0, 700}, {700, 2049}, {2049, 2100}, {2100, 5000}}) {
      const auto part = [&, from = first, to = end](const std::vector<float>& all) {
        return std::vector<float>(all.begin() + from * static_cast<std::ptrdiff_t>(position),
                                  all.begin() + to * static_cast<std::ptrdiff_t>(position));
      };
      cache.write(device, first, part(cache.keys), part(cache.values));
    }
    const std::vector<int> kv_end = {5000, 700, 2100};
    const auto q = random.floats(kv_end.size() * cache.q_size(), -1, 1);
    check_close(device, cache, kv_end, q);
  }
}

// Positions in several pages are taken over; what is given up leaves its pages.
TEST(cuda_attention_over_a_copied_cache) {
  CudaDevice device;
  for (const DType dtype : kCacheTypes) {
    Random random(8);
    const HeadShape heads{2, 1, 10};
    FilledCache cache(device, heads, 2500, dtype, random);
    auto copy = device.backend().allocate_kv(2, heads, 2500, dtype);
    copy->copy(*cache.kv, 2100);
    CHECK_EQ(static_cast<const CudaKv&>(*copy).pages().size(), 3u);
    copy->truncate(2000);
    CHECK_EQ(static_cast<const CudaKv&>(*copy).pages().size(), 2u);
    const auto bytes = [&](int n) { return device.backend().kv_bytes(2, heads, 2500, dtype, n); };
    CHECK_EQ(bytes(1), bytes(1024));
    CHECK_EQ(bytes(1025), 2 * bytes(1));
    cache.kv = std::move(copy);
    const std::vector<int> kv_end = {2000, 1024, 1025, 3};
    const auto q = random.floats(kv_end.size() * cache.q_size(), -1, 1);
    check_close(device, cache, kv_end, q);
  }
}

// What a cache left in its pages is nothing to the next one: behind head_dim it is zeros again.
TEST(cuda_attention_over_pages_of_another_cache) {
  CudaDevice device;
  const HeadShape heads{2, 1, 10};
  constexpr int kLong = 300, kShort = 200;  // of F16 and F32: pages of the same size
  for (const float left : {NAN, 3.0f}) {
    const std::uint8_t* page = nullptr;
    {
      Random random(6);
      FilledCache first(device, heads, kShort, DType::f32, random);
      const std::vector<float> all(kShort * 10, left);
      first.write(device, 0, all, all);
      page = static_cast<const CudaKv&>(*first.kv).pages()[0].as<std::uint8_t>();
    }
    Random random(7);
    const FilledCache second(device, heads, kLong, DType::f16, random);
    CHECK_EQ(static_cast<const CudaKv&>(*second.kv).pages()[0].as<std::uint8_t>(), page);
    const std::vector<int> kv_end = {kLong, 7};
    const auto q = random.floats(kv_end.size() * second.q_size(), -1, 1);
    check_close(device, second, kv_end, q);
  }
}

TEST(cuda_attention_of_many_rows) {
  for (const int n_rows : {2, 7, 17, 33, 67}) {
    std::vector<int> kv_end;
    for (int row = 0; row < n_rows; ++row) kv_end.push_back(60 + row * 29 % 83);
    check_cuda({8, 2, 24}, kv_end);
    check_cuda({3, 3, 8}, kv_end);
  }
}

TEST(cuda_attention_sees_the_last_key_and_not_the_next) {
  CudaDevice device;
  check_last_key(device, {0, 15, 63, 64, 1023, 1100});
}

TEST(cuda_attention_ignores_what_lies_behind_kv_end) {
  CudaDevice device;
  check_behind_kv_end(device, {1, 17, 64, 1000});
}

TEST(cuda_attention_of_several_sequences) {
  CudaDevice device;
  for (const DType dtype : kCacheTypes) check_sequences(device, dtype);
}

TEST(cuda_attention_passes_on_what_is_not_finite) {
  CudaDevice device;
  check_not_finite(device, {NAN, INFINITY, -INFINITY});
}

TEST(cuda_rotate_and_cache_norms_turns_and_stores) {
  CudaDevice device;
  for (const DType dtype : kCacheTypes) {
    for (const bool interleaved : {false, true}) {
      for (const bool normed : {false, true}) {
        check_rotate_and_cache(device, dtype, interleaved, normed);
      }
    }
  }
}

}  // namespace
}  // namespace sbd::cuda
