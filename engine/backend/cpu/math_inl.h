// Vector functions and the small row operations around the matmuls.

// Relative error below 2e-7 on [-87, 88]; exactly 0 below, exactly 1 at 0. Cody-Waite reduction to
// |r| <= ln(2) / 2 and a polynomial for exp(r). NaN stays NaN, so that no damage goes unseen: of
// max and min, the second operand is the result where one is not a number.
static inline F exp(F x) {
  const F limit = set1(-87.0f);
  const F clamped = min(set1(88.0f), max(limit, x));
  const F n = round(mul(clamped, set1(1.44269504f)));
  F r = fma(n, set1(-0.693359375f), clamped);
  r = fma(n, set1(2.12194440e-4f), r);
  F p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(mul(p, r), r, add(r, set1(1.0f)));
  return zero_below(scale_by_power(p, n), x, limit);
}

static void rms_norm(const float* x, const float* weight, float eps, int n, float* out) {
  F squares = zero();
  for (int i = 0; i < n; i += 16) {
    const F v = load_some(x + i, n - i);
    squares = fma(v, v, squares);
  }
  const float mean = reduce_add(squares) / static_cast<float>(n);
  const F scale = set1(1.0f / __builtin_sqrtf(mean + eps));
  for (int i = 0; i < n; i += 16) {
    const F v = mul(load_some(x + i, n - i), scale);
    store_some(out + i, mul(v, load_some(weight + i, n - i)), n - i);
  }
}

static void swiglu(const float* gate, const float* up, int n, float* out) {
  for (int i = 0; i < n; i += 16) {
    const F g = load_some(gate + i, n - i);
    const F silu = div(g, add(set1(1.0f), exp(sub(zero(), g))));
    store_some(out + i, mul(silu, load_some(up + i, n - i)), n - i);
  }
}

static void rotate(float* x, const float* cos, const float* sin, int dim, bool interleaved) {
  const int n_pairs = dim / 2;
  int i = 0;
  for (; i + 16 <= n_pairs; i += 16) {
    float* first = interleaved ? x + 2 * i : x + i;
    float* second = interleaved ? first + 16 : first + n_pairs;
    F a = load(first);
    F b = load(second);
    if (interleaved) unzip(a, b, &a, &b);
    const F c = load(cos + i);
    const F s = load(sin + i);
    F turned_a = sub(mul(a, c), mul(b, s));
    F turned_b = add(mul(a, s), mul(b, c));
    if (interleaved) zip(turned_a, turned_b, &turned_a, &turned_b);
    store(first, turned_a);
    store(second, turned_b);
  }
  for (; i < n_pairs; ++i) {
    float& first = x[interleaved ? 2 * i : i];
    float& second = x[interleaved ? 2 * i + 1 : i + n_pairs];
    const float a = first;
    const float b = second;
    first = a * cos[i] - b * sin[i];
    second = a * sin[i] + b * cos[i];
  }
}

static void quantize(const float* x, int n, QuantizedGroup* groups) {
  for (int g = 0; g < n / kGroupSize; ++g, x += kGroupSize) {
    const F a = load(x);
    const F b = load(x + 16);
    const float top = reduce_max(max(abs(a), abs(b)));
    const F inverse = set1(top > 1e-36f ? 127.0f / top : 0.0f);  // of less it would be infinite
    const F low = round(mul(a, inverse));
    const F high = round(mul(b, inverse));
    QuantizedGroup& out = groups[g];
    store_int8(out.quants, low);
    store_int8(out.quants + 16, high);
    // The maximum may have passed over a NaN.
    const bool finite = (equal_mask(a, a) & equal_mask(b, b)) == 0xffffu && top <= 3.4028235e38f;
    out.scale = finite ? top / 127.0f : __builtin_nanf("");
    out.sums[0] = finite ? static_cast<std::int32_t>(reduce_add(low)) : 0;
    out.sums[1] = finite ? static_cast<std::int32_t>(reduce_add(high)) : 0;
    const std::int32_t sum = out.sums[0] + out.sums[1];
    out.minus_sum = -out.scale * static_cast<float>(sum);
    out.minus_128_sum = -128 * sum;
  }
}

// To nearest, ties to even; NaN stays NaN.
static void to_bf16(const float* x, int n, std::uint16_t* out) {
  for (int i = 0; i < n; ++i) {
    std::uint32_t u;
    __builtin_memcpy(&u, x + i, 4);
    const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
    const std::uint32_t rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
    out[i] = static_cast<std::uint16_t>(nan ? 0x7fc0u : rounded);
  }
}

static void to_half(const float* x, int n, std::uint16_t* out) {
  int i = 0;
  for (; i + 16 <= n; i += 16) store_half(out + i, load(x + i));
  if (i < n) {
    std::uint16_t lanes[16];
    store_half(lanes, load_some(x + i, n - i));
    __builtin_memcpy(out + i, lanes, static_cast<std::size_t>(n - i) * sizeof(std::uint16_t));
  }
}

static void run_stats(const float* logits, int n, RunStats* stats) {
  F top = set1(kMinusInfinity);
  F next = set1(kMinusInfinity);
  F not_finite = zero();
  for (int i = 0; i < n; i += 16) {
    const F l = load(logits + i);
    not_finite = fma(l, zero(), not_finite);
    next = max(next, min(top, l));
    top = max(top, l);
  }
  float tops[16];
  store(tops, top);
  const float highest = reduce_max(top);
  float second = reduce_max(next);
  bool seen = false;  // the lane of the maximum gives way once; its second is already in `next`
  for (const float t : tops) {
    if (t == highest && !seen) {
      seen = true;
    } else if (t > second) {
      second = t;
    }
  }
  std::int32_t argmax = 0;
  const F highest_lanes = set1(highest);
  for (int i = 0; i < n; i += 16) {
    const std::uint32_t mask = equal_mask(load(logits + i), highest_lanes);
    if (mask != 0) {
      argmax = i + __builtin_ctz(mask);
      break;
    }
  }
  F sum = zero();
  F weighted = zero();
  for (int i = 0; i < n; i += 16) {
    const F below = sub(load(logits + i), highest_lanes);
    const F e = exp(below);
    sum = add(sum, e);
    weighted = fma(below, e, weighted);
  }
  *stats = {highest, second, reduce_add(sum), reduce_add(weighted), reduce_add(not_finite), argmax};
}

static float exp_sum(const float* x, Index n, float highest, float scale) {
  F sum = zero();
  for (Index i = 0; i < n; i += 16) {
    F l = set1(kMinusInfinity);
    if (n - i >= 16) {
      l = load(x + i);
    } else {
      float lanes[16];
      store(lanes, l);
      __builtin_memcpy(lanes, x + i, static_cast<std::size_t>(n - i) * sizeof(float));
      l = load(lanes);
    }
    sum = add(sum, exp(mul(sub(l, set1(highest)), set1(scale))));
  }
  return reduce_add(sum);
}
