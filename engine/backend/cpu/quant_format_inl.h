// The matmul format of the quantised types, whose panels quant_layout.h describes (linear_inl.h
// says what a format is). Weights are unsigned: sum of (u - offset) x = sum of u x - offset * sum
// of x, whose second term starts the integer accumulator. A minimum is multiplied by the sum of the
// inputs, in float32. The product of an integer scale and its half precision one is exact there.

// IQ4's levels as Q8_0's weights lie in memory: value + 128.
alignas(16) static constexpr std::uint8_t kIq4Bytes[16] = {1,   24,  45,  63,  79,  93,  106, 118,
                                                           129, 141, 153, 166, 181, 197, 217, 241};

// Products of a group's 32 inputs. kAsQ8: what comes of the bits has Q8_0's range.
template <int kBits, bool kAsQ8>
struct GroupQuants {
  static constexpr int kBytes = 64 * kBits;

  template <int R, int P>
  static inline void multiply(const std::uint8_t* weights, const QuantizedGroup* x, Index stride,
                              I (&dots)[R][P]) {
    W plane[P];
    for (int p = 0; p < P && kBits == 5; ++p) plane[p] = load_weights(weights + p * kBytes + 256);
    for (int j = 0; j < 4; ++j) {
      W low[P], high[P];
      for (int p = 0; p < P; ++p) {
        const W w = load_weights(weights + p * kBytes + j * 64);
        low[p] = masked<15>(w);
        high[p] = high_nibbles(w);
        if constexpr (kBits == 5) {
          low[p] = with_bits<16>(low[p], shift_left<4>(plane[p]));
          high[p] = with_bits<16>(high[p], plane[p]);
          plane[p] = shift_right<1>(plane[p]);
        }
        if constexpr (kAsQ8) {
          low[p] = q8_weights(lookup(kIq4Bytes, low[p]));
          high[p] = q8_weights(lookup(kIq4Bytes, high[p]));
        }
      }
      for (int r = 0; r < R; ++r) {
        const I x_low = set1_int(load_int(x[r * stride].quants + j * 4));
        const I x_high = set1_int(load_int(x[r * stride].quants + j * 4 + 16));
        for (int p = 0; p < P; ++p) {
          if constexpr (kAsQ8) {
            dots[r][p] = dot_q8(dot_q8(dots[r][p], low[p], x_low), high[p], x_high);
          } else {
            dots[r][p] = dot_bytes(dot_bytes(dots[r][p], low[p], x_low), high[p], x_high);
          }
        }
      }
    }
  }
};

template <>
struct GroupQuants<8, true> {
  template <int R, int P>
  static inline void multiply(const std::uint8_t* weights, const QuantizedGroup* x, Index stride,
                              I (&dots)[R][P]) {
    for (int j = 0; j < 8; ++j) {
      W w[P];
      for (int p = 0; p < P; ++p) w[p] = q8_weights(load_weights(weights + p * 512 + j * 64));
      for (int r = 0; r < R; ++r) {
        const I xr = set1_int(load_int(x[r * stride].quants + j * 4));
        for (int p = 0; p < P; ++p) dots[r][p] = dot_q8(dots[r][p], w[p], xr);
      }
    }
  }
};

// Four vectors of a strip's weights of inputs 0-15 or 16-31.
template <int kBits, int kPart>
static inline void load_small_group(const std::uint8_t* strip, W (&w)[4]) {
  if constexpr (kBits == 6) {
    const W a = load_weights(strip + kPart * 192);
    const W b = load_weights(strip + kPart * 192 + 64);
    const W c = load_weights(strip + kPart * 192 + 128);
    w[0] = masked<63>(a);
    w[1] = masked<63>(b);
    w[2] = masked<63>(c);
    w[3] = top_bits(a, b, c);
  } else {
    const W twos = load_weights(strip + kPart * 64);
    w[0] = masked<3>(twos);
    w[1] = masked<3>(shift_right<2>(twos));
    w[2] = masked<3>(shift_right<4>(twos));
    w[3] = masked<3>(shift_right<6>(twos));
    if constexpr (kBits == 3) {
      W plane = load_weights(strip + 128);
      if constexpr (kPart == 1) plane = shift_right<4>(plane);
      w[0] = with_bits<4>(w[0], shift_left<2>(plane));
      w[1] = with_bits<4>(w[1], shift_left<1>(plane));
      w[2] = with_bits<4>(w[2], plane);
      w[3] = with_bits<4>(w[3], shift_right<1>(plane));
    }
  }
}

