// Lines of plain fields: their numbers, the places of their texts, or what these are numbered by.
//
// Plain is what every reader of delimited text takes for the same: ASCII, no carriage return, as many fields
// in each line as there are columns, whole numbers of up to 18 digits, decimals of up to 15. Anything else
// is for readers that know more: the answer is then that the block is not plain, and nothing of it counts.

#include <cstddef>
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
constexpr int64_t kBatch = 64;   // lines that are read together, a column at a time
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

// What ends fields and lines, found 64 bytes at a time; and whether the text is as plain as it has to be.
class Ends {
 public:
  Ends(const char* data, int64_t size, char separator) : data_(data), size_(size), separator_(separator) {}

  // Appends the places of ends to `found`, `count` or up to 63 more; fewer where the data has no more.
  void append(std::vector<int32_t>& found, size_t count) {
    if (found.capacity() < count + kWidth) found.reserve(count + kWidth);
    while (found.size() < count && base_ < size_) {
      uint64_t bits = marks();
      while (bits != 0) {
        found.push_back(static_cast<int32_t>(base_ + __builtin_ctzll(bits)));
        bits &= bits - 1;
      }
      base_ += kWidth;
      // The last line may lack its newline.
      if (base_ >= size_ && data_[size_ - 1] != '\n') found.push_back(static_cast<int32_t>(size_));
    }
  }

  // Of the data so far: nothing but ASCII, and no carriage return.
  bool is_plain() const { return odd_ == 0; }

  // Newlines so far, and a last line without one.
  int64_t lines() const { return lines_ + (base_ >= size_ && size_ > 0 && data_[size_ - 1] != '\n'); }

 private:
  static constexpr int64_t kWidth = 64;

  // The bits of the next 64 bytes that end something.
  uint64_t marks() {
    uint64_t found = 0, newlines = 0;
#if defined(__SSE2__)
    if (base_ + kWidth <= size_) {
      __m128i odd = _mm_setzero_si128();
      for (int i = 0; i < 4; ++i) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(data_ + base_ + 16 * i));
        const __m128i lines = _mm_cmpeq_epi8(bytes, _mm_set1_epi8('\n'));
        const __m128i fields = _mm_cmpeq_epi8(bytes, _mm_set1_epi8(separator_));
        odd = _mm_or_si128(odd, _mm_or_si128(bytes, _mm_cmpeq_epi8(bytes, _mm_set1_epi8('\r'))));
        newlines |= static_cast<uint64_t>(static_cast<uint32_t>(_mm_movemask_epi8(lines))) << (16 * i);
        found |= static_cast<uint64_t>(static_cast<uint32_t>(_mm_movemask_epi8(fields))) << (16 * i);
      }
      odd_ |= static_cast<uint32_t>(_mm_movemask_epi8(odd));
      lines_ += __builtin_popcountll(newlines);
      return found | newlines;
    }
#endif
    for (int64_t i = 0; i < kWidth && base_ + i < size_; ++i) {
      const char byte = data_[base_ + i];
      odd_ |= static_cast<unsigned char>(byte) >= 0x80 || byte == '\r';
      if (byte == '\n') newlines |= 1ull << i;
      if (byte == separator_) found |= 1ull << i;
    }
    lines_ += __builtin_popcountll(newlines);
    return found | newlines;
  }

  const char* data_;
  int64_t size_;
  char separator_;
  int64_t base_ = 0;
  int64_t lines_ = 0;
  uint32_t odd_ = 0;
};

// Which bits of the first and of the second 8 bytes belong to a text of so many bytes, up to kInline.
struct Kept {
  uint64_t first[kInline + 1];
  uint64_t second[kInline + 1];

  constexpr Kept() : first(), second() {
    for (int i = 0; i <= kInline; ++i) {
      first[i] = i < 8 ? (1ull << (8 * i)) - 1 : ~0ull;
      second[i] = i <= 8 ? 0 : (1ull << (8 * (i - 8))) - 1;
    }
  }
};
constexpr Kept kKept;

