// Compressed look-ups of many features in one call: ids in, embeddings out.
//
// The tables of steps and features are made by `program.py`, whose field order is the one here. Samples
// are taken in tiles, feature after feature. Codes and bitmaps of a tile are asked for some tiles before rows
// are found, and rows some tiles before they are read, so that the waits for memory overlap. A thread keeps
// its scratch memory between calls, and no other state is written.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

enum Kind : int32_t {
  kIdentity, kHashed, kQuotient, kRemainder, kRanked, kCode, kWithin, kHashedBeyond
};
enum RowType : int32_t { kFp32, kFp16, kInt8, kInt4 };
enum How : int32_t { kSet, kAdd, kMultiply };

struct Step {
  const uint8_t* rows;       // of the physical table
  const uint8_t* state;      // codes, or the words of a bitmap
  const int32_t* counts;     // kept ids before each block of a bitmap
  const int32_t* columns;    // where each column of the row goes; null: side by side
  const float* projection;   // (width, out_width); null: none
  int64_t row_bytes, num_rows;
  int64_t a, b, c, d;        // of the kind
  int32_t kind, row_type, how, into, width, out_width;
  int32_t from;              // first column of the row that is used
  int32_t joined;            // whether its row is summed with that of the step before
  int32_t asked;             // bytes of a row that are asked for ahead; 0 where the table is in a cache
  int32_t last;              // its last byte, where rows begin anywhere in a cache line; else 0
};

struct Feature {
  int64_t limit;             // ids are in [0, limit); negative: any id
  int64_t out;               // first column of the output
  int32_t source, first, count, dim;
  int32_t mean, zero;        // whether bags are averaged; whether the steps leave columns unset
  float scale;
  int32_t linear;            // whether rows of a bag may be summed before they make an embedding
  int32_t plain;             // whether every step writes columns of its own, side by side
  int32_t coded;             // whether moreover every step is a code that names a row there is
};

constexpr int64_t kTile = 64;        // samples of a feature that are taken together
constexpr int64_t kInFlight = 256;   // rows that are asked for before the first of them is read
constexpr int64_t kMostAhead = 64;   // tiles of features that lie between asking and reading
constexpr int64_t kTask = 4096;      // steps that are worth a thread of their own, which may have to wake
constexpr int64_t kLine = 64;
constexpr int64_t kSkipped = -1;
constexpr int64_t kBad = -2;

