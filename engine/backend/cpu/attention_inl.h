// Attention of queries that share a key-value head: keys are read 16 to a lane group, values 16
// dimensions to a lane group, with an online softmax over steps of kKeysPerStep keys. A key a query
// does not see gets probability exactly 0 and changes no bit of its result.

static inline F load_kv(const float* p) { return load(p); }
static inline F load_kv(const std::uint16_t* p) { return load_half(p); }

static constexpr int kQueryTile = kRowTile < 4 ? 2 : 4;
static constexpr int kKeyVectors = kKeysPerStep / 16;

// scores[q][64] = queries[q] . keys of one step
template <int Q, typename T>
static inline void score_step(const AttentionTask& t, int query, const T* keys,
                              float (*scores)[kKeysPerStep]) {
  F sums[Q][kKeyVectors];
  for (int q = 0; q < Q; ++q) {
    for (int j = 0; j < kKeyVectors; ++j) sums[q][j] = zero();
  }
  const Index block = static_cast<Index>(t.head_dim) * 16;
  for (int d = 0; d < t.head_dim; ++d) {
    F k[kKeyVectors];
    for (int j = 0; j < kKeyVectors; ++j) k[j] = load_kv(keys + j * block + d * 16);
    for (int q = 0; q < Q; ++q) {
      const F x = set1(t.queries[query + q][d]);
      for (int j = 0; j < kKeyVectors; ++j) sums[q][j] = fma(k[j], x, sums[q][j]);
    }
  }
  for (int q = 0; q < Q; ++q) {
    for (int j = 0; j < kKeyVectors; ++j) {
      store(scores[query + q] + j * 16, mul(sums[q][j], set1(t.scale)));
    }
  }
}

// out[q] += probabilities[q][n_keys] values
template <int Q, typename T>
static inline void value_step(const AttentionTask& t, int query, const T* values, int n_keys,
                              float (*probabilities)[kKeysPerStep]) {
  constexpr int D = kKeyVectors;
  for (int d = 0; d < t.padded_dim; d += 16 * D) {
    const int vectors = (t.padded_dim - d) / 16 < D ? (t.padded_dim - d) / 16 : D;
    F sums[Q][D];
    for (int q = 0; q < Q; ++q) {
      for (int j = 0; j < vectors; ++j) {
        sums[q][j] = load(t.out + static_cast<Index>(query + q) * t.padded_dim + d + j * 16);
      }
    }
    if (vectors == D) {
      for (int key = 0; key < n_keys; ++key) {
        const T* v = values + static_cast<Index>(key) * t.padded_dim + d;
        F lanes[D];
        for (int j = 0; j < D; ++j) lanes[j] = load_kv(v + j * 16);
        for (int q = 0; q < Q; ++q) {
          const F p = set1(probabilities[query + q][key]);
          for (int j = 0; j < D; ++j) sums[q][j] = fma(lanes[j], p, sums[q][j]);
        }
      }
    } else {
      for (int key = 0; key < n_keys; ++key) {
        const T* v = values + static_cast<Index>(key) * t.padded_dim + d;
        for (int q = 0; q < Q; ++q) {
          const F p = set1(probabilities[query + q][key]);
          for (int j = 0; j < vectors; ++j) {
            sums[q][j] = fma(load_kv(v + j * 16), p, sums[q][j]);
          }
        }
      }
    }
    for (int q = 0; q < Q; ++q) {
      for (int j = 0; j < vectors; ++j) {
        store(t.out + static_cast<Index>(query + q) * t.padded_dim + d + j * 16, sums[q][j]);
      }
    }
  }
}

template <typename T>
static void attention_typed(const AttentionTask& t) {
  const T* keys = static_cast<const T*>(t.keys);
  const T* values = static_cast<const T*>(t.values);
  alignas(64) float scores[kMaxQueries][kKeysPerStep];

  for (int q = 0; q < t.n_queries; ++q) {
    t.maxima[q] = kMinusInfinity;
    t.sums[q] = 0.0f;
    float* out = t.out + static_cast<Index>(q) * t.padded_dim;
    for (int d = 0; d < t.padded_dim; d += 16) store(out + d, zero());
  }

  for (int key = t.key_begin; key < t.key_end; key += kKeysPerStep) {
    const int n_keys = t.key_end - key < kKeysPerStep ? t.key_end - key : kKeysPerStep;
    const T* step_keys = keys + static_cast<Index>(key) * t.head_dim;
    int query = 0;
    for (; query + kQueryTile <= t.n_queries; query += kQueryTile) {
      score_step<kQueryTile>(t, query, step_keys, scores);
    }
    for (; query < t.n_queries; ++query) score_step<1>(t, query, step_keys, scores);

    for (int q = 0; q < t.n_queries; ++q) {
      const int seen = t.kv_end[q] - key;
      for (int i = seen < 0 ? 0 : seen; i < kKeysPerStep; ++i) scores[q][i] = kMinusInfinity;
      F top = load(scores[q]);
      for (int j = 1; j < kKeyVectors; ++j) top = max(top, load(scores[q] + j * 16));
      const float step_max = reduce_max(top);
      const float old_max = t.maxima[q];
      const float new_max = step_max > old_max ? step_max : old_max;
      // Where nothing has been seen yet, exp(-1e30 - -1e30) would be 1: such keys start far below.
      const F shift = set1(seen > 0 ? new_max : 0.0f);
      F sum = zero();
      for (int j = 0; j < kKeyVectors; ++j) {
        const F p = exp(sub(load(scores[q] + j * 16), shift));
        store(scores[q] + j * 16, p);
        sum = add(sum, p);
      }
      if (new_max > old_max) {
        float factor[16];
        store(factor, exp(set1(old_max - new_max)));
        t.sums[q] *= factor[0];
        float* out = t.out + static_cast<Index>(q) * t.padded_dim;
        for (int d = 0; d < t.padded_dim; d += 16)
          store(out + d, mul(load(out + d), set1(factor[0])));
        t.maxima[q] = new_max;
      }
      t.sums[q] += reduce_add(sum);
    }

    const T* step_values = values + static_cast<Index>(key) * t.padded_dim;
    query = 0;
    for (; query + kQueryTile <= t.n_queries; query += kQueryTile) {
      value_step<kQueryTile>(t, query, step_values, n_keys, scores);
    }
    for (; query < t.n_queries; ++query) value_step<1>(t, query, step_values, n_keys, scores);
  }
}

static void attention(const AttentionTask& t) {
  if (t.kv_dtype == DType::f16) {
    attention_typed<std::uint16_t>(t);
  } else {
    attention_typed<float>(t);
  }
}
