// Where attention's vectors come from: a cache as it lies, converted on the way to a product, or by
// way of scratch.

// A cache that holds what is multiplied, or scratch; what the next product reads is prefetched in
// even portions, one at each word.
template <typename Products>
struct Words {
  static constexpr int kBytes = 64;  // of a vector
  const std::uint8_t* next;
  Index portion;
  void step() {
    prefetch(next);
    next += portion;
  }
  static typename Products::Vector load(const std::uint8_t* p, Index stride, int j) {
    return Products::load_vector(p + j * stride);
  }
};

// A cache of another type, two bytes an element, converted on the way; what is needed a step later
// is prefetched.
template <typename Products, DType kCache>
struct Converted {
  static constexpr int kBytes = 32 * Products::kPerWord;
  Index ahead;  // bytes from this step to the next one
  void step() {}
  typename Products::Vector load(const std::uint8_t* p, Index stride, int j) const {
    p += j * stride;
    prefetch(p + ahead);
    return Products::template load_cached<kCache>(reinterpret_cast<const std::uint16_t*>(p));
  }
};

// Its vectors are those of GroupKeys and GroupValues.
template <typename Products>
struct Converted<Products, DType::q8_0> {
  Index ahead;
};

// What a Q8_0 cache holds is scale * quant, which float32 has exactly: it is the same number
// wherever it is computed.
static inline F dequantized(const std::int8_t* quants, F scale) {
  return mul(load_signed_bytes(reinterpret_cast<const std::uint8_t*>(quants)), scale);
}

// 32 dimensions of J vectors of 16 keys, groups `stride` apart
template <int J>
struct GroupKeys {
  Index ahead;
  F scales[J];
  GroupKeys(const CachedGroup* group, Index stride, Index bytes) : ahead(bytes) {
    for (int j = 0; j < J; ++j) scales[j] = load_half(group[j * stride].scales);
  }
  void step() {}
  F load(const std::uint8_t* p, Index stride, int j) const {
    p += j * stride;
    prefetch(p + ahead);
    return dequantized(reinterpret_cast<const std::int8_t*>(p), scales[j]);
  }
};

// The values of 16 keys in J vectors of dimensions, two of which share a group.
template <int J>
struct GroupValues {
  Index ahead;
  float scales[(J + 1) / 2][kLanes];
  int key = -1;
  GroupValues(const CachedGroup* group, Index bytes) : ahead(bytes) {
    for (int j = 0; j < J; j += 2) store(scales[j / 2], load_half(group[j / 2].scales));
  }
  void step() { ++key; }
  F load(const std::uint8_t* p, Index stride, int j) const {
    p += j / 2 * stride + j % 2 * 16;
    prefetch(p + ahead);
    return dequantized(reinterpret_cast<const std::int8_t*>(p), set1(scales[j / 2][key]));
  }
};

// sums[q][j] += vector j of word w times word w of query q, over n words
template <typename Products, typename Source, int Q, int J>
static inline void multiply_tile(Source& source, const std::uint8_t* vectors, Index vector_stride,
                                 Index word_stride, const std::uint8_t* words, Index query_stride,
                                 int n, F (&sums)[Q][J]) {
  for (int w = 0; w < n; ++w) {
    source.step();
    typename Products::Vector v[J];
    for (int j = 0; j < J; ++j) v[j] = source.load(vectors, vector_stride, j);
    for (int q = 0; q < Q; ++q) {
      const auto word = Products::spread(words + q * query_stride);
      for (int j = 0; j < J; ++j) sums[q][j] = Products::multiply_add(sums[q][j], v[j], word);
    }
    vectors += word_stride;
    words += 4;
  }
}

// tile += keys of the vectors from `vector` on, times queries
template <typename Products, typename Source, int Q, int J>
static inline void multiply_keys(Source& source, const std::uint8_t* keys, int vector, int head_dim,
                                 const std::uint8_t* queries, F (&tile)[Q][J]) {
  const int n_words = head_dim / Products::kPerWord;
  const Index vector_bytes = Index{Source::kBytes} * n_words;
  multiply_tile<Products>(source, keys + vector * vector_bytes, vector_bytes, Source::kBytes,
                          queries, Index{4} * n_words, n_words, tile);
}
template <typename Products, int Q, int J>
static inline void multiply_keys(Converted<Products, DType::q8_0>& source, const std::uint8_t* keys,
                                 int vector, int head_dim, const std::uint8_t* queries,
                                 F (&tile)[Q][J]) {
  const int n_groups = head_dim / kGroupSize;
  const auto* group = reinterpret_cast<const CachedGroup*>(keys) + Index{vector} * n_groups;
  for (int g = 0; g < n_groups; ++g, ++group, queries += kGroupSize * 4) {
    GroupKeys<J> of_group(group, n_groups, source.ahead);
    multiply_tile<Products>(of_group, reinterpret_cast<const std::uint8_t*>(group->quants),
                            n_groups * Index{sizeof(CachedGroup)}, 16, queries, Index{4} * head_dim,
                            kGroupSize, tile);
  }
}

