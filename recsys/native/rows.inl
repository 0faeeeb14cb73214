// Kernels over rows of embedding tables, included once for each instruction set (see tables.cpp); includes nothing.
//
// D is the dimension, where it is one of those compiled for, else 0: then the table says it.

// Rows ahead of the one at hand whose lines are asked for: about the latency of memory over the time that a row takes.
constexpr int64_t kAhead = 12;
constexpr int64_t kLineBytes = 64;
constexpr int64_t kMaxLines = 4;  // a longer row's others are foreseen by the processor

template <int D, bool Write, typename V>
inline void ask_for(const V* row, int64_t dim) {
  const int64_t bytes = dim * static_cast<int64_t>(sizeof(V));
  const int64_t lines = std::min((bytes + kLineBytes - 1) / kLineBytes, kMaxLines);
  for (int64_t line = 0; line < lines; ++line) {
    __builtin_prefetch(reinterpret_cast<const char*>(row) + line * kLineBytes, Write, 3);
  }
}

inline float to_float(float value) { return value; }
inline float to_float(Bf16 value) { return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16); }

inline void put(float* to, float value) { *to = value; }
// To the nearest, ties to even; NaN stays NaN.
inline void put(Bf16* to, float value) {
  const auto bits = std::bit_cast<uint32_t>(value), nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  to->bits = static_cast<uint16_t>(value == value ? nearest : nearest | 0x7FC0);
}

// Columns that are summed together, in float, before they are written in another type.
constexpr int64_t kSummed = 128;

// Write the sums of rows for bags [begin, end) of one feature.
template <int D, typename Id, typename V>
void sum_bags(const Feature& feature, const float* weights, const Id* ids, const Id* offsets, int64_t begin,
              int64_t end, V* out, int64_t out_width) {
  const int64_t dim = D ? D : feature.dim;
  const float* table = weights + feature.weights;
  const int64_t past_all = offsets[end];
  for (int64_t at = offsets[begin]; at < std::min<int64_t>(offsets[begin] + kAhead, past_all); ++at) {
    ask_for<D, false>(table + ids[at] * dim, dim);
  }
  for (int64_t bag = begin; bag < end; ++bag) {
    V* sum = out + bag * out_width + feature.column;
    const int64_t first = offsets[bag], past = offsets[bag + 1];
    if (past == first) std::memset(sum, 0, dim * sizeof(V));
    for (int64_t at = first; at < past; ++at) {
      if (at + kAhead < past_all) ask_for<D, false>(table + ids[at + kAhead] * dim, dim);
    }
    if (past == first + 1) {
      const float* row = table + ids[first] * dim;
      for (int64_t d = 0; d < dim; ++d) put(sum + d, row[d]);
      continue;
    }
    for (int64_t from = 0; past > first && from < dim; from += kSummed) {
      const int64_t columns = std::min(kSummed, dim - from);
      float sums[kSummed] = {};
      for (int64_t at = first; at < past; ++at) {
        const float* row = table + ids[at] * dim + from;
        for (int64_t d = 0; d < columns; ++d) sums[d] += row[d];
      }
      for (int64_t d = 0; d < columns; ++d) put(sum + from + d, sums[d]);
    }
  }
}

// Over columns d of rows that do not overlap, as a loop: of lines without one GCC could not tell that, nor make vectors.
#define RECSYS_COLUMNS _Pragma("GCC ivdep") _Pragma("GCC unroll 1") for (int64_t d = 0; d < dim; ++d)

inline float towards(float mean, float square, const Rates& rates) {
  return mean / rates.mean_bias / (std::sqrt(square / rates.squares_bias) + rates.eps);
}

// Change a row of weights and its state by the sum of its gradients, by the formulas of `RowOptimizer`.
template <int D, Kind K>
inline void update_row(float* __restrict__ row, float* __restrict__ means, float* __restrict__ squares,
                       const float* __restrict__ grad, int64_t row_dim, float lr, const Rates rates) {
  const int64_t dim = D ? D : row_dim;
  float square = 0, step = lr;
  if constexpr (by_row(K)) {
    RECSYS_COLUMNS square += grad[d] * grad[d];
    square /= dim;
  }
  if constexpr (has_means(K)) {
    RECSYS_COLUMNS means[d] = rates.beta1 * means[d] + (1 - rates.beta1) * grad[d];
  }
  if constexpr (K == Kind::sgd) {
    RECSYS_COLUMNS row[d] -= step * grad[d];
  } else if constexpr (K == Kind::adagrad) {
    RECSYS_COLUMNS {
      squares[d] += grad[d] * grad[d];
      row[d] -= step * grad[d] / (std::sqrt(squares[d]) + rates.eps);
    }
  } else if constexpr (K == Kind::rowwise_adagrad) {
    *squares += square;
    step /= std::sqrt(*squares) + rates.eps;
    RECSYS_COLUMNS row[d] -= step * grad[d];
  } else if constexpr (K == Kind::partial_rowwise_adam) {
    *squares = square = rates.beta2 * *squares + (1 - rates.beta2) * square;
    const float by = towards(1, square, rates);
    RECSYS_COLUMNS row[d] -= step * (means[d] * by);
  } else {
    RECSYS_COLUMNS squares[d] = rates.beta2 * squares[d] + (1 - rates.beta2) * (grad[d] * grad[d]);
    if constexpr (K == Kind::lamb) {
      float of_row = 0, of_step = 0;
      RECSYS_COLUMNS {
        const float by = towards(means[d], squares[d], rates);
        of_row += row[d] * row[d];
        of_step += by * by;
      }
      step *= of_step > 0 ? std::sqrt(of_row) / std::sqrt(of_step) : 0;  // rows that had no gradient yet stay
    }
    RECSYS_COLUMNS row[d] -= step * towards(means[d], squares[d], rates);
  }
}

