// Kernels of what stands between matrix products, included once for each instruction set (see fused.cpp); includes
// nothing, and needs `widened`, `narrowed` and `inverse` for its instruction set.
//
// V is the type of values in memory, float or Bf16; all is computed in float, kLanes at a time.

template <typename V>
inline Floats load(const V* from) {
  if constexpr (std::is_same_v<V, float>) {
    Floats lanes;
    std::memcpy(&lanes, from, sizeof(lanes));
    return lanes;
  } else {
    Halves bits;
    std::memcpy(&bits, from, sizeof(bits));
    return reinterpret_cast<Floats>(widened(bits) << 16);
  }
}

template <typename V>
inline void store(V* to, Floats lanes) {
  if constexpr (std::is_same_v<V, float>) {
    std::memcpy(to, &lanes, sizeof(lanes));
  } else {
    const Halves bits = narrowed(lanes);
    std::memcpy(to, &bits, sizeof(bits));
  }
}

template <typename V>
inline Floats load(const V* from, int64_t count) {
  V whole[kLanes] = {};
  std::memcpy(whole, from, count * sizeof(V));
  return load(whole);
}

template <typename V>
inline void store(V* to, Floats lanes, int64_t count) {
  V whole[kLanes];
  store(whole, lanes);
  std::memcpy(to, whole, count * sizeof(V));
}

// Call `lanes(n, count...)` for each kLanes of `width` columns from n on, and for those left over with their count.
template <typename F>
inline void over_lanes(int64_t width, F lanes) {
  int64_t n = 0;
  for (; n + kLanes <= width; n += kLanes) lanes(n);
  if (n < width) lanes(n, width - n);
}

// The same for a row of N columns, unrolled where N is known.
template <int N, typename F>
inline void over_row(int64_t width, F lanes) {
  if constexpr (N) {
#pragma GCC unroll 8
    for (int64_t n = 0; n < N; n += kLanes) lanes(n);
  } else {
    over_lanes(width, lanes);
  }
}

template <typename Lanes>
inline float sum_of(Lanes v) {
  constexpr int64_t count = sizeof(Lanes) / sizeof(float);
#if __has_builtin(__builtin_shufflevector)
  if constexpr (count == 16) {
    return sum_of(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                  __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
  } else if constexpr (count == 8) {
    return sum_of(__builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7));
  } else {
    return (v[0] + v[1]) + (v[2] + v[3]);
  }
#else  // GCC 11
  float sum = 0;
  for (int64_t n = 0; n < count; ++n) sum += v[n];
  return sum;
#endif
}

// exp(x) for x <= 0, to 5e-6 of it; exp(-87) below.
inline Floats exp_negative(Floats x) {
  x = x < -87.0f ? Floats{} - 87.0f : x;
  const Ints power = __builtin_convertvector(x * 1.44269504f - 0.5f, Ints);
  const Floats n = __builtin_convertvector(power, Floats);
  const Floats r = x - n * 0.69314718f;
  Floats sum = r * 1.9875691500e-4f + 1.3981999507e-3f;
  sum = sum * r + 8.3334519073e-3f;
  sum = sum * r + 4.1665795894e-2f;
  sum = sum * r + 1.6666665459e-1f;
  sum = sum * r + 5.0000001201e-1f;
  sum = sum * (r * r) + r + 1.0f;
  return sum * reinterpret_cast<Floats>((power + 127) << 23);
}

// GELU and its slope: x P(X < x), and P(X < x) + x p(x), X normal; P errs by 2e-7 (Abramowitz and Stegun, 7.1.26).
inline Floats gelu(Floats x, Floats& slope) {
  x = x < -20.0f ? Floats{} - 20.0f : x;  // 0 from there on; and infinities take part in no sum
  const Floats near = x > 20.0f ? Floats{} + 20.0f : x;
  const Floats z = (near < 0.0f ? -near : near) * 0.70710678f;
  const Floats t = inverse(z * 0.3275911f + 1.0f);
  const Floats tail = exp_negative(-z * z);
  Floats sum = t * 1.061405429f - 1.453152027f;
  sum = sum * t + 1.421413741f;
  sum = sum * t - 0.284496736f;
  sum = sum * t + 0.254829592f;
  const Floats beyond = sum * t * tail * 0.5f;
  const Floats below = x < 0.0f ? beyond : 1.0f - beyond;
  slope = below + near * tail * 0.39894228f;
  return x * below;
}

