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

// What is missing looks as an empty slot does, so that it is found there, with number 0. An empty text, which
// is a value, has a key that no other view has.
constexpr View kMissing{0, 0};
constexpr View kEmptyText{0, 1};

// A key and its number in one place: a value is found with one access to memory.
struct Slot {
  View key;         // of a long text: its place in `text`
  uint32_t number;  // 0: nothing is here
  uint32_t tag;     // the upper bits of the hash
};

inline uint32_t length_of(const View& view) { return static_cast<uint32_t>(view.first); }

inline uint64_t mixed(uint64_t a, uint64_t b) {
  const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

struct Numbering {
  uint64_t seed = 0;
  uint64_t salt = 0;
  std::vector<Slot> slots;
  std::vector<int64_t> counts;
  std::vector<char> text;
  uint64_t mask = 0;

  uint64_t hash(const View& view) const { return mixed(view.first ^ seed, view.second ^ salt); }

  uint64_t hash_of_long(const View& view, const char* bytes) const {
    uint64_t h = mixed(view.first ^ seed, 0xBF58476D1CE4E5B9ull ^ salt);
    const uint32_t length = length_of(view);
    for (uint32_t at = 4; at < length; at += 8) {
      uint64_t word = 0;
      const uint32_t left = length - at;
      std::memcpy(&word, bytes + at, left < 8 ? left : 8);
      h = mixed(h ^ word, 0x94D049BB133111EBull ^ salt);
    }
    return h;
  }

  uint64_t hash_of_key(const View& key) const {
    return length_of(key) <= kInline ? hash(key) : hash_of_long(key, text.data() + key.second);
  }

  void grow(uint64_t size) {
    std::vector<Slot> larger(size, Slot{kMissing, 0, 0});
    const uint64_t larger_mask = size - 1;
    for (const Slot& slot : slots) {
      if (slot.number == 0) continue;
      uint64_t at = hash_of_key(slot.key) & larger_mask;
      while (larger[at].number != 0) at = (at + 1) & larger_mask;
      larger[at] = slot;
    }
    slots.swap(larger);
    mask = larger_mask;
  }

  // Makes room for more values, so that a third of the slots stays empty.
  void make_room(uint64_t more) {
    while (3 * (counts.size() + more) > 2 * slots.size()) grow(2 * slots.size());
  }

  uint32_t fill(Slot& slot, const View& key, uint64_t hash) {
    counts.push_back(0);
    slot = Slot{key, static_cast<uint32_t>(counts.size()), static_cast<uint32_t>(hash >> 32)};
    return slot.number;
  }

  uint32_t number(const View& view, uint64_t hash) {
    uint64_t at = hash & mask;
    while (true) {
      Slot& slot = slots[at];
      if (slot.key.first == view.first && slot.key.second == view.second) return slot.number;
      if (slot.number == 0) return fill(slot, view, hash);
      at = (at + 1) & mask;
    }
  }

  uint32_t number_of_long(const View& view, uint64_t hash, const char* bytes) {
    uint64_t at = hash & mask;
    for (; slots[at].number != 0; at = (at + 1) & mask) {
      const Slot& slot = slots[at];
      if (slot.key.first == view.first && slot.tag == static_cast<uint32_t>(hash >> 32) &&
          std::memcmp(text.data() + slot.key.second, bytes, length_of(view)) == 0) {
        return slot.number;
      }
    }
    const View key{view.first, text.size()};
    text.insert(text.end(), bytes, bytes + length_of(view));
    return fill(slots[at], key, hash);
  }

  // Numbers up to kBatch values; `bytes_of` gives the bytes of a long one.
  template <typename BytesOf>
  void number_batch(const View* views, int64_t size, const BytesOf& bytes_of, uint32_t* numbers) {
    make_room(static_cast<uint64_t>(size));
    uint64_t hashes[kBatch];
    for (int64_t i = 0; i < size; ++i) {
      const View& view = views[i];
      hashes[i] = length_of(view) <= kInline ? hash(view) : hash_of_long(view, bytes_of(view));
      __builtin_prefetch(&slots[hashes[i] & mask]);
    }
    for (int64_t i = 0; i < size; ++i) {
      const View& view = views[i];
      numbers[i] = length_of(view) <= kInline ? number(view, hashes[i])
                                              : number_of_long(view, hashes[i], bytes_of(view));
    }
  }

  bool is_full(int64_t more) const { return static_cast<int64_t>(counts.size()) + more >= kMostValues; }
};

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
    made->salt = mixed(seed ^ 0x9E3779B97F4A7C15ull, 0xD1342543DE82EF95ull);
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
  return static_cast<int64_t>(numbering->counts.size());
}

