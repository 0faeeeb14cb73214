// Lookup and update of embedding tables on a CPU, near the speed of its memory; see recsys/sharding/native.py.
//
// The update finds the distinct ids of a table in a hash table that stays in the cache, sums their gradients in one
// that does so too, and then goes through the rows once, asking for them well ahead of their use. A table is one
// thread's, or a part of its ids, chosen by their hash, so no row is written by two; gradients of a row are summed in
// the order of the batch, whatever the number of threads. Threads take tables from a queue and meet once: FBGEMM's
// meet several times a table, and wait there for whichever has lost its core.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "bf16.h"
#include "instructions.h"

namespace recsys {
namespace {

constexpr uint32_t kNone = std::numeric_limits<uint32_t>::max();

// What `tables` says of each feature, in this order.
struct Feature {
  int64_t weights;  // where its table begins, in elements
  int64_t state;    // where the table's state begins
  int64_t rows;
  int64_t dim;
  int64_t column;  // where its sums stand in a row of the output
  int64_t table;   // features of one table stand next to one another
};
constexpr int64_t kFacts = 6;

enum class Kind { sgd, adagrad, rowwise_adagrad, adam, partial_rowwise_adam, lamb };

// Kinds that keep a mean of gradients too; and those whose squares are one a row.
constexpr bool has_means(Kind kind) { return kind >= Kind::adam; }
constexpr bool by_row(Kind kind) { return kind == Kind::rowwise_adagrad || kind == Kind::partial_rowwise_adam; }

struct Rates {
  float eps, limit, beta1, beta2;
  float mean_bias, squares_bias;  // what means that began as 0 are divided by: 1 - beta^updates
};

// Of a table: weights, means of gradients, which lie as the weights do, and (means of) squares.
struct Rows {
  float *weights, *means, *squares;
};

// The ids of a table, or one part of them.
struct Task {
  std::vector<int64_t> features;
  int64_t lookups;  // about how many
  int part, parts;
};

inline int part_of(uint32_t id, int parts) {
  return static_cast<int>((static_cast<uint64_t>(id * 0x85EBCA6Bu) * parts) >> 32);
}

// The distinct ids of a part of a table, in the order in which they came first, and whose each gradient is.
class Scratch {
 public:
  struct Came {
    int64_t grad;    // where it begins
    uint32_t found;  // in which place its id is
  };
  std::vector<uint32_t> found;
  std::vector<Came> came;

  void begin(int64_t lookups, int64_t rows) {
    bits_ = 6;
    while ((int64_t{1} << bits_) < 2 * lookups) ++bits_;
    // As many slots as rows need no hash, and no two ids meet.
    direct_ = (int64_t{1} << bits_) >= rows;
    slots_.assign(size_t{1} << bits_, Slot{kNone, kNone});
    found.clear();
    came.clear();
  }

  void add(uint32_t id, int64_t grad) {
    if (!direct_ && 2 * found.size() >= slots_.size()) grow();
    Slot& slot = slot_of(id);
    if (slot.found == kNone) {
      slot = {id, static_cast<uint32_t>(found.size())};
      found.push_back(id);
    }
    came.push_back({grad, slot.found});
  }

  float* sums(int64_t size) {
    if (static_cast<int64_t>(sums_.size()) < size) sums_.resize(size);
    return sums_.data();
  }

 private:
  struct Slot {
    uint32_t id, found;
  };

  Slot& slot_of(uint32_t id) {
    const uint32_t mask = static_cast<uint32_t>(slots_.size()) - 1;
    uint32_t at = direct_ ? id : (id * 0x9E3779B1u) >> (32 - bits_);
    while (slots_[at].found != kNone && slots_[at].id != id) at = (at + 1) & mask;
    return slots_[at];
  }

  // A part of a skewed table may hold more than its share.
  void grow() {
    ++bits_;
    slots_.assign(size_t{1} << bits_, Slot{kNone, kNone});
    for (uint32_t at = 0; at < found.size(); ++at) slot_of(found[at]) = {found[at], at};
  }

