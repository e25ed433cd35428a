// Rows that a gate lets through, cut to prefixes, and the gradients: one pass over the rows each.

#include <cmath>
#include <cstdint>

namespace {

// What `Step` of `threshold_gate.py` says is its derivative.
inline float slope(float u) {
  const float far = std::fabs(u);
  return far <= 0.4f ? 2.0f - 4.0f * far : far <= 1.0f ? 0.4f : 0.0f;
}

inline int64_t width_of(const int64_t* widths, int64_t row, int64_t columns) {
  return widths ? (widths[row] < columns ? widths[row] : columns) : columns;
}

}  // namespace

extern "C" {

// The L1 or L2 norms of rows (count, columns): (count,).
void embcomp_norms(const float* rows, int64_t count, int64_t columns, int32_t norm, float* norms) {
  for (int64_t n = 0; n < count; ++n) {
    const float* row = rows + n * columns;
    float sum = 0.0f;
    for (int64_t j = 0; j < columns; ++j) sum += norm == 1 ? std::fabs(row[j]) : row[j] * row[j];
    norms[n] = norm == 1 ? sum : std::sqrt(sum);
  }
}

// The first `widths` columns of the rows whose `u` is positive, zeros elsewhere.
void embcomp_gate(const float* rows, const float* u, const int64_t* widths, int64_t count,
                  int64_t columns, float* found) {
  for (int64_t n = 0; n < count; ++n) {
    const int64_t width = u[n] > 0.0f ? width_of(widths, n, columns) : 0;
    const float* row = rows + n * columns;
    float* to = found + n * columns;
    for (int64_t j = 0; j < columns; ++j) to[j] = row[j] * (j < width ? 1.0f : 0.0f);  // keeps NaN
  }
}

// The gradients of rows, whose norms were divided by `mean` to make `u`; that of `u` is written to `pulls`.
void embcomp_gate_grads(const float* rows, const float* grads, const float* norms, const float* u,
                        const int64_t* widths, int64_t count, int64_t columns, int32_t norm,
                        float mean, float* found, float* pulls) {
  for (int64_t n = 0; n < count; ++n) {
    const int64_t width = width_of(widths, n, columns);
    const float* row = rows + n * columns;
    const float* grad = grads + n * columns;
    float* to = found + n * columns;
    float pull = 0.0f;
    for (int64_t j = 0; j < width; ++j) pull += grad[j] * row[j];
    pulls[n] = pull *= slope(u[n]);
    const float along = pull / mean;
    const bool open = u[n] > 0.0f;
    for (int64_t j = 0; j < columns; ++j) {
      const float direction = norm == 1 ? float((row[j] > 0.0f) - (row[j] < 0.0f)) : row[j] / norms[n];
      to[j] = along * direction + (open && j < width ? grad[j] : 0.0f);
    }
  }
}
}
