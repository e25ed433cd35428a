// Compressed look-ups of many features in one call: ids in, embeddings out.
//
// The tables of steps and features are made by `program.py`, whose field order is the one here. Samples
// are taken in tiles. For each tile, rows are found first and asked for, then read, so that the waits
// for memory overlap. Nothing is allocated but once per thread, and no global state is written.

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

constexpr int64_t kTile = 16;
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
  std::vector<const uint8_t*> rows;
  std::vector<float> row, projected, embedding;
  Scratch(int64_t steps, int64_t width) : rows(size_t(kTile * steps)), row(size_t(width)),
      projected(size_t(width)), embedding(size_t(width)) {}
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

// The addresses of the rows of some ids; the kind is fixed, so that nothing is asked in the loop.
template <Kind kind>
bool find_rows_of(Step s, const int64_t* ids, int64_t size, const uint8_t** rows, int64_t stride) {
  s.kind = kind;
  bool bad = false;
  for (int64_t i = 0; i < size; ++i) rows[i * stride] = address(s, ids[i], &bad);
  return !bad;
}

bool find_rows(const Step& s, const int64_t* ids, int64_t size, const uint8_t** rows,
               int64_t stride) {
  switch (s.kind) {
    case kIdentity: return find_rows_of<kIdentity>(s, ids, size, rows, stride);
    case kHashed: return find_rows_of<kHashed>(s, ids, size, rows, stride);
    case kQuotient: return find_rows_of<kQuotient>(s, ids, size, rows, stride);
    case kRemainder: return find_rows_of<kRemainder>(s, ids, size, rows, stride);
    case kRanked: return find_rows_of<kRanked>(s, ids, size, rows, stride);
    case kCode: return find_rows_of<kCode>(s, ids, size, rows, stride);
    case kWithin: return find_rows_of<kWithin>(s, ids, size, rows, stride);
    case kHashedBeyond: return find_rows_of<kHashedBeyond>(s, ids, size, rows, stride);
  }
  return false;
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
};

// One step of a feature for some samples; its width is fixed where it is a usual one.
template <RowType type, How how, int32_t fixed>
void emit_rows(const Step& s, const uint8_t* const* rows, int64_t each, int64_t size, float* out,
               int64_t stride) {
  const int32_t width = fixed ? fixed : s.width;
  for (int64_t i = 0; i < size; ++i) {
    const uint8_t* at = rows[i * each];
    if (!at) continue;
    const Reader<type> reader(s, at);
    float* to = out + i * stride;
    int32_t j = 0;
    for (; j + 8 <= width; j += 8) {
      const __m256 came = reader.eight(j);
      if (how == kSet) {
        _mm256_storeu_ps(to + j, came);
      } else {
        const __m256 there = _mm256_loadu_ps(to + j);
        _mm256_storeu_ps(to + j, how == kAdd ? _mm256_add_ps(there, came)
                                             : _mm256_mul_ps(there, came));
      }
    }
    if (fixed || j == width) continue;
    float rest[8];
    restore_columns(type, at, s.from + j, width - j, how == kSet ? to + j : rest);
    for (int32_t k = 0; how != kSet && k < width - j; ++k)
      to[j + k] = how == kAdd ? to[j + k] + rest[k] : to[j + k] * rest[k];
  }
}

template <RowType type, How how>
void emit_widths(const Step& s, const uint8_t* const* rows, int64_t each, int64_t size, float* out,
                 int64_t stride) {
  if (s.width == 8) return emit_rows<type, how, 8>(s, rows, each, size, out, stride);
  if (s.width == 16) return emit_rows<type, how, 16>(s, rows, each, size, out, stride);
  if (s.width == 32) return emit_rows<type, how, 32>(s, rows, each, size, out, stride);
  emit_rows<type, how, 0>(s, rows, each, size, out, stride);
}

template <RowType type>
void emit_type(const Step& s, const uint8_t* const* rows, int64_t each, int64_t size, float* out,
               int64_t stride) {
  if (s.how == kSet) return emit_widths<type, kSet>(s, rows, each, size, out, stride);
  if (s.how == kAdd) return emit_widths<type, kAdd>(s, rows, each, size, out, stride);
  emit_widths<type, kMultiply>(s, rows, each, size, out, stride);
}

// Whether `emit` can do a step: columns side by side.
inline bool is_even(const Step& s) {
  return !s.columns && !s.projection && (s.row_type != kInt4 || s.from % 2 == 0);
}

void emit(const Step& s, const uint8_t* const* rows, int64_t each, int64_t size, float* out,
          int64_t stride) {
  switch (s.row_type) {
    case kFp32: return emit_type<kFp32>(s, rows, each, size, out, stride);
    case kFp16: return emit_type<kFp16>(s, rows, each, size, out, stride);
    case kInt8: return emit_type<kInt8>(s, rows, each, size, out, stride);
    default: return emit_type<kInt4>(s, rows, each, size, out, stride);
  }
}

#else

inline bool is_even(const Step&) { return false; }
void emit(const Step&, const uint8_t* const*, int64_t, int64_t, float*, int64_t) {}

#endif

