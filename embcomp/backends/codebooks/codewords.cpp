// Codes of ids, and the codewords that vectors chose: one pass where torch makes one for each operation.
//
// Sums are made in the order of the vectors, so that they depend on nothing else.

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

// The codes of one look-up: code `start + step * id` of a packed stream, for each of its ids.
struct Codes {
  const int64_t* ids;
  int64_t* rows;       // receives `first + code`
  int64_t count, start, step, first;
};

constexpr int64_t kAhead = 16;

// A code within the bytes that are there; those behind the last stand for zeros.
inline int64_t code_at(const uint8_t* packed, int64_t bytes, int64_t bits, int64_t index) {
  const int64_t begin = index * bits;
  const int64_t byte = begin >> 3;
  uint64_t word = 0;
  std::memcpy(&word, packed + byte, size_t(std::clamp<int64_t>(bytes - byte, 0, 8)));
  return int64_t(word >> (begin & 7) & ((uint64_t(1) << bits) - 1));
}

}  // namespace

extern "C" {

void embcomp_gather_codes(const uint8_t* packed, int64_t bytes, int64_t bits, const Codes* all,
                          int64_t count, int32_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic)
  for (int64_t n = 0; n < count; ++n) {
    const Codes c = all[n];
    if (bits == 8) {
      const uint8_t* own = packed + c.start;
      for (int64_t i = 0; i < c.count; ++i) {
        if (i + kAhead < c.count) __builtin_prefetch(own + c.step * c.ids[i + kAhead]);
        c.rows[i] = c.first + own[c.step * c.ids[i]];
      }
    } else {
      for (int64_t i = 0; i < c.count; ++i)
        c.rows[i] = c.first + code_at(packed, bytes, bits, c.start + c.step * c.ids[i]);
    }
  }
}

int64_t embcomp_codes_bytes() { return sizeof(Codes); }

// Writes the words (., width) that vectors (count, width) chose, and their squared distances (count,).
void embcomp_snap(const float* vectors, const int64_t* slots, const float* words, int64_t count,
                  int64_t width, float* found, float* gaps) {
  for (int64_t n = 0; n < count; ++n) {
    const float* vector = vectors + n * width;
    const float* word = words + slots[n] * width;
    float* to = found + n * width;
    float gap = 0.0f;
    for (int64_t j = 0; j < width; ++j) {
      const float away = vector[j] - word[j];
      gap += away * away;
      to[j] = word[j];
    }
    gaps[n] = gap;
  }
}

// Adds vectors to what is known of the words that they chose, (., width + 2): how many there were, their
// sum, their squared distances. Those that are not `chosen`, where that is given, do not count.
void embcomp_total(const float* vectors, const int64_t* slots, const float* gaps,
                   const uint8_t* chosen, int64_t count, int64_t width, float* totals) {
  for (int64_t n = 0; n < count; ++n) {
    if (chosen && !chosen[n]) continue;
    const float* vector = vectors + n * width;
    float* total = totals + slots[n] * (width + 2);
    total[0] += 1.0f;
    for (int64_t j = 0; j < width; ++j) total[1 + j] += vector[j];
    total[1 + width] += gaps[n];
  }
}
}
