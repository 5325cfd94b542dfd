// Matrix times a few rows. A tile is kPanelTile panels (of 16 outputs) times up to kRowTile rows,
// its accumulators in registers; the rows are split into even passes over a panel tile that the
// first pass brings into L2, while every pass prefetches its share of the next tile. Whatever the
// split, an output's products are summed in one order, so a row's result never depends on the other
// rows.

struct PrefetchStream {
  const std::uint8_t* next;
  int lines_per_step;
  void step() {
    for (int i = 0; i < lines_per_step; ++i, next += 64) prefetch(next);
  }
};

static constexpr int kStep = 32;  // inputs between two prefetch steps, a quantisation group

static inline std::int32_t load_int(const void* p) {
  std::int32_t x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}

// Each format adds one step's products for R rows and P panels.
struct F32Format {
  template <int R, int P>
  static inline void run(const LinearTask& t, const std::uint8_t* const* panels, int row,
                         PrefetchStream& stream, F (&sums)[R][P]) {
    const int cols = t.weight.cols;
    const float* x = t.x.values + static_cast<Index>(t.x.first_row + row) * cols;
    for (int k = 0; k < cols; ++k) {
      if (k % kStep == 0) stream.step();
      F w[P];
      for (int p = 0; p < P; ++p) w[p] = load(reinterpret_cast<const float*>(panels[p]) + k * 16);
      for (int r = 0; r < R; ++r) {
        const F xr = set1(x[static_cast<Index>(r) * cols + k]);
        for (int p = 0; p < P; ++p) sums[r][p] = fma(w[p], xr, sums[r][p]);
      }
    }
  }
};

struct F16Format {
  template <int R, int P>
  static inline void run(const LinearTask& t, const std::uint8_t* const* panels, int row,
                         PrefetchStream& stream, F (&sums)[R][P]) {
    const int cols = t.weight.cols;
    const float* x = t.x.values + static_cast<Index>(t.x.first_row + row) * cols;
    for (int k = 0; k < cols; ++k) {
      if (k % kStep == 0) stream.step();
      F w[P];
      for (int p = 0; p < P; ++p) {
        w[p] = load_half(reinterpret_cast<const std::uint16_t*>(panels[p]) + k * 16);
      }
      for (int r = 0; r < R; ++r) {
        const F xr = set1(x[static_cast<Index>(r) * cols + k]);
        for (int p = 0; p < P; ++p) sums[r][p] = fma(w[p], xr, sums[r][p]);
      }
    }
  }
};

struct BF16Format {
  template <int R, int P>
  static inline void run(const LinearTask& t, const std::uint8_t* const* panels, int row,
                         PrefetchStream& stream, F (&sums)[R][P]) {
    const int pairs = (t.weight.cols + 1) / 2;
    const std::uint16_t* x = t.x.bf16 + static_cast<Index>(t.x.first_row + row) * pairs * 2;
    for (int k = 0; k < pairs; ++k) {
      if (k % (kStep / 2) == 0) stream.step();
      W w[P];
      for (int p = 0; p < P; ++p) w[p] = load_weights(panels[p] + static_cast<Index>(k) * 64);
      for (int r = 0; r < R; ++r) {
        const I xr = set1_int(load_int(x + (static_cast<Index>(r) * pairs + k) * 2));
        for (int p = 0; p < P; ++p) sums[r][p] = dot_bf16(sums[r][p], w[p], xr);
      }
    }
  }
};

// Quantised groups: sum of (u - offset) q = sum of u q - offset * sum of q, with unsigned weights
// u; the second term starts the integer accumulator.
template <int Offset, int GroupBytes, typename Dot>
struct QuantFormat {
  template <int R, int P>
  static inline void run(const LinearTask& t, const std::uint8_t* const* panels, int row,
                         PrefetchStream& stream, F (&sums)[R][P]) {
    const int groups = t.weight.cols / kGroupSize;
    const Index first = static_cast<Index>(t.x.first_row + row) * groups;
    const std::int8_t* x = t.x.quants + first * kGroupSize;
    const float* x_scales = t.x.scales + first;
    const std::int32_t* x_sums = t.x.sums + first;
    for (int g = 0; g < groups; ++g) {
      stream.step();
      I dots[R][P];
      for (int r = 0; r < R; ++r) {
        const I start = set1_int(-Offset * x_sums[static_cast<Index>(r) * groups + g]);
        for (int p = 0; p < P; ++p) dots[r][p] = start;
      }
      Dot::template group<R, P>(panels, static_cast<Index>(g) * GroupBytes,
                                x + static_cast<Index>(g) * kGroupSize,
                                static_cast<Index>(groups) * kGroupSize, dots);
      for (int p = 0; p < P; ++p) {
        const F w_scale = load_half(reinterpret_cast<const std::uint16_t*>(
                                        panels[p] + static_cast<Index>(groups) * GroupBytes) +
                                    g * 16);
        for (int r = 0; r < R; ++r) {
          const F scale = mul(w_scale, set1(x_scales[static_cast<Index>(r) * groups + g]));
          sums[r][p] = fma(to_float(dots[r][p]), scale, sums[r][p]);
        }
      }
    }
  }
};