inline uint64_t splitmix(uint64_t z) {
  z += 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

// n / divisor for n in [0, 2**63), where magic is (2**64 - 1) / divisor: a division takes far longer.
inline uint64_t quotient(uint64_t n, uint64_t divisor, uint64_t magic) {
  uint64_t q = uint64_t((unsigned __int128)(n) * magic >> 64);
  uint64_t rest = n - q * divisor;
  while (rest >= divisor) rest -= divisor, ++q;
  return q;
}

inline void copy(float* to, const float* from, int32_t width) {
  int32_t i = 0;
  for (; i + 8 <= width; i += 8) std::memcpy(to + i, from + i, 32);
  for (; i + 4 <= width; i += 4) std::memcpy(to + i, from + i, 16);
  for (; i < width; ++i) to[i] = from[i];
}

inline int64_t code_at(const Step& s, int64_t index) {
  const int64_t bits = s.d;
  if (bits == 8) return s.state[index];
  const int64_t start = index * bits;
  const uint8_t* byte = s.state + (start >> 3);
  const int64_t shift = start & 7;
  uint64_t word = byte[0];
  if (shift + bits > 8) word |= uint64_t(byte[1]) << 8;
  if (shift + bits > 16) word |= uint64_t(byte[2]) << 16;
  if (shift + bits > 24) word |= uint64_t(byte[3]) << 24;
  if (shift + bits > 32) word |= uint64_t(byte[4]) << 32;
  return int64_t((word >> shift) & ((1ull << bits) - 1));
}

inline int64_t hashed(const Step& s, int64_t id) {
  const uint64_t hash = splitmix(uint64_t(id ^ s.a)) & 0x7FFFFFFFFFFFFFFFull;
  return int64_t(hash - quotient(hash, uint64_t(s.b), uint64_t(s.c)) * uint64_t(s.b));
}

// The row of an id, kSkipped where it has none.
inline int64_t row_of(const Step& s, int64_t id) {
  switch (s.kind) {
    case kIdentity:
      return id;
    case kHashed:
      return hashed(s, id);
    case kQuotient:
      return int64_t(quotient(uint64_t(id), uint64_t(s.a), uint64_t(s.c)));
    case kRemainder:
      return id - int64_t(quotient(uint64_t(id), uint64_t(s.a), uint64_t(s.c))) * s.a + s.b;
    case kRanked: {
      const int64_t block = (id >> 8) + s.a;
      const int64_t in_block = (id >> 6) & 3;
      const uint64_t* words = reinterpret_cast<const uint64_t*>(s.state) + 4 * block;
      const uint64_t bit = 1ull << (id & 63);
      if (!(words[in_block] & bit)) return s.b;
      int64_t rank = s.counts[block] + __builtin_popcountll(words[in_block] & (bit - 1));
      for (int64_t w = 0; w < in_block; ++w) rank += __builtin_popcountll(words[w]);
      return rank;
    }
    case kCode:
      return code_at(s, id * s.a + s.b) + s.c;
    case kWithin:
      return id >= s.a && id < s.b ? id - s.a : kSkipped;
    case kHashedBeyond:
      return id >= 0 && id < s.d ? kSkipped : s.d + hashed(s, id);
  }
  return kBad;
}

inline void ask_for_state(const Step& s, int64_t id) {
  if (s.kind == kCode) {
    __builtin_prefetch(s.state + (((id * s.a + s.b) * s.d) >> 3));
  } else if (s.kind == kRanked) {
    const int64_t block = (id >> 8) + s.a;
    __builtin_prefetch(s.state + 32 * block);
    __builtin_prefetch(s.counts + block);
  }
}

inline float half(uint16_t bits) {
#if defined(__F16C__)
  return _cvtsh_ss(bits);
#else
  const uint32_t sign = uint32_t(bits & 0x8000) << 16;
  uint32_t exponent = (bits >> 10) & 31, fraction = bits & 1023, word;
  if (exponent == 31) {
    word = sign | 0x7F800000 | (fraction << 13);
  } else if (exponent) {
    word = sign | ((exponent + 112) << 23) | (fraction << 13);
  } else if (!fraction) {
    word = sign;
  } else {
    exponent = 113;
    while (!(fraction & 1024)) fraction <<= 1, --exponent;
    word = sign | (exponent << 23) | ((fraction & 1023) << 13);
  }
  float value;
  std::memcpy(&value, &word, 4);
  return value;
#endif
}

inline void widen_halves(float* to, const uint16_t* halves, int32_t width) {
  int32_t i = 0;
#if defined(__F16C__) && defined(__AVX__)
  for (; i + 8 <= width; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(halves + i))));
  for (; i + 4 <= width; i += 4)
    _mm_storeu_ps(to + i, _mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)(halves + i))));
#endif
  for (; i < width; ++i) to[i] = half(halves[i]);
}

inline void widen_bytes(float* to, const uint8_t* codes, int32_t width, float scale, float bias) {
  int32_t i = 0;
#if defined(__AVX2__)
  const __m256 scales = _mm256_set1_ps(scale), biases = _mm256_set1_ps(bias);
  for (; i + 8 <= width; i += 8) {
    const __m256i eight = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(codes + i)));
    const __m256 product = _mm256_mul_ps(_mm256_cvtepi32_ps(eight), scales);
    _mm256_storeu_ps(to + i, _mm256_add_ps(product, biases));
  }
#endif
  for (; i < width; ++i) {
    const float product = float(codes[i]) * scale;
    to[i] = product + bias;
  }
}

// Writes `width` columns of a stored row, those from `from` on, as floats.
inline void restore_columns(int32_t row_type, const uint8_t* row, int32_t from, int32_t width,
                            float* to) {
  if (row_type == kFp32) {
    copy(to, reinterpret_cast<const float*>(row) + from, width);
  } else if (row_type == kFp16) {
    widen_halves(to, reinterpret_cast<const uint16_t*>(row) + from, width);
  } else {
    uint16_t head[2];
    std::memcpy(head, row, 4);
    const float scale = half(head[0]), bias = half(head[1]);
    if (row_type == kInt8) {
      widen_bytes(to, row + 4 + from, width, scale, bias);
    } else {
      for (int32_t i = 0; i < width; ++i) {
        const int32_t at = from + i;
        const float product = float((row[4 + (at >> 1)] >> (4 * (at & 1))) & 15) * scale;
        to[i] = product + bias;
      }
    }
  }
}

// Writes the used columns of a stored row as floats.
inline void restore(const Step& s, const uint8_t* row, float* to) {
  restore_columns(s.row_type, row, s.from, s.width, to);
}