// out = GELU(z + bias); where `Slope`, its slope takes the place of z.
template <typename V, bool Slope>
void gelu_rows(V* __restrict__ z, const float* __restrict__ bias, V* __restrict__ out, int64_t rows, int64_t width) {
  for (int64_t row = 0; row < rows; ++row, z += width, out += width) {
    over_lanes(width, [&](int64_t n, auto... count) {
      Floats slope;
      store(out + n, gelu(load(z + n, count...) + load(bias + n, count...), slope), count...);
      if constexpr (Slope) store(z + n, slope, count...);
    });
  }
}

// grad_z = grad * slope, and its sum over rows is added to grad_bias.
template <typename V>
void scaled_rows(const V* __restrict__ grad, const V* __restrict__ slope, V* __restrict__ grad_z,
                 float* __restrict__ grad_bias, int64_t rows, int64_t width) {
  for (int64_t row = 0; row < rows; ++row, slope += width, grad += width, grad_z += width) {
    over_lanes(width, [&](int64_t n, auto... count) {
      const Floats by_z = load(grad + n, count...) * load(slope + n, count...);
      store(grad_z + n, by_z, count...);
      store(grad_bias + n, load(grad_bias + n, count...) + by_z, count...);
    });
  }
}

// z = ReLU(z)
template <typename V>
void relu_rows(V* __restrict__ z, int64_t rows, int64_t width) {
  over_lanes(rows * width, [&](int64_t n, auto... count) {
    const Floats x = load(z + n, count...);
    store(z + n, x < 0.0f ? Floats{} : x, count...);
  });
}

// grad_z = grad, 0 where out is not above 0 (NaN lets it pass), and its sum over rows is added to grad_bias.
template <typename V>
void passed_rows(const V* __restrict__ grad, const V* __restrict__ out, V* __restrict__ grad_z,
                 float* __restrict__ grad_bias, int64_t rows, int64_t width) {
  for (int64_t row = 0; row < rows; ++row, out += width, grad += width, grad_z += width) {
    over_lanes(width, [&](int64_t n, auto... count) {
      const Floats by_z = load(out + n, count...) <= 0.0f ? Floats{} : load(grad + n, count...);
      store(grad_z + n, by_z, count...);
      store(grad_bias + n, load(grad_bias + n, count...) + by_z, count...);
    });
  }
}

// out = x0 * z + x
template <typename V>
void cross_rows(const V* __restrict__ x0, const V* __restrict__ z, const V* __restrict__ x, V* __restrict__ out,
                int64_t rows, int64_t width) {
  over_lanes(rows * width, [&](int64_t n, auto... count) {
    store(out + n, load(x0 + n, count...) * load(z + n, count...) + load(x + n, count...), count...);
  });
}

// grad_x0 = grad * z; grad_z = grad * x0, and its sum over rows is added to grad_bias.
template <typename V>
void cross_rows_backward(const V* __restrict__ grad, const V* __restrict__ x0, const V* __restrict__ z,
                         V* __restrict__ grad_x0, V* __restrict__ grad_z, float* __restrict__ grad_bias, int64_t rows,
                         int64_t width) {
  for (int64_t row = 0; row < rows; ++row) {
    over_lanes(width, [&](int64_t n, auto... count) {
      const Floats by_out = load(grad + n, count...), by_z = by_out * load(x0 + n, count...);
      store(grad_x0 + n, by_out * load(z + n, count...), count...);
      store(grad_z + n, by_z, count...);
      store(grad_bias + n, load(grad_bias + n, count...) + by_z, count...);
    });
    grad += width, x0 += width, z += width, grad_x0 += width, grad_z += width;
  }
}

struct Moments {
  float mean, inverse;  // of the standard deviation
};

