// What a decoder's trunk does around its experts, written once on `Vec` and `tile`. Included after products.h.
// Every row is computed on its own: its bits do not depend on the rows beside it, nor on the threads.

constexpr int64_t ROWS_EACH = 16;  // that a thread finishes at once

template <class Act> inline float inverse_rms(const Act* row, int64_t count, float eps) {
  Vec squares = Vec::zero();
  for (int64_t c = 0; c < count; c += 16) {
    const Vec x = Vec::load(row + c);
    squares = fma(x, x, squares);
  }
  return 1.0f / std::sqrt(squares.sum() / float(count) + eps);
}

// row / rms(row) * scale, rounded before the scale as the reference implementations do. `count`: whole vectors.
template <class Act>
inline void norm_row(const Act* row, const Act* scale, int64_t count, float eps, Act* out) {
  const Vec inverse = Vec::all(inverse_rms(row, count, eps));
  for (int64_t c = 0; c < count; c += 16) {
    (Vec::load(row + c) * inverse).store(out + c);
    (Vec::load(out + c) * Vec::load(scale + c)).store(out + c);
  }
}

template <class Act>
void norm_of(const Act* rows, const Act* scale, int64_t count, int64_t width, float eps, Act* out) {
  for (int64_t row = 0; row < count; ++row) norm_row(rows + row * width, scale, width, eps, out + row * width);
}

inline void run_norm(Kind kind, const void* rows, const void* scale, int64_t count, int64_t width, float eps,
                     void* out) {
  if (kind == F32 || kind == I8_F32) {
    norm_of(static_cast<const float*>(rows), static_cast<const float*>(scale), count, width, eps,
            static_cast<float*>(out));
  } else {
    norm_of(static_cast<const uint16_t*>(rows), static_cast<const uint16_t*>(scale), count, width, eps,
            static_cast<uint16_t*>(out));
  }
}

// hidden + added (float32), rounded before and after as the reference implementations do.
template <class Act> void add_of(const Act* hidden, const float* added, int64_t numbers, Act* out) {
  int64_t c = 0;
  for (; c + 16 <= numbers; c += 16) {
    Act rounded[16];
    Vec::load(added + c).store(rounded);
    (Vec::load(hidden + c) + Vec::load(rounded)).store(out + c);
  }
  for (; c < numbers; ++c) {
    Act rounded;
    put(added[c], &rounded);
    put(float_of(hidden[c]) + float_of(rounded), out + c);
  }
}

inline void run_add(Kind kind, const void* hidden, const float* added, int64_t numbers, void* out) {
  if (kind == F32 || kind == I8_F32)
    add_of(static_cast<const float*>(hidden), added, numbers, static_cast<float*>(out));
  else
    add_of(static_cast<const uint16_t*>(hidden), added, numbers, static_cast<uint16_t*>(out));
}

// One panel of rows x matrix, for all rows, into float32 rows of `stride`.
template <int KIND>
inline void panel_into(const Matrix& matrix, int64_t panel, const typename Traits<KIND>::Act* rows, int64_t count,
                       float* out, int64_t stride) {
  alignas(64) float sums[TILE][PANEL];
  const typename Traits<KIND>::Act* tiled[TILE];
  for (int64_t row = 0; row < count;) {
    const int taken = next_tile(count - row);
    for (int m = 0; m < taken; ++m) tiled[m] = rows + (row + m) * matrix.k;
    tile<KIND>(matrix, panel, tiled, taken, sums);
    for (int m = 0; m < taken; ++m)
      std::memcpy(out + (row + m) * stride + panel * PANEL, sums[m], sizeof(sums[m]));
    row += taken;
  }
}

template <class Act> inline void scale_row(float* row, const Act* scale, int64_t count, float eps) {
  const Vec inverse = Vec::all(inverse_rms(row, count, eps));
  for (int64_t c = 0; c < count; c += 16) (Vec::load(row + c) * inverse * Vec::load(scale + c)).store(row + c);
}