// The same where it can be used as it lies: nothing is copied then.
inline const float* restored(const Step& s, const uint8_t* row, float* scratch) {
  if (s.row_type == kFp32) return reinterpret_cast<const float*>(row) + s.from;
  restore(s, row, scratch);
  return scratch;
}

inline void place(const Step& s, const float* row, float* out, float* projected) {
  if (s.projection) {
    for (int32_t j = 0; j < s.out_width; ++j) projected[j] = 0.0f;
    for (int32_t i = 0; i < s.width; ++i) {
      const float* weights = s.projection + int64_t(i) * s.out_width;
      for (int32_t j = 0; j < s.out_width; ++j) projected[j] += row[i] * weights[j];
    }
    row = projected;
  }
  const int32_t width = s.projection ? s.out_width : s.width;
  float* to = out + s.into;
  if (s.columns) {
    for (int32_t i = 0; i < width; ++i) out[s.columns[i]] += row[i];
  } else if (s.how == kSet) {
    copy(to, row, width);
  } else if (s.how == kAdd) {
    for (int32_t i = 0; i < width; ++i) to[i] += row[i];
  } else {
    for (int32_t i = 0; i < width; ++i) to[i] *= row[i];
  }
}

inline float multiply_add(float a, float b, float c) {
#if defined(__FMA__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

struct Program {
  const Feature* features;
  const Step* steps;
  const int64_t* places;           // by source, its place among the keys of a batch
  int64_t num_features, num_steps, num_sources, widest, stride;
};

struct Call {
  const Program& program;
  const int64_t* values;           // key after key
  const int64_t* offsets;          // (keys * batch + 1,); null: bags of one
  const float* weights;            // as values; null: none
  int64_t batch;
  float* out;
};

struct Scratch {
  std::vector<const uint8_t*> rows;  // of the tiles in flight, step after step
  std::vector<int32_t> samples;      // as rows: whose they are, where some have none
  std::vector<int64_t> counts;       // of the tiles in flight, by step: how many rows there are
  std::vector<float> row, projected, embedding;

  void fit(int64_t pointers, int64_t steps, int64_t width) {
    if (int64_t(rows.size()) < pointers) rows.resize(size_t(pointers)), samples.resize(size_t(pointers));
    if (int64_t(counts.size()) < steps) counts.resize(size_t(steps));
    if (int64_t(row.size()) < width)
      row.resize(size_t(width)), projected.resize(size_t(width)), embedding.resize(size_t(width));
  }
};

inline const uint8_t* address(const Step& s, int64_t id, bool* bad) {
  const int64_t row = row_of(s, id);
  if (row == kSkipped) return nullptr;
  if (row < 0 || row >= s.num_rows) {
    *bad = true;
    return nullptr;
  }
  const uint8_t* at = s.rows + row * s.row_bytes;
  for (int64_t line = 0; line < s.asked; line += kLine) __builtin_prefetch(at + line);
  if (s.last) __builtin_prefetch(at + s.last);
  return at;
}

// The addresses of the rows of some ids, null where an id has none; the kind is fixed, so that nothing is
// asked in the loop. Returns how many there are, -1 where one is out of range.
template <Kind kind>
int64_t find_all(Step s, const int64_t* ids, int64_t size, const uint8_t** rows) {
  s.kind = kind;
  bool bad = false;
  for (int64_t i = 0; i < size; ++i) rows[i] = address(s, ids[i], &bad);
  return bad ? -1 : size;
}

// The same of those that have one, and whose they are.
template <Kind kind>
int64_t find_some(Step s, const int64_t* ids, int64_t size, const uint8_t** rows, int32_t* samples) {
  s.kind = kind;
  bool bad = false;
  int64_t found = 0;
  for (int64_t i = 0; i < size; ++i) {
    const uint8_t* at = address(s, ids[i], &bad);
    if (!at) continue;
    rows[found] = at;
    samples[found++] = int32_t(i);
  }
  return bad ? -1 : found;
}

inline bool skips(const Step& s) { return s.kind == kWithin || s.kind == kHashedBeyond; }

int64_t find_rows(const Step& s, const int64_t* ids, int64_t size, const uint8_t** rows,
                  int32_t* samples) {
  switch (s.kind) {
    case kIdentity: return find_all<kIdentity>(s, ids, size, rows);
    case kHashed: return find_all<kHashed>(s, ids, size, rows);
    case kQuotient: return find_all<kQuotient>(s, ids, size, rows);
    case kRemainder: return find_all<kRemainder>(s, ids, size, rows);
    case kRanked: return find_all<kRanked>(s, ids, size, rows);
    case kCode: return find_all<kCode>(s, ids, size, rows);
    case kWithin:
      return samples ? find_some<kWithin>(s, ids, size, rows, samples)
                     : find_all<kWithin>(s, ids, size, rows);
    case kHashedBeyond:
      return samples ? find_some<kHashedBeyond>(s, ids, size, rows, samples)
                     : find_all<kHashedBeyond>(s, ids, size, rows);
  }
  return -1;
}

#if defined(__AVX2__)

// Eight columns of a stored row at a time, as floats; what is the row's alone is read once.
template <RowType type>
struct Reader {
  const uint8_t* row;
  int32_t from;
  __m256 scale, bias;

  Reader(const Step& s, const uint8_t* at) : row(at), from(s.from) {
    if (type == kInt8 || type == kInt4) {
      int32_t head;
      std::memcpy(&head, at, 4);
      const __m128 both = _mm_cvtph_ps(_mm_cvtsi32_si128(head));
      scale = _mm256_broadcastss_ps(both);
      bias = _mm256_broadcastss_ps(_mm_movehdup_ps(both));
      row += 4;
    }
  }

  inline __m256 eight(int32_t i) const {
    const int32_t at = from + i;
    if (type == kFp32) return _mm256_loadu_ps(reinterpret_cast<const float*>(row) + at);
    if (type == kFp16)
      return _mm256_cvtph_ps(_mm_loadu_si128(
          reinterpret_cast<const __m128i*>(reinterpret_cast<const uint16_t*>(row) + at)));
    __m256i codes;
    if (type == kInt8) {
      codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(row + at)));
    } else {
      int32_t word;
      std::memcpy(&word, row + (at >> 1), 4);
      codes = _mm256_srlv_epi32(_mm256_set1_epi32(word),
                                _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
      codes = _mm256_and_si256(codes, _mm256_set1_epi32(15));
    }
    return _mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(codes), scale), bias);
  }

  inline __m128 four(int32_t i) const {
    const int32_t at = from + i;
    if (type == kFp32) return _mm_loadu_ps(reinterpret_cast<const float*>(row) + at);
    if (type == kFp16)
      return _mm_cvtph_ps(_mm_loadl_epi64(
          reinterpret_cast<const __m128i*>(reinterpret_cast<const uint16_t*>(row) + at)));
    __m128i codes;
    if (type == kInt8) {
      int32_t word;
      std::memcpy(&word, row + at, 4);
      codes = _mm_cvtepu8_epi32(_mm_cvtsi32_si128(word));
    } else {
      uint16_t word;
      std::memcpy(&word, row + (at >> 1), 2);
      codes = _mm_srlv_epi32(_mm_set1_epi32(word), _mm_setr_epi32(0, 4, 8, 12));
      codes = _mm_and_si128(codes, _mm_set1_epi32(15));
    }
    return _mm_add_ps(_mm_mul_ps(_mm_cvtepi32_ps(codes), _mm256_castps256_ps128(scale)),
                      _mm256_castps256_ps128(bias));
  }

  // Writes two columns of a row that has no scale.
  inline void two(float* to) const {
    if (type == kFp32) return void(std::memcpy(to, reinterpret_cast<const float*>(row) + from, 8));
    int32_t halves;
    std::memcpy(&halves, reinterpret_cast<const uint16_t*>(row) + from, 4);
    _mm_storel_pi(reinterpret_cast<__m64*>(to), _mm_cvtph_ps(_mm_cvtsi32_si128(halves)));
  }
};

