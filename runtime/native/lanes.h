// Lanes: Unix sockets over which a router's thread and a group's thread pass dispatches, with no interpreter between
// them. A lane carries one dispatch at a time. Both ends are processes on one machine that trust each other already
// (see `lanes.py`); lengths are checked all the same before anything is allocated.
#pragma once

#include <errno.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "common.h"

namespace pimoe {

using ExpertsKernel = void (*)(const Experts&, const Dispatch&, int);

constexpr uint32_t LANE_MAGIC = 0x50694d31;
constexpr int64_t LANE_MAX_BYTES = 64 << 20;
constexpr uint32_t LANE_MAX_COUNT = 1 << 20;  // of rows, pairs and numbers in a row: no product of these overflows
constexpr int LANE_MAX_GROUPS = 256;

enum LaneStatus : uint32_t { LANE_DONE = 0, LANE_REFUSED = 1, LANE_LATE = 2 };

struct LaneRequest {
  uint32_t magic, number_bytes;  // of an activation
  uint32_t layer, rows, hidden, pairs;
  uint64_t remaining_ns, sequence;
};

struct LaneAnswer {
  uint32_t magic, status;
  uint64_t computed_ns, sequence, sums_bytes;
};

// What a group's lanes count together, and what they are told; shared with Python.
struct LaneControl {
  int64_t batches, rows, pairs, busy_ns, threads;
};

inline uint64_t now_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return uint64_t(now.tv_sec) * 1000000000u + uint64_t(now.tv_nsec);
}

