// The same as `vector_avx512.h` in plain C++, for the compiler to vectorise for whatever it is told to. Included
// inside a namespace, once for each instruction set.

struct Vec {
  float v[16];
  static Vec all(float x) {
    Vec out;
    for (int j = 0; j < 16; ++j) out.v[j] = x;
    return out;
  }
  static Vec zero() { return all(0.0f); }
  template <class T> static Vec load(const T* p) {
    Vec out;
    for (int j = 0; j < 16; ++j) out.v[j] = float_of(p[j]);
    return out;
  }
  void store(float* p) const {
    for (int j = 0; j < 16; ++j) p[j] = v[j];
  }
  void store(uint16_t* p) const {
    for (int j = 0; j < 16; ++j) p[j] = bf16_of(v[j]);
  }
  float sum() const {
    float part[8];
    for (int j = 0; j < 8; ++j) part[j] = v[j] + v[j + 8];
    for (int j = 0; j < 4; ++j) part[j] += part[j + 4];
    return (part[0] + part[2]) + (part[1] + part[3]);
  }
  float largest() const {
    float found = v[0];
    for (int j = 1; j < 16; ++j) found = v[j] > found ? v[j] : found;
    return found;
  }
};
#define PIMOE_ELEMENTWISE(name, expression)      \
  inline Vec name(Vec a, Vec b) {                \
    Vec out;                                     \
    for (int j = 0; j < 16; ++j) out.v[j] = (expression); \
    return out;                                  \
  }
PIMOE_ELEMENTWISE(operator+, a.v[j] + b.v[j])
PIMOE_ELEMENTWISE(operator-, a.v[j] - b.v[j])
PIMOE_ELEMENTWISE(operator*, a.v[j] * b.v[j])
PIMOE_ELEMENTWISE(operator/, a.v[j] / b.v[j])
// Of two operands of which one is NaN these give the second one.
PIMOE_ELEMENTWISE(smaller, a.v[j] < b.v[j] ? a.v[j] : b.v[j])
PIMOE_ELEMENTWISE(larger, a.v[j] > b.v[j] ? a.v[j] : b.v[j])
#undef PIMOE_ELEMENTWISE
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec rounded(Vec a) {
  Vec out;
  for (int j = 0; j < 16; ++j) out.v[j] = std::nearbyint(a.v[j]);
  return out;
}
inline Vec times_power_of_two(Vec a, Vec n) {
  Vec out;
  for (int j = 0; j < 16; ++j) out.v[j] = std::ldexp(a.v[j], n.v[j] == n.v[j] ? int(n.v[j]) : 0);
  return out;
}

// Lane n of the result is the sum of the vector of token n.
constexpr int SUM_PLACE[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
inline Vec sums_of(Vec (&parts)[16]) {
  Vec out;
  for (int j = 0; j < 16; ++j) out.v[j] = parts[j].sum();
  return out;
}

template <int KIND, int M> struct Panel {
  using Act = typename Traits<KIND>::Act;
  static void run(const uint8_t* weights, const float* scales, const Act* const* rows, int64_t k,
                  float (*out)[PANEL]) {
    for (int m = 0; m < M; ++m)
      for (int64_t c = 0; c < PANEL; ++c) out[m][c] = 0.0f;
    float w[2][PANEL];
    for (int64_t i = 0; i < k; i += 2) {
      const int terms = k - i < 2 ? 1 : 2;
      widen(weights, i, terms, w);
      for (int m = 0; m < M; ++m) {
        const float first = float_of(rows[m][i]), second = terms == 2 ? float_of(rows[m][i + 1]) : 0.0f;
        for (int64_t c = 0; c < PANEL; ++c) out[m][c] += first * w[0][c] + second * w[1][c];
      }
    }
    if (scales == nullptr) return;
    for (int m = 0; m < M; ++m)
      for (int64_t c = 0; c < PANEL; ++c) out[m][c] *= scales[c];
  }

 private:
  static void widen(const uint8_t* weights, int64_t i, int terms, float (*w)[PANEL]) {
    if constexpr (KIND == BF16) {
      const uint16_t* pairs = reinterpret_cast<const uint16_t*>(weights) + i * PANEL;
      for (int64_t c = 0; c < PANEL; ++c) w[0][c] = float_of(pairs[2 * c]), w[1][c] = float_of(pairs[2 * c + 1]);
    } else {
      for (int64_t c = 0; c < PANEL; ++c) w[1][c] = 0.0f;
      for (int term = 0; term < terms; ++term) {
        if constexpr (KIND == F32) {
          const float* line = reinterpret_cast<const float*>(weights) + (i + term) * PANEL;
          for (int64_t c = 0; c < PANEL; ++c) w[term][c] = line[c];
        } else {
          const int8_t* line = reinterpret_cast<const int8_t*>(weights) + (i + term) * PANEL;
          for (int64_t c = 0; c < PANEL; ++c) w[term][c] = float(line[c]);
        }
      }
    }
  }
};