// Norms, clips and turns the heads of one token, all in float32, and puts them where they belong.
template <class Act>
inline void finish_token(const Attention& layer, float* merged, const float* rotary, Act* queries, Act* cached) {
  const int64_t dim = layer.head_dim, turned = layer.heads + layer.kv_heads, half = dim / 2;
  const Act* scale = static_cast<const Act*>(layer.qk_scale);
  if (layer.qk_norm == 1) {
    for (int64_t head = 0; head < turned; ++head) scale_row(merged + head * dim, scale + head * dim, dim, layer.eps);
  } else if (layer.qk_norm == 2) {
    scale_row(merged, scale, layer.heads * dim, layer.eps);
    scale_row(merged + layer.heads * dim, scale + layer.heads * dim, layer.kv_heads * dim, layer.eps);
  }
  if (layer.clip < INFINITY)
    for (int64_t c = 0; c < (turned + layer.kv_heads) * dim; c += 16)
      larger(Vec::all(-layer.clip), smaller(Vec::all(layer.clip), Vec::load(merged + c))).store(merged + c);
  for (int64_t head = 0; head < turned; ++head) {
    const float* x = merged + head * dim;
    Act* out = head < layer.heads ? queries + head * dim : cached + (head - layer.heads) * dim;
    for (int64_t c = 0; c < dim; c += 16) {
      const float* other = c < half ? x + half + c : x + c - half;
      fma(Vec::load(other), Vec::load(rotary + dim + c), Vec::load(x + c) * Vec::load(rotary + c)).store(out + c);
    }
  }
  const float* values = merged + turned * dim;
  for (int64_t c = 0; c < layer.kv_heads * dim; c += 16)
    Vec::load(values + c).store(cached + layer.kv_heads * dim + c);
}

// hidden [tokens, hidden] -> queries [tokens, heads * head_dim]; keys and values go to the cache.
template <int KIND>
void project_of(const Attention& layer, const Tokens& tokens, const void* hidden, void* queries, int threads) {
  using Act = typename Traits<KIND>::Act;
  static thread_local Scratch normed_memory, merged_memory;
  const int64_t count = tokens.count, columns = layer.qkv.columns, panels = columns / PANEL;
  const int64_t query_width = layer.heads * layer.head_dim, cached_width = 2 * layer.kv_heads * layer.head_dim;
  Act* normed = normed_memory.get<Act>(count * layer.hidden);
  float* merged = merged_memory.get<float>(count * columns);
  for (int64_t token = 0; token < count; ++token)
    norm_row(static_cast<const Act*>(hidden) + token * layer.hidden, static_cast<const Act*>(layer.input_norm),
             layer.hidden, layer.eps, normed + token * layer.hidden);
  parallel_for(threads, panels, 1,
               [&](int64_t panel) { panel_into<KIND>(layer.qkv, panel, normed, count, merged, columns); });
  parallel_for(threads, count, ROWS_EACH, [&](int64_t token) {
    finish_token(layer, merged + token * columns, tokens.rotary + tokens.positions[token] * 2 * layer.head_dim,
                 static_cast<Act*>(queries) + token * query_width,
                 static_cast<Act*>(tokens.cache) + tokens.cache_rows[token] * cached_width);
  });
}