  int bits_ = 0;
  bool direct_ = false;
  std::vector<Slot> slots_;
  std::vector<float> sums_;
};

namespace plain {
#include "rows.inl"
}

#ifdef RECSYS_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2")
namespace avx2 {
#include "rows.inl"
}
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2")
namespace avx512 {
#include "rows.inl"
}
#pragma GCC pop_options
#define RECSYS_WIDEST(FUNCTION, ...)                                       \
  (in_use() >= Instructions::avx512 ? avx512::FUNCTION<__VA_ARGS__>        \
   : in_use() >= Instructions::avx2 ? avx2::FUNCTION<__VA_ARGS__>          \
                                    : plain::FUNCTION<__VA_ARGS__>)
#else
#define RECSYS_WIDEST(FUNCTION, ...) plain::FUNCTION<__VA_ARGS__>
#endif

#define RECSYS_FOR_DIM(DIM, ...)                                     \
  switch (DIM) {                                                     \
    case 8: { constexpr int D = 8; __VA_ARGS__; break; }             \
    case 16: { constexpr int D = 16; __VA_ARGS__; break; }           \
    case 32: { constexpr int D = 32; __VA_ARGS__; break; }           \
    case 64: { constexpr int D = 64; __VA_ARGS__; break; }           \
    case 128: { constexpr int D = 128; __VA_ARGS__; break; }         \
    default: { constexpr int D = 0; __VA_ARGS__; break; }            \
  }

// Bags that a thread sums before it takes others, of all features: their sums stay in its cache.
constexpr int64_t kBlock = 128;
// Parts that a thread gets, so that they end about together.
constexpr int64_t kPartsAThread = 3;
// Fewer lookups than that are not worth a part: each part reads all ids of its table.
constexpr int64_t kLeastLookups = 2048;
// The sums of a part stay in the cache of a core, unless that takes more parts than this.
constexpr int64_t kSumsBytes = 512 * 1024;
constexpr int64_t kMostParts = 16;

std::vector<Feature> features_of(const at::Tensor& tables) {
  TORCH_CHECK(tables.dim() == 2 && tables.size(1) == kFacts && tables.is_contiguous(), "tables [F, 6] expected");
  std::vector<Feature> features;
  const auto* facts = tables.const_data_ptr<int64_t>();
  for (int64_t f = 0; f < tables.size(0); ++f, facts += kFacts) {
    features.push_back({facts[0], facts[1], facts[2], facts[3], facts[4], facts[5]});
    TORCH_CHECK(facts[2] < kNone, "a table of ", facts[2], " rows: at most 2^32 - 2");
  }
  return features;
}

int64_t batch_size_of(const at::Tensor& offsets, size_t num_features) {
  TORCH_CHECK(num_features > 0 && (offsets.numel() - 1) % static_cast<int64_t>(num_features) == 0, "offsets [F B + 1]");
  return (offsets.numel() - 1) / static_cast<int64_t>(num_features);
}

void check(const at::Tensor& weights, const at::Tensor& ids, const at::Tensor& offsets) {
  TORCH_CHECK(weights.scalar_type() == at::kFloat && weights.is_contiguous(), "contiguous float32 weights expected");
  TORCH_CHECK(ids.is_contiguous() && offsets.is_contiguous(), "contiguous ids and offsets expected");
  TORCH_CHECK(ids.scalar_type() == offsets.scalar_type(), "ids and offsets of one type expected");
}

template <typename Id>
void check_ids(const Feature& feature, int64_t f, const Id* ids, int64_t begin, int64_t end) {
  uint64_t highest = 0;  // of negative ids too, which are beyond all others
  for (int64_t at = begin; at < end; ++at) {
    highest = std::max(highest, static_cast<uint64_t>(static_cast<int64_t>(ids[at])));
  }
  TORCH_CHECK_INDEX(begin == end || highest < static_cast<uint64_t>(feature.rows), "feature ", f, " has id ",
                    static_cast<int64_t>(highest), ", its table ", feature.rows, " rows");
}

template <typename Id, typename V>
void lookup(const std::vector<Feature>& features, const at::Tensor& weights, const at::Tensor& ids,
            const at::Tensor& offsets, int64_t batch_size, at::Tensor& out) {
  const int64_t blocks = (batch_size + kBlock - 1) / kBlock;
  const auto* all_offsets = offsets.const_data_ptr<Id>();
  const auto* all_ids = ids.const_data_ptr<Id>();
  TORCH_CHECK_INDEX(all_offsets[0] == 0 && all_offsets[offsets.numel() - 1] == ids.numel(), "offsets do not fit ids");
  // Threads take blocks as they come to them: one whose core has something else to do holds up no other.
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), blocks), 1, [&](int64_t, int64_t) {
    for (int64_t block; (block = next.fetch_add(1)) < blocks;) {
      const int64_t begin = block * kBlock, end = std::min(begin + kBlock, batch_size);
      for (size_t f = 0; f < features.size(); ++f) {
        const Id* bags = all_offsets + static_cast<int64_t>(f) * batch_size;
        for (int64_t bag = begin; bag < end; ++bag) {
          TORCH_CHECK_INDEX(bags[bag] <= bags[bag + 1] && bags[bag + 1] <= ids.numel(), "offsets do not fit ids");
        }
        check_ids(features[f], static_cast<int64_t>(f), all_ids, bags[begin], bags[end]);
        RECSYS_FOR_DIM(features[f].dim, {
          const auto kernel = RECSYS_WIDEST(sum_bags, D, Id, V);
          kernel(features[f], weights.const_data_ptr<float>(), all_ids, bags, begin, end,
                 static_cast<V*>(out.mutable_data_ptr()), out.size(1));
        })
      }
    }
  });
}

