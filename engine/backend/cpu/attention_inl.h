// Attention of queries that share a key-value head, with an online softmax over steps of
// kKeysPerStep keys. Keys lie 16 to a vector and values 16 dimensions to a vector, so both products
// (scores = K q and out += V p) have the same inner loop: a vector times one word of a query, added
// to 16 float32 sums. A word and a lane hold one float, or two bf16 where the CPU multiplies pairs.
//
// A step of a cache that holds another type is converted once, into scratch that stays in L1, for
// all queries. A key behind what a query sees gets probability exactly 0, and every sum runs in the
// order of its keys or dimensions: a query's result has the same bits whatever shares its task.

// A call per tile would cost a tenth of its time.
#define SBD_INLINE __attribute__((always_inline))

// 2^x with a relative error below 2e-7, exactly 1 at 0; 2^-126 below -126. NaN stays NaN.
static inline F exp2(F x) {
  x = max(set1(-126.0f), x);
  const F n = round(x);
  const F r = sub(x, n);
  F p = set1(1.32647273e-3f);
  p = fma(p, r, set1(9.67151279e-3f));
  p = fma(p, r, set1(5.55073374e-2f));
  p = fma(p, r, set1(2.40222421e-1f));
  p = fma(p, r, set1(6.93146978e-1f));
  p = fma(p, r, set1(1.0f));
  return scale_by_power(p, n);
}

// Calls tile.operator()<Q, J>(query, vector) until all are covered.
template <int Q, int J, typename Tile>
static inline void query_tiles(int query, int n_queries, int vector, const Tile& tile) {
  for (; query + Q <= n_queries; query += Q) tile.template operator()<Q, J>(query, vector);
  if constexpr (Q > 1) query_tiles<Q / 2, J>(query, n_queries, vector, tile);
}
template <int Q, int J, typename Tile>
static inline void tiles(int n_queries, int vector, int n_vectors, const Tile& tile) {
  for (; vector + J <= n_vectors; vector += J) query_tiles<Q, J>(0, n_queries, vector, tile);
  if constexpr (J > 1) tiles<(Q < 8 ? 2 * Q : Q), J / 2>(n_queries, vector, n_vectors, tile);
}

template <typename Products, DType kCache>
struct AttentionWork {
  static constexpr bool kConverts = kCache != Products::kType;
  using Cached = Converted<Products, kCache>;

  const AttentionTask& t;
  int n_queries = t.n_rows * t.group;
  AttentionLayout at = attention_layout(n_queries, t.head_dim, t.padded_dim);
  int key_words = t.head_dim / Products::kPerWord;
  int dim_vectors = t.padded_dim / 16;
  Index query_bytes = Index{4} * key_words;
  float* out = t.partial;
  float* shifts = t.partial + at.shifts;  // minus the highest scaled score
  float* sums = t.partial + at.sums;
  std::uint8_t* step = reinterpret_cast<std::uint8_t*>(t.scratch);
  float* scores = t.scratch + at.scores;
  float* factors = t.scratch + at.factors;
  float* step_sums = t.scratch + at.step_sums;
  int* kv_end = reinterpret_cast<int*>(t.scratch + at.kv_end);
  std::uint8_t* queries = reinterpret_cast<std::uint8_t*>(t.scratch + at.queries);

  // Keys of the step at `key` that the one of n queries that sees most sees.
  int seen(int query, int n, int key) const {
    int end = kv_end[query];
    for (int q = 1; q < n; ++q) end = kv_end[query + q] > end ? kv_end[query + q] : end;
    return end - key;
  }

  void start() const {
    for (int i = 0; i < n_queries; ++i) {
      const int row = i / t.group;
      kv_end[i] = t.kv_end[row];
      shifts[i] = -kMinusInfinity;
      sums[i] = 0.0f;
      Products::store_query(t.queries + row * t.row_stride + i % t.group * Index{t.head_dim},
                            t.head_dim, queries + i * query_bytes);
    }
    for (Index i = 0; i < Index{n_queries} * t.padded_dim; i += 16) store(out + i, zero());
  }

  // bytes_of_values() here: of inline functions, which are shared, only constants may be used.
  static Index bytes_of(Index n_values) {
    constexpr Index kValues = values_per_block(kCache), kBytes = bytes_per_block(kCache);
    return n_values / kValues * kBytes;
  }

  // scores[q] = queries[q] . keys
  template <int Q0, int J0, typename Source>
  void score(Source source, const std::uint8_t* keys, int key, int n_keys) const {
    tiles<Q0, J0>(
        n_queries, 0, (n_keys + 15) / 16, [&]<int Q, int J>(int query, int vector) SBD_INLINE {
          if (seen(query, Q, key) <= vector * 16) return;
          F tile[Q][J];
          for (auto& row : tile) {
            for (F& x : row) x = zero();
          }
          multiply_keys<Products>(source, keys, vector, t.head_dim, queries + query * query_bytes,
                                  tile);
          for (int q = 0; q < Q; ++q) {
            for (int j = 0; j < J; ++j) {
              store(scores + Index{query + q} * kKeysPerStep + (vector + j) * 16, tile[q][j]);
            }
          }
        });
  }