// The queries of one token that share a KV head, over all cached tokens that it sees. Scores in rows of `stride`.
template <class Act>
inline void attend_unit(const Attention& layer, const Tokens& tokens, const int32_t* blocks, int64_t position,
                        int64_t kv_head, const Act* queries, Act* out, float* scores, int64_t stride) {
  const int64_t dim = layer.head_dim, group = layer.heads / layer.kv_heads, width = 2 * layer.kv_heads * dim;
  const int64_t end = position + 1, first = layer.window > 0 ? std::max<int64_t>(0, end - layer.window) : 0;
  const int64_t start = first / 16 * 16;  // sixteens begin where they begin for every token
  const Act* keys = static_cast<const Act*>(tokens.cache) + kv_head * dim;
  const Act* values = keys + layer.kv_heads * dim;
  const auto row_of = [&](int64_t token) {
    return (int64_t(blocks[token / tokens.block_tokens]) * tokens.block_tokens + token % tokens.block_tokens) * width;
  };
  for (int64_t base = start; base < end; base += 16) {
    const int64_t count = std::min<int64_t>(16, end - base);
    const Act* key_rows[16];
    for (int64_t n = 0; n < 16; ++n) key_rows[n] = keys + row_of(base + std::min(n, count - 1));
    for (int64_t head = 0; head < group; ++head) {
      Vec parts[16];
      const Act* query = queries + head * dim;
      for (int n = 0; n < 16; ++n) {
        Vec sum = Vec::zero();
        for (int64_t c = 0; c < dim; c += 16) sum = fma(Vec::load(query + c), Vec::load(key_rows[n] + c), sum);
        parts[SUM_PLACE[n]] = sum;
      }
      (sums_of(parts) * Vec::all(layer.scale)).store(scores + head * stride + base - start);
    }
  }
  const int64_t length = end - start, padded = (length + 15) / 16 * 16;
  for (int64_t head = 0; head < group; ++head) {
    float* row = scores + head * stride;
    for (int64_t n = 0; n < first - start; ++n) row[n] = -INFINITY;
    for (int64_t n = length; n < padded; ++n) row[n] = -INFINITY;
    Vec top = Vec::all(-INFINITY);
    for (int64_t n = 0; n < padded; n += 16) top = larger(top, Vec::load(row + n));
    float highest = top.largest();
    if (layer.sinks != nullptr) highest = std::max(highest, layer.sinks[kv_head * group + head]);
    Vec total = Vec::zero();
    for (int64_t n = 0; n < padded; n += 16) {
      const Vec weight = exponential(Vec::load(row + n) - Vec::all(highest));
      weight.store(row + n);
    }
    // What is not seen weighs nothing, rather than the smallest number that `exponential` gives.
    for (int64_t n = 0; n < first - start; ++n) row[n] = 0.0f;
    for (int64_t n = length; n < padded; ++n) row[n] = 0.0f;
    for (int64_t n = 0; n < padded; n += 16) total = total + Vec::load(row + n);
    float sum = total.sum();
    if (layer.sinks != nullptr) sum += std::exp(layer.sinks[kv_head * group + head] - highest);
    const Vec inverse = Vec::all(1.0f / sum);
    for (int64_t n = 0; n < padded; n += 16) (Vec::load(row + n) * inverse).store(row + n);
  }
  for (int64_t head = 0; head < group; ++head) {
    const float* row = scores + head * stride;
    for (int64_t c = 0; c < dim; c += 64) {
      const int64_t parts = std::min<int64_t>(4, (dim - c) / 16);
      Vec sums[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
      for (int64_t token = first; token < end; ++token) {
        const Act* value = values + row_of(token) + c;
        const Vec weight = Vec::all(row[token - start]);
        for (int64_t part = 0; part < parts; ++part) sums[part] = fma(weight, Vec::load(value + 16 * part), sums[part]);
      }
      for (int64_t part = 0; part < parts; ++part) sums[part].store(out + head * dim + c + 16 * part);
    }
  }
}

// queries -> out, both [tokens, heads * head_dim], for the tokens named.
template <class Act>
void attend_of(const Attention& layer, const Tokens& tokens, const Queries& named, const Act* queries, Act* out,
               int threads) {
  const int64_t width = layer.heads * layer.head_dim, group_width = width / layer.kv_heads;
  const int64_t units = named.count * layer.kv_heads;
  int64_t longest = 0, seen = 0;
  for (int64_t query = 0; query < named.count; ++query) {
    longest = std::max(longest, tokens.positions[named.rows[query]] + 1);
    seen += tokens.positions[named.rows[query]] + 1;
  }
  const int64_t stride = (longest + 31) / 16 * 16;
  // A few microseconds of work are not worth waking a thread for.
  const int wanted = seen * layer.heads < 2048 ? 1 : threads;
  std::atomic<bool> enough{true};
  parallel_for(wanted, units, 1, [&](int64_t unit) {
    static thread_local Scratch score_memory;
    float* scores = nullptr;
    try {
      scores = score_memory.get<float>(stride * (layer.heads / layer.kv_heads));
    } catch (const std::bad_alloc&) {
      enough = false;
      return;
    }
    const int64_t query = unit / layer.kv_heads, kv_head = unit % layer.kv_heads;
    const int64_t row = named.rows[query];
    attend_unit(layer, tokens, named.blocks + named.tables[query], tokens.positions[row], kv_head,
                queries + row * width + kv_head * group_width, out + row * width + kv_head * group_width, scores,
                stride);
  });
  if (!enough) throw std::bad_alloc();
}

// The residual stream after attention, and its norm: hidden [tokens] and attended [tokens] at `rows` (null: all).
template <int KIND>
void finish_of(const Attention& layer, const void* attended, const void* hidden, const int64_t* rows, int64_t count,
               void* out, void* normed, int threads) {
  using Act = typename Traits<KIND>::Act;
  const int64_t width = layer.heads * layer.head_dim, panels = layer.output.columns / PANEL;
  Act* const sums = static_cast<Act*>(out);
  parallel_for(threads, panels, 1, [&](int64_t panel) {
    alignas(64) float products[TILE][PANEL];
    const Act* tiled[TILE];
    const int64_t first = panel * PANEL, columns = std::min(PANEL, layer.hidden - first);
    for (int64_t row = 0; row < count;) {
      const int taken = next_tile(count - row);
      for (int m = 0; m < taken; ++m)
        tiled[m] = static_cast<const Act*>(attended) + (rows == nullptr ? row + m : rows[row + m]) * width;
      tile<KIND>(layer.output, panel, tiled, taken, products);
      for (int m = 0; m < taken; ++m) {
        const int64_t source = rows == nullptr ? row + m : rows[row + m];
        add_of(static_cast<const Act*>(hidden) + source * layer.hidden + first, products[m], columns,
               sums + (row + m) * layer.hidden + first);
      }
      row += taken;
    }
  });
  for (int64_t row = 0; row < count; ++row)
    norm_row(sums + row * layer.hidden, static_cast<const Act*>(layer.post_norm), layer.hidden, layer.eps,
             static_cast<Act*>(normed) + row * layer.hidden);
}

inline void run_project(const Attention& layer, const Tokens& tokens, const void* hidden, void* queries,
                        int threads) {
  if (layer.kind == F32) return project_of<F32>(layer, tokens, hidden, queries, threads);
  return project_of<BF16>(layer, tokens, hidden, queries, threads);
}

inline void run_attend(const Attention& layer, const Tokens& tokens, const Queries& named, const void* queries,
                       void* out, int threads) {
  if (layer.kind == F32)
    return attend_of(layer, tokens, named, static_cast<const float*>(queries), static_cast<float*>(out), threads);
  return attend_of(layer, tokens, named, static_cast<const uint16_t*>(queries), static_cast<uint16_t*>(out), threads);
}

inline void run_finish(const Attention& layer, const void* attended, const void* hidden, const int64_t* rows,
                       int64_t count, void* out, void* normed, int threads) {
  if (layer.kind == F32) return finish_of<F32>(layer, attended, hidden, rows, count, out, normed, threads);
  return finish_of<BF16>(layer, attended, hidden, rows, count, out, normed, threads);
}

// Softmax over all experts, the `top_k` largest, largest first; of equal ones the first.
template <int KIND>
void route_of(const Matrix& gate, int64_t experts, const void* rows, int64_t count, int64_t top_k, bool renormalize,
              bool round_weights, int64_t* ids, float* weights) {
  using Act = typename Traits<KIND>::Act;
  static thread_local Scratch memory;
  float* logits = memory.get<float>(count * gate.columns);
  for (int64_t panel = 0; panel < gate.columns / PANEL; ++panel)
    panel_into<KIND>(gate, panel, static_cast<const Act*>(rows), count, logits, gate.columns);
  for (int64_t row = 0; row < count; ++row) {
    float* scores = logits + row * gate.columns;
    for (int64_t expert = 0; expert < experts; ++expert) {
      Act rounded;  // the reference computes logits in the model's dtype
      put(scores[expert], &rounded);
      scores[expert] = float_of(rounded);
    }
    for (int64_t pad = experts; pad < gate.columns; ++pad) scores[pad] = -INFINITY;
    float highest = scores[0];
    for (int64_t expert = 1; expert < experts; ++expert) highest = std::max(highest, scores[expert]);
    Vec total = Vec::zero();
    for (int64_t c = 0; c < gate.columns; c += 16) {
      exponential(Vec::load(scores + c) - Vec::all(highest)).store(scores + c);
      for (int64_t pad = std::max(c, experts); pad < c + 16; ++pad) scores[pad] = 0.0f;
      total = total + Vec::load(scores + c);
    }
    const float inverse = 1.0f / total.sum();
    float chosen_sum = 0.0f;
    for (int64_t k = 0; k < top_k; ++k) {
      int64_t best = -1;
      for (int64_t expert = 0; expert < experts; ++expert)
        if (scores[expert] >= 0.0f && (best < 0 || scores[expert] > scores[best])) best = expert;
      // With NaN nothing is greater: the first ones left stand in, so that ids stay distinct and in range.
      if (best < 0)
        for (best = 0; scores[best] == -1.0f; ++best) {
        }
      ids[row * top_k + k] = best;
      weights[row * top_k + k] = scores[best] * inverse;
      chosen_sum += scores[best] * inverse;
      scores[best] = -1.0f;
    }
    for (int64_t k = 0; k < top_k; ++k) {
      float weight = weights[row * top_k + k];
      if (renormalize) weight /= chosen_sum;
      Act rounded;
      put(weight, &rounded);
      weights[row * top_k + k] = round_weights ? float_of(rounded) : weight;
    }
  }
}

inline void run_route(Kind kind, const Matrix& gate, int64_t experts, const void* rows, int64_t count, int64_t top_k,
                      bool renormalize, bool round_weights, int64_t* ids, float* weights) {
  if (kind == F32)
    return route_of<F32>(gate, experts, rows, count, top_k, renormalize, round_weights, ids, weights);
  return route_of<BF16>(gate, experts, rows, count, top_k, renormalize, round_weights, ids, weights);
}