// Call `run(Id{}, V{})` with the types of ids, and of sums or their gradients.
template <typename F>
void by_types(const at::Tensor& ids, const at::Tensor& values, F run) {
  const auto by_values = [&](auto id) {
    if (values.scalar_type() == at::kBFloat16) {
      run(id, Bf16{});
    } else {
      run(id, float{});
    }
  };
  if (ids.scalar_type() == at::kInt) {
    by_values(int32_t{});
  } else {
    by_values(int64_t{});
  }
}

at::Tensor lookup_sum(const at::Tensor& weights, const at::Tensor& tables, const at::Tensor& ids,
                      const at::Tensor& offsets, int64_t width, at::ScalarType dtype) {
  check(weights, ids, offsets);
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16, "sums of float32 or bfloat16 expected, not ", dtype);
  const auto features = features_of(tables);
  const int64_t batch_size = batch_size_of(offsets, features.size());
  auto out = at::empty({batch_size, width}, weights.options().dtype(dtype));
  by_types(ids, out, [&](auto id, auto v) {
    lookup<decltype(id), decltype(v)>(features, weights, ids, offsets, batch_size, out);
  });
  return out;
}

template <typename Id>
std::vector<Task> tasks_of(const std::vector<Feature>& features, const Id* offsets, int64_t batch_size) {
  std::vector<Task> tables;
  int64_t lookups = 0;
  for (int64_t f = 0; f < static_cast<int64_t>(features.size()); ++f) {
    if (tables.empty() || features[f].table != features[tables.back().features.front()].table) {
      tables.push_back({{}, 0, 0, 1});
    }
    const int64_t own = offsets[(f + 1) * batch_size] - offsets[f * batch_size];
    tables.back().features.push_back(f);
    tables.back().lookups += own;
    lookups += own;
  }
  const int64_t threads = at::get_num_threads();
  const int64_t most = std::max(lookups / (threads * kPartsAThread), kLeastLookups);
  std::vector<Task> tasks;
  for (const Task& table : tables) {
    if (!table.lookups) continue;
    TORCH_CHECK(table.lookups < kNone, "a table with ", table.lookups, " lookups: at most 2^32 - 2");
    const Feature& first = features[table.features.front()];
    const int64_t sums_bytes = std::min(table.lookups, first.rows) * first.dim * static_cast<int64_t>(sizeof(float));
    const int64_t balanced = threads == 1 ? 1 : (table.lookups + most - 1) / most;
    const int64_t cached = std::min((sums_bytes + kSumsBytes - 1) / kSumsBytes, kMostParts);
    const auto parts = static_cast<int>(std::max(balanced, cached));
    for (int part = 0; part < parts; ++part) tasks.push_back({table.features, table.lookups / parts, part, parts});
  }
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.lookups > b.lookups; });
  return tasks;
}

using UpdateRows = void (*)(const Rows&, int64_t, float, const Rates&, Scratch&);

template <int D>
UpdateRows update_rows_of(Kind kind) {
  switch (kind) {
    case Kind::sgd: return RECSYS_WIDEST(update_rows, D, Kind::sgd);
    case Kind::adagrad: return RECSYS_WIDEST(update_rows, D, Kind::adagrad);
    case Kind::rowwise_adagrad: return RECSYS_WIDEST(update_rows, D, Kind::rowwise_adagrad);
    case Kind::adam: return RECSYS_WIDEST(update_rows, D, Kind::adam);
    case Kind::partial_rowwise_adam: return RECSYS_WIDEST(update_rows, D, Kind::partial_rowwise_adam);
    default: return RECSYS_WIDEST(update_rows, D, Kind::lamb);
  }
}