// Keep a row, `from(n, count...)` for its lanes, and return its moments.
template <int N, typename From>
inline Moments kept(From from, Floats* row, int64_t row_width, float eps) {
  const int64_t width = N ? N : row_width;
  Floats sum{}, squares{};
  over_row<N>(width, [&](int64_t n, auto... count) { sum += row[n / kLanes] = from(n, count...); });
  const float mean = sum_of(sum) / width;
  over_row<N>(width, [&](int64_t n, auto... count) {
    Floats apart = row[n / kLanes] - mean;
    if constexpr (sizeof...(count)) apart = load(reinterpret_cast<const float*>(&apart), count...);
    squares += apart * apart;
  });
  return {mean, 1.0f / std::sqrt(sum_of(squares) / width + eps)};
}

// Rows of up to 128 columns are kept in registers.
#define RECSYS_ROW(NAME)                  \
  Floats NAME##_lanes[N ? N / kLanes : 1]; \
  Floats* NAME = N ? NAME##_lanes : reinterpret_cast<Floats*>(scratch);

template <int N, typename From, typename V>
inline void norm_row(From from, const float* gain, const float* shift, V* out, float* scratch, int64_t width,
                     float eps) {
  RECSYS_ROW(row)
  const Moments of = kept<N>(from, row, width, eps);
  over_row<N>(width, [&](int64_t n, auto... count) {
    const Floats unit = (row[n / kLanes] - of.mean) * of.inverse;
    store(out + n, unit * load(gain + n, count...) + load(shift + n, count...), count...);
  });
}

// Writes the gradient of what `from` gives, and adds those of gain and shift to theirs.
template <int N, typename From, typename V, typename G>
inline void norm_row_backward(From from, const V* grad, const float* gain, G* grad_x, float* grad_gain,
                              float* grad_shift, float* scratch, int64_t row_width, float eps) {
  const int64_t width = N ? N : row_width;
  RECSYS_ROW(row)
  const Moments of = kept<N>(from, row, width, eps);
  Floats sum{}, dot{};
  over_row<N>(width, [&](int64_t n, auto... count) {
    const Floats by_out = load(grad + n, count...), unit = (row[n / kLanes] - of.mean) * of.inverse;
    store(grad_gain + n, load(grad_gain + n, count...) + by_out * unit, count...);
    store(grad_shift + n, load(grad_shift + n, count...) + by_out, count...);
    const Floats by_unit = by_out * load(gain + n, count...);
    sum += by_unit;
    dot += by_unit * unit;
    row[n / kLanes] = unit;
  });
  const float mean = sum_of(sum) / width, along = sum_of(dot) / width;
  over_row<N>(width, [&](int64_t n, auto... count) {
    const Floats by_unit = load(grad + n, count...) * load(gain + n, count...);
    store(grad_x + n, (by_unit - mean - row[n / kLanes] * along) * of.inverse, count...);
  });
}

// LN(x) or LN(x + residual), rows [begin, end).
template <int N, typename V>
void norm_rows(const V* x, const V* residual, const float* __restrict__ gain, const float* __restrict__ shift,
               V* __restrict__ out, float* __restrict__ scratch, int64_t begin, int64_t end, int64_t row_width,
               float eps) {
  const int64_t width = N ? N : row_width;
  for (int64_t at = begin * width; at < end * width; at += width) {
    const auto alone = [&](int64_t n, auto... count) { return load(x + at + n, count...); };
    const auto both = [&](int64_t n, auto... count) { return alone(n, count...) + load(residual + at + n, count...); };
    if (residual) {
      norm_row<N>(both, gain, shift, out + at, scratch, width, eps);
    } else {
      norm_row<N>(alone, gain, shift, out + at, scratch, width, eps);
    }
  }
}

