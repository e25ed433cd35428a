// Lines of plain fields: their numbers, the places of their texts, or what these are numbered by.
//
// Plain is what every reader of delimited text takes for the same: ASCII, no carriage return, as many fields
// in each line as there are columns, whole numbers of up to 18 digits, decimals of up to 15. Anything else
// is for readers that know more: the answer is then that the block is not plain, and nothing of it counts.

#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace {

constexpr int kText = 0;
constexpr int kInteger = 1;
constexpr int kDecimal = 2;
constexpr int kIntegerAsDecimal = 3;
constexpr int kNumbered = 4;
constexpr int64_t kBatch = 64;   // texts of a column that are numbered together
constexpr int64_t kInline = 12;  // bytes of a text that lies in its Arrow view
constexpr int kMostDigits = 18;
constexpr int kMostDecimals = 15;

constexpr double kPowers[] = {1e0, 1e1, 1e2,  1e3,  1e4,  1e5,  1e6,  1e7,
                              1e8, 1e9, 1e10, 1e11, 1e12, 1e13, 1e14, 1e15};

// Arrow's view of a text on a little-endian machine: the length and four bytes; eight bytes more, or of a long
// text the buffer, 0, and the place in it.
struct View {
  uint64_t first;
  uint64_t second;
};

// Whether there is nothing but ASCII, and no carriage return.
bool is_plain_text(const char* data, int64_t size) {
  unsigned char all = 0, returns = 0;
  for (int64_t i = 0; i < size; ++i) {
    all |= static_cast<unsigned char>(data[i]);
    returns |= static_cast<unsigned char>(data[i] == '\r');
  }
  return all < 0x80 && returns == 0;
}

// What ends fields and lines, found sixteen bytes at a time.
class Ends {
 public:
  Ends(const char* data, int64_t size, char separator)
      : data_(data), size_(size), separator_(separator) { load(); }

  // The place of the next end; the size of the data where there is none.
  int64_t next() {
    while (bits_ == 0) {
      base_ += kWidth;
      if (base_ >= size_) return size_;
      load();
    }
    const int64_t at = base_ + __builtin_ctz(bits_);
    bits_ &= bits_ - 1;
    return at;
  }

 private:
  static constexpr int64_t kWidth = 16;

  void load() {
    bits_ = 0;
#if defined(__SSE2__)
    if (base_ + kWidth <= size_) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(data_ + base_));
      const __m128i found = _mm_or_si128(_mm_cmpeq_epi8(bytes, _mm_set1_epi8(separator_)),
                                         _mm_cmpeq_epi8(bytes, _mm_set1_epi8('\n')));
      bits_ = static_cast<uint32_t>(_mm_movemask_epi8(found));
      return;
    }
#endif
    for (int64_t i = 0; i < kWidth && base_ + i < size_; ++i) {
      const char byte = data_[base_ + i];
      if (byte == separator_ || byte == '\n') bits_ |= 1u << i;
    }
  }

  const char* data_;
  int64_t size_;
  char separator_;
  int64_t base_ = 0;
  uint32_t bits_ = 0;
};

View view_of(const char* data, int64_t size, int64_t start, int64_t length) {
  uint64_t words[2] = {0, 0};
  if (start + 16 <= size) {
    std::memcpy(words, data + start, 16);
  } else {
    std::memcpy(words, data + start, static_cast<size_t>(length < 16 ? length : 16));
  }
  if (length > kInline) {
    return {static_cast<uint64_t>(length) | words[0] << 32, static_cast<uint64_t>(start) << 32};
  }
  if (length < 8) words[0] &= (1ull << (8 * length)) - 1;
  words[1] &= length <= 8 ? 0 : (1ull << (8 * (length - 8))) - 1;
  return {static_cast<uint64_t>(length) | words[0] << 32, words[0] >> 32 | words[1] << 32};
}

// A whole number, or false where the bytes are anything else.
bool integer(const char* text, int64_t length, int64_t* value) {
  const bool negative = length > 0 && text[0] == '-';
  const int64_t digits = length - negative;
  if (digits < 1 || digits > kMostDigits) return false;
  int64_t found = 0;
  for (int64_t i = negative; i < length; ++i) {
    const unsigned digit = static_cast<unsigned char>(text[i]) - '0';
    if (digit > 9) return false;
    found = 10 * found + digit;
  }
  *value = negative ? -found : found;
  return true;
}