struct Q8Dot {
  template <int R, int P>
  static inline void group(const std::uint8_t* const* panels, Index offset, const std::int8_t* x,
                           Index x_stride, I (&dots)[R][P]) {
    for (int j = 0; j < 8; ++j) {
      W w[P];
      for (int p = 0; p < P; ++p) w[p] = load_weights(panels[p] + offset + j * 64);
      for (int r = 0; r < R; ++r) {
        const I xr = set1_int(load_int(x + r * x_stride + j * 4));
        for (int p = 0; p < P; ++p) dots[r][p] = dot_bytes(dots[r][p], w[p], xr);
      }
    }
  }
};

struct Q4Dot {
  template <int R, int P>
  static inline void group(const std::uint8_t* const* panels, Index offset, const std::int8_t* x,
                           Index x_stride, I (&dots)[R][P]) {
    for (int j = 0; j < 4; ++j) {
      W low[P], high[P];
      for (int p = 0; p < P; ++p) {
        const W w = load_weights(panels[p] + offset + j * 64);
        low[p] = low_nibbles(w);
        high[p] = high_nibbles(w);
      }
      for (int r = 0; r < R; ++r) {
        const I x_low = set1_int(load_int(x + r * x_stride + j * 4));
        const I x_high = set1_int(load_int(x + r * x_stride + j * 4 + 16));
        for (int p = 0; p < P; ++p) {
          dots[r][p] = dot_bytes(dot_bytes(dots[r][p], low[p], x_low), high[p], x_high);
        }
      }
    }
  }
};

using Q8Format = QuantFormat<128, 512, Q8Dot>;
using Q4Format = QuantFormat<8, 256, Q4Dot>;

static inline F load_some(const float* p, int n) {
  if (n >= 16) return load(p);
  float lanes[16] = {};
  __builtin_memcpy(lanes, p, static_cast<std::size_t>(n) * sizeof(float));
  return load(lanes);
}

static inline void store_some(float* p, F x, int n) {
  if (n >= 16) {
    store(p, x);
    return;
  }
  float lanes[16];
  store(lanes, x);
  __builtin_memcpy(p, lanes, static_cast<std::size_t>(n) * sizeof(float));
}

template <typename Format, int R, int P>
static void linear_tile(const LinearTask& t, int panel, int row, float* out,
                        PrefetchStream& stream) {
  const std::uint8_t* panels[P];
  for (int p = 0; p < P; ++p) {
    panels[p] = t.weight.data + (panel + p) * t.weight.panel_bytes;
  }
  F sums[R][P];
  for (int r = 0; r < R; ++r) {
    for (int p = 0; p < P; ++p) sums[r][p] = zero();
  }
  Format::template run<R, P>(t, panels, row, stream, sums);
  for (int p = 0; p < P; ++p) {
    const int feature = (panel + p) * 16;
    const int n = t.weight.rows - feature;
    for (int r = 0; r < R; ++r) {
      float* o = out + (row + r) * t.out_stride + p * 16;
      F y = sums[r][p];
      if (t.bias != nullptr) y = add(y, load_some(t.bias + feature, n));
      if (t.accumulate) y = add(load_some(o, n), y);
      store_some(o, y, n);
    }
  }
}

template <typename Format, int P, int R>
static void linear_rows(const LinearTask& t, int panel, int row, int n_rows, float* out,
                        PrefetchStream& stream) {
  if (n_rows == R) {
    linear_tile<Format, R, P>(t, panel, row, out, stream);
  } else if constexpr (R > 1) {
    linear_rows<Format, P, R - 1>(t, panel, row, n_rows, out, stream);
  }
}

template <typename Format, int P>
static void linear_panels(const LinearTask& t, int panel, float* out) {
  const int passes = (t.n_rows + kRowTile - 1) / kRowTile;
  const int steps = passes * ((t.weight.cols + kStep - 1) / kStep);
  const Index tile_lines = P * t.weight.panel_bytes / 64;
  PrefetchStream stream{t.weight.data + (panel + P) * t.weight.panel_bytes,
                        static_cast<int>((tile_lines + steps - 1) / steps)};
  for (int pass = 0; pass < passes; ++pass) {
    const int row = t.n_rows * pass / passes;
    const int end = t.n_rows * (pass + 1) / passes;
    linear_rows<Format, P, kRowTile>(t, panel, row, end - row, out, stream);
  }
}

template <typename Format>
static void linear_format(const LinearTask& t, int panel_begin, int panel_end) {
  float* out = t.out;
  int panel = panel_begin;
  for (; panel + kPanelTile <= panel_end; panel += kPanelTile, out += kPanelTile * 16) {
    linear_panels<Format, kPanelTile>(t, panel, out);
  }
  for (; panel < panel_end; ++panel, out += 16) linear_panels<Format, 1>(t, panel, out);
}

static void linear(const LinearTask& t, int panel_begin, int panel_end) {
  switch (t.weight.dtype) {
    case DType::f32: return linear_format<F32Format>(t, panel_begin, panel_end);
    case DType::f16: return linear_format<F16Format>(t, panel_begin, panel_end);
    case DType::bf16: return linear_format<BF16Format>(t, panel_begin, panel_end);
    case DType::q8_0: return linear_format<Q8Format>(t, panel_begin, panel_end);
    case DType::q4_0: return linear_format<Q4Format>(t, panel_begin, panel_end);
  }
}