int64_t embcomp_numbering_bytes(const Numbering* numbering) {
  return static_cast<int64_t>(sizeof(Slot) * numbering->slots.capacity() +
                              sizeof(int64_t) * numbering->counts.capacity() + numbering->text.capacity());
}

int64_t embcomp_numbering_text_bytes(const Numbering* numbering) {
  int64_t total = 0;
  for (const Slot& slot : numbering->slots) total += length_of(slot.key);
  return total;
}

// Numbers n values. Bit `first + i` of `valid` says whether value i is there (null: all are). Returns 0, -1
// where there is no memory, -2 where there are too many.
int32_t embcomp_numbering_add(Numbering* numbering, const View* views, const uint8_t* valid, int64_t first,
                              const char* const* buffers, int64_t n, uint32_t* numbers) {
  const auto bytes_of = [buffers](const View& view) {
    return buffers[static_cast<uint32_t>(view.second)] + (view.second >> 32);
  };
  try {
    View batch[kBatch];
    for (int64_t start = 0; start < n; start += kBatch) {
      const int64_t size = n - start < kBatch ? n - start : kBatch;
      if (numbering->is_full(size)) return -2;
      for (int64_t i = 0; i < size; ++i) {
        const View& view = views[start + i];
        const View there = length_of(view) == 0 ? kEmptyText : view;
        batch[i] = is_set(valid, first + start + i) ? there : kMissing;
      }
      numbering->number_batch(batch, size, bytes_of, numbers + start);
    }
    return 0;
  } catch (const std::bad_alloc&) {
    return -1;
  }
}

// Numbers n fields of `data`, of which an empty one is missing. Returns as embcomp_numbering_add does.
int32_t embcomp_numbering_add_fields(Numbering* numbering, const View* views, const char* data, int64_t n,
                                     uint32_t* numbers) {
  const auto bytes_of = [data](const View& view) { return data + (view.second >> 32); };
  try {
    for (int64_t start = 0; start < n; start += kBatch) {
      const int64_t size = n - start < kBatch ? n - start : kBatch;
      if (numbering->is_full(size)) return -2;
      numbering->number_batch(views + start, size, bytes_of, numbers + start);
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
  const int64_t size = static_cast<int64_t>(numbering->counts.size());
  if (size > 0) std::memcpy(counts, numbering->counts.data(), sizeof(int64_t) * size);
  offsets[0] = 0;
  for (const Slot& slot : numbering->slots) {
    if (slot.number != 0) offsets[slot.number] = length_of(slot.key);
  }
  for (int64_t i = 0; i < size; ++i) offsets[i + 1] += offsets[i];
  for (const Slot& slot : numbering->slots) {
    if (slot.number == 0) continue;
    const uint32_t length = length_of(slot.key);
    char* place = text + offsets[slot.number - 1];
    if (length <= kInline) {
      std::memcpy(place, reinterpret_cast<const char*>(&slot.key) + sizeof(uint32_t), length);
    } else {
      std::memcpy(place, numbering->text.data() + slot.key.second, length);
    }
  }
}

}  // extern "C"