struct Found {
  const uint8_t* const* rows;
  const int32_t* samples;          // whose they are; null: one for each sample
  int64_t count;
};

template <How how>
inline void put(float* to, __m256 came) {
  if (how == kAdd) came = _mm256_add_ps(_mm256_loadu_ps(to), came);
  if (how == kMultiply) came = _mm256_mul_ps(_mm256_loadu_ps(to), came);
  _mm256_storeu_ps(to, came);
}

template <How how>
inline void put(float* to, __m128 came) {
  if (how == kAdd) came = _mm_add_ps(_mm_loadu_ps(to), came);
  if (how == kMultiply) came = _mm_mul_ps(_mm_loadu_ps(to), came);
  _mm_storeu_ps(to, came);
}

// One step of a feature for some samples; its width is fixed where it is a usual one.
template <RowType type, How how, int32_t fixed>
void emit_rows(const Step& s, const Found& found, float* out, int64_t stride) {
  const int32_t width = fixed ? fixed : s.width;
  for (int64_t i = 0; i < found.count; ++i) {
    const uint8_t* at = found.rows[i];
    const Reader<type> reader(s, at);
    float* to = out + (found.samples ? found.samples[i] : i) * stride;
    if (fixed == 2) {
      reader.two(to);
      continue;
    }
    int32_t j = 0;
    for (; j + 8 <= width; j += 8) put<how>(to + j, reader.eight(j));
    if (width & 4) put<how>(to + j, reader.four(j)), j += 4;
    if (fixed || j == width) continue;
    float rest[8];
    restore_columns(type, at, s.from + j, width - j, how == kSet ? to + j : rest);
    for (int32_t k = 0; how != kSet && k < width - j; ++k)
      to[j + k] = how == kAdd ? to[j + k] + rest[k] : to[j + k] * rest[k];
  }
}

