// Matrix times a few rows. A tile is kStrips vectors of 16 outputs times up to kRowTile rows, its
// accumulators in registers; more rows take even passes over the panel, while what is read next
// from memory comes into L2 in even portions. Whatever the tiles, an output's products are summed
// in one order, so a row's result never depends on the other rows.

static constexpr int kStep = 32;  // inputs between two portions of prefetch, a quantisation group

struct PrefetchStream {
  const std::uint8_t* next;
  int lines_per_step;
  void step() {
    for (int i = 0; i < lines_per_step; ++i, next += 64) prefetch(next);
  }
};

// What a tile works on: rows from `row` on, outputs from strip `strip` of a panel on, steps
// [begin, end) of its inputs.
struct Tile {
  const std::uint8_t* panel;
  int strip;
  int row;
  int begin;
  int end;
};

static inline std::int32_t load_int(const void* p) {
  std::int32_t x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}

static inline F load_halves(const std::uint8_t* p) {
  return load_half(reinterpret_cast<const std::uint16_t*>(p));
}

// A tile's first row of quantised activations at its first step; rows lie cols / 32 apart.
static inline const QuantizedGroup* first_group(const LinearTask& t, const Tile& tile) {
  const Index groups = t.weight.cols / kGroupSize;
  return t.x.groups + (t.x.first_row + tile.row) * groups + tile.begin;
}

static inline int lowest(int a, int b) { return a < b ? a : b; }

// Each format adds a tile's products for R rows and P strips. kStepBytes: what a step of a whole
// panel takes.
template <typename Vector>
struct FloatFormat {
  static constexpr Operands kOperands = Operands::floats;
  static constexpr int kStepBytes = kStep * 2 * Vector::kBytes;

  template <int R, int P>
  static inline void run(const LinearTask& t, const Tile& tile, PrefetchStream& stream,
                         F (&sums)[R][P]) {
    const int cols = t.weight.cols;
    const float* x = t.x.values + static_cast<Index>(t.x.first_row + tile.row) * cols;
    const std::uint8_t* weights = tile.panel + tile.strip * Vector::kBytes;
    const int end = lowest(tile.end * kStep, cols);
    for (int k = tile.begin * kStep; k < end; ++k) {
      if (k % kStep == 0) stream.step();
      F w[P];
      for (int p = 0; p < P; ++p) {
        w[p] = Vector::load_floats(weights + (static_cast<Index>(k) * 2 + p) * Vector::kBytes);
      }
      for (int r = 0; r < R; ++r) {
        const F xr = set1(x[static_cast<Index>(r) * cols + k]);
        for (int p = 0; p < P; ++p) sums[r][p] = fma(w[p], xr, sums[r][p]);
      }
    }
  }
};

struct F32Vector {
  static constexpr int kBytes = 64;
  static inline F load_floats(const std::uint8_t* p) {
    return load(reinterpret_cast<const float*>(p));
  }
};

struct F16Vector {
  static constexpr int kBytes = 32;
  static inline F load_floats(const std::uint8_t* p) { return load_halves(p); }
};

struct BF16Format {
  static constexpr Operands kOperands = Operands::bf16;
  static constexpr int kStepBytes = kStep * 64;

  template <int R, int P>
  static inline void run(const LinearTask& t, const Tile& tile, PrefetchStream& stream,
                         F (&sums)[R][P]) {
    const int pairs = (t.weight.cols + 1) / 2;
    const std::uint16_t* x = t.x.bf16 + static_cast<Index>(t.x.first_row + tile.row) * pairs * 2;
    const std::uint8_t* weights = tile.panel + tile.strip * 64;
    const int end = lowest(tile.end * kStep / 2, pairs);
    for (int k = tile.begin * kStep / 2; k < end; ++k) {
      if (k % (kStep / 2) == 0) stream.step();
      W w[P];
      for (int p = 0; p < P; ++p) {
        w[p] = load_weights(weights + (static_cast<Index>(k) * 2 + p) * 64);
      }
      for (int r = 0; r < R; ++r) {
        const I xr = set1_int(load_int(x + (static_cast<Index>(r) * pairs + k) * 2));
        for (int p = 0; p < P; ++p) sums[r][p] = dot_bf16(sums[r][p], w[p], xr);
      }
    }
  }
};

#include "backend/cpu/quant_format_inl.h"

using F32Format = FloatFormat<F32Vector>;
using F16Format = FloatFormat<F16Vector>;

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

// A panel at work: sums wait in `partial` between two pieces of its steps.
struct PanelTask {
  const LinearTask& task;
  int first_feature;
  float* out;      // row 0 at the panel's first feature
  float* partial;  // [rows][2][16], where the steps are taken in more than one piece
};

template <typename Format, int R, int P>
static void linear_tile(const PanelTask& at, const Tile& tile, PrefetchStream& stream) {
  const LinearTask& t = at.task;
  const auto partial = [&](int r, int p) {
    return at.partial + ((tile.row + r) * 2 + tile.strip + p) * 16;
  };
  F sums[R][P];
  for (int r = 0; r < R; ++r) {
    for (int p = 0; p < P; ++p) sums[r][p] = tile.begin == 0 ? zero() : load(partial(r, p));
  }
  Format::template run<R, P>(t, tile, stream, sums);
  if (tile.end * kStep < t.weight.cols) {
    for (int r = 0; r < R; ++r) {
      for (int p = 0; p < P; ++p) store(partial(r, p), sums[r][p]);
    }
    return;
  }
  for (int p = 0; p < P; ++p) {
    const int offset = (tile.strip + p) * 16;
    const int n = t.weight.rows - at.first_feature - offset;
    if (n <= 0) return;
    for (int r = 0; r < R; ++r) {
      float* o = at.out + (tile.row + r) * t.out_stride + offset;
      F y = sums[r][p];
      if (t.scale != 1.0f) y = mul(y, set1(t.scale));
      if (t.bias != nullptr) y = add(y, load_some(t.bias + at.first_feature + offset, n));
      if (t.accumulate) y = add(load_some(o, n), y);
      store_some(o, y, n);
    }
  }
}