  // What is unseen before a kv_end has next to no probability: 2^-126 of the highest.
  void hide(int key) const {
    for (int q = 0; q < n_queries; ++q) {
      const Interval hidden = t.unseen[q / t.group];
      const int begin = hidden.begin > key ? hidden.begin - key : 0;
      const int end = hidden.end - key < kKeysPerStep ? hidden.end - key : kKeysPerStep;
      for (int k = begin; k < end; ++k) scores[Index{q} * kKeysPerStep + k] = kMinusInfinity;
    }
  }

  // Keys [0, n) of a step are seen, all of them where kAll.
  template <bool kAll>
  float highest_score(int q, int n) const {
    F top = set1(kMinusInfinity);
    for (int j = 0; j < kKeyVectors; ++j) {
      const F x = load(scores + Index{q} * kKeysPerStep + j * 16);
      top = max(top, kAll ? x : first_lanes(x, n - j * 16, top));
    }
    return reduce_max(top);
  }

  // In the scores' place; returns their sum.
  template <bool kAll>
  float probabilities(int q, int n, F scale) const {
    float* x = scores + Index{q} * kKeysPerStep;
    const F shift = set1(shifts[q]);
    F p[kKeyVectors];
    for (int j = 0; j < kKeyVectors; ++j) {
      p[j] = exp2(fma(load(x + j * 16), scale, shift));
      if (!kAll) p[j] = first_lanes(p[j], n - j * 16, zero());
    }
    return reduce_add(Products::store_probabilities(p, x));
  }

  // scores = 2^(scale scores + shift), factors = 2^(new shift - old shift), of every query. In
  // passes over all of them, as the two reductions of one are long chains.
  void softmax(int key) const {
    const F scale = set1(t.scale * 1.44269504f);  // to powers of 2
    if (t.unseen != nullptr) hide(key);
    for (int q = 0; q < n_queries; ++q) {
      const int n = kv_end[q] - key;
      step_sums[q] = n >= kKeysPerStep ? highest_score<true>(q, n)
                     : n > 0           ? highest_score<false>(q, n)
                                       : kMinusInfinity;
    }
    for (int q = 0; q < n_queries; q += 16) {
      const F old = load(shifts + q);
      const F shift = min(old, sub(zero(), mul(load(step_sums + q), scale)));
      const F factor = exp2(sub(shift, old));
      store(shifts + q, shift);
      store(sums + q, mul(load(sums + q), factor));
      store(factors + q, factor);
    }
    for (int q = 0; q < n_queries; ++q) {
      const int n = kv_end[q] - key;
      if (n >= kKeysPerStep) {
        sums[q] += probabilities<true>(q, n, scale);
      } else if (n > 0) {
        sums[q] += probabilities<false>(q, n, scale);
      } else {
        F none[kKeyVectors];
        for (F& p : none) p = zero();
        Products::store_probabilities(none, scores + Index{q} * kKeysPerStep);
      }
    }
  }

  // out[q] = factors[q] out[q] + probabilities[q] . values
  template <int Q0, int J0, typename Source>
  void add_values(Source source, const std::uint8_t* values, int key, int n_keys) const {
    tiles<Q0, J0>(n_queries, 0, dim_vectors, [&]<int Q, int J>(int query, int vector) SBD_INLINE {
      int n = seen(query, Q, key);
      if (n <= 0) return;
      n = n < n_keys ? n : n_keys;
      F tile[Q][J];
      float* o = out + Index{query} * t.padded_dim + vector * 16;
      for (int q = 0; q < Q; ++q) {
        const F factor = set1(factors[query + q]);
        for (int j = 0; j < J; ++j) {
          tile[q][j] = mul(load(o + Index{q} * t.padded_dim + j * 16), factor);
        }
      }
      multiply_values<Products>(source, values, vector, t.padded_dim,
                                scores + Index{query} * kKeysPerStep, n, tile);
      for (int q = 0; q < Q; ++q) {
        for (int j = 0; j < J; ++j) store(o + Index{q} * t.padded_dim + j * 16, tile[q][j]);
      }
    });
  }

  // Prefetches `bytes` from `next` over the words of all tiles.
  Words<Products> words(const std::uint8_t* next, Index bytes, int n_vectors, int n_words) const {
    const Index n_tiles = Index{(n_queries + kQueryTile - 1) / kQueryTile} *
                          ((n_vectors + kVectorTile - 1) / kVectorTile);
    return {next, bytes / (n_tiles * n_words) + 1};
  }

  // A step each vector of which serves one tile, as that holds all queries: there is no need of
  // scratch.
  template <int Q, int J>
  void converted_step(const std::uint8_t* keys, const std::uint8_t* values, int key) const {
    const bool last = key + 2 * kKeysPerStep > t.key_end;
    const auto ahead = [&](const std::uint8_t* here, int width, const void* next) {
      return last ? static_cast<const std::uint8_t*>(next) - here
                  : bytes_of(Index{kKeysPerStep} * width);
    };
    score<Q, J>(Cached{ahead(keys, t.head_dim, t.next_keys)}, keys, key, kKeysPerStep);
    softmax(key);
    add_values<Q, J>(Cached{ahead(values, t.padded_dim, t.next_values)}, values, key, kKeysPerStep);
  }