template <typename Products>
static inline int words_of(int n) {
  return (n + Products::kPerWord - 1) / Products::kPerWord;
}

// tile += dimensions of the vectors from `vector` on, of n keys, times probabilities
template <typename Products, typename Source, int Q, int J>
static inline void multiply_values(Source& source, const std::uint8_t* values, int vector,
                                   int padded_dim, const float* probabilities, int n,
                                   F (&tile)[Q][J]) {
  multiply_tile<Products>(source, values + vector * Source::kBytes, Source::kBytes,
                          Index{Source::kBytes} * (padded_dim / 16),
                          reinterpret_cast<const std::uint8_t*>(probabilities), kKeysPerStep * 4,
                          words_of<Products>(n), tile);
}
template <typename Products, int Q, int J>
static inline void multiply_values(Converted<Products, DType::q8_0>& source,
                                   const std::uint8_t* values, int vector, int padded_dim,
                                   const float* probabilities, int n, F (&tile)[Q][J]) {
  const int n_groups = padded_dim / kGroupSize;
  const auto* group = reinterpret_cast<const CachedGroup*>(values) + vector / 2;
  for (int key = 0; key < n; key += 16, group += n_groups, probabilities += 16) {
    GroupValues<J> of_group(group, source.ahead);
    const auto* quants = reinterpret_cast<const std::uint8_t*>(group->quants);
    multiply_tile<Products>(of_group, quants + vector % 2 * 16, sizeof(CachedGroup), kGroupSize,
                            reinterpret_cast<const std::uint8_t*>(probabilities), kKeysPerStep * 4,
                            n - key < 16 ? n - key : 16, tile);
  }
}

// Elements [0, n) to words
template <typename Products, DType kCache>
static inline void convert_step(const std::uint8_t* elements, Index n, std::uint8_t* words) {
  constexpr int kPerVector = 16 * Products::kPerWord;
  const auto* in = reinterpret_cast<const std::uint16_t*>(elements);
  for (Index i = 0; i < n; i += kPerVector, words += 64) {
    Products::store_vector(words, Products::template load_cached<kCache>(in + i));
  }
}

// Keys of n_vectors vectors to words
template <typename Products, DType kCache>
static inline void convert_keys(const std::uint8_t* keys, int n_vectors, int head_dim,
                                std::uint8_t* words) {
  if constexpr (kCache == DType::q8_0) {
    auto* to = reinterpret_cast<float*>(words);
    const auto* group = reinterpret_cast<const CachedGroup*>(keys);
    const auto* end = group + Index{n_vectors} * (head_dim / kGroupSize);
    for (; group < end; ++group) {
      const F scale = load_half(group->scales);
      for (int d = 0; d < kGroupSize; ++d, to += 16) {
        store(to, dequantized(group->quants + d * 16, scale));
      }
    }
  } else {
    convert_step<Products, kCache>(keys, Index{n_vectors} * 16 * head_dim, words);
  }
}

// Values of n_words words of keys to words
template <typename Products, DType kCache>
static inline void convert_values(const std::uint8_t* values, int n_words, int padded_dim,
                                  std::uint8_t* words) {
  if constexpr (kCache == DType::q8_0) {
    auto* to = reinterpret_cast<float*>(words);
    const auto* group = reinterpret_cast<const CachedGroup*>(values);
    for (int key = 0; key < n_words; key += 16, to += Index{16} * padded_dim) {
      for (int g = 0; g < padded_dim / kGroupSize; ++g, ++group) {
        float scales[16];
        store(scales, load_half(group->scales));
        for (int k = 0; k < 16; ++k) {
          float* row = to + Index{k} * padded_dim + g * kGroupSize;
          const F scale = set1(scales[k]);
          store(row, dequantized(group->quants + k * kGroupSize, scale));
          store(row + 16, dequantized(group->quants + k * kGroupSize + 16, scale));
        }
      }
    }
  } else {
    convert_step<Products, kCache>(values, Index{n_words} * Products::kPerWord * padded_dim, words);
  }
}
