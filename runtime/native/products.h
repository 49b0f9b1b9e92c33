// Matrix products and experts, written once on `Vec` and `Panel`. Included after one of the vector headers.

inline Vec exponential(Vec x) {
  // Cephes' expf: the argument less a multiple of ln 2, a polynomial, and the multiple as a power of two.
  const Vec low = Vec::all(-87.0f), high = Vec::all(88.0f);
  x = larger(low, smaller(high, x));
  const Vec n = rounded(x * Vec::all(1.44269504088896341f));
  Vec r = fma(n, Vec::all(-0.693359375f), x);
  r = fma(n, Vec::all(2.12194440e-4f), r);
  Vec p = Vec::all(1.9875691500e-4f);
  p = fma(p, r, Vec::all(1.3981999507e-3f));
  p = fma(p, r, Vec::all(8.3334519073e-3f));
  p = fma(p, r, Vec::all(4.1665795894e-2f));
  p = fma(p, r, Vec::all(1.6666665459e-1f));
  p = fma(p, r, Vec::all(5.0000001201e-1f));
  return times_power_of_two(fma(p * r, r, r + Vec::all(1.0f)), n);
}

inline Vec sigmoid(Vec x) { return Vec::all(1.0f) / (Vec::all(1.0f) + exponential(Vec::zero() - x)); }

inline Vec gated(Activation activation, Vec gate, Vec up, float alpha, float limit) {
  switch (activation) {
    case SILU:
      return gate * sigmoid(gate) * up;
    case GELU_TANH: {
      const Vec inner = gate * fma(gate * gate, Vec::all(0.7978845608f * 0.044715f), Vec::all(0.7978845608f));
      return gate * sigmoid(inner + inner) * up;  // (1 + tanh(x)) / 2 = sigmoid(2x)
    }
    case RELU:
      return larger(Vec::zero(), gate) * up;
    default: {
      const Vec top = Vec::all(limit);
      gate = smaller(top, gate);
      up = larger(Vec::all(-limit), smaller(top, up));
      return (up + Vec::all(1.0f)) * (gate * sigmoid(gate * Vec::all(alpha)));
    }
  }
}

// Rows of one pass over a panel; their number is a template so that the sums stay in registers.
template <int KIND>
inline void tile(const Matrix& matrix, int64_t panel, const typename Traits<KIND>::Act* const* rows, int count,
                 float (*out)[PANEL]) {
  const uint8_t* weights = matrix.weights + panel * PANEL * matrix.k * Traits<KIND>::weight_bytes;
  const float* scales = matrix.scales == nullptr ? nullptr : matrix.scales + panel * PANEL;
  switch (count) {
    case 1: Panel<KIND, 1>::run(weights, scales, rows, matrix.k, out); break;
    case 2: Panel<KIND, 2>::run(weights, scales, rows, matrix.k, out); break;
    case 3: Panel<KIND, 3>::run(weights, scales, rows, matrix.k, out); break;
    case 4: Panel<KIND, 4>::run(weights, scales, rows, matrix.k, out); break;
    case 5: Panel<KIND, 5>::run(weights, scales, rows, matrix.k, out); break;
    default: Panel<KIND, 6>::run(weights, scales, rows, matrix.k, out); break;
  }
  if (matrix.bias == nullptr) return;
  for (int m = 0; m < count; ++m)
    for (int64_t c = 0; c < PANEL; c += 16)
      (Vec::load(out[m] + c) + Vec::load(matrix.bias + panel * PANEL + c)).store(out[m] + c);
}

// How many rows the next pass takes of those left: nearly equal passes, as small ones do little per weight read.
inline int next_tile(int64_t left) {
  const int64_t passes = (left + TILE - 1) / TILE;
  return int((left + passes - 1) / passes);
}

// The pairs sorted by expert, each expert's in the order of rows.
struct Sorted {
  const int32_t* bounds;   // [experts + 1]
  const int32_t* rows;     // [pairs]
  const float* weights;    // [pairs]
  const int32_t* active;   // experts that have pairs
  int64_t active_count;
};

inline Sorted sort_pairs(const Experts& layer, const Dispatch& work, Scratch& memory) {
  const int64_t pairs = work.pairs;
  int32_t* bounds = memory.get<int32_t>(2 * layer.experts + 1 + 2 * pairs);
  int32_t* active = bounds + layer.experts + 1;
  int32_t* rows = active + layer.experts;
  float* weights = reinterpret_cast<float*>(rows + pairs);
  std::memset(bounds, 0, sizeof(int32_t) * size_t(layer.experts + 1));
  for (int64_t pair = 0; pair < pairs; ++pair) ++bounds[work.experts[pair] + 1];
  int64_t active_count = 0;
  for (int64_t expert = 0; expert < layer.experts; ++expert) {
    if (bounds[expert + 1] > 0) active[active_count++] = int32_t(expert);
    bounds[expert + 1] += bounds[expert];
  }
  for (int64_t row = 0; row < work.rows; ++row)
    for (int32_t pair = work.offsets[row]; pair < work.offsets[row + 1]; ++pair) {
      const int32_t place = bounds[work.experts[pair]]++;
      rows[place] = int32_t(row);
      weights[place] = work.weights[pair];
    }
  for (int64_t expert = layer.experts; expert > 0; --expert) bounds[expert] = bounds[expert - 1];
  bounds[0] = 0;
  return {bounds, rows, weights, active, active_count};
}

