// What the kernels of all instruction sets share: types, the layers they work on, memory.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

namespace pimoe {

// Weights and the activations they are multiplied with. All sums are float32.
enum Kind : int { F32 = 0, BF16 = 1, I8_F32 = 2, I8_BF16 = 3 };

// What happens between the two products of a gated expert.
enum Activation : int { SILU = 0, GELU_TANH = 1, RELU = 2, CLAMPED_SWIGLU = 3 };

constexpr int64_t PANEL = 64;  // output columns that one pass over the rows computes
constexpr int64_t HALF = PANEL / 2;
constexpr int TILE = 6;  // rows of one pass: 6 x 4 sums, 4 weights and a factor fill 32 vector registers

template <int KIND> struct Traits;
template <> struct Traits<F32> { using Act = float; static constexpr int64_t weight_bytes = 4; };
template <> struct Traits<BF16> { using Act = uint16_t; static constexpr int64_t weight_bytes = 2; };
template <> struct Traits<I8_F32> { using Act = float; static constexpr int64_t weight_bytes = 1; };
template <> struct Traits<I8_BF16> { using Act = uint16_t; static constexpr int64_t weight_bytes = 1; };

inline float float_of(uint16_t bits) {
  uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}
inline float float_of(float value) { return value; }

inline uint16_t bf16_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40);  // NaN stays one
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);  // to the nearest, ties to even
}

inline void put(float value, float* out) { *out = value; }
inline void put(float value, uint16_t* out) { *out = bf16_of(value); }

// A matrix [columns, k] in panels of PANEL columns; see `packing.py`.
struct Matrix {
  const uint8_t* weights;
  const float* scales;  // of every column, for int8; else null
  const float* bias;    // of every column, or null
  int64_t columns;      // padded to whole panels
  int64_t k;
};

struct Experts {
  Kind kind;
  Activation activation;
  float alpha, limit;
  int64_t experts, hidden, inner;  // inner: padded to whole half panels
  Matrix gate_up, down;            // of the first expert; those of the others follow
};

// The (row, expert) pairs of one dispatch.
struct Dispatch {
  const void* hidden;      // [rows, hidden] of the kind's activations
  const int32_t* offsets;  // [rows + 1]
  const int32_t* experts;  // [pairs]
  const float* weights;    // [pairs]
  float* out;              // [rows, hidden], overwritten
  int64_t rows, pairs;
};

// One layer's grouped-query attention with what lies around it.
struct Attention {
  Kind kind;
  int64_t hidden, heads, kv_heads, head_dim;
  float eps, scale;
  float clip;              // of queries, keys and values; infinity: none
  int64_t window;          // tokens that a token sees, itself included; 0: all
  int qk_norm;             // 0: none; 1: of every head; 2: of all queries and of all keys
  const void* input_norm;  // [hidden], like the other scales in the kind's activations
  const void* qk_scale;    // [heads + kv_heads, head_dim]
  const void* post_norm;   // [hidden]
  const float* sinks;      // [heads], or null
  Matrix qkv, output;
};

// New tokens of one forward, and where the paged cache keeps them and what came before.
struct Tokens {
  int64_t count;
  const int64_t* positions;   // [count]
  const int64_t* cache_rows;  // [count] block times block_tokens plus place
  const float* rotary;        // [positions, 2, head_dim] cosine and signed sine
  void* cache;                // [blocks * block_tokens, 2 * kv_heads * head_dim] keys before values
  int64_t block_tokens;
};

// Which tokens attend natively, and through which blocks.
struct Queries {
  int64_t count;
  const int32_t* rows;    // [count] of the batch
  const int32_t* tables;  // [count] where in `blocks` each one's begin
  const int32_t* blocks;
};

// Memory of a thread that grows to what it was asked for at most, so that nothing is allocated in the steady state.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }
  // Throws std::bad_alloc.
  template <class T> T* get(int64_t count) {
    size_t bytes = (size_t(count) * sizeof(T) + 127) & ~size_t(63);
    if (bytes > size_) {
      std::free(memory_);
      size_ = 0;
      memory_ = std::aligned_alloc(64, bytes);
      if (memory_ == nullptr) throw std::bad_alloc();
      size_ = bytes;
    }
    return static_cast<T*>(memory_);
  }

 private:
  void* memory_ = nullptr;
  size_t size_ = 0;
};

inline const Matrix of_expert(const Matrix& first, int64_t expert, int64_t weight_bytes) {
  Matrix matrix = first;
  matrix.weights += expert * first.columns * first.k * weight_bytes;
  if (matrix.scales != nullptr) matrix.scales += expert * first.columns;
  if (matrix.bias != nullptr) matrix.bias += expert * first.columns;
  return matrix;
}

}  // namespace pimoe
