// The distinct values of a feature, numbered as they come, and how often each is counted.
//
// Values come as Arrow's views: 16 bytes with the length, and the text itself where it has up to 12 bytes.
// Two such texts are equal where their views are; a longer one is kept in `text`, and its key says where.
// Numbers begin at 1; a value that is missing is 0. They do not depend on the hash, whose seed is the
// caller's: nobody can choose values that meet in it.

#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

namespace {

constexpr int64_t kInline = 12;      // bytes of a text that lies in its view
constexpr int64_t kBatch = 64;       // values whose slots are asked for together
constexpr uint64_t kFirstSlots = 256;
constexpr int64_t kMostValues = 1ll << 31;

struct View {
  uint64_t first;   // length, and the first four bytes
  uint64_t second;  // eight bytes more; of a long text the buffer and the offset in it
};

inline uint32_t length_of(const View& view) { return static_cast<uint32_t>(view.first); }

inline uint64_t mixed(uint64_t a, uint64_t b) {
  const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

struct Numbering {
  uint64_t seed = 0;
  std::vector<View> keys;        // of a long text: its place in `text`
  std::vector<int64_t> counts;
  std::vector<char> text;
  std::vector<uint64_t> slots;   // 0, or 32 bits of the hash and the number
  uint64_t mask = 0;

  uint32_t hash(const View& view, const char* text_of_long) const {
    const uint64_t salt = seed ^ 0x9E3779B97F4A7C15ull;
    uint64_t h = mixed(view.first ^ seed, 0xBF58476D1CE4E5B9ull ^ salt);
    if (text_of_long == nullptr) {
      h = mixed(h ^ view.second, 0x94D049BB133111EBull ^ salt);
    } else {
      const uint32_t length = length_of(view);
      for (uint32_t at = 4; at < length; at += 8) {
        uint64_t word = 0;
        const uint32_t left = length - at;
        std::memcpy(&word, text_of_long + at, left < 8 ? left : 8);
        h = mixed(h ^ word, 0x94D049BB133111EBull ^ salt);
      }
    }
    return static_cast<uint32_t>(h ^ (h >> 32));
  }

  void grow(uint64_t size) {
    std::vector<uint64_t> larger(size, 0);
    const uint64_t larger_mask = size - 1;
    for (const uint64_t slot : slots) {
      if (slot == 0) continue;
      uint64_t at = (slot >> 32) & larger_mask;
      while (larger[at] != 0) at = (at + 1) & larger_mask;
      larger[at] = slot;
    }
    slots.swap(larger);
    mask = larger_mask;
  }

  bool equal(const View& key, const View& view, const char* text_of_long) const {
    if (key.first != view.first) return false;
    if (text_of_long == nullptr) return key.second == view.second;
    return std::memcmp(text.data() + key.second, text_of_long, length_of(view)) == 0;
  }

  uint32_t add(const View& view, const char* text_of_long) {
    View key = view;
    if (text_of_long != nullptr) {
      key.second = text.size();
      text.insert(text.end(), text_of_long, text_of_long + length_of(view));
    }
    keys.push_back(key);
    counts.push_back(0);
    return static_cast<uint32_t>(keys.size());
  }

  uint32_t number(const View& view, uint32_t hash, const char* text_of_long) {
    uint64_t at = hash & mask;
    while (slots[at] != 0) {
      const uint64_t slot = slots[at];
      const uint32_t found = static_cast<uint32_t>(slot);
      if (static_cast<uint32_t>(slot >> 32) == hash && equal(keys[found - 1], view, text_of_long)) {
        return found;
      }
      at = (at + 1) & mask;
    }
    const uint32_t fresh = add(view, text_of_long);
    slots[at] = static_cast<uint64_t>(hash) << 32 | fresh;
    return fresh;
  }
};

inline const char* long_text(const View& view, const char* const* buffers) {
  if (length_of(view) <= kInline) return nullptr;
  return buffers[static_cast<uint32_t>(view.second)] + (view.second >> 32);
}

inline bool is_set(const uint8_t* bits, int64_t at) {
  return bits == nullptr || (bits[at >> 3] >> (at & 7) & 1);
}

}  // namespace

extern "C" {

// Returns null where there is no memory.
Numbering* embcomp_numbering_new(uint64_t seed) {
  try {
    auto* made = new Numbering;
    made->seed = seed;
    try {
      made->grow(kFirstSlots);
    } catch (...) {
      delete made;
      throw;
    }
    return made;
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

void embcomp_numbering_free(Numbering* numbering) { delete numbering; }

int64_t embcomp_numbering_size(const Numbering* numbering) {
  return static_cast<int64_t>(numbering->keys.size());
}

int64_t embcomp_numbering_bytes(const Numbering* numbering) {
  return static_cast<int64_t>(sizeof(View) * numbering->keys.capacity() +
                              sizeof(int64_t) * numbering->counts.capacity() +
                              numbering->text.capacity() +
                              sizeof(uint64_t) * numbering->slots.capacity());
}

int64_t embcomp_numbering_text_bytes(const Numbering* numbering) {
  int64_t total = 0;
  for (const View& key : numbering->keys) total += length_of(key);
  return total;
}

// Numbers n values. Bit `first + i` of `valid` says whether value i is there (null: all are). Returns 0, -1
// where there is no memory, -2 where there are too many.
int32_t embcomp_numbering_add(Numbering* numbering, const View* views, const uint8_t* valid, int64_t first,
                              const char* const* buffers, int64_t n, uint32_t* numbers) {
  try {
    uint32_t hashes[kBatch];
    for (int64_t start = 0; start < n; start += kBatch) {
      const int64_t size = n - start < kBatch ? n - start : kBatch;
      const uint64_t most = numbering->keys.size() + size;
      if (most >= kMostValues) return -2;
      if (4 * most > 3 * numbering->slots.size()) numbering->grow(2 * numbering->slots.size());
      for (int64_t i = 0; i < size; ++i) {
        if (!is_set(valid, first + start + i)) continue;
        const View& view = views[start + i];
        hashes[i] = numbering->hash(view, long_text(view, buffers));
        __builtin_prefetch(&numbering->slots[hashes[i] & numbering->mask]);
      }
      for (int64_t i = 0; i < size; ++i) {
        if (!is_set(valid, first + start + i)) continue;
        const uint32_t likely = static_cast<uint32_t>(numbering->slots[hashes[i] & numbering->mask]);
        if (likely != 0) __builtin_prefetch(&numbering->keys[likely - 1]);
      }
      for (int64_t i = 0; i < size; ++i) {
        if (!is_set(valid, first + start + i)) {
          numbers[start + i] = 0;
          continue;
        }
        const View& view = views[start + i];
        numbers[start + i] = numbering->number(view, hashes[i], long_text(view, buffers));
      }
    }
    return 0;
  } catch (const std::bad_alloc&) {
    return -1;
  }
}

// Counts those of n numbers whose byte of `counted` is 1.
void embcomp_numbering_count(Numbering* numbering, const uint32_t* numbers, const uint8_t* counted, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if (numbers[i] != 0) numbering->counts[numbers[i] - 1] += counted[i];
  }
}

// Writes (size,) counts, (size + 1,) offsets and the bytes of all texts, by number.
void embcomp_numbering_values(const Numbering* numbering, int64_t* counts, int64_t* offsets, char* text) {
  int64_t at = 0;
  const int64_t size = static_cast<int64_t>(numbering->keys.size());
  for (int64_t i = 0; i < size; ++i) {
    const View& key = numbering->keys[i];
    const uint32_t length = length_of(key);
    counts[i] = numbering->counts[i];
    offsets[i] = at;
    if (length <= kInline) {
      std::memcpy(text + at, reinterpret_cast<const char*>(&key) + sizeof(uint32_t), length);
    } else {
      std::memcpy(text + at, numbering->text.data() + key.second, length);
    }
    at += length;
  }
  offsets[size] = at;
}

}  // extern "C"