template <typename Id, typename V>
void update(Kind kind, const std::vector<Feature>& features, const Rows& all, const at::Tensor& ids,
            const at::Tensor& offsets, const at::Tensor& grad, at::ArrayRef<double> lrs, const Rates& rates) {
  const int64_t batch_size = grad.size(0), width = grad.size(1);
  const auto *all_ids = ids.const_data_ptr<Id>(), *all_offsets = offsets.const_data_ptr<Id>();
  const auto* grads = static_cast<const V*>(grad.const_data_ptr());
  const auto tasks = tasks_of(features, all_offsets, batch_size);
  std::atomic<size_t> next{0};
  const int64_t workers = std::min<int64_t>(at::get_num_threads(), static_cast<int64_t>(tasks.size()));
  at::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    thread_local Scratch scratch;
    for (size_t at; (at = next.fetch_add(1)) < tasks.size();) {
      const int64_t first = tasks[at].features.front();
      const Feature& table = features[first];
      const Rows rows{all.weights + table.weights, all.means + (has_means(kind) ? table.weights : 0),
                      all.squares + table.state};
      RECSYS_WIDEST(find_rows, Id)(tasks[at], features, all_ids, all_offsets, width, batch_size, scratch);
      RECSYS_FOR_DIM(table.dim, {
        RECSYS_WIDEST(sum_gradients, D, V)(grads, table.dim, rates.limit, scratch);
        update_rows_of<D>(kind)(rows, table.dim, static_cast<float>(lrs[first]), rates, scratch);
      })
    }
  });
}

Kind kind_of(c10::string_view name) {
  constexpr std::array<std::string_view, 6> kinds = {"sgd",  "adagrad",              "rowwise_adagrad",
                                                     "adam", "partial_rowwise_adam", "lamb"};
  const auto found = std::find(kinds.begin(), kinds.end(), std::string_view(name.data(), name.size()));
  TORCH_CHECK(found != kinds.end(), "no optimizer ", name);
  return static_cast<Kind>(found - kinds.begin());
}

void update_(at::Tensor weights, at::Tensor means, at::Tensor squares, const at::Tensor& tables, const at::Tensor& ids,
             const at::Tensor& offsets, const at::Tensor& grad, c10::string_view name, at::ArrayRef<double> lrs,
             double eps, double limit, double beta1, double beta2, int64_t updates) {
  check(weights, ids, offsets);
  const auto features = features_of(tables);
  const Kind kind = kind_of(name);
  TORCH_CHECK(grad.size(0) == batch_size_of(offsets, features.size()), "a gradient row for each bag expected");
  TORCH_CHECK(lrs.size() == features.size(), "a rate for each feature expected, not ", lrs.size());
  TORCH_CHECK(!has_means(kind) || (means.numel() == weights.numel() && updates > 0), "a mean for each weight expected");
  const auto bias = [&](double beta) { return static_cast<float>(1 - std::pow(beta, updates)); };
  const Rates rates{static_cast<float>(eps),   static_cast<float>(limit), static_cast<float>(beta1),
                    static_cast<float>(beta2), bias(beta1),               bias(beta2)};
  const Rows all{weights.mutable_data_ptr<float>(), means.mutable_data_ptr<float>(),
                 squares.mutable_data_ptr<float>()};
  const auto whole = (grad.scalar_type() == at::kBFloat16 ? grad : grad.to(at::kFloat)).contiguous();
  by_types(ids, whole, [&](auto id, auto v) {
    update<decltype(id), decltype(v)>(kind, features, all, ids, offsets, whole, lrs, rates);
  });
}

std::string instructions(c10::string_view most) {
  if (!most.empty()) {
    const auto found = std::find(kInstructions.begin(), kInstructions.end(), std::string_view(most.data(), most.size()));
    TORCH_CHECK_VALUE(found != kInstructions.end(), "no instructions ", most);
    in_use() = std::min(widest_here(), static_cast<Instructions>(found - kInstructions.begin()));
  }
  return std::string(kInstructions[static_cast<size_t>(in_use().load())]);
}

}  // namespace
}  // namespace recsys

TORCH_LIBRARY(recsys, library) {
  library.def("instructions(str most) -> str", &recsys::instructions);
  library.def("tables_sources() -> str", [] { return std::string(RECSYS_SOURCES); });
  library.def(
      "lookup_sum(Tensor weights, Tensor tables, Tensor ids, Tensor offsets, int width, ScalarType dtype) -> Tensor");
  library.def(
      "update_(Tensor(a!) weights, Tensor(b!) means, Tensor(c!) squares, Tensor tables, Tensor ids, Tensor offsets, "
      "Tensor grad, str kind, float[] lrs, float eps, float limit, float beta1, float beta2, int updates) -> ()");
}

TORCH_LIBRARY_IMPL(recsys, CPU, library) {
  library.impl("lookup_sum", &recsys::lookup_sum);
  library.impl("update_", &recsys::update_);
}
