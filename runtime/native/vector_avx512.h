// Sixteen floats, and the products of a panel, for AVX-512 with bfloat16 (AMD Zen 4 and later, Intel Sapphire Rapids
// and later). Included inside a namespace and a target pragma.

struct Vec {
  __m512 v;
  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec all(float x) { return {_mm512_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const uint16_t* p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(uint16_t* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v));
  }
  float sum() const { return _mm512_reduce_add_ps(v); }
  float largest() const { return _mm512_reduce_max_ps(v); }
};
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// Of two operands of which one is NaN these give the second one.
inline Vec smaller(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec larger(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec rounded(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vec times_power_of_two(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }

// Lane n of the result is the sum of the vector of token n. Every sum has the same tree, and so the same bits for the
// same numbers, whichever token it is of.
constexpr int SUM_PLACE[16] = {0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15};  // token -> place in `parts`
inline Vec sums_of(Vec (&parts)[16]) {
  __m512 s[8], r[4], u[2];
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j)
    s[j] = _mm512_add_ps(_mm512_shuffle_f32x4(parts[j].v, parts[j + 8].v, 0x44),
                         _mm512_shuffle_f32x4(parts[j].v, parts[j + 8].v, 0xee));
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j)
    r[j] = _mm512_add_ps(_mm512_shuffle_f32x4(s[j], s[j + 4], 0x88), _mm512_shuffle_f32x4(s[j], s[j + 4], 0xdd));
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j)
    u[j] = _mm512_add_ps(_mm512_shuffle_ps(r[j], r[j + 2], 0x44), _mm512_shuffle_ps(r[j], r[j + 2], 0xee));
  return {_mm512_add_ps(_mm512_shuffle_ps(u[0], u[1], 0x88), _mm512_shuffle_ps(u[0], u[1], 0xdd))};
}

// out[m] = rows[m] . w for the 64 columns of a panel. Every row adds up in the order of k, however many rows there are.
template <int KIND, int M> struct Panel;

template <int M> inline void store_panel(const __m512 (&acc)[M][4], const float* scales, float (*out)[PANEL]) {
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    __m512 scale = scales == nullptr ? _mm512_set1_ps(1.0f) : _mm512_loadu_ps(scales + 16 * c);
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) _mm512_store_ps(out[m] + 16 * c, _mm512_mul_ps(acc[m][c], scale));
  }
}

template <int M> inline void clear_sums(__m512 (&acc)[M][4]) {
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) acc[m][c] = _mm512_setzero_ps();
}

template <int M> struct Panel<F32, M> {
  static void run(const uint8_t* weights, const float* scales, const float* const* rows, int64_t k,
                  float (*out)[PANEL]) {
    __m512 acc[M][4];
    clear_sums<M>(acc);
    const float* w = reinterpret_cast<const float*>(weights);
    for (int64_t i = 0; i < k; ++i, w += PANEL) {
      __m512 b[4];
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) b[c] = _mm512_loadu_ps(w + 16 * c);
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) {
        __m512 a = _mm512_set1_ps(rows[m][i]);
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) acc[m][c] = _mm512_fmadd_ps(a, b[c], acc[m][c]);
      }
    }
    store_panel<M>(acc, scales, out);
  }
};

inline int32_t pair_at(const uint16_t* row, int64_t pair) {
  int32_t both;
  std::memcpy(&both, row + 2 * pair, 4);
  return both;
}

template <int M> struct Panel<BF16, M> {
  static void run(const uint8_t* weights, const float* scales, const uint16_t* const* rows, int64_t k,
                  float (*out)[PANEL]) {
    __m512 acc[M][4];
    clear_sums<M>(acc);
    const uint8_t* w = weights;
    for (int64_t i = 0; i < k / 2; ++i, w += 4 * PANEL) {
      __m512i b[4];
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) b[c] = _mm512_loadu_si512(w + 64 * c);
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) {
        __m512bh a = (__m512bh)_mm512_set1_epi32(pair_at(rows[m], i));
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) acc[m][c] = _mm512_dpbf16_ps(acc[m][c], (__m512bh)b[c], a);
      }
    }
    store_panel<M>(acc, scales, out);
  }
};

template <int M> struct Panel<I8_F32, M> {
  static void run(const uint8_t* weights, const float* scales, const float* const* rows, int64_t k,
                  float (*out)[PANEL]) {
    __m512 acc[M][4];
    clear_sums<M>(acc);
    const uint8_t* w = weights;
    for (int64_t i = 0; i < k; ++i, w += PANEL) {
      __m512 b[4];
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
        __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + 16 * c));
        b[c] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
      }
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) {
        __m512 a = _mm512_set1_ps(rows[m][i]);
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) acc[m][c] = _mm512_fmadd_ps(a, b[c], acc[m][c]);
      }
    }
    store_panel<M>(acc, scales, out);
  }
};

// Weights are a sign and seven bits, and every such number is a bfloat16: its two bytes are looked up, 64 at a time.
struct Bf16OfInt8 {
  __m512i low[2], high[2];
  Bf16OfInt8() {
    alignas(64) uint8_t lows[128], highs[128];
    for (int magnitude = 0; magnitude < 128; ++magnitude) {
      uint16_t bits = bf16_of(float(magnitude));
      lows[magnitude] = uint8_t(bits);
      highs[magnitude] = uint8_t(bits >> 8);
    }
    for (int half = 0; half < 2; ++half) {
      low[half] = _mm512_load_si512(lows + 64 * half);
      high[half] = _mm512_load_si512(highs + 64 * half);
    }
  }
  void operator()(const uint8_t* bytes, __m512i& first, __m512i& second) const {
    __m512i packed = _mm512_loadu_si512(bytes);
    __m512i lows = _mm512_permutex2var_epi8(low[0], packed, low[1]);
    __m512i highs = _mm512_permutex2var_epi8(high[0], packed, high[1]);
    highs = _mm512_ternarylogic_epi32(highs, packed, _mm512_set1_epi8(char(0x80)), 0xf8);  // a | (b & c)
    first = _mm512_unpacklo_epi8(lows, highs);
    second = _mm512_unpackhi_epi8(lows, highs);
  }
};

template <int M> struct Panel<I8_BF16, M> {
  static void run(const uint8_t* weights, const float* scales, const uint16_t* const* rows, int64_t k,
                  float (*out)[PANEL]) {
    __m512 acc[M][4];
    clear_sums<M>(acc);
    const Bf16OfInt8 widen;
    const uint8_t* w = weights;
    for (int64_t i = 0; i < k / 2; ++i, w += 2 * PANEL) {
      __m512i b[4];
      widen(w, b[0], b[1]);
      widen(w + 64, b[2], b[3]);
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) {
        __m512bh a = (__m512bh)_mm512_set1_epi32(pair_at(rows[m], i));
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) acc[m][c] = _mm512_dpbf16_ps(acc[m][c], (__m512bh)b[c], a);
      }
    }
    store_panel<M>(acc, scales, out);
  }
};
