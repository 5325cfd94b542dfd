// What the machine can do at most: memory read in one stream, and the dot instructions of a matmul
// tile on registers.

static std::uint64_t peak_read(const std::uint8_t* p, Index n) {
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
  for (const I& sum : sums) {
    total += static_cast<std::uint64_t>(static_cast<std::int64_t>(reduce_add(to_float(sum))));
  }
  return total;
}

static constexpr int kChains = kStrips * kRowTile;
static constexpr int kDots = 64;  // of each chain, a round

// Rows are different constants and the weights are hidden, so that no product is shared or hoisted.
template <typename Sum, typename Weights, typename X, typename Dot>
static void dot_chains(Index rounds, Sum (&result)[kChains], Weights w, const X (&x)[kRowTile],
                       Dot dot) {
  Sum sums[kChains];
  for (int i = 0; i < kChains; ++i) sums[i] = result[i];
  for (Index i = 0; i < rounds * kDots; ++i) {
    hide(w);
    for (int r = 0; r < kRowTile; ++r) {
      for (int p = 0; p < kStrips; ++p) {
        sums[r * kStrips + p] = dot(sums[r * kStrips + p], w, x[r]);
      }
    }
  }
  for (int i = 0; i < kChains; ++i) result[i] = sums[i];
}

static Index peak_dots(DType dtype, Index rounds, float* total) {
  I ints[kChains];
  F floats[kChains];
  for (int i = 0; i < kChains; ++i) {
    ints[i] = set1_int(0);
    floats[i] = zero();
  }
  I x[kRowTile];
  F x_floats[kRowTile];
  for (int r = 0; r < kRowTile; ++r) {
    x[r] = set1_int(0x3f803f80 + r);
    x_floats[r] = set1(1.0f + static_cast<float>(r));
  }
  std::uint8_t bytes[64];
  for (int i = 0; i < 64; ++i) bytes[i] = static_cast<std::uint8_t>(i);
  const W w = load_weights(bytes);
  int products = 1;  // a lane of a dot instruction
  if (dtype == DType::f32) {
    dot_chains(rounds, floats, set1(0.5f), x_floats,
               [](F sum, F weights, F value) { return fma(weights, value, sum); });
  } else if (dtype == DType::bf16) {
    dot_chains(rounds, floats, w, x,
               [](F sum, const W& weights, I value) { return dot_bf16(sum, weights, value); });
    products = 2;
  } else {
    dot_chains(rounds, ints, w, x,
               [](I sum, const W& weights, I value) { return dot_q8(sum, weights, value); });
    products = 4;
  }
  *total = 0;
  for (const I& sum : ints) *total += reduce_add(to_float(sum));
  for (const F& sum : floats) *total += reduce_add(sum);
  return rounds * kDots * kChains * 16 * products * 2;
}
