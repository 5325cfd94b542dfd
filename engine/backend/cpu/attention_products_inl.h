// What attention multiplies, a vector by one word of a query: floats, or pairs of bf16 where the
// CPU has their dots.

static constexpr int kKeyVectors = kKeysPerStep / 16;

struct FloatProducts {
  static constexpr Operands kOperands = Operands::floats;
  static constexpr DType kType = DType::f32;
  static constexpr int kPerWord = 1;
  using Vector = F;
  using Word = F;
  static Vector load_vector(const std::uint8_t* p) {
    return load(reinterpret_cast<const float*>(p));
  }
  template <DType kCache>
  static Vector load_cached(const std::uint16_t* p) {
    return kCache == DType::f16 ? load_half(p) : load_bf16(p);
  }
  static Word spread(const std::uint8_t* p) { return set1(*reinterpret_cast<const float*>(p)); }
  static F multiply_add(F sum, Vector v, Word w) { return fma(v, w, sum); }

  static void store_vector(std::uint8_t* p, Vector v) { store(reinterpret_cast<float*>(p), v); }
  static void store_query(const float* q, int dim, std::uint8_t* out) {
    __builtin_memcpy(out, q, static_cast<std::size_t>(dim) * sizeof(float));
  }
  // Over the scores of a step; returns lanes that add up to the probabilities' sum.
  static F store_probabilities(const F (&p)[kKeyVectors], float* out) {
    F sum = zero();
    for (int j = 0; j < kKeyVectors; ++j) {
      store(out + j * 16, p[j]);
      sum = add(sum, p[j]);
    }
    return sum;
  }
};

#ifdef __AVX512BF16__
struct Bf16Products {
  static constexpr Operands kOperands = Operands::bf16;
  static constexpr DType kType = DType::bf16;
  static constexpr int kPerWord = 2;
  using Vector = W;
  using Word = I;
  static Vector load_vector(const std::uint8_t* p) { return load_weights(p); }
  template <DType kCache>
  static Vector load_cached(const std::uint16_t* p) {
    if constexpr (kCache == DType::bf16)
      return load_weights(reinterpret_cast<const std::uint8_t*>(p));
    return pack_bf16(load_half(p), load_half(p + 16));
  }
  static Word spread(const std::uint8_t* p) {
    std::int32_t word;
    __builtin_memcpy(&word, p, 4);
    return set1_int(word);
  }
  static F multiply_add(F sum, Vector v, Word w) { return dot_bf16(sum, v, w); }

  static void store_vector(std::uint8_t* p, Vector v) { store_words(p, v); }
  static void store_query(const float* q, int dim, std::uint8_t* out) {
    int d = 0;
    for (; d + 32 <= dim; d += 32)
      store_words(out + d * 2, pack_bf16(load(q + d), load(q + d + 16)));
    if (d == dim) return;
    float rest[32] = {};
    std::uint8_t words[64];
    __builtin_memcpy(rest, q + d, static_cast<std::size_t>(dim - d) * sizeof(float));
    store_words(words, pack_bf16(load(rest), load(rest + 16)));
    __builtin_memcpy(out + d * 2, words, static_cast<std::size_t>(dim - d) * 2);
  }
  // The sum is that of the rounded probabilities, so that the weights of the values add up to 1.
  static F store_probabilities(const F (&p)[kKeyVectors], float* out) {
    const I ones = set1_int(0x3f803f80);
    F sum = zero();
    for (int j = 0; j < kKeyVectors; j += 2) {
      const W words = pack_bf16(p[j], p[j + 1]);
      store_words(reinterpret_cast<std::uint8_t*>(out) + j * 32, words);
      sum = dot_bf16(sum, words, ones);
    }
    return sum;
  }
};
using ShortProducts = Bf16Products;
#else
using ShortProducts = FloatProducts;
#endif
