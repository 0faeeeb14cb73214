// Kernels over rows of embedding tables, included once for each instruction set (see tables.cpp); includes nothing.
//
// D is the dimension, where it is one of those compiled for, else 0: then the table says it.

// Rows ahead of the one at hand whose lines are asked for: about the latency of memory over the time that a row takes.
constexpr int64_t kAhead = 12;
constexpr int64_t kLineFloats = 16;
constexpr int64_t kMaxLines = 4;  // a longer row's others are foreseen by the processor

template <int D, bool Write>
inline void ask_for(const float* row, int64_t dim) {
  const int64_t lines = std::min((dim + kLineFloats - 1) / kLineFloats, kMaxLines);
  for (int64_t line = 0; line < lines; ++line) __builtin_prefetch(row + line * kLineFloats, Write, 3);
}

// Write the sums of rows for bags [begin, end) of one feature.
template <int D, typename Id>
void sum_bags(const Feature& feature, const float* weights, const Id* ids, const Id* offsets, int64_t begin,
              int64_t end, float* out, int64_t out_width) {
  const int64_t dim = D ? D : feature.dim;
  const float* table = weights + feature.weights;
  const int64_t past_all = offsets[end];
  for (int64_t at = offsets[begin]; at < std::min<int64_t>(offsets[begin] + kAhead, past_all); ++at) {
    ask_for<D, false>(table + ids[at] * dim, dim);
  }
  for (int64_t bag = begin; bag < end; ++bag) {
    float* sum = out + bag * out_width + feature.column;
    const int64_t first = offsets[bag], past = offsets[bag + 1];
    if (past == first) std::memset(sum, 0, dim * sizeof(float));
    for (int64_t at = first; at < past; ++at) {
      if (at + kAhead < past_all) ask_for<D, false>(table + ids[at + kAhead] * dim, dim);
      const float* row = table + ids[at] * dim;
      if (at == first) {
        for (int64_t d = 0; d < dim; ++d) sum[d] = row[d];
      } else {
        for (int64_t d = 0; d < dim; ++d) sum[d] += row[d];
      }
    }
  }
}

// Change a row of weights and its state by the sum of its gradients.
template <int D, Kind K>
inline void update_row(float* __restrict__ row, float* __restrict__ squares, const float* __restrict__ grad,
                       int64_t row_dim, const Rates& rates) {
  const int64_t dim = D ? D : row_dim;
  if constexpr (K == Kind::sgd) {
    for (int64_t d = 0; d < dim; ++d) row[d] -= rates.lr * grad[d];
  } else if constexpr (K == Kind::adagrad) {
    for (int64_t d = 0; d < dim; ++d) {
      squares[d] += grad[d] * grad[d];
      row[d] -= rates.lr * grad[d] / (std::sqrt(squares[d]) + rates.eps);
    }
  } else {
    float sum = 0;
    for (int64_t d = 0; d < dim; ++d) sum += grad[d] * grad[d];
    *squares += sum / dim;
    const float step = rates.lr / (std::sqrt(*squares) + rates.eps);
    for (int64_t d = 0; d < dim; ++d) row[d] -= step * grad[d];
  }
}

template <int D, bool First>
inline void add_clipped(float* __restrict__ sum, const float* __restrict__ grad, int64_t row_dim, float limit) {
  const int64_t dim = D ? D : row_dim;
  for (int64_t d = 0; d < dim; ++d) {
    const float cut = std::min(std::max(grad[d], -limit), limit);
    sum[d] = First ? cut : sum[d] + cut;
  }
}

// Sum the gradients of each distinct id of a table, and update its row; of the ids, those of one part of `parts`.
template <int D, Kind K, typename Id>
void update_table(const Task& task, const std::vector<Feature>& features, float* weights, float* state, const Id* ids,
                  const Id* offsets, const float* grad, int64_t grad_width, int64_t batch_size, const Rates& rates,
                  Scratch& scratch) {
  const Feature& table = features[task.features.front()];
  const int64_t dim = D ? D : table.dim;
  scratch.begin(task.lookups, table.rows);
  for (int64_t f : task.features) {
    const Id* bags = offsets + f * batch_size;
    for (int64_t bag = 0; bag < batch_size; ++bag) {
      const float* of_bag = grad + bag * grad_width + features[f].column;
      for (int64_t at = bags[bag]; at < bags[bag + 1]; ++at) {
        const auto id = static_cast<uint32_t>(ids[at]);
        if (task.parts == 1 || part_of(id, task.parts) == task.part) scratch.add(id, of_bag);
      }
    }
  }

  // In the order of the batch, so that gradients are read ahead; the sums stay in the cache.
  const auto& found = scratch.found;
  const auto& came = scratch.came;
  const auto num_came = static_cast<int64_t>(came.size()), num_found = static_cast<int64_t>(found.size());
  float* sums = scratch.sums(num_found * dim);
  uint32_t seen = 0;
  for (int64_t at = 0; at < num_came; ++at) {
    if (at + kAhead < num_came) ask_for<D, false>(came[at + kAhead].grad, dim);
    float* sum = sums + came[at].found * dim;
    if (came[at].found == seen) {
      add_clipped<D, true>(sum, came[at].grad, dim, rates.limit);
      ++seen;
    } else {
      add_clipped<D, false>(sum, came[at].grad, dim, rates.limit);
    }
  }

  float* rows = weights + table.weights;
  float* squares = K == Kind::sgd ? nullptr : state + table.state;
  const auto ask = [&](int64_t at) {
    if (at >= num_found) return;
    ask_for<D, true>(rows + found[at] * dim, dim);
    if constexpr (K == Kind::rowwise_adagrad) __builtin_prefetch(squares + found[at], 1, 3);
    if constexpr (K == Kind::adagrad) ask_for<D, true>(squares + found[at] * dim, dim);
  };
  for (int64_t at = 0; at < kAhead; ++at) ask(at);
  for (int64_t at = 0; at < num_found; ++at) {
    ask(at + kAhead);
    const int64_t id = found[at];
    float* of_row = K == Kind::sgd ? nullptr : squares + (K == Kind::rowwise_adagrad ? id : id * dim);
    update_row<D, K>(rows + id * dim, of_row, sums + at * dim, dim, rates);
  }
}
