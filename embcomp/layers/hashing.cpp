// The hash of `hashing.py`, of many look-ups in one pass.

#include <cstdint>

namespace {

inline uint64_t splitmix(uint64_t z) {
  z += 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

}  // namespace

extern "C" {

// The rows in [0, rows[n]) of `counts[n]` ids of look-up n, which come one look-up after another.
void embcomp_hash(const int64_t* ids, const int64_t* counts, const int64_t* salts,
                  const int64_t* rows, int64_t lookups, int64_t* found) {
  for (int64_t n = 0; n < lookups; ids += counts[n], found += counts[n], ++n) {
    const uint64_t salt = uint64_t(salts[n]), divisor = uint64_t(rows[n]);
    const uint64_t magic = ~0ull / divisor;  // a division takes far longer than a product
    for (int64_t i = 0; i < counts[n]; ++i) {
      const uint64_t hash = splitmix(uint64_t(ids[i]) ^ salt) & 0x7FFFFFFFFFFFFFFFull;
      uint64_t rest = hash - uint64_t((unsigned __int128)(hash) * magic >> 64) * divisor;
      while (rest >= divisor) rest -= divisor;
      found[i] = int64_t(rest);
    }
  }
}
}