template <RowType type, How how>
void emit_widths(const Step& s, const Found& found, float* out, int64_t stride) {
  if (how == kSet && type <= kFp16 && s.width == 2)
    return emit_rows<type, how, 2>(s, found, out, stride);
  if (s.width == 4) return emit_rows<type, how, 4>(s, found, out, stride);
  if (s.width == 8) return emit_rows<type, how, 8>(s, found, out, stride);
  if (s.width == 16) return emit_rows<type, how, 16>(s, found, out, stride);
  if (s.width == 32) return emit_rows<type, how, 32>(s, found, out, stride);
  emit_rows<type, how, 0>(s, found, out, stride);
}

template <RowType type>
void emit_type(const Step& s, const Found& found, float* out, int64_t stride) {
  if (s.how == kSet) return emit_widths<type, kSet>(s, found, out, stride);
  if (s.how == kAdd) return emit_widths<type, kAdd>(s, found, out, stride);
  emit_widths<type, kMultiply>(s, found, out, stride);
}

// Whether `emit` can do a step: columns side by side.
inline bool is_even(const Step& s) {
  return !s.columns && !s.projection && (s.row_type != kInt4 || s.from % 2 == 0);
}

void emit(const Step& s, const Found& found, float* out, int64_t stride) {
  switch (s.row_type) {
    case kFp32: return emit_type<kFp32>(s, found, out, stride);
    case kFp16: return emit_type<kFp16>(s, found, out, stride);
    case kInt8: return emit_type<kInt8>(s, found, out, stride);
    default: return emit_type<kInt4>(s, found, out, stride);
  }
}

#else

struct Found {
  const uint8_t* const* rows;
  const int32_t* samples;
  int64_t count;
};

inline bool is_even(const Step&) { return false; }
void emit(const Step&, const Found&, float*, int64_t) {}

#endif

inline bool is_even(const Feature& f, const Step* steps) {
  bool even = true;
  for (int32_t n = 0; n < f.count; ++n) even &= is_even(steps[f.first + n]);
  return even;
}

inline void clear(float* to, int32_t width) {
  int32_t i = 0;
  for (; i + 8 <= width; i += 8) std::memset(to + i, 0, 32);
  for (; i < width; ++i) to[i] = 0.0f;
}

// Whether four steps are codes of a byte, side by side, of codewords of four columns, side by side.
inline bool are_four_codes(const Step* s) {
  if (s->d != 8 || s->width != 4 || s->row_type > kFp16) return false;
  for (int32_t k = 1; k < 4; ++k) {
    if (s[k].d != 8 || s[k].width != 4 || s[k].row_type != s->row_type) return false;
    if (s[k].state != s->state || s[k].a != s->a || s[k].b != s->b + k) return false;
    if (s[k].row_bytes != s->row_bytes || s[k].into != s->into + 4 * k) return false;
  }
  return true;
}

inline const uint8_t* codewords(const Step& s) {
  return s.rows + s.c * s.row_bytes + (s.row_type == kFp32 ? 4 : 2) * s.from;
}

#if defined(__F16C__) && defined(__AVX__)
inline __m256 two_of_halves(const uint8_t* first, const uint8_t* second) {
  const __m128i low = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(first));
  const __m128i high = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(second));
  return _mm256_cvtph_ps(_mm_unpacklo_epi64(low, high));
}
#endif

