// The nearest codeword of many vectors, where float32 can tell.
//
// A vector's score for a codeword is their product less half the codeword's square: the nearest codeword
// has the largest. Vectors stand side by side in a register, codewords come one after another in groups,
// of which the largest score is kept, and only the best group of a vector is looked into. Where rounding
// could have decided between two codewords, or numbers are too large, squared differences in float64 do,
// of the codewords that are near enough. Those are not contracted, so that they are what torch computes;
// what is to be fused is written so.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

constexpr int kHalf = kLanes / 2;  // lanes of a register of doubles
typedef float Halves __attribute__((vector_size(4 * kHalf)));
typedef double Doubles __attribute__((vector_size(8 * kHalf)));
typedef int64_t Longs __attribute__((vector_size(8 * kHalf)));

constexpr int kSide = 2;             // registers of vectors that are looked at together
constexpr int kTile = kSide * kLanes;
constexpr int kGroup = 16;           // codewords; their number is that of `nearest_compiled.py`
constexpr int kParts = kGroup / kLanes;
constexpr int64_t kRows = 256;       // rows of a part; they stay in a core's cache for all columns
constexpr float kSmallest = 1e-36f;  // more than what is too small to be squared can add up to
constexpr float kLongest = 1e17f;    // of what can be squared and added up
constexpr float kTie = 4e-16f;       // twice what rounding in float64 makes of a square

inline Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
  return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
  return (Floats)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}

inline Floats smaller(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
  return (Floats)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
  return (Floats)_mm_min_ps((__m128)a, (__m128)b);
#else
  return a < b ? a : b;
#endif
}

inline Floats multiply_add(Floats a, Floats b, Floats sum) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__FMA__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
  return a * b + sum;
#endif
}

inline Floats all(float value) { return value - Floats{}; }

constexpr std::array<int32_t, kGroup> kPlaces = [] {
  std::array<int32_t, kGroup> found{};
  for (int place = 0; place < kGroup; ++place) found[place] = (1 << 16) + place;
  return found;
}();

// What is known of a tile's vectors once all codewords were seen.
struct Found {
  float best[kTile];     // the largest score
  float second[kTile];   // the largest of another group
  int32_t group[kTile];  // that has the best
};

// Lines are (groups, width + 1, kGroup): numbers of a group's codewords, then their squares, halved and
// negative. Points are (width, kTile).
template <int W>
void find_groups(const float* lines, int64_t groups, int width, const float* points, Found& found) {
  const int own = W > 0 ? W : width;
  Floats best[kSide], second[kSide];
  Ints place[kSide];
  for (int s = 0; s < kSide; ++s) best[s] = second[s] = all(-INFINITY), place[s] = Ints{};
  for (int64_t g = 0; g < groups; ++g) {
    const float* line = lines + g * (own + 1) * kGroup;
    Floats most[kSide];
    for (int s = 0; s < kSide; ++s) most[s] = all(-INFINITY);
    for (int word = 0; word < kGroup; word += 2) {
      Floats one[kSide], other[kSide];
      for (int s = 0; s < kSide; ++s) {
        one[s] = all(line[own * kGroup + word]);
        other[s] = all(line[own * kGroup + word + 1]);
      }
      for (int axis = 0; axis < own; ++axis) {
        for (int s = 0; s < kSide; ++s) {
          Floats point;
          std::memcpy(&point, points + axis * kTile + s * kLanes, sizeof point);
          one[s] = multiply_add(all(line[axis * kGroup + word]), point, one[s]);
          other[s] = multiply_add(all(line[axis * kGroup + word + 1]), point, other[s]);
        }
      }
      for (int s = 0; s < kSide; ++s) most[s] = larger(most[s], larger(one[s], other[s]));
    }
    for (int s = 0; s < kSide; ++s) {
      second[s] = larger(second[s], smaller(best[s], most[s]));
      place[s] = most[s] > best[s] ? Ints{} + int32_t(g) : place[s];
      best[s] = larger(best[s], most[s]);
    }
  }
  std::memcpy(found.best, best, sizeof best);
  std::memcpy(found.second, second, sizeof second);
  std::memcpy(found.group, place, sizeof place);
}