template <int D, bool First, typename V>
inline void add_clipped(float* __restrict__ sum, const V* __restrict__ grad, int64_t row_dim, float limit) {
  const int64_t dim = D ? D : row_dim;
  for (int64_t d = 0; d < dim; ++d) {
    const float cut = std::min(std::max(to_float(grad[d]), -limit), limit);
    sum[d] = First ? cut : sum[d] + cut;
  }
}

// Find the distinct ids of a table; of the ids, those of one part of `parts`.
template <typename Id>
void find_rows(const Task& task, const std::vector<Feature>& features, const Id* ids, const Id* offsets,
               int64_t grad_width, int64_t batch_size, Scratch& scratch) {
  scratch.begin(task.lookups, features[task.features.front()].rows);
  for (int64_t f : task.features) {
    const Id* bags = offsets + f * batch_size;
    for (int64_t bag = 0; bag < batch_size; ++bag) {
      const int64_t of_bag = bag * grad_width + features[f].column;
      for (int64_t at = bags[bag]; at < bags[bag + 1]; ++at) {
        const auto id = static_cast<uint32_t>(ids[at]);
        if (task.parts == 1 || part_of(id, task.parts) == task.part) scratch.add(id, of_bag);
      }
    }
  }
}

// Sum the gradients of each id, in the order of the batch, so that gradients are read ahead; the sums stay in the cache.
template <int D, typename V>
void sum_gradients(const V* grad, int64_t table_dim, float limit, Scratch& scratch) {
  const int64_t dim = D ? D : table_dim;
  const auto& came = scratch.came;
  const auto num_came = static_cast<int64_t>(came.size());
  float* sums = scratch.sums(static_cast<int64_t>(scratch.found.size()) * dim);
  uint32_t seen = 0;
  for (int64_t at = 0; at < num_came; ++at) {
    if (at + kAhead < num_came) ask_for<D, false>(grad + came[at + kAhead].grad, dim);
    float* sum = sums + came[at].found * dim;
    if (came[at].found == seen) {
      add_clipped<D, true>(sum, grad + came[at].grad, dim, limit);
      ++seen;
    } else {
      add_clipped<D, false>(sum, grad + came[at].grad, dim, limit);
    }
  }
}

// Update the row of each id by the sum of its gradients.
template <int D, Kind K>
void update_rows(const Rows& table, int64_t table_dim, float lr, const Rates& rates, Scratch& scratch) {
  const int64_t dim = D ? D : table_dim;
  const auto& found = scratch.found;
  const auto num_found = static_cast<int64_t>(found.size());
  const float* sums = scratch.sums(num_found * dim);
  const auto means_of = [&](int64_t id) { return has_means(K) ? table.means + id * dim : nullptr; };
  const auto squares_of = [&](int64_t id) {
    return K == Kind::sgd ? nullptr : table.squares + (by_row(K) ? id : id * dim);
  };
  const auto ask = [&](int64_t at) {
    if (at >= num_found) return;
    ask_for<D, true>(table.weights + found[at] * dim, dim);
    if constexpr (has_means(K)) ask_for<D, true>(means_of(found[at]), dim);
    if constexpr (by_row(K)) {
      __builtin_prefetch(squares_of(found[at]), 1, 3);
    } else if constexpr (K != Kind::sgd) {
      ask_for<D, true>(squares_of(found[at]), dim);
    }
  };
  for (int64_t at = 0; at < kAhead; ++at) ask(at);
  for (int64_t at = 0; at < num_found; ++at) {
    ask(at + kAhead);
    const int64_t id = found[at];
    update_row<D, K>(table.weights + id * dim, means_of(id), squares_of(id), sums + at * dim, dim, lr, rates);
  }
}