// Four codewords of each sample, whose codes are read as one word. False where this processor cannot.
template <RowType type>
bool decode_four(const Step* s, const int64_t* ids, int64_t size, float* to, int64_t stride) {
  const uint8_t* codes = s->state + s->b;
  const uint8_t* words[4] = {codewords(s[0]), codewords(s[1]), codewords(s[2]), codewords(s[3])};
  const int64_t step = s->a, bytes = s->row_bytes;
  for (int64_t i = 0; i < size; ++i, to += stride) {
    uint32_t code;
    std::memcpy(&code, codes + ids[i] * step, 4);
    const uint8_t* at[4];
    for (int32_t k = 0; k < 4; ++k) at[k] = words[k] + int64_t(code >> (8 * k) & 255) * bytes;
    if (type == kFp32) {
      for (int32_t k = 0; k < 4; ++k) std::memcpy(to + 4 * k, at[k], 16);
      continue;
    }
#if defined(__F16C__) && defined(__AVX__)
    _mm256_storeu_ps(to, two_of_halves(at[0], at[1]));
    _mm256_storeu_ps(to + 8, two_of_halves(at[2], at[3]));
#else
    return false;
#endif
  }
  return true;
}

inline bool are_little_endian() {
  const uint16_t one = 1;
  uint8_t first;
  std::memcpy(&first, &one, 1);
  return first == 1;
}

// Embeddings of codes, which need no addresses: their rows are in a cache.
void decode(const Feature& f, const Step* steps, const int64_t* ids, int64_t size, float* out,
            int64_t stride) {
  for (int32_t n = 0; n < f.count; ++n) {
    const Step& s = steps[f.first + n];
    float* to = out + s.into;
    if (n + 4 <= f.count && are_little_endian() && are_four_codes(&s)) {
      const bool done = s.row_type == kFp32 ? decode_four<kFp32>(&s, ids, size, to, stride)
                                            : decode_four<kFp16>(&s, ids, size, to, stride);
      if (done) {
        n += 3;
        continue;
      }
    }
    const uint8_t* rows = s.rows + s.c * s.row_bytes;
    for (int64_t i = 0; i < size; ++i)
      restore(s, rows + code_at(s, ids[i] * s.a + s.b) * s.row_bytes, to + i * stride);
  }
  for (int64_t i = 0; f.scale != 1.0f && i < size; ++i)
    for (int32_t j = 0; j < f.dim; ++j) out[i * stride + j] *= f.scale;
}

// The embedding of one id, whose row of step n is `rows[n * each]`.
inline void embed(const Feature& f, const Step* steps, const uint8_t* const* rows, int64_t each,
                  float* out, Scratch& scratch) {
  if (f.zero) clear(out, f.dim);
  for (int32_t n = 0; n < f.count; ++n) {
    const uint8_t* at = rows[n * each];
    if (!at) continue;
    const Step& s = steps[f.first + n];
    if (f.plain) {
      restore(s, at, out + s.into);
      continue;
    }
    place(s, restored(s, at, scratch.row.data()), out, scratch.projected.data());
  }
  if (f.scale != 1.0f)
    for (int32_t i = 0; i < f.dim; ++i) out[i] *= f.scale;
}

// Samples [begin, end) where every bag holds one id without a weight.
//
// A unit of work is a tile of samples of one feature. Units go through three passes, `ahead` units apart.
struct Singles {
  const Call& call;
  int64_t begin, end, tile, most, ahead;
  Scratch& scratch;

  struct Unit {
    int64_t number = 0, first, feature = 0;
  };

  Singles(const Call& c, int64_t from, int64_t to, Scratch& own)
      : call(c), begin(from), end(to), tile(std::min(kTile, to - from)), most(1), scratch(own) {
    const Program& p = c.program;
    for (int64_t n = 0; n < p.num_features; ++n)
      most = std::max<int64_t>(most, p.features[n].count);
    const int64_t each = tile * std::max<int64_t>(1, p.num_steps / std::max<int64_t>(1, p.num_features));
    ahead = std::clamp<int64_t>(kInFlight / each, 1, kMostAhead);
    scratch.fit((ahead + 1) * most * tile, (ahead + 1) * most, p.widest);
  }

  bool answer() {
    const int64_t tiles = (end - begin + tile - 1) / tile, units = tiles * call.program.num_features;
    Unit asked{0, begin}, found{0, begin}, read{0, begin};
    for (int64_t u = 0; u < units + 2 * ahead; ++u) {
      if (u < units && !ask(asked)) return false;
      if (u < units) next(asked);
      if (u >= ahead && u < units + ahead) {
        if (!find(found)) return false;
        next(found);
      }
      if (u >= 2 * ahead) embed_tile(read), next(read);
    }
    return true;
  }