template <int N, typename V>
void norm_rows_backward(const V* __restrict__ grad, const V* x, const V* residual, const float* __restrict__ gain,
                        V* __restrict__ grad_x, float* __restrict__ grad_gain, float* __restrict__ grad_shift,
                        float* __restrict__ scratch, int64_t begin, int64_t end, int64_t row_width, float eps) {
  const int64_t width = N ? N : row_width;
  for (int64_t at = begin * width; at < end * width; at += width) {
    const auto alone = [&](int64_t n, auto... count) { return load(x + at + n, count...); };
    const auto both = [&](int64_t n, auto... count) { return alone(n, count...) + load(residual + at + n, count...); };
    if (residual) {
      norm_row_backward<N>(both, grad + at, gain, grad_x + at, grad_gain, grad_shift, scratch, width, eps);
    } else {
      norm_row_backward<N>(alone, grad + at, gain, grad_x + at, grad_gain, grad_shift, scratch, width, eps);
    }
  }
}

// to = from + Mix(from), for T tokens of T heads: to[h, t] = from[h, t] + from[t, h].
inline void add_mixed(const float* __restrict__ from, float* __restrict__ to, int64_t tokens, int64_t width) {
  const int64_t columns = width / tokens;
  for (int64_t h = 0; h < tokens; ++h) {
    for (int64_t t = 0; t < tokens; ++t) {
      const float *own = from + h * width + t * columns, *other = from + t * width + h * columns;
      float* sum = to + h * width + t * columns;
      for (int64_t c = 0; c < columns; ++c) sum[c] = own[c] + other[c];
    }
  }
}

// x + Mix(x) of tokens [T, B, width] at one row of the batch. `room` is for twice T * width.
template <int N, typename V>
inline const float* mixed_at(int64_t row, const V* x, float* room, int64_t tokens, int64_t rows, int64_t width) {
  for (int64_t t = 0; t < tokens; ++t) {
    const V* token = x + (t * rows + row) * width;
    over_lanes(width, [&](int64_t n, auto... count) {
      store(room + t * width + n, load(token + n, count...), count...);
    });
  }
  add_mixed(room, room + tokens * width, tokens, width);
  return room + tokens * width;
}

// Behind the lanes of one row.
inline float* behind_row(float* scratch, int64_t width) { return scratch + (width + kLanes - 1) / kLanes * kLanes; }

// LN(x + Mix(x)) of tokens [T, B, width], rows [begin, end) of the batch.
template <int N, typename V>
void mix_norm_rows(const V* __restrict__ x, const float* __restrict__ gain, const float* __restrict__ shift,
                   V* __restrict__ out, float* __restrict__ scratch, int64_t begin, int64_t end, int64_t tokens,
                   int64_t rows, int64_t row_width, float eps) {
  const int64_t width = N ? N : row_width;
  float* room = behind_row(scratch, width);
  for (int64_t row = begin; row < end; ++row) {
    const float* mixed = mixed_at<N>(row, x, room, tokens, rows, width);
    for (int64_t t = 0; t < tokens; ++t) {
      const auto from = [&](int64_t n, auto... count) { return load(mixed + t * width + n, count...); };
      norm_row<N>(from, gain, shift, out + (t * rows + row) * width, scratch, width, eps);
    }
  }
}

template <int N, typename V>
void mix_norm_rows_backward(const V* __restrict__ grad, const V* __restrict__ x, const float* __restrict__ gain,
                            V* __restrict__ grad_x, float* __restrict__ grad_gain, float* __restrict__ grad_shift,
                            float* __restrict__ scratch, int64_t begin, int64_t end, int64_t tokens, int64_t rows,
                            int64_t row_width, float eps) {
  const int64_t width = N ? N : row_width;
  float *room = behind_row(scratch, width), *by_mixed = room + 2 * tokens * width;
  for (int64_t row = begin; row < end; ++row) {
    const float* mixed = mixed_at<N>(row, x, room, tokens, rows, width);
    for (int64_t t = 0; t < tokens; ++t) {
      const auto from = [&](int64_t n, auto... count) { return load(mixed + t * width + n, count...); };
      norm_row_backward<N>(from, grad + (t * rows + row) * width, gain, by_mixed + t * width, grad_gain, grad_shift,
                           scratch, width, eps);
    }
    add_mixed(by_mixed, room, tokens, width);  // Mix is its own inverse, and its own transpose
    for (int64_t t = 0; t < tokens; ++t) {
      V* to = grad_x + (t * rows + row) * width;
      over_lanes(width, [&](int64_t n, auto... count) {
        store(to + n, load(room + t * width + n, count...), count...);
      });
    }
  }
}

