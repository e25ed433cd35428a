// Numbers that are looked up in a table of consecutive whole ones, and which of them are not in it.

#include <cstdint>
#include <cstring>

extern "C" {

// Looks up n numbers, given the entries for the whole numbers from `least` on: what each becomes, and a byte that
// says whether it is to be counted. Bit `first + i` of `valid` says whether number i is there (null: all are);
// one that is not becomes 0. The places of numbers that the table lacks go to `left`, which has room for n + 1.
// Returns how many there are of these; adds to `counted`.
int64_t embcomp_tabulated(const double* numbers, const uint8_t* valid, int64_t first, int64_t n, const float* entries,
                          const uint8_t* counts, int64_t least, int64_t size, float* found, int64_t* counted,
                          int64_t* left) {
  const double low = static_cast<double>(least), high = static_cast<double>(least + size);
  int64_t missing = 0, sum = 0;
  // Nothing here branches on numbers: which are missing, or not in the table, cannot be foreseen.
  for (int64_t i = 0; i < n; ++i) {
    const int64_t bit = first + i;
    const uint32_t there = valid == nullptr ? 1u : valid[bit >> 3] >> (bit & 7) & 1u;
    const double number = numbers[i];
    const int64_t whole = static_cast<int64_t>(number >= low && number < high ? number : low);
    const double again = static_cast<double>(whole);
    uint64_t bits, bits_again;
    std::memcpy(&bits, &number, sizeof bits);
    std::memcpy(&bits_again, &again, sizeof bits_again);
    // By their bits: -0.0 has no place.
    const uint32_t same = bits == bits_again;
    uint32_t entry;
    std::memcpy(&entry, entries + (whole - least), sizeof entry);
    entry &= 0u - (there & same);
    std::memcpy(found + i, &entry, sizeof entry);
    sum += (there & same) * counts[whole - least];
    left[missing] = i;
    missing += there & (same ^ 1u);
  }
  *counted += sum;
  return missing;
}

}  // extern "C"
