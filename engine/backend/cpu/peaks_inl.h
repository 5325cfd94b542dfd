// What the machine can do at most: memory read in one stream, and the dot instructions of a matmul
// tile on registers alone.

static std::uint64_t read(const std::uint8_t* p, Index n) {
  I sums[4] = {set1_int(0), set1_int(0), set1_int(0), set1_int(0)};
  const I x = set1_int(1);
  for (Index i = 0; i + 256 <= n; i += 256) {
    prefetch(p + i + 4096);
    prefetch(p + i + 4096 + 64);
    prefetch(p + i + 4096 + 128);
    prefetch(p + i + 4096 + 192);
    for (int j = 0; j < 4; ++j) {
      sums[j] = dot_bytes(sums[j], load_weights(p + i + j * 64), x);
    }
  }
  std::uint64_t total = 0;
  for (const I& sum : sums) total += static_cast<std::uint64_t>(reduce_add(to_float(sum)));
  return total;
}

static constexpr int kChains = kHalves * kRowTile;
static constexpr int kDots = 64;  // of each chain between two looks at the loop counter

static float multiply_int8(Index rounds) {
  I sums[kChains];
  for (I& sum : sums) sum = set1_int(0);
  std::uint8_t bytes[64];
  for (int i = 0; i < 64; ++i) bytes[i] = static_cast<std::uint8_t>(i);
  const W w = load_weights(bytes);
  const I x = set1_int(0x01020304);
  for (Index i = 0; i < rounds * kDots; ++i) {
    for (I& sum : sums) sum = dot_bytes(sum, w, x);
  }
  float total = 0;
  for (const I& sum : sums) total += reduce_add(to_float(sum));
  return total;
}

static float multiply_bf16(Index rounds) {
  F sums[kChains];
  for (F& sum : sums) sum = zero();
  std::uint8_t bytes[64] = {};
  const W w = load_weights(bytes);
  const I x = set1_int(0x3f803f80);  // ones
  for (Index i = 0; i < rounds * kDots; ++i) {
    for (F& sum : sums) sum = dot_bf16(sum, w, x);
  }
  float total = 0;
  for (const F& sum : sums) total += reduce_add(sum);
  return total;
}

static float multiply_f32(Index rounds) {
  F sums[kChains];
  for (F& sum : sums) sum = zero();
  const F w = set1(static_cast<float>(rounds));
  for (Index i = 0; i < rounds * kDots; ++i) {
    for (F& sum : sums) sum = fma(sum, w, w);
  }
  float total = 0;
  for (const F& sum : sums) total += reduce_add(sum);
  return total;
}

static Index multiply(DType dtype, Index rounds, float* total) {
  int products = 1;  // a lane of a dot instruction
  if (dtype == DType::f32) {
    *total = multiply_f32(rounds);
  } else if (dtype == DType::bf16) {
    *total = multiply_bf16(rounds);
    products = 2;
  } else {
    *total = multiply_int8(rounds);
    products = 4;
  }
  return rounds * kDots * kChains * 16 * products * 2;
}