  void next(Unit& u) const {
    ++u.number;
    if (++u.feature == call.program.num_features) u.feature = 0, u.first += tile;
  }

  const Feature& feature(const Unit& u) const { return call.program.features[u.feature]; }
  int64_t size(const Unit& u) const { return std::min(tile, end - u.first); }
  int64_t slot(const Unit& u) const { return u.number % (ahead + 1) * most; }
  const int64_t* ids(const Unit& u) const {
    return call.values + call.program.places[feature(u).source] * call.batch + u.first;
  }

  // Asks for codes and bitmaps; false where an id is out of range.
  bool ask(const Unit& u) const {
    const Feature& f = feature(u);
    const int64_t *own = ids(u), count = size(u);
    if (f.limit >= 0) {
      uint64_t out_of_range = 0;
      for (int64_t i = 0; i < count; ++i) out_of_range |= uint64_t(own[i]) >= uint64_t(f.limit);
      if (out_of_range) return false;
    }
    for (int32_t k = 0; k < f.count; ++k) {
      const Step& s = call.program.steps[f.first + k];
      if (!s.state || (k && s.state == (&s)[-1].state)) continue;
      for (int64_t i = 0; i < count; ++i) ask_for_state(s, own[i]);
    }
    return true;
  }

  // Finds rows and asks for them; false where one is out of range.
  bool find(const Unit& u) {
    const Feature& f = feature(u);
    if (f.coded) return true;
    const bool even = is_even(f, call.program.steps);
    for (int32_t k = 0; k < f.count; ++k) {
      const Step& s = call.program.steps[f.first + k];
      const int64_t at = (slot(u) + k) * tile;
      int32_t* samples = even && skips(s) ? scratch.samples.data() + at : nullptr;
      const int64_t count = find_rows(s, ids(u), size(u), scratch.rows.data() + at, samples);
      if (count < 0) return false;
      scratch.counts[size_t(slot(u) + k)] = count;
    }
    return true;
  }

  void embed_tile(const Unit& u) {
    const Feature& f = feature(u);
    const int64_t stride = call.program.stride, count = size(u);
    float* out = call.out + u.first * stride + f.out;
    if (f.coded) return decode(f, call.program.steps, ids(u), count, out, stride);
    const uint8_t** rows = scratch.rows.data() + slot(u) * tile;
    if (!is_even(f, call.program.steps)) {
      for (int64_t i = 0; i < count; ++i)
        embed(f, call.program.steps, rows + i, tile, out + i * stride, scratch);
      return;
    }
    for (int64_t i = 0; f.zero && i < count; ++i) clear(out + i * stride, f.dim);
    for (int32_t k = 0; k < f.count; ++k) {
      const Step& s = call.program.steps[f.first + k];
      const int32_t* samples = skips(s) ? scratch.samples.data() + (slot(u) + k) * tile : nullptr;
      const Found found{rows + k * tile, samples, scratch.counts[size_t(slot(u) + k)]};
      emit(s, found, out + s.into, stride);
    }
    for (int64_t i = 0; f.scale != 1.0f && i < count; ++i)
      for (int32_t j = 0; j < f.dim; ++j) out[i * stride + j] *= f.scale;
  }
};

// One bag of a feature, whose ids are `ids` from `first` to `last`.
struct Bag {
  const int64_t* ids;
  const float* weights;
  int64_t first, last;
};

// Sums the rows of a bag before they make an embedding, in the order of the training kernels.
bool sum_then_embed(const Call& c, const Feature& f, const Bag& bag, float* out,
                    Scratch& scratch) {
  bool bad = false;
  float* sum = scratch.embedding.data();
  for (int32_t k = 0; k < f.count;) {
    const Step& head = c.program.steps[f.first + k];
    int32_t end = k + 1;
    while (end < f.count && c.program.steps[f.first + end].joined) ++end;
    std::memset(sum, 0, 4 * size_t(head.width));
    for (int64_t v = bag.first; v < bag.last; ++v) {
      for (int32_t n = k; n < end; ++n) {
        const Step& s = c.program.steps[f.first + n];
        const uint8_t* at = address(s, bag.ids[v], &bad);
        if (!at) continue;
        const float* row = restored(s, at, scratch.row.data());
        if (bag.weights) {
          const float weight = bag.weights[v];
          for (int32_t i = 0; i < s.width; ++i) sum[i] = multiply_add(weight, row[i], sum[i]);
        } else {
          for (int32_t i = 0; i < s.width; ++i) sum[i] += row[i];
        }
      }
    }
    if (bad) return false;
    place(head, sum, out, scratch.projected.data());
    k = end;
  }
  if (f.scale != 1.0f)
    for (int32_t i = 0; i < f.dim; ++i) out[i] *= f.scale;
  return true;
}