// A decimal that one division gives exactly rounded: both of its numbers are exact.
bool decimal(const char* text, int64_t length, double* value) {
  const bool negative = length > 0 && text[0] == '-';
  int64_t found = 0, digits = 0, behind = -1;
  for (int64_t i = negative; i < length; ++i) {
    if (text[i] == '.' && behind < 0 && digits > 0) {
      behind = 0;
      continue;
    }
    const unsigned digit = static_cast<unsigned char>(text[i]) - '0';
    if (digit > 9 || ++digits > kMostDecimals) return false;
    found = 10 * found + digit;
    behind += behind >= 0;
  }
  if (digits == 0 || behind == 0) return false;
  const double size = static_cast<double>(found) / kPowers[behind < 0 ? 0 : behind];
  *value = negative ? -size : size;
  return true;
}

}  // namespace

namespace {

// What numbers texts: embcomp_numbering_add.
using Number = int32_t (*)(void*, const View*, const uint8_t*, int64_t, const char* const*, int64_t, uint32_t*);

struct Column {
  uint8_t kind;
  void* values;    // views, int64, float64 or uint32
  uint8_t* valid;  // bits, all 0 at the start; null where texts are numbered
  void* numbering;
  int64_t missing;
};

struct Batch {
  View views[kBatch];
  uint8_t valid[kBatch / 8];
};

// Takes in one field; false where it is not plain.
bool take(Column& column, Batch& batch, const char* data, int64_t size, int64_t start, int64_t length,
          int64_t row) {
  column.missing += length == 0;
  if (column.kind == kNumbered) {
    const int64_t at = row % kBatch;
    batch.views[at] = length == 0 ? View{0, 0} : view_of(data, size, start, length);
    const uint8_t bit = static_cast<uint8_t>(1u << (at & 7));
    if (length == 0) batch.valid[at >> 3] &= static_cast<uint8_t>(~bit);
    else batch.valid[at >> 3] |= bit;
    return true;
  }
  if (length == 0) {
    if (column.kind == kText) static_cast<View*>(column.values)[row] = View{0, 0};
    else static_cast<int64_t*>(column.values)[row] = 0;
    return true;
  }
  column.valid[row >> 3] |= static_cast<uint8_t>(1u << (row & 7));
  int64_t whole = 0;
  switch (column.kind) {
    case kText:
      static_cast<View*>(column.values)[row] = view_of(data, size, start, length);
      return true;
    case kInteger:
      return integer(data + start, length, static_cast<int64_t*>(column.values) + row);
    case kIntegerAsDecimal:
      if (!integer(data + start, length, &whole)) return false;
      static_cast<double*>(column.values)[row] = static_cast<double>(whole);
      return true;
    default:
      return decimal(data + start, length, static_cast<double*>(column.values) + row);
  }
}

// Numbers the texts of the last rows; false where there is no memory for them.
bool number_batch(Column* columns, Batch* batches, int32_t count, const char* data, Number number, int64_t rows) {
  const int64_t size = (rows - 1) % kBatch + 1;
  for (int32_t i = 0; i < count; ++i) {
    if (columns[i].kind != kNumbered) continue;
    uint32_t* numbers = static_cast<uint32_t*>(columns[i].values) + (rows - size);
    if (number(columns[i].numbering, batches[i].views, batches[i].valid, 0, &data, size, numbers) != 0) {
      return false;
    }
  }
  return true;
}

}  // namespace

// Reads `rows` lines of `count` fields into columns, which have room for them. Returns 0, 1 where the block is
// not plain, -1 where there is no memory.
extern "C" int32_t embcomp_plain_lines(const char* data, int64_t size, char separator, int32_t count,
                                       Column* columns, int64_t rows, Number number) {
  if (!is_plain_text(data, size)) return 1;
  std::vector<Batch> batches;
  try {
    batches.resize(static_cast<size_t>(count));
  } catch (const std::bad_alloc&) {
    return -1;
  }
  Ends ends(data, size, separator);
  int64_t start = 0;
  for (int64_t row = 0; row < rows; ++row) {
    if (start >= size) return 1;
    for (int32_t i = 0; i < count; ++i) {
      const int64_t end = ends.next();
      // The last line may lack its newline.
      const bool ends_line = end == size || data[end] == '\n';
      if (ends_line != (i + 1 == count)) return 1;
      if (!take(columns[i], batches[i], data, size, start, end - start, row)) return 1;
      start = end + 1;
    }
    if ((row + 1) % kBatch == 0 || row + 1 == rows) {
      if (number != nullptr && !number_batch(columns, batches.data(), count, data, number, row + 1)) return -1;
    }
  }
  return start >= size ? 0 : 1;
}