inline View view_of(const char* data, int64_t size, int64_t start, int64_t length) {
  uint64_t words[2] = {0, 0};
  if (start + 16 <= size) {
    std::memcpy(words, data + start, 8);
    std::memcpy(words + 1, data + start + 8, 8);
  } else {
    std::memcpy(words, data + start, static_cast<size_t>(length < 16 ? length : 16));
  }
  if (length > kInline) {
    return {static_cast<uint64_t>(length) | words[0] << 32, static_cast<uint64_t>(start) << 32};
  }
  const uint64_t first = words[0] & kKept.first[length], second = words[1] & kKept.second[length];
  return {static_cast<uint64_t>(length) | first << 32, first >> 32 | second << 32};
}

// A whole number of up to 8 digits without a sign, from the 8 bytes where it starts; false where it is another.
bool short_integer(const char* text, int64_t length, int64_t* value) {
  constexpr uint64_t kZeros = 0x3030303030303030ull;
  uint64_t word;
  std::memcpy(&word, text, sizeof word);
  // The last digit at the top, and zeros before the first.
  word <<= 64 - 8 * length;
  word |= length == 8 ? 0 : kZeros >> (8 * length);
  const uint64_t upper = 0xF0F0F0F0F0F0F0F0ull;
  if (((word & upper) | (((word + 0x0606060606060606ull) & upper) >> 4)) != 0x3333333333333333ull) return false;
  word = (word & 0x0F0F0F0F0F0F0F0Full) * 2561 >> 8;
  word = (word & 0x00FF00FF00FF00FFull) * 6553601 >> 16;
  *value = static_cast<int64_t>((word & 0x0000FFFF0000FFFFull) * 42949672960001ull >> 32);
  return true;
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

// What numbers fields: embcomp_numbering_add_fields.
using Number = int32_t (*)(void*, const View*, const char*, int64_t, uint32_t*);

static_assert(kBatch == 64, "the bits of a batch are one word");

struct Column {
  uint8_t kind;
  void* values;    // views, int64, float64 or uint32
  uint8_t* valid;  // bits, all 0 at the start; null where texts are numbered
  void* numbering;
  int64_t missing;
};

// Some lines of a block: field i of line r lies between the marks r * count + i and r * count + i + 1.
struct Lines {
  const char* data;
  int64_t size;
  const int32_t* marks;
  int64_t count;
  int64_t first;  // the place of the first line in the block
  int64_t rows;

  int64_t start(int64_t row, int64_t field) const { return marks[row * count + field] + 1; }
  int64_t length(int64_t row, int64_t field) const { return marks[row * count + field + 1] - start(row, field); }
};

// Which of some lines have a field, a bit for each.
class Valid {
 public:
  void add(int64_t row, bool is_there) { bits_ |= static_cast<uint64_t>(is_there) << row; }

  void write(Column& column, const Lines& lines) const {
    // Lines come by 64, so that their bits start at a byte.
    std::memcpy(column.valid + lines.first / 8, &bits_, static_cast<size_t>((lines.rows + 7) / 8));
    column.missing += lines.rows - __builtin_popcountll(bits_);
  }

 private:
  uint64_t bits_ = 0;
};

void take_texts(Column& column, const Lines& lines, int64_t field) {
  View* views = static_cast<View*>(column.values) + lines.first;
  Valid valid;
  for (int64_t r = 0; r < lines.rows; ++r) {
    const int64_t length = lines.length(r, field);
    views[r] = view_of(lines.data, lines.size, lines.start(r, field), length);
    valid.add(r, length > 0);
  }
  valid.write(column, lines);
}

// Returns false where there is no memory for the numbers.
bool take_numbers_of_texts(Column& column, const Lines& lines, int64_t field, Number number) {
  View views[kBatch];
  for (int64_t r = 0; r < lines.rows; ++r) {
    views[r] = view_of(lines.data, lines.size, lines.start(r, field), lines.length(r, field));
  }
  uint32_t* numbers = static_cast<uint32_t*>(column.values) + lines.first;
  return number(column.numbering, views, lines.data, lines.rows, numbers) == 0;
}

// Returns false where some field is no whole number.
template <typename Value>
bool take_integers(Column& column, const Lines& lines, int64_t field) {
  Value* values = static_cast<Value*>(column.values) + lines.first;
  Valid valid;
  for (int64_t r = 0; r < lines.rows; ++r) {
    const int64_t start = lines.start(r, field), length = lines.length(r, field);
    const char* text = lines.data + start;
    // A missing field is read as one of a digit, for want of a branch, and counts for nothing.
    const int64_t digits = length + (length == 0);
    int64_t value = 0;
    const bool is_short = digits <= 8 && start + 8 <= lines.size && short_integer(text, digits, &value);
    if (!is_short && length > 0 && !integer(text, length, &value)) return false;
    values[r] = static_cast<Value>(length == 0 ? 0 : value);
    valid.add(r, length > 0);
  }
  valid.write(column, lines);
  return true;
}

// Returns false where some field is no plain decimal.
bool take_decimals(Column& column, const Lines& lines, int64_t field) {
  double* values = static_cast<double*>(column.values) + lines.first;
  Valid valid;
  for (int64_t r = 0; r < lines.rows; ++r) {
    const int64_t length = lines.length(r, field);
    values[r] = 0.0;
    if (length > 0 && !decimal(lines.data + lines.start(r, field), length, values + r)) return false;
    valid.add(r, length > 0);
  }
  valid.write(column, lines);
  return true;
}

// Takes in a column of some lines. Returns 0, 1 where it is not plain, -1 where there is no memory.
int32_t take(Column& column, const Lines& lines, int64_t field, Number number) {
  switch (column.kind) {
    case kText:
      take_texts(column, lines, field);
      return 0;
    case kNumbered:
      return take_numbers_of_texts(column, lines, field, number) ? 0 : -1;
    case kInteger:
      return take_integers<int64_t>(column, lines, field) ? 0 : 1;
    case kIntegerAsDecimal:
      return take_integers<double>(column, lines, field) ? 0 : 1;
    default:
      return take_decimals(column, lines, field) ? 0 : 1;
  }
}

// Whether the marks end as many lines, each with its last field.
bool are_lines(const Lines& lines) {
  for (int64_t r = 0; r < lines.rows; ++r) {
    const int64_t end = lines.marks[(r + 1) * lines.count];
    if (end != lines.size && lines.data[end] != '\n') return false;
  }
  return true;
}

int32_t read_lines(const char* data, int64_t size, char separator, int64_t count, Column* columns, int64_t rows,
                   Number number) {
  Ends ends(data, size, separator);
  // The end of the line before, and the ends of all fields of some lines; more of them may have been found.
  std::vector<int32_t> marks{-1};
  for (int64_t row = 0; row < rows; row += kBatch) {
    const int64_t batch = rows - row < kBatch ? rows - row : kBatch;
    const size_t wanted = static_cast<size_t>(batch * count);
    ends.append(marks, wanted + 1);
    if (marks.size() < wanted + 1) return 1;
    const Lines lines{data, size, marks.data(), count, row, batch};
    if (!are_lines(lines) || !ends.is_plain()) return 1;
    for (int64_t i = 0; i < count; ++i) {
      const int32_t odd = take(columns[i], lines, i, number);
      if (odd != 0) return odd;
    }
    marks.erase(marks.begin(), marks.begin() + static_cast<std::ptrdiff_t>(wanted));
  }
  // With a newline behind each line and none within one, there are as many as lines.
  return marks.size() == 1 && marks[0] + 1 >= size && ends.lines() == rows ? 0 : 1;
}

}  // namespace

// Reads `rows` lines of `count` fields into columns, which have room for them. Returns 0, 1 where the block is
// not plain, -1 where there is no memory.
extern "C" int32_t embcomp_plain_lines(const char* data, int64_t size, char separator, int32_t count,
                                       Column* columns, int64_t rows, Number number) {
  try {
    return read_lines(data, size, separator, count, columns, rows, number);
  } catch (const std::bad_alloc&) {
    return -1;
  }
}
