// Rows of tables summed in bags, and the gradients of the sums added back to rows; many look-ups in one call.
//
// A key is a look-up: bags of ids of one table, whose sums are columns of one output. Sums are made in the
// order of a bag's values, and gradients are added in the order of a table's keys and their values, so that
// no answer depends on the number of threads. The fields are those of `compiled_rows.py`.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

struct Key {
  float* rows;             // of the table, or of its gradient; the first column that is used
  const int64_t* ids;      // of the key's values; null: value v has row v
  const int64_t* offsets;  // (bags + 1,), counted from any start; null: bags of `size`
  const float* weights;    // of the values; null: none
  float* out;              // the first bag's sum, or its gradient
  int64_t num_rows, row_stride, width, out_stride, bags, size;
};

constexpr int64_t kAhead = 12;   // values between a row and the one that is asked for
constexpr int64_t kPart = 512;   // bags that a thread takes at a time

inline float multiply_add(float a, float b, float c) {
#if defined(__FMA__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

inline int64_t begin_of(const Key& k, int64_t bag) {
  return k.offsets ? k.offsets[bag] - k.offsets[0] : bag * k.size;
}

inline void ask_for(const Key& k, int64_t value, int64_t last) {
  if (value + kAhead < last) __builtin_prefetch(k.rows + k.ids[value + kAhead] * k.row_stride);
}

// Bags [from, to) of a key, of W columns where that is known; whether all ids are those of rows.
template <int64_t W>
bool read(const Key& k, int64_t from, int64_t to) {
  const int64_t width = W ? W : k.width, last = begin_of(k, k.bags);
  const bool copies = !k.offsets && k.size == 1 && !k.weights;
  bool good = true;
  for (int64_t bag = from; bag < to; ++bag) {
    float* out = k.out + bag * k.out_stride;
    const int64_t end = begin_of(k, bag + 1);
    float sums[W ? W : 1];
    float* sum = W ? sums : out;
    for (int64_t j = 0; j < width; ++j) sum[j] = 0.0f;
    for (int64_t v = begin_of(k, bag); v < end; ++v) {
      if (k.ids) ask_for(k, v, last);
      const int64_t id = k.ids ? k.ids[v] : v;
      if (uint64_t(id) >= uint64_t(k.num_rows)) {
        good = false;
        continue;
      }
      const float* row = k.rows + id * k.row_stride;
      if (copies) {
        std::memcpy(sum, row, 4 * size_t(width));
      } else if (k.weights) {
        const float weight = k.weights[v];
        for (int64_t j = 0; j < width; ++j) sum[j] = multiply_add(weight, row[j], sum[j]);
      } else {
        for (int64_t j = 0; j < width; ++j) sum[j] += row[j];
      }
    }
    if (W) std::memcpy(out, sum, 4 * size_t(width));
  }
  return good;
}

bool read(const Key& k, int64_t from, int64_t to) {
  switch (k.width) {
    case 4: return read<4>(k, from, to);
    case 8: return read<8>(k, from, to);
    case 16: return read<16>(k, from, to);
    case 32: return read<32>(k, from, to);
    default: return read<0>(k, from, to);
  }
}

// Adds a key's gradients to the rows that it read; where a row is a value's alone, it is written.
template <int64_t W>
void add(const Key& k) {
  const int64_t width = W ? W : k.width, last = begin_of(k, k.bags);
  for (int64_t bag = 0; bag < k.bags; ++bag) {
    const float* grad = k.out + bag * k.out_stride;
    const int64_t end = begin_of(k, bag + 1);
    for (int64_t v = begin_of(k, bag); v < end; ++v) {
      if (k.ids) ask_for(k, v, last);
      float* row = k.rows + (k.ids ? k.ids[v] : v) * k.row_stride;
      const float weight = k.weights ? k.weights[v] : 1.0f;
      if (k.ids) {
        for (int64_t j = 0; j < width; ++j) row[j] += weight * grad[j];
      } else {
        for (int64_t j = 0; j < width; ++j) row[j] = weight * grad[j];
      }
    }
  }
}

void add(const Key& k) {
  switch (k.width) {
    case 4: return add<4>(k);
    case 8: return add<8>(k);
    case 16: return add<16>(k);
    case 32: return add<32>(k);
    default: return add<0>(k);
  }
}

}  // namespace

extern "C" {

// Writes the sums of all keys. 0: some id is that of no row.
int32_t embcomp_read_rows(const Key* keys, int64_t count, int32_t threads) {
  struct Part {
    const Key* key;
    int64_t from;
  };
  std::vector<Part> parts;
  for (const Key* key = keys; key < keys + count; ++key)
    for (int64_t from = 0; from < key->bags; from += kPart) parts.push_back({key, from});
  int32_t good = 1;
#pragma omp parallel for num_threads(threads) if (threads > 1 && parts.size() > 8) \
    schedule(dynamic) reduction(&& : good)
  for (size_t n = 0; n < parts.size(); ++n) {
    const Key& key = *parts[n].key;
    good = read(key, parts[n].from, std::min(key.bags, parts[n].from + kPart)) && good;
  }
  return good;
}

// Adds the gradients of all keys' sums to the rows of tables, whose keys come one table after another:
// those of table t are `starts[t]` to `starts[t + 1]`. All ids were read before.
void embcomp_add_rows(const Key* keys, const int64_t* starts, int64_t tables, int32_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && tables > 1) schedule(dynamic)
  for (int64_t table = 0; table < tables; ++table)
    for (int64_t n = starts[table]; n < starts[table + 1]; ++n) add(keys[n]);
}

int64_t embcomp_rows_key_bytes() { return sizeof(Key); }
}