template <DType kType>
struct QuantFormat {
  using Type = QuantType<kType>;
  using Layout = QuantLayout<kType>;
  static constexpr Operands kOperands = Operands::bytes;
  static constexpr int kStepBytes = Layout::kBlock / Layout::kBlockSteps;
  static constexpr bool kAsQ8 = Type::kBits == 8 || Type::kHasLevels;

  template <int R, int P>
  static inline void run(const LinearTask& t, const Tile& tile, PrefetchStream& stream,
                         F (&sums)[R][P]) {
    const Index groups = t.weight.cols / kGroupSize;
    const QuantizedGroup* x = first_group(t, tile);
    for (int g = tile.begin; g < tile.end; ++g, ++x) {
      stream.step();
      const std::uint8_t* block = tile.panel + g / Layout::kBlockSteps * Index{Layout::kBlock};
      add<0, R, P>(tile.strip, block, g % Layout::kBlockSteps, x, groups, sums);
      if constexpr (Layout::kParts == 2) {
        add<1, R, P>(tile.strip, block, g % Layout::kBlockSteps, x, groups, sums);
      }
    }
  }

  // A part of a step: 32 inputs, or 0-15 or 16-31.
  template <int kPart, int R, int P>
  static inline void add(int strip, const std::uint8_t* block, int step, const QuantizedGroup* x,
                         Index groups, F (&sums)[R][P]) {
    I dots[R][P];
    for (int r = 0; r < R; ++r) {
      const I start = set1_int(offset<kPart>(x[r * groups]));
      for (int p = 0; p < P; ++p) dots[r][p] = start;
    }
    const std::uint8_t* quants =
        block + Layout::kFirstStep + step * Layout::kStep + strip * Layout::kStrip;
    if constexpr (Layout::kParts == 1) {
      GroupQuants<Type::kBits, kAsQ8>::template multiply<R, P>(quants, x, groups, dots);
    } else {
      W w[P][4];
      for (int p = 0; p < P; ++p) {
        load_small_group<Type::kBits, kPart>(quants + p * Layout::kStrip, w[p]);
      }
      for (int j = 0; j < 4; ++j) {
        for (int r = 0; r < R; ++r) {
          const I xr = set1_int(load_int(x[r * groups].quants + kPart * 16 + j * 4));
          for (int p = 0; p < P; ++p) dots[r][p] = dot_bytes(dots[r][p], w[p][j], xr);
        }
      }
    }
    for (int p = 0; p < P; ++p) {
      const int feature = (strip + p) * 16;
      F scale = load_halves(block + Layout::kScales + feature * 2);
      F min = Type::kHasMins ? load_halves(block + Layout::kMins + feature * 2) : scale;
      if constexpr (Type::kNested) {
        const std::uint8_t* bytes = block + (step * Layout::kParts + kPart) * kPanel + feature;
        if constexpr (Layout::kPairs) {
          std::uint8_t low[16], high[16];
          for (int i = 0; i < 16; ++i) {
            low[i] = bytes[Layout::kScaleBytes + i] & 15;
            high[i] = bytes[Layout::kScaleBytes + i] >> 4;
          }
          scale = mul(scale, load_signed_bytes(low));
          min = mul(min, load_signed_bytes(high));
        } else {
          scale = mul(scale, load_signed_bytes(bytes + Layout::kScaleBytes));
          if (Type::kHasMins) min = mul(min, load_signed_bytes(bytes + Layout::kMinBytes));
        }
      }
      for (int r = 0; r < R; ++r) {
        const QuantizedGroup& xr = x[r * groups];
        sums[r][p] = fma(to_float(dots[r][p]), mul(scale, set1(xr.scale)), sums[r][p]);
        if (Type::kHasMins) sums[r][p] = fma(min, set1(minus_sum<kPart>(xr)), sums[r][p]);
      }
    }
  }

  // What the weights' offset adds to a part's products.
  template <int kPart>
  static inline std::int32_t offset(const QuantizedGroup& x) {
    if constexpr (kAsQ8) return kQ8Offset == 0 ? 0 : x.minus_128_sum;
    if constexpr (Layout::kParts == 2) return -Type::kOffset * x.sums[kPart];
    return Type::kOffset == 0 ? 0 : x.minus_128_sum / 128 * Type::kOffset;
  }

  template <int kPart>
  static inline float minus_sum(const QuantizedGroup& x) {
    if constexpr (Layout::kParts == 1) return x.minus_sum;
    return -x.scale * static_cast<float>(x.sums[kPart]);
  }
};
