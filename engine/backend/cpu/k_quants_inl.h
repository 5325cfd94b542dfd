// The matmul formats of K-quants (k_quants.h; linear_inl.h says what a format is). The product of
// an integer scale and its half precision one is exact in float32.

// `Step` adds the products of one step of a super group.
template <typename Step>
struct KQuantFormat {
  using Layout = typename Step::Layout;
  static constexpr int kStepBytes = Layout::kSuper / kSuperSteps;

  template <int R, int P>
  static inline void run(const LinearTask& t, const Tile& tile, PrefetchStream& stream,
                         F (&sums)[R][P]) {
    const Index groups = t.weight.cols / kGroupSize;
    const QuantizedGroup* x = first_group(t, tile);
    for (int g = tile.begin; g < tile.end; ++g, ++x) {
      stream.step();
      const std::uint8_t* super = tile.panel + static_cast<Index>(g / kSuperSteps) * Layout::kSuper;
      const std::uint8_t* step = super + g % kSuperSteps * Layout::kStep;
      Step::template add<R, P>(tile, super, step, x, groups, sums);
    }
  }
};

// w = scale q - min: sum of w x = scale * sum of q x - min * sum of x.
struct Q4KStep {
  using Layout = Q4KLayout;

  template <int R, int P>
  static inline void add(const Tile& tile, const std::uint8_t* super, const std::uint8_t* step,
                         const QuantizedGroup* x, Index groups, F (&sums)[R][P]) {
    I dots[R][P];
    for (int r = 0; r < R; ++r) {
      for (int p = 0; p < P; ++p) dots[r][p] = set1_int(0);
    }
    Q4Quants::multiply<R, P>(step + tile.strip * Layout::kStripNibbles, x, groups, dots);
    for (int p = 0; p < P; ++p) {
      const int feature = (tile.strip + p) * 16;
      const F scale = mul(load_halves(super + Layout::kSuperScales + feature * 2),
                          load_bytes(step + Layout::kScales + feature));
      const F min = mul(load_halves(super + Layout::kSuperMins + feature * 2),
                        load_bytes(step + Layout::kMins + feature));
      for (int r = 0; r < R; ++r) {
        const F both = mul(scale, set1(x[r * groups].scale));
        sums[r][p] = fma(to_float(dots[r][p]), both, sums[r][p]);
        sums[r][p] = fma(min, set1(x[r * groups].minus_sum), sums[r][p]);
      }
    }
  }
};

// w = scale (q - 32), with one scale for a step's inputs 0-15 and one for 16-31.
struct Q6KStep {
  using Layout = Q6KLayout;

  template <int R, int P>
  static inline void add(const Tile& tile, const std::uint8_t* super, const std::uint8_t* step,
                         const QuantizedGroup* x, Index groups, F (&sums)[R][P]) {
    add_part<0, R, P>(tile, super, step, x, groups, sums);
    add_part<1, R, P>(tile, super, step, x, groups, sums);
  }

  // Inputs 0-15 or 16-31 of a step.
  template <int Part, int R, int P>
  static inline void add_part(const Tile& tile, const std::uint8_t* super, const std::uint8_t* step,
                              const QuantizedGroup* x, Index groups, F (&sums)[R][P]) {
    I dots[R][P];
    for (int r = 0; r < R; ++r) {
      const I start = set1_int(-32 * x[r * groups].sums[Part]);
      for (int p = 0; p < P; ++p) dots[r][p] = start;
    }
    W w[4][P];
    for (int p = 0; p < P; ++p) {
      const std::uint8_t* sixes = step + ((tile.strip + p) * 2 + Part) * Layout::kVectors;
      const W a = load_weights(sixes);
      const W b = load_weights(sixes + 64);
      const W c = load_weights(sixes + 128);
      w[0][p] = low_sixes(a);
      w[1][p] = low_sixes(b);
      w[2][p] = low_sixes(c);
      w[3][p] = top_bits(a, b, c);
    }
    for (int j = 0; j < 4; ++j) {
      for (int r = 0; r < R; ++r) {
        const I xr = set1_int(load_int(x[r * groups].quants + Part * 16 + j * 4));
        for (int p = 0; p < P; ++p) dots[r][p] = dot_bytes(dots[r][p], w[j][p], xr);
      }
    }
    for (int p = 0; p < P; ++p) {
      const int feature = (tile.strip + p) * 16;
      const F scale = mul(load_halves(super + Layout::kSuperScales + feature * 2),
                          load_signed_bytes(step + Layout::kScales + Part * kPanel + feature));
      for (int r = 0; r < R; ++r) {
        const F both = mul(scale, set1(x[r * groups].scale));
        sums[r][p] = fma(to_float(dots[r][p]), both, sums[r][p]);
      }
    }
  }
};

using Q4KFormat = KQuantFormat<Q4KStep>;
using Q6KFormat = KQuantFormat<Q6KStep>;