// Makes the embedding of every id of a bag, and sums those.
bool embed_then_sum(const Call& c, const Feature& f, const Bag& bag, float* out,
                    Scratch& scratch) {
  bool bad = false;
  const uint8_t** rows = scratch.rows.data();
  for (int64_t v = bag.first; v < bag.last; ++v) {
    for (int32_t k = 0; k < f.count; ++k)
      rows[k] = address(c.program.steps[f.first + k], bag.ids[v], &bad);
    if (bad) return false;
    embed(f, c.program.steps, rows, 1, scratch.embedding.data(), scratch);
    const float weight = bag.weights ? bag.weights[v] : 1.0f;
    for (int32_t i = 0; i < f.dim; ++i) {
      const float product = scratch.embedding[size_t(i)] * weight;
      out[i] += product;
    }
  }
  return true;
}

// Samples [begin, end) of bags of any length.
bool bags(const Call& c, int64_t begin, int64_t end, Scratch& scratch) {
  scratch.fit(c.program.num_steps, 0, c.program.widest);
  for (int64_t n = 0; n < c.program.num_features; ++n) {
    const Feature& f = c.program.features[n];
    const int64_t key = c.program.places[f.source] * c.batch;
    for (int64_t b = begin; b < end; ++b) {
      const int64_t at = key + b;
      const Bag bag{c.values, c.weights, c.offsets ? c.offsets[at] : at,
                    c.offsets ? c.offsets[at + 1] : at + 1};
      for (int64_t v = bag.first; f.limit >= 0 && v < bag.last; ++v)
        if (bag.ids[v] < 0 || bag.ids[v] >= f.limit) return false;
      float* out = c.out + b * c.program.stride + f.out;
      std::memset(out, 0, 4 * size_t(f.dim));
      const bool fine = f.linear ? sum_then_embed(c, f, bag, out, scratch)
                                 : embed_then_sum(c, f, bag, out, scratch);
      if (!fine) return false;
      const float share = 1.0f / float(std::max<int64_t>(bag.last - bag.first, 1));
      for (int32_t i = 0; f.mean && i < f.dim; ++i) out[i] *= share;
    }
  }
  return true;
}

}  // namespace

extern "C" {

// Looks up a batch. `lengths`, where given, must be all ones, as bags of one are then assumed.
// 1: done; 0: an id, or a code, is out of range; 2: bags are not of one, and nothing was done.
int32_t embcomp_lookup(const Program* program, const int64_t* values, const int32_t* lengths,
                       const int64_t* offsets, const float* weights, int64_t batch, float* out,
                       int32_t threads) {
  if (lengths) {
    int32_t others = 0;
    for (int64_t s = 0; s < program->num_sources; ++s) {
      const int64_t first = program->places[s] * batch;
      for (int64_t i = first; i < first + batch; ++i) others |= lengths[i] ^ 1;
    }
    if (others) return 2;
  }
  const Call call{*program, values, offsets, weights, batch, out};
  if (!batch) return 1;
  const int64_t shares =
      std::clamp<int64_t>(std::min(batch, batch * program->num_steps / kTask), 1, std::max(threads, 1));
  int32_t good = 1;
#if defined(_OPENMP)
#pragma omp parallel for num_threads(int(shares)) schedule(static) if (shares > 1)
#endif
  for (int64_t share = 0; share < shares; ++share) {
    static thread_local Scratch scratch;
    const int64_t begin = batch * share / shares, end = batch * (share + 1) / shares;
    if (!(offsets || weights ? bags(call, begin, end, scratch)
                             : Singles(call, begin, end, scratch).answer())) {
#if defined(_OPENMP)
#pragma omp atomic write
#endif
      good = 0;
    }
  }
  return good;
}

int64_t embcomp_program_bytes() { return sizeof(Program); }
int64_t embcomp_step_bytes() { return sizeof(Step); }
int64_t embcomp_feature_bytes() { return sizeof(Feature); }
}