// Embeddings of codes, which need no addresses: their rows are in a cache.
void decode(const Feature& f, const Step* steps, const int64_t* ids, int64_t size, float* out,
            int64_t stride) {
  for (int32_t n = 0; n < f.count; ++n) {
    const Step s = steps[f.first + n];
    const uint8_t* rows = s.rows + s.c * s.row_bytes;
    float* to = out + s.into;
    if (s.d == 8 && s.row_type == kFp32 && s.width == 4) {
      const uint8_t* codes = s.state + s.b;
      rows += 4 * s.from;
      for (int64_t i = 0; i < size; ++i)
        std::memcpy(to + i * stride, rows + codes[ids[i] * s.a] * s.row_bytes, 16);
      continue;
    }
#if defined(__F16C__) && defined(__AVX__)
    if (s.d == 8 && s.row_type == kFp16 && s.width == 4) {
      const uint8_t* codes = s.state + s.b;
      rows += 2 * s.from;
      for (int64_t i = 0; i < size; ++i) {
        const uint8_t* row = rows + codes[ids[i] * s.a] * s.row_bytes;
        const __m128i halves = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row));
        _mm_storeu_ps(to + i * stride, _mm_cvtph_ps(halves));
      }
      continue;
    }
#endif
    for (int64_t i = 0; i < size; ++i)
      restore(s, rows + code_at(s, ids[i] * s.a + s.b) * s.row_bytes, to + i * stride);
  }
  for (int64_t i = 0; f.scale != 1.0f && i < size; ++i)
    for (int32_t j = 0; j < f.dim; ++j) out[i * stride + j] *= f.scale;
}

inline void embed(const Feature& f, const Step* steps, const uint8_t* const* rows, float* out,
                  Scratch& scratch) {
  if (f.zero) std::memset(out, 0, 4 * size_t(f.dim));
  for (int32_t n = 0; n < f.count; ++n) {
    if (!rows[n]) continue;
    const Step& s = steps[f.first + n];
    if (f.plain) {
      restore(s, rows[n], out + s.into);
      continue;
    }
    place(s, restored(s, rows[n], scratch.row.data()), out, scratch.projected.data());
  }
  if (f.scale != 1.0f)
    for (int32_t i = 0; i < f.dim; ++i) out[i] *= f.scale;
}

// The embeddings of one feature for some samples, step by step where every step allows it.
void embed_all(const Feature& f, const Step* steps, const uint8_t* const* rows, int64_t size,
               float* out, int64_t stride, Scratch& scratch) {
  bool even = true;
  for (int32_t n = 0; n < f.count; ++n) even &= is_even(steps[f.first + n]);
  if (!even) {
    for (int64_t i = 0; i < size; ++i) embed(f, steps, rows + i * f.count, out + i * stride, scratch);
    return;
  }
  for (int64_t i = 0; f.zero && i < size; ++i) std::memset(out + i * stride, 0, 4 * size_t(f.dim));
  for (int32_t n = 0; n < f.count; ++n) {
    const Step& s = steps[f.first + n];
    emit(s, rows + n, f.count, size, out + s.into, stride);
  }
  for (int64_t i = 0; f.scale != 1.0f && i < size; ++i)
    for (int32_t j = 0; j < f.dim; ++j) out[i * stride + j] *= f.scale;
}

// Samples [begin, end) where every bag holds one id without a weight.
bool singles(const Call& c, int64_t begin, int64_t end, Scratch& scratch) {
  const Program& p = c.program;
  const int64_t size = end - begin;
  for (int64_t n = 0; n < p.num_features; ++n) {
    const Feature& f = p.features[n];
    const int64_t* ids = c.values + p.places[f.source] * c.batch + begin;
    if (f.limit >= 0) {
      uint64_t out_of_range = 0;
      for (int64_t i = 0; i < size; ++i) out_of_range |= uint64_t(ids[i]) >= uint64_t(f.limit);
      if (out_of_range) return false;
    }
    for (int32_t k = 0; k < f.count; ++k) {
      const Step& s = p.steps[f.first + k];
      if (!s.state || (k && s.state == (&s)[-1].state)) continue;
      for (int64_t i = 0; i < size; ++i) ask_for_state(s, ids[i]);
    }
  }
  for (int64_t n = 0; n < p.num_features; ++n) {
    const Feature& f = p.features[n];
    if (f.coded) continue;
    const int64_t* ids = c.values + p.places[f.source] * c.batch + begin;
    const uint8_t** rows = scratch.rows.data() + kTile * f.first;
    for (int32_t k = 0; k < f.count; ++k)
      if (!find_rows(p.steps[f.first + k], ids, size, rows + k, f.count)) return false;
  }
  for (int64_t n = 0; n < p.num_features; ++n) {
    const Feature& f = p.features[n];
    float* out = c.out + begin * p.stride + f.out;
    if (f.coded) {
      const int64_t* ids = c.values + p.places[f.source] * c.batch + begin;
      decode(f, p.steps, ids, size, out, p.stride);
      continue;
    }
    const uint8_t** rows = scratch.rows.data() + kTile * f.first;
    embed_all(f, p.steps, rows, size, out, p.stride, scratch);
  }
  return true;
}

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
    embed(f, c.program.steps, rows, scratch.embedding.data(), scratch);
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
  const int64_t tiles = (batch + kTile - 1) / kTile;
  int32_t good = 1;
#if defined(_OPENMP)
  const bool shared = threads > 1 && batch * program->num_steps > 8192;
#pragma omp parallel num_threads(threads) if (shared)
#endif
  {
    Scratch scratch(std::max<int64_t>(program->num_steps, 1),
                    std::max<int64_t>(program->widest, 1));
#if defined(_OPENMP)
#pragma omp for schedule(static)
#endif
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t begin = tile * kTile, end = std::min(batch, begin + kTile);
      const bool fine = offsets || weights ? bags(call, begin, end, scratch)
                                           : singles(call, begin, end, scratch);
      if (!fine) {
#if defined(_OPENMP)
#pragma omp atomic write
#endif
        good = 0;
      }
    }
  }
  return good;
}

int64_t embcomp_program_bytes() { return sizeof(Program); }
int64_t embcomp_step_bytes() { return sizeof(Step); }
int64_t embcomp_feature_bytes() { return sizeof(Feature); }
}