// to[c, r] = from[r, c]
template <typename V>
inline void transpose(const V* __restrict__ from, V* __restrict__ to, int64_t rows, int64_t columns) {
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t r = 0; r < rows; ++r) to[c * rows + r] = from[r * columns + c];
  }
}

// [B, rows, columns] -> [B, columns, rows]
template <typename V>
void transpose_each(const V* from, V* to, int64_t count, int64_t rows, int64_t columns) {
  for (int64_t at = 0; at < count * rows * columns; at += rows * columns) {
    transpose(from + at, to + at, rows, columns);
  }
}

// What a row of a batch gives for token t of Wukong's output: `fm` [F, D] and then the first of `tokens` [N, D], plus
// the residual [F + L, D], which is x, or the last of `tokens`.
template <typename V>
struct WukongRow {
  const V *fm, *tokens, *residual;
  int64_t num_fm, dim;

  auto at(int64_t t) const {
    const V* own = (t < num_fm ? fm : tokens - num_fm * dim) + t * dim;
    const V* more = residual + t * dim;
    return [=](int64_t n, auto... count) { return load(own + n, count...) + load(more + n, count...); };
  }
};

// The row `b` of a batch, whose tokens [D, N] are put in `room` as [N, D].
template <typename V>
inline WukongRow<V> wukong_row(const Wukong<V>& all, int64_t b, V* room) {
  transpose(all.tokens + b * all.num_tokens * all.dim, room, all.dim, all.num_tokens);
  const V* residual = all.x ? all.x + b * all.num_out * all.dim : room + (all.num_tokens - all.num_out) * all.dim;
  return {all.fm + b * all.num_fm * all.dim, room, residual, all.num_fm, all.dim};
}

template <int N, typename V>
void wukong_norm_rows(const Wukong<V>& all, const float* __restrict__ gain, const float* __restrict__ shift,
                      V* __restrict__ out, float* __restrict__ scratch, int64_t begin, int64_t end, float eps) {
  V* room = reinterpret_cast<V*>(behind_row(scratch, all.dim));
  for (int64_t b = begin; b < end; ++b) {
    const auto row = wukong_row(all, b, room);
    for (int64_t t = 0; t < all.num_out; ++t) {
      norm_row<N>(row.at(t), gain, shift, out + (b * all.num_out + t) * all.dim, scratch, all.dim, eps);
    }
  }
}

template <int N, typename V>
void wukong_norm_rows_backward(const V* __restrict__ grad, const Wukong<V>& all, const float* __restrict__ gain,
                               V* __restrict__ grad_fm, V* __restrict__ grad_tokens, V* __restrict__ grad_x,
                               float* __restrict__ grad_gain, float* __restrict__ grad_shift,
                               float* __restrict__ scratch, int64_t begin, int64_t end, float eps) {
  V* room = reinterpret_cast<V*>(behind_row(scratch, all.dim));
  V* by_tokens = room + all.num_tokens * all.dim;
  const int64_t num_linear = all.num_out - all.num_fm, dim = N ? N : all.dim;
  for (int64_t b = begin; b < end; ++b) {
    const auto row = wukong_row(all, b, room);
    V* by_residual = all.x ? grad_x + b * all.num_out * dim : by_tokens + num_linear * dim;
    for (int64_t t = 0; t < all.num_out; ++t) {
      norm_row_backward<N>(row.at(t), grad + (b * all.num_out + t) * dim, gain, by_residual + t * dim, grad_gain,
                           grad_shift, scratch, dim, eps);
    }
    std::memcpy(grad_fm + b * all.num_fm * dim, by_residual, all.num_fm * dim * sizeof(V));
    std::memcpy(by_tokens, by_residual + all.num_fm * dim, num_linear * dim * sizeof(V));
    transpose(by_tokens, grad_tokens + b * all.num_tokens * dim, all.num_tokens, dim);
  }
}
