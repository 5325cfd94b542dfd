// Attention of every kernel table, through the backend that splits it into tasks.
#include <cmath>
#include <numeric>

#include "attention_cases.h"
#include "cpu_device.h"

namespace sbd {
namespace {

using namespace test;

TEST_ON_EVERY_ISA(attention_of_every_head_shape) {
  for (const int dim : {2, 8, 10, 16, 24, 32, 64, 80, 96, 128}) {
    for (const int group : {1, 2, 3, 5, 40}) {
      const int kv_heads = group == 40 ? 1 : 2;
      check_attention(cpu_devices(), {group * kv_heads, kv_heads, dim},
                      {1, 2, 15, 16, 17, 63, 64, 65, 100});
    }
  }
}

TEST_ON_EVERY_ISA(attention_over_long_contexts) {
  const std::vector<int> kv_end = {1023, 1, 1024, 1025, 500, 2047, 2048, 2049, 2100, 64};
  check_attention(cpu_devices(), {4, 2, 64}, kv_end);
  check_attention(cpu_devices(), {40, 1, 8}, kv_end);
  check_attention(cpu_devices(), {3, 3, 24}, kv_end);
  check_attention(cpu_devices(), {2, 1, 16}, {4097, 4096, 4095, 1});
  check_attention(cpu_devices(), {8, 1, 256}, {511, 512, 513, 600});
}

// Every number of rows around the tiles' sizes, and more queries than a task holds.
TEST_ON_EVERY_ISA(attention_of_many_rows) {
  for (const int n_rows : {2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 67}) {
    std::vector<int> kv_end;
    for (int row = 0; row < n_rows; ++row) kv_end.push_back(60 + row * 29 % 83);
    check_attention(cpu_devices(), {2, 1, 24}, kv_end);
    check_attention(cpu_devices(), {8, 1, 16}, kv_end);
    check_attention(cpu_devices(), {3, 3, 8}, kv_end);
    check_attention(cpu_devices(), {2, 1, 32}, kv_end);
  }
}

TEST_ON_EVERY_ISA(attention_of_causal_and_block_rows_in_one_forward) {
  std::vector<int> kv_end(16);
  std::iota(kv_end.begin(), kv_end.end(), 1018);  // a decided block, causal, over the split
  kv_end.insert(kv_end.end(), 16, 1049);          // and a block of masks behind it
  check_attention(cpu_devices(), {6, 2, 16}, kv_end);
}

TEST_ON_EVERY_ISA(attention_leaves_out_what_is_unseen) {
  check_unseen(cpu_devices(), {4, 2, 32});
  check_unseen(cpu_devices(), {3, 1, 64});
}

TEST_ON_EVERY_ISA(attention_sees_the_last_key_and_not_the_next) {
  for (const MakeDevice& make : cpu_devices(1)) {
    check_last_key(*make(), {0, 15, 16, 63, 64, 1022, 1023, 1024, 1100});
  }
}

TEST_ON_EVERY_ISA(attention_ignores_what_lies_behind_kv_end) {
  for (const MakeDevice& make : cpu_devices()) {
    check_behind_kv_end(*make(), {1, 15, 17, 64, 1000, 1024, 1030});
  }
}

TEST_ON_EVERY_ISA(attention_passes_on_what_is_not_finite) {
  for (const MakeDevice& make : cpu_devices(1)) check_not_finite(*make(), {NAN});
}

TEST_ON_EVERY_ISA(attention_of_several_sequences_and_threads) {
  for (const cpu::Kernels* kernels : tested_kernels()) {
    for (const DType dtype : {DType::f16, DType::q8_0}) {
      std::vector<float> first;
      for (const int n_threads : {1, 2, 3, 5}) {
        CpuDevice device(kernels, n_threads);
        const auto together = check_sequences(device, dtype);
        if (first.empty()) first = together;
        CHECK(same_bits(first.data(), together.data(), first.size()));
      }
    }
  }
}

// Of what the cache holds, or of what it was given; over the size of what is right.
double attention_error(Device& device, DType dtype, const std::vector<int>& kv_end, bool as_given) {
  Random random(11);
  FilledCache cache(device, {4, 2, 128}, 700, dtype, random);
  const auto q = random.floats(kv_end.size() * cache.q_size(), -1.5, 1.5);
  const auto out = attend(device, {{&cache, kv_end}}, q);
  if (as_given) cache.dtype = DType::f32;
  const Expected exact = expected_attention(cache, kv_end, q, DType::f32, 0);
  double errors = 0, squares = 0;
  for (std::size_t i = 0; i < out.size(); ++i) {
    errors += (out[i] - exact.values[i]) * (out[i] - exact.values[i]);
    squares += exact.values[i] * exact.values[i];
  }
  return std::sqrt(errors / squares);
}

// What rounding to bf16 costs where scores are about as large as a trained model's: no more than
// the roundings of value and probability, 2^-9 / sqrt(3) each in root mean square, and that of the
// scores, which is their size times as much.
TEST_ON_EVERY_ISA(attention_in_bf16_is_near_float64) {
  for (const MakeDevice& make : cpu_devices()) {
    const auto device = make();
    const double error =
        attention_error(*device, DType::f16, {1, 2, 30, 300, 600, 700}, /*as_given=*/false);
    const bool bf16 = device->multiplied(DType::f16) == DType::bf16;
    CHECK_IN(device->name() + ": " + std::to_string(error),
             error < (bf16 ? 4 * 0x1p-9 / std::sqrt(3.0) : 1e-6));
  }
}

// What 8 bits cost: values of 2 / sqrt(3) in root mean square are rounded to multiples of 2 / 127,
// and scores of queries of 1.5 / sqrt(3) are off by about as much, of many keys independently.
TEST_ON_EVERY_ISA(attention_in_q8_0_is_near_float64) {
  for (const MakeDevice& make : cpu_devices()) {
    const auto device = make();
    const double of_values = 2.0 / 127 / std::sqrt(12.0) / (2 / std::sqrt(3.0));
    const double of_scores = 2.0 / 127 / std::sqrt(12.0) * 1.5 / std::sqrt(3.0);
    const double error = attention_error(*device, DType::q8_0, {300, 600, 700}, /*as_given=*/true);
    CHECK_NEAR(error, std::hypot(of_values, of_scores), 1e-3);
    CHECK(attention_error(*device, DType::q8_0, {300, 600, 700}, /*as_given=*/false) < 1e-6);
  }
}

TEST(a_cache_in_q8_0_takes_17_bytes_where_f16_takes_32) {
  CpuDevice device(all_kernels().front(), 1);
  const auto bytes = [&](DType dtype) {
    return device.backend().kv_bytes(3, {2, 1, 128}, 8192, dtype, 4096);
  };
  CHECK_EQ(bytes(DType::f16), std::size_t{3 * 2 * 4096 * 128 * 2});
  CHECK_EQ(bytes(DType::q8_0), std::size_t{3 * 2 * 4096 * 128 / 32 * 34});
}

TEST_ON_EVERY_ISA(rotate_and_cache_norms_turns_and_stores) {
  for (const MakeDevice& make : cpu_devices()) {
    const auto device = make();
    for (const DType dtype : device->cache_types(32)) {
      for (const bool interleaved : {false, true}) {
        for (const bool normed : {false, true}) {
          check_rotate_and_cache(*device, dtype, interleaved, normed);
        }
      }
    }
  }
}

// A layer's keys are not another's.
TEST_ON_EVERY_ISA(rotate_and_cache_leaves_other_layers) {
  for (const MakeDevice& make : cpu_devices()) {
    const auto device = make();
    for (const DType dtype : device->cache_types(32)) {
      const HeadShape heads{2, 1, head_of(dtype, 24)};
      Random random(12);
      const FilledCache cache(*device, heads, 50, dtype, random);
      for (int position = 0; position < 50; ++position) {
        for (const bool value : {false, true}) {
          CHECK_EQ(device->stored(*cache.kv, heads, 0, value, 0, position, 5), 0.0);
        }
      }
    }
  }
}

}  // namespace
}  // namespace sbd