  void run() const {
    start();
    constexpr int kNarrowTile = kVectorTile > 1 ? kVectorTile / 2 : 1;
    constexpr int kMoreQueries = kQueryTile * kVectorTile / kNarrowTile;
    for (int key = t.key_begin; key < t.key_end; key += kKeysPerStep) {
      const int n_keys = t.key_end - key < kKeysPerStep ? t.key_end - key : kKeysPerStep;
      const auto* keys =
          static_cast<const std::uint8_t*>(t.keys) + bytes_of(Index{key} * t.head_dim);
      const auto* values =
          static_cast<const std::uint8_t*>(t.values) + bytes_of(Index{key} * t.padded_dim);
      if constexpr (kConverts) {
        if (n_keys == kKeysPerStep && n_queries <= kMoreQueries) {
          if (n_queries <= kQueryTile) {
            converted_step<kQueryTile, kVectorTile>(keys, values, key);
          } else {
            converted_step<kMoreQueries, kNarrowTile>(keys, values, key);
          }
          continue;
        }
      }
      const int key_vectors = (n_keys + 15) / 16;
      const int n_words = words_of<Products>(n_keys);
      const Index step_bytes = bytes_of(Index{kKeysPerStep} * t.head_dim);
      const bool last = key + kKeysPerStep >= t.key_end;
      const auto to_values =
          words(values, bytes_of(Index{n_keys} * t.padded_dim), key_vectors, key_words);
      const auto to_keys =
          words(last ? static_cast<const std::uint8_t*>(t.next_keys) : keys + step_bytes,
                step_bytes, dim_vectors, n_words);
      if constexpr (kConverts) {
        convert_keys<Products, kCache>(keys, key_vectors, t.head_dim, step);
        keys = step;
      }
      score<kQueryTile, kVectorTile>(to_values, keys, key, n_keys);
      softmax(key);
      const bool odd = n_keys % Products::kPerWord != 0;
      if (kConverts || odd) {
        convert_values<Products, kCache>(values, n_words, t.padded_dim, step);
        values = step;
        if (odd) {
          // Nobody sees the last pair's second key, and 0 times what lies there need not be 0.
          std::uint8_t* last_word = step + Index{n_words - 1} * t.padded_dim * 4;
          for (int i = 0; i < t.padded_dim; ++i) last_word[i * 4 + 2] = last_word[i * 4 + 3] = 0;
        }
      }
      add_values<kQueryTile, kVectorTile>(to_keys, values, key, n_keys);
    }
  }
};

template <typename Products, DType kCache>
static void attention_of(const AttentionTask& t) {
  if constexpr (is_own(Products::kOperands)) {
    AttentionWork<Products, kCache>{t}.run();
  } else {
    SBD_BASE::kernels.attention(t);
  }
}

static void attention(const AttentionTask& t) {
  switch (t.kv_dtype) {
    case DType::f16: return attention_of<ShortProducts, DType::f16>(t);
    case DType::bf16: return attention_of<ShortProducts, DType::bf16>(t);
    case DType::q8_0: return attention_of<FloatProducts, DType::q8_0>(t);
    default: return attention_of<FloatProducts, DType::f32>(t);
  }
}

// out = sum over splits s of 2^(shift - shift_s) out_s, divided by the same sum of the sums
static void merge_attention(const MergeTask& t) {
  const int n_queries = t.n_rows * t.group;
  const AttentionLayout layout = attention_layout(n_queries, t.head_dim, t.padded_dim);
  for (int i = 0; i < n_queries; ++i) {
    const int row = i / t.group;
    const int splits = (t.kv_end[row] + kKeysPerSplit - 1) / kKeysPerSplit;
    float* shifts = t.partials + layout.shifts + i;
    const float* sums = t.partials + layout.sums + i;
    float shift = shifts[0];
    for (int s = 1; s < splits; ++s) {
      const float other = shifts[s * t.partial_stride];
      shift = other < shift ? other : shift;
    }
    F sum = zero();
    float* factors = shifts;  // in their place
    for (int s = 0; s < splits; ++s) {
      const Index at = s * t.partial_stride;
      float factor[16];
      store(factor, exp2(set1(shift - shifts[at])));
      sum = fma(set1(factor[0]), set1(sums[at]), sum);
      factors[at] = factor[0];
    }
    const F inverse = div(set1(1.0f), sum);
    float* out = t.out + row * t.row_stride + i % t.group * Index{t.head_dim};
    for (int d = 0; d < t.head_dim; d += 16) {
      F total = zero();
      for (int s = 0; s < splits; ++s) {
        const Index at = s * t.partial_stride;
        const float* partial = t.partials + at + Index{i} * t.padded_dim + d;
        total = fma(set1(factors[at]), load(partial), total);
      }
      store_some(out + d, mul(total, inverse), t.head_dim - d);
    }
  }
}