template <typename Format, int R>
static void linear_rows(const PanelTask& at, Tile tile, int n_rows, PrefetchStream& stream) {
  if (n_rows == R) {
    for (tile.strip = 0; tile.strip < 2; tile.strip += kStrips) {
      linear_tile<Format, R, kStrips>(at, tile, stream);
    }
  } else if constexpr (R > 1) {
    linear_rows<Format, R - 1>(at, tile, n_rows, stream);
  }
}

// A lone pass streams along, prefetching a little ahead. A few are bound by memory, too: they share
// pieces of the steps, which stay in L1, while the next piece, of the same length or nearly so, is
// prefetched. More passes are bound by arithmetic: each takes all steps, while the next panel is
// prefetched.
template <typename Format>
static void linear_panel(const LinearTask& t, int panel, const std::uint8_t* next, float* out) {
  constexpr int kPiece = 9216 / Format::kStepBytes;
  constexpr int kAhead = kPiece / 2;
  alignas(64) float partial[kFewPasses * kRowTile * 2 * 16];
  const int passes = (t.n_rows + kRowTile - 1) / kRowTile;
  const int steps = (t.weight.cols + kStep - 1) / kStep;
  const int tile_passes = passes * 2 / kStrips;
  const bool alone = tile_passes == 1 && steps > kAhead;
  const bool few = tile_passes > 1 && passes <= kFewPasses;
  const int pieces = alone ? 2 : few ? (steps + kPiece - 1) / kPiece : 1;
  const auto bound = [&](int piece) {  // the second piece of a lone pass prefetches what comes next
    return alone && piece == 1 ? steps - kAhead : steps * piece / pieces;
  };
  const std::uint8_t* data = t.weight.data + panel * t.weight.panel_bytes;
  const PanelTask at{t, panel * kPanel, out, partial};
  PrefetchStream stream{nullptr, ((Format::kStepBytes + 63) / 64 + tile_passes - 1) / tile_passes};
  for (int piece = 0; piece < pieces; ++piece) {
    const int begin = bound(piece), end = bound(piece + 1);
    const int from = alone ? begin + kAhead : end;
    stream.next = from < steps ? data + static_cast<Index>(from) * Format::kStepBytes : next;
    for (int pass = 0; pass < passes; ++pass) {
      const int row = static_cast<int>(static_cast<Index>(t.n_rows) * pass / passes);
      const int row_end = static_cast<int>(static_cast<Index>(t.n_rows) * (pass + 1) / passes);
      linear_rows<Format, kRowTile>(at, {data, 0, row, begin, end}, row_end - row, stream);
    }
  }
}

template <typename Format>
static void linear_panels(const LinearTask& t, int panel_begin, int panel_end) {
  if constexpr (is_own(Format::kOperands)) {
    float* out = t.out;
    for (int panel = panel_begin; panel < panel_end; ++panel, out += kPanel) {
      const std::uint8_t* next =
          panel + 1 < panel_end ? t.weight.data + (panel + 1) * t.weight.panel_bytes : t.next;
      linear_panel<Format>(t, panel, next, out);
    }
  } else {
    SBD_BASE::kernels.linear(t, panel_begin, panel_end);
  }
}

static void linear(const LinearTask& t, int panel_begin, int panel_end) {
  switch (t.weight.dtype) {
    case DType::f32: return linear_panels<F32Format>(t, panel_begin, panel_end);
    case DType::f16: return linear_panels<F16Format>(t, panel_begin, panel_end);
    case DType::bf16: return linear_panels<BF16Format>(t, panel_begin, panel_end);
    case DType::q8_0: return linear_panels<QuantFormat<DType::q8_0>>(t, panel_begin, panel_end);
    case DType::q4_0: return linear_panels<QuantFormat<DType::q4_0>>(t, panel_begin, panel_end);
    case DType::q4_1: return linear_panels<QuantFormat<DType::q4_1>>(t, panel_begin, panel_end);
    case DType::q5_0: return linear_panels<QuantFormat<DType::q5_0>>(t, panel_begin, panel_end);
    case DType::q5_1: return linear_panels<QuantFormat<DType::q5_1>>(t, panel_begin, panel_end);
    case DType::iq4_nl: return linear_panels<QuantFormat<DType::iq4_nl>>(t, panel_begin, panel_end);
    case DType::q2_k: return linear_panels<QuantFormat<DType::q2_k>>(t, panel_begin, panel_end);
    case DType::q3_k: return linear_panels<QuantFormat<DType::q3_k>>(t, panel_begin, panel_end);
    case DType::q4_k: return linear_panels<QuantFormat<DType::q4_k>>(t, panel_begin, panel_end);
    case DType::q5_k: return linear_panels<QuantFormat<DType::q5_k>>(t, panel_begin, panel_end);
    case DType::q6_k: return linear_panels<QuantFormat<DType::q6_k>>(t, panel_begin, panel_end);
    case DType::iq4_xs: return linear_panels<QuantFormat<DType::iq4_xs>>(t, panel_begin, panel_end);
  }
}