void find_groups(const float* lines, int64_t groups, int width, const float* points, Found& found) {
  switch (width) {
    case 1: return find_groups<1>(lines, groups, width, points, found);
    case 2: return find_groups<2>(lines, groups, width, points, found);
    case 3: return find_groups<3>(lines, groups, width, points, found);
    case 4: return find_groups<4>(lines, groups, width, points, found);
    case 8: return find_groups<8>(lines, groups, width, points, found);
    default: return find_groups<0>(lines, groups, width, points, found);
  }
}

// The scores of a group for one vector of a tile.
void score(const float* line, int width, const float* points, int at, Floats (&scores)[kParts]) {
  std::memcpy(scores, line + width * kGroup, sizeof scores);
  for (int axis = 0; axis < width; ++axis) {
    const Floats point = all(points[axis * kTile + at]);
    for (int part = 0; part < kParts; ++part) {
      Floats words;
      std::memcpy(&words, line + axis * kGroup + part * kLanes, sizeof words);
      scores[part] = multiply_add(words, point, scores[part]);
    }
  }
}

// More than the scores of a vector's nearest codewords can differ by rounding alone. It grows with the length
// of codewords, of which those count that are nearly as near as the best: twice as far as that one and the
// vector's own norm, a codeword loses by more than a third of its squared distance. So one codeword that lies
// far out does not bring all others into doubt. What float64 cannot tell apart is in doubt, too, and all is
// where numbers are too large.
inline float rounding_of(float squared_norm, float best, float reach, float factor, int64_t width) {
  const float norm = std::sqrt(squared_norm);
  const float distance = std::sqrt(std::max(0.0f, squared_norm - 2 * best));
  const float near = std::min(reach, 2 * (norm + distance));
  if (!(norm < kLongest && reach < kLongest)) return INFINITY;
  return (norm + near) * (near * factor + (norm + near) * (kTie * float(width + 3))) + kSmallest;
}

// The only codeword of a group whose score is at least `least`; -1 where there are several.
int32_t only(const float* line, int width, const float* points, int at, float least) {
  Floats scores[kParts];
  score(line, width, points, at, scores);
  Ints near{};  // one in the upper half and its place in the lower, wherever a score is large
  for (int part = 0; part < kParts; ++part) {
    Ints here;
    std::memcpy(&here, kPlaces.data() + part * kLanes, sizeof here);
    near += (scores[part] >= all(least)) & here;
  }
  int32_t sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += near[lane];
  return sum >> 16 == 1 ? sum & 0xffff : -1;
}

inline bool any(Ints flags) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)flags, (__m512i)flags) != 0;
#elif defined(__AVX__)
  return _mm256_movemask_ps((__m256)flags) != 0;
#else
  int32_t sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum |= flags[lane];
  return sum != 0;
#endif
}

// Squared distances of a vector from kHalf words, whose numbers lie kGroup apart.
inline Doubles distances(const float* words, int width, const float* vector) {
  Doubles sum{};
  for (int axis = 0; axis < width; ++axis) {
    Halves here;
    std::memcpy(&here, words + axis * kGroup, sizeof here);
    const Doubles gap = double(vector[axis]) - __builtin_convertvector(here, Doubles);
    sum += gap * gap;
  }
  return sum;
}