inline int64_t padded_to_64(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Where the parts of a request's body lie.
struct LaneBody {
  int64_t experts_at, weights_at, hidden_at, bytes;
  LaneBody(int64_t rows, int64_t pairs, int64_t hidden, int64_t number_bytes)
      : experts_at(4 * (rows + 1)),
        weights_at(experts_at + 4 * pairs),
        hidden_at(padded_to_64(weights_at + 4 * pairs)),
        bytes(hidden_at + rows * hidden * number_bytes) {}
};

inline bool receive_all(int socket, void* into, int64_t bytes) {
  auto* at = static_cast<char*>(into);
  while (bytes > 0) {
    const ssize_t got = recv(socket, at, size_t(bytes), 0);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    at += got;
    bytes -= got;
  }
  return true;
}

inline bool send_all(int socket, const void* from, int64_t bytes) {
  const auto* at = static_cast<const char*>(from);
  while (bytes > 0) {
    const ssize_t sent = send(socket, at, size_t(bytes), MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent <= 0) return false;
    at += sent;
    bytes -= sent;
  }
  return true;
}

inline bool pairs_fit(const Experts& layer, const Dispatch& work) {
  if (work.rows < 1 || work.offsets[0] != 0 || work.offsets[work.rows] != work.pairs) return false;
  for (int64_t row = 0; row < work.rows; ++row)
    if (work.offsets[row + 1] < work.offsets[row]) return false;
  for (int64_t pair = 0; pair < work.pairs; ++pair)
    if (work.experts[pair] < 0 || work.experts[pair] >= layer.experts) return false;
  return true;
}

// Whether a request is one, of lengths that may be worked with. Before anything is computed from them.
inline bool is_request(const LaneRequest& asked) {
  return asked.magic == LANE_MAGIC && (asked.number_bytes == 2 || asked.number_bytes == 4) && asked.rows >= 1 &&
         asked.rows <= LANE_MAX_COUNT && asked.pairs <= LANE_MAX_COUNT && asked.hidden <= LANE_MAX_COUNT;
}

// Answers dispatches on a blocking socket until it ends or talks nonsense. `layers[n]`: the experts of layer n, or null.
inline void serve_lane(int socket, const Experts* const* layers, int64_t layer_count, LaneControl* control,
                       ExpertsKernel kernel) {
  Scratch received, answered;
  LaneRequest asked;
  while (receive_all(socket, &asked, sizeof asked)) {
    if (!is_request(asked)) return;
    const uint64_t started = now_ns();
    const Experts* layer = asked.layer < layer_count ? layers[asked.layer] : nullptr;
    const LaneBody body(asked.rows, asked.pairs, asked.hidden, asked.number_bytes);
    if (body.bytes > LANE_MAX_BYTES) return;
    auto* bytes = received.get<char>(body.bytes);
    if (!receive_all(socket, bytes, body.bytes)) return;
    const int64_t sums_bytes = int64_t(asked.rows) * asked.hidden * 4;
    auto* reply = answered.get<char>(int64_t(sizeof(LaneAnswer)) + sums_bytes);
    LaneAnswer answer{LANE_MAGIC, LANE_REFUSED, 0, asked.sequence, 0};
    const Dispatch work{bytes + body.hidden_at,
                        reinterpret_cast<const int32_t*>(bytes),
                        reinterpret_cast<const int32_t*>(bytes + body.experts_at),
                        reinterpret_cast<const float*>(bytes + body.weights_at),
                        reinterpret_cast<float*>(reply + sizeof(LaneAnswer)),
                        asked.rows,
                        asked.pairs};
    const bool halves = layer != nullptr && (layer->kind == BF16 || layer->kind == I8_BF16);
    const bool fits = layer != nullptr && layer->hidden == asked.hidden && asked.number_bytes == (halves ? 2u : 4u) &&
                      pairs_fit(*layer, work);
    if (fits && now_ns() - started > asked.remaining_ns) {
      answer.status = LANE_LATE;
    } else if (fits) {
      kernel(*layer, work, int(__atomic_load_n(&control->threads, __ATOMIC_RELAXED)));
      answer.status = LANE_DONE;
      answer.computed_ns = now_ns() - started;
      answer.sums_bytes = uint64_t(sums_bytes);
      __atomic_fetch_add(&control->batches, 1, __ATOMIC_RELAXED);
      __atomic_fetch_add(&control->rows, int64_t(asked.rows), __ATOMIC_RELAXED);
      __atomic_fetch_add(&control->pairs, int64_t(asked.pairs), __ATOMIC_RELAXED);
      __atomic_fetch_add(&control->busy_ns, int64_t(answer.computed_ns), __ATOMIC_RELAXED);
    }
    std::memcpy(reply, &answer, sizeof answer);
    if (!send_all(socket, reply, int64_t(sizeof answer) + int64_t(answer.sums_bytes))) return;
  }
}

// A layer's tokens and where they go, on the router's side.
struct LaneWork {
  const int* sockets;        // of every group, not blocking; -1: none
  int64_t groups;
  const int16_t* group_of;   // [all experts]
  const int32_t* local_of;   // [all experts]
  int64_t experts;           // how many there are
  int64_t layer, tokens, top_k, hidden, number_bytes;
  const int64_t* expert_ids;  // [tokens, top_k]
  const float* weights;       // [tokens, top_k]
  const char* states;         // [tokens, hidden]
  float* out;                 // [tokens, hidden], overwritten
  uint64_t timeout_ns, sequence;
  int64_t* expert_pairs;      // [all experts], counted up
  int64_t* group_rows;        // [groups], counted up
  int64_t* computed_ns;       // [groups], counted up
};

struct LaneShare {
  int64_t rows = 0, pairs = 0, sent = 0, received = 0, request_bytes = 0;
  char* request = nullptr;   // header and body
  char* answer = nullptr;    // header and sums
  int32_t* tokens = nullptr; // of every row
  bool done = false, failed = false;
};

// Sends all groups their shares, waits for all sums and adds them up in the order of groups. Returns how many tokens
// the most loaded expert had; or -1 - g when group g failed or was late, and nothing is to be read from `out`; or 0 for
// an id that no expert has.
inline int64_t dispatch_on_lanes(const LaneWork& work) {
  static thread_local Scratch memory;
  if (work.groups > LANE_MAX_GROUPS) return -1;
  LaneShare shares[LANE_MAX_GROUPS];
  const int64_t pairs = work.tokens * work.top_k, row_bytes = work.hidden * work.number_bytes;
  for (int64_t pair = 0; pair < pairs; ++pair)
    if (work.expert_ids[pair] < 0 || work.expert_ids[pair] >= work.experts) return 0;
  for (int64_t token = 0; token < work.tokens; ++token) {
    for (int64_t k = 0; k < work.top_k; ++k) ++shares[work.group_of[work.expert_ids[token * work.top_k + k]]].pairs;
  }
  for (int64_t token = 0; token < work.tokens; ++token) {
    for (int64_t k = 0; k < work.top_k; ++k) {
      LaneShare& share = shares[work.group_of[work.expert_ids[token * work.top_k + k]]];
      if (share.received != token + 1) ++share.rows, share.received = token + 1;  // `received`: last token seen
    }
  }
  int64_t total = 0;
  for (int64_t group = 0; group < work.groups; ++group) {
    LaneShare& share = shares[group];
    if (share.pairs == 0) continue;
    const LaneBody body(share.rows, share.pairs, work.hidden, work.number_bytes);
    share.request_bytes = int64_t(sizeof(LaneRequest)) + body.bytes;
    total += padded_to_64(share.request_bytes) + padded_to_64(4 * share.rows) +
             padded_to_64(int64_t(sizeof(LaneAnswer)) + 4 * share.rows * work.hidden);
  }
  char* at = memory.get<char>(total);
  for (int64_t group = 0; group < work.groups; ++group) {
    LaneShare& share = shares[group];
    share.done = share.pairs == 0;
    if (share.done) continue;
    if (work.sockets[group] < 0) return -1 - group;
    share.request = at;
    at += padded_to_64(share.request_bytes);
    share.tokens = reinterpret_cast<int32_t*>(at);
    at += padded_to_64(4 * share.rows);
    share.answer = at;
    at += padded_to_64(int64_t(sizeof(LaneAnswer)) + 4 * share.rows * work.hidden);
    const LaneRequest header{LANE_MAGIC, uint32_t(work.number_bytes), uint32_t(work.layer), uint32_t(share.rows),
                             uint32_t(work.hidden), uint32_t(share.pairs), work.timeout_ns, work.sequence};
    std::memcpy(share.request, &header, sizeof header);
    share.rows = share.pairs = share.received = 0;
  }
  for (int64_t token = 0; token < work.tokens; ++token) {
    for (int64_t k = 0; k < work.top_k; ++k) {
      const int64_t expert = work.expert_ids[token * work.top_k + k];
      LaneShare& share = shares[work.group_of[expert]];
      LaneRequest header;
      std::memcpy(&header, share.request, sizeof header);
      const LaneBody body(header.rows, header.pairs, work.hidden, work.number_bytes);
      char* start = share.request + sizeof(LaneRequest);
      auto* offsets = reinterpret_cast<int32_t*>(start);
      if (share.received != token + 1) {
        share.received = token + 1;
        offsets[share.rows] = int32_t(share.pairs);
        share.tokens[share.rows] = int32_t(token);
        std::memcpy(start + body.hidden_at + share.rows * row_bytes, work.states + token * row_bytes, size_t(row_bytes));
        ++share.rows;
        offsets[share.rows] = int32_t(header.pairs);
      }
      reinterpret_cast<int32_t*>(start + body.experts_at)[share.pairs] = work.local_of[expert];
      reinterpret_cast<float*>(start + body.weights_at)[share.pairs] = work.weights[token * work.top_k + k];
      ++share.pairs;
    }
  }
  for (int64_t group = 0; group < work.groups; ++group) shares[group].received = 0;
  const uint64_t until = now_ns() + work.timeout_ns;
  while (true) {
    pollfd waiting[LANE_MAX_GROUPS];
    int64_t group_at[LANE_MAX_GROUPS];
    nfds_t count = 0;
    for (int64_t group = 0; group < work.groups; ++group) {
      LaneShare& share = shares[group];
      if (share.done) continue;
      const int socket = work.sockets[group];
      while (share.sent < share.request_bytes) {
        const ssize_t sent =
            send(socket, share.request + share.sent, size_t(share.request_bytes - share.sent), MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR) continue;
        if (sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) break;
        if (sent <= 0) return -1 - group;
        share.sent += sent;
      }
      const int64_t wanted = int64_t(sizeof(LaneAnswer)) + 4 * share.rows * work.hidden;
      while (share.sent == share.request_bytes && share.received < wanted) {
        const ssize_t got = recv(socket, share.answer + share.received, size_t(wanted - share.received), 0);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) break;
        if (got <= 0) return -1 - group;
        share.received += got;
        if (share.received < int64_t(sizeof(LaneAnswer))) continue;
        LaneAnswer answer;
        std::memcpy(&answer, share.answer, sizeof answer);
        if (answer.magic != LANE_MAGIC || answer.sequence != work.sequence || answer.status != LANE_DONE ||
            int64_t(answer.sums_bytes) != wanted - int64_t(sizeof(LaneAnswer)))
          return -1 - group;
        if (share.received == wanted) {
          share.done = true;
          work.computed_ns[group] += int64_t(answer.computed_ns);
        }
      }
      if (share.done) continue;
      waiting[count] = {socket, short(share.sent < share.request_bytes ? POLLOUT : POLLIN), 0};
      group_at[count++] = group;
    }
    if (count == 0) break;
    const uint64_t now = now_ns();
    if (now >= until) return -1 - group_at[0];
    const int ready = poll(waiting, count, int(std::min<uint64_t>((until - now) / 1000000u + 1, 60000u)));
    if (ready < 0 && errno != EINTR) return -1 - group_at[0];
  }
  std::memset(work.out, 0, sizeof(float) * size_t(work.tokens * work.hidden));
  for (int64_t group = 0; group < work.groups; ++group) {
    const LaneShare& share = shares[group];
    work.group_rows[group] += share.rows;
    const auto* sums = reinterpret_cast<const float*>(share.answer + sizeof(LaneAnswer));
    for (int64_t row = 0; row < share.rows; ++row) {
      float* target = work.out + share.tokens[row] * work.hidden;
      for (int64_t c = 0; c < work.hidden; ++c) target[c] += sums[row * work.hidden + c];
    }
  }
  int64_t largest = 0;
  int64_t* counts = memory.get<int64_t>(pairs);
  for (int64_t pair = 0; pair < pairs; ++pair) counts[pair] = work.expert_ids[pair], ++work.expert_pairs[work.expert_ids[pair]];
  std::sort(counts, counts + pairs);
  for (int64_t first = 0, pair = 0; pair < pairs; ++pair) {
    if (counts[pair] != counts[first]) first = pair;
    largest = std::max(largest, pair - first + 1);
  }
  return largest;
}

}  // namespace pimoe