// One half panel of one expert's inner values, for all its rows.
template <int KIND>
inline void up_unit(const Experts& layer, const Dispatch& work, const Sorted& sorted, int64_t expert, int64_t panel,
                    typename Traits<KIND>::Act* inner) {
  using Act = typename Traits<KIND>::Act;
  const Matrix matrix = of_expert(layer.gate_up, expert, Traits<KIND>::weight_bytes);
  const Act* hidden = static_cast<const Act*>(work.hidden);
  alignas(64) float out[TILE][PANEL];
  const Act* rows[TILE];
  for (int64_t place = sorted.bounds[expert]; place < sorted.bounds[expert + 1];) {
    const int count = next_tile(sorted.bounds[expert + 1] - place);
    for (int m = 0; m < count; ++m) rows[m] = hidden + sorted.rows[place + m] * layer.hidden;
    tile<KIND>(matrix, panel, rows, count, out);
    for (int m = 0; m < count; ++m)
      for (int64_t c = 0; c < HALF; c += 16)
        gated(layer.activation, Vec::load(out[m] + c), Vec::load(out[m] + HALF + c), layer.alpha, layer.limit)
            .store(inner + (place + m) * layer.inner + panel * HALF + c);
    place += count;
  }
}

// One panel of the outputs, over all experts in order: nobody else writes these columns.
template <int KIND>
inline void down_unit(const Experts& layer, const Dispatch& work, const Sorted& sorted, int64_t panel,
                      const typename Traits<KIND>::Act* inner) {
  alignas(64) float out[TILE][PANEL];
  const typename Traits<KIND>::Act* rows[TILE];
  const int64_t first = panel * PANEL, width = std::min(PANEL, layer.hidden - first);
  for (int64_t row = 0; row < work.rows; ++row)
    std::memset(work.out + row * layer.hidden + first, 0, sizeof(float) * size_t(width));
  for (int64_t index = 0; index < sorted.active_count; ++index) {
    const int64_t expert = sorted.active[index], end = sorted.bounds[expert + 1];
    const Matrix matrix = of_expert(layer.down, expert, Traits<KIND>::weight_bytes);
    for (int64_t place = sorted.bounds[expert]; place < end;) {
      const int count = next_tile(end - place);
      for (int m = 0; m < count; ++m) rows[m] = inner + (place + m) * layer.inner;
      tile<KIND>(matrix, panel, rows, count, out);
      for (int m = 0; m < count; ++m) {
        float* target = work.out + sorted.rows[place + m] * layer.hidden + first;
        const float weight = sorted.weights[place + m];
        for (int64_t c = 0; c < width; ++c) target[c] += weight * out[m][c];
      }
      place += count;
    }
  }
}

template <int KIND> void experts_of(const Experts& layer, const Dispatch& work, int threads) {
  using Act = typename Traits<KIND>::Act;
  static thread_local Scratch pair_memory, inner_memory;
  const Sorted sorted = sort_pairs(layer, work, pair_memory);
  Act* inner = inner_memory.get<Act>(int64_t(sorted.bounds[layer.experts]) * layer.inner);
  const int64_t up_panels = layer.gate_up.columns / PANEL, down_panels = layer.down.columns / PANEL;
  const int64_t up_units = up_panels * sorted.active_count;
  parallel_for(threads, up_units, 2, [&](int64_t unit) {
    up_unit<KIND>(layer, work, sorted, sorted.active[unit / up_panels], unit % up_panels, inner);
  });
  parallel_for(threads, down_panels, 1,
               [&](int64_t panel) { down_unit<KIND>(layer, work, sorted, panel, inner); });
}

inline void run_experts(const Experts& layer, const Dispatch& work, int threads) {
  switch (layer.kind) {
    case F32: return experts_of<F32>(layer, work, threads);
    case BF16: return experts_of<BF16>(layer, work, threads);
    case I8_F32: return experts_of<I8_F32>(layer, work, threads);
    default: return experts_of<I8_BF16>(layer, work, threads);
  }
}

template <int KIND, class Out>
void product_of(const Matrix& matrix, const typename Traits<KIND>::Act* rows, int64_t count, Out* out,
                int64_t columns, int threads) {
  const int64_t panels = matrix.columns / PANEL;
  parallel_for(threads, panels, 2, [&](int64_t panel) {
    alignas(64) float sums[TILE][PANEL];
    const typename Traits<KIND>::Act* tiled[TILE];
    const int64_t first = panel * PANEL, width = std::min(PANEL, columns - first);
    for (int64_t row = 0; row < count;) {
      const int taken = next_tile(count - row);
      for (int m = 0; m < taken; ++m) tiled[m] = rows + (row + m) * matrix.k;
      tile<KIND>(matrix, panel, tiled, taken, sums);
      for (int m = 0; m < taken; ++m) {
        Out* target = out + (row + m) * columns + first;
        if (width == PANEL) {
          for (int64_t c = 0; c < PANEL; c += 16) Vec::load(sums[m] + c).store(target + c);
        } else {
          Out padded[PANEL];
          for (int64_t c = 0; c < PANEL; c += 16) Vec::load(sums[m] + c).store(padded + c);
          std::memcpy(target, padded, sizeof(Out) * size_t(width));
        }
      }
      row += taken;
    }
  });
}

// rows [count, k] x matrix -> out [count, columns], in the kind's activations or in float32.
inline void run_product(Kind kind, const Matrix& matrix, const void* rows, int64_t count, void* out, bool out_f32,
                        int64_t columns, int threads) {
  const auto* floats = static_cast<const float*>(rows);
  const auto* halves = static_cast<const uint16_t*>(rows);
  if (kind == F32) return product_of<F32>(matrix, floats, count, static_cast<float*>(out), columns, threads);
  if (out_f32) return product_of<BF16>(matrix, halves, count, static_cast<float*>(out), columns, threads);
  return product_of<BF16>(matrix, halves, count, static_cast<uint16_t*>(out), columns, threads);
}