// The first of the nearest codewords in float64, among groups with a score that is not below `least`.
// Words are (groups, width, kGroup), the last group filled up by what is never nearest.
int64_t settle(const float* lines, const float* words, int64_t groups, int width,
               const float* points, int at, const float* vector, float least) {
  Doubles shortest = double(INFINITY) - Doubles{};
  Longs found{};  // kHalf codes together count as one
  for (int64_t group = 0; group < groups; ++group) {
    Floats scores[kParts];
    score(lines + group * (width + 1) * kGroup, width, points, at, scores);
    for (int part = 0; part < kParts; ++part) {
      if (!any(~(scores[part] < all(least)))) continue;  // what is no number is looked at
      for (int half = 2 * part; half < 2 * part + 2; ++half) {
        const Doubles own = distances(words + group * width * kGroup + half * kHalf, width, vector);
        const Longs nearer = own < shortest;
        found = nearer ? Longs{} + (group * 2 * kParts + half) : found;
        shortest = nearer ? own : shortest;
      }
    }
  }
  int64_t code = 0;
  double least_distance = INFINITY;
  for (int lane = 0; lane < kHalf; ++lane) {
    const int64_t own = found[lane] * kHalf + lane;
    if (shortest[lane] < least_distance || (shortest[lane] == least_distance && own < code))
      least_distance = shortest[lane], code = own;
  }
  return std::isfinite(least_distance) ? code : 0;
}

}  // namespace

extern "C" {

int64_t embcomp_nearest_group() { return kGroup; }

// Vectors are (rows, columns, width); words, lines, centres and reaches have one codebook for each of
// `books`, of which `which` says the one of a column; scores of a vector p for codewords no longer than r
// differ by rounding by less than `factor` (|p| + r) r. Codes are (rows, columns).
void embcomp_nearest(const float* vectors, const float* words, const float* lines,
                     const float* centres, const float* reaches, const int64_t* which, int64_t rows,
                     int64_t columns, int64_t width, int64_t groups, float factor, int64_t* codes,
                     int32_t threads) {
  const int64_t parts = (rows + kRows - 1) / kRows;
  const int64_t line = (width + 1) * kGroup;
#pragma omp parallel for num_threads(threads) if (threads > 1 && parts > 1)
  for (int64_t part = 0; part < parts; ++part) {
    std::vector<float> points(size_t(width) * kTile);
    Found found;
    const int64_t end = std::min(rows, (part + 1) * kRows);
    for (int64_t column = 0; column < columns; ++column) {
      const int64_t book = which[column];
      const float* own = lines + book * groups * line;
      const float* centre = centres + book * width;
      const float reach = reaches[book];
      for (int64_t start = part * kRows; start < end; start += kTile) {
        const int filled = int(std::min<int64_t>(kTile, end - start));
        const float* from = vectors + (start * columns + column) * width;
        for (int at = 0; at < filled; ++at)
          for (int64_t axis = 0; axis < width; ++axis)
            points[axis * kTile + at] = from[at * columns * width + axis] - centre[axis];
        if (filled < kTile)
          for (int64_t axis = 0; axis < width; ++axis)
            std::fill_n(&points[axis * kTile + filled], kTile - filled, 0.0f);
        float norms[kTile] = {};
        for (int64_t axis = 0; axis < width; ++axis)
          for (int at = 0; at < kTile; ++at)
            norms[at] += points[axis * kTile + at] * points[axis * kTile + at];
        find_groups(own, groups, int(width), points.data(), found);
        for (int at = 0; at < filled; ++at) {
          const float best = found.best[at];
          const float rounding = rounding_of(norms[at], best, reach, factor, width);
          const bool tells = std::isfinite(best) && std::isfinite(rounding);
          const float least = tells ? best - rounding : -INFINITY;
          int64_t code = -1;
          if (tells && found.second[at] < least) {
            const int32_t group = found.group[at];
            code = only(own + group * line, int(width), points.data(), at, least);
            if (code >= 0) code += group * kGroup;
          }
          if (code < 0)
            code = settle(own, words + book * groups * width * kGroup, groups, int(width),
                          points.data(), at, from + at * columns * width, least);
          codes[(start + at) * columns + column] = code;
        }
      }
    }
  }
}
}
