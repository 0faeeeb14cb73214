// What stands between matrix products, each in one pass over memory; see recsys/backbones/fused.py.
//
// Values are float32 or bfloat16, biases and gains float32, and so is the arithmetic. Sums over rows are those of
// blocks of rows, added up in order: the same bits for any number of threads.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "bf16.h"
#include "instructions.h"
#ifdef RECSYS_X86
#include <immintrin.h>
#endif

namespace recsys {
namespace {

constexpr int64_t kWidest = 16;

// Vectors of an instruction set: as wide as its registers, since GCC takes wider ones apart into scalars.
#define RECSYS_LANES(COUNT)                                    \
  constexpr int64_t kLanes = COUNT;                            \
  using Floats = float __attribute__((vector_size(4 * COUNT)));  \
  using Bits = uint32_t __attribute__((vector_size(4 * COUNT))); \
  using Ints = int32_t __attribute__((vector_size(4 * COUNT)));  \
  using Halves = uint16_t __attribute__((vector_size(2 * COUNT)));

// What Wukong normalises: see `wukong_norm`.
template <typename V>
struct Wukong {
  const V *fm, *tokens, *x;  // x or null
  int64_t num_fm, num_tokens, num_out, dim;
};

// What kernels need of an instruction set: 16 bits made 32; float32 made bfloat16, to the nearest, ties to even, NaN
// staying NaN; and 1 / x to 1e-7.
#define RECSYS_GENERIC_LANES                                                                             \
  inline Bits widened(Halves bits) { return __builtin_convertvector(bits, Bits); }                       \
  inline Halves narrowed(Floats lanes) {                                                                 \
    const Bits bits = reinterpret_cast<Bits>(lanes), nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16; \
    return __builtin_convertvector(lanes == lanes ? nearest : nearest | 0x7FC0, Halves);                 \
  }                                                                                                      \
  inline Floats inverse(Floats x) { return 1.0f / x; }

namespace plain {
RECSYS_LANES(4)
RECSYS_GENERIC_LANES
#include "fused.inl"
}  // namespace plain

#ifdef RECSYS_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
RECSYS_LANES(8)
RECSYS_GENERIC_LANES
#include "fused.inl"
}  // namespace avx2
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
namespace avx512 {
RECSYS_LANES(16)
RECSYS_GENERIC_LANES
#include "fused.inl"
}  // namespace avx512
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
namespace avx512_bf16 {
RECSYS_LANES(16)
inline Bits widened(Halves bits) {
  return reinterpret_cast<Bits>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(bits)));
}
inline Halves narrowed(Floats lanes) {
  return reinterpret_cast<Halves>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(lanes)));
}
inline Floats inverse(Floats x) {
  const auto near = reinterpret_cast<Floats>(_mm512_rcp14_ps(reinterpret_cast<__m512>(x)));
  return near * (2.0f - x * near);
}
#include "fused.inl"
}  // namespace avx512_bf16
#pragma GCC pop_options
#define RECSYS_WIDEST(FUNCTION, ...)                                               \
  (in_use() >= Instructions::avx512_bf16 ? avx512_bf16::FUNCTION<__VA_ARGS__>      \
   : in_use() >= Instructions::avx512    ? avx512::FUNCTION<__VA_ARGS__>           \
   : in_use() >= Instructions::avx2      ? avx2::FUNCTION<__VA_ARGS__>             \
                                         : plain::FUNCTION<__VA_ARGS__>)
#else
#define RECSYS_WIDEST(FUNCTION, ...) plain::FUNCTION<__VA_ARGS__>
#endif

// Run with N, which is COMMON where the width is, and else 0.
#define RECSYS_FOR_WIDTH(WIDTH, COMMON, ...) \
  if ((WIDTH) == (COMMON)) {                 \
    constexpr int N = COMMON;                \
    __VA_ARGS__;                             \
  } else {                                   \
    constexpr int N = 0;                     \
    __VA_ARGS__;                             \
  }

// Call `kernel(V{})` with the type of a tensor's values.
template <typename F>
void by_type(const at::Tensor& values, F kernel) {
  if (values.scalar_type() == at::kFloat) return kernel(float{});
  TORCH_CHECK(values.scalar_type() == at::kBFloat16, "float32 or bfloat16 expected, not ", values.scalar_type());
  kernel(Bf16{});
}

template <typename V>
const V* in(const at::Tensor& values) {
  return static_cast<const V*>(values.const_data_ptr());
}

template <typename V>
V* out(const at::Tensor& values) {
  return static_cast<V*>(values.mutable_data_ptr());
}

void check(const at::Tensor& like, std::initializer_list<at::Tensor> values) {
  TORCH_CHECK(like.is_contiguous(), "contiguous values expected");
  for (const auto& each : values) {
    TORCH_CHECK(each.is_contiguous() && each.sizes() == like.sizes() && each.scalar_type() == like.scalar_type(),
                "contiguous values of one shape and type expected: ", like.sizes(), " and ", each.sizes());
  }
}

// Rows of values [G, rows, width], cut into blocks; a block's sums are its own.
struct Blocks {
  int64_t groups, rows, width, height, each;

  Blocks(int64_t num_groups, int64_t num_rows, int64_t row_width)
      : groups(num_groups), rows(num_rows), width(row_width) {
    // Some dozens of blocks to a batch, so that a thread which loses its core holds up no other; not too small ones.
    height = std::max({int64_t{1}, (rows * groups + 63) / 64, int64_t{16384} / std::max<int64_t>(width, 1)});
    each = (rows + height - 1) / height;
  }

  // Of z [..., width].
  static Blocks of(const at::Tensor& z) {
    TORCH_CHECK(z.dim() > 0 && z.numel() > 0, "values expected, not ", z.sizes());
    return Blocks(1, z.numel() / z.size(-1), z.size(-1));
  }

  // Of z [G, ..., width], and a bias [G, width].
  static Blocks of(const at::Tensor& z, const at::Tensor& bias) {
    TORCH_CHECK(z.dim() > 1 && z.numel() > 0, "values [G, ..., N] expected, not ", z.sizes());
    const int64_t groups = z.size(0), width = z.size(-1);
    TORCH_CHECK(bias.scalar_type() == at::kFloat && bias.is_contiguous() &&
                    bias.sizes() == at::IntArrayRef({groups, width}),
                "a contiguous float32 bias [", groups, ", ", width, "] expected, not ", bias.scalar_type(), " ",
                bias.sizes());
    return Blocks(groups, z.numel() / (groups * width), width);
  }

  // Threads take blocks as they come to them: `kernel(block, group, first row of all, rows)`.
  template <typename F>
  void run(F kernel) const {
    std::atomic<int64_t> next{0};
    at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), groups * each), 1, [&](int64_t, int64_t) {
      for (int64_t block; (block = next.fetch_add(1)) < groups * each;) {
        const int64_t group = block / each, begin = block % each * height;
        kernel(block, group, group * rows + begin, std::min(height, rows - begin));
      }
    });
  }

  // Sums [kinds, G, blocks, width], to be added up.
  at::Tensor sums(int64_t kinds = 1) const { return at::zeros({kinds, groups, each, width}, at::kFloat); }
};

// Call `kernel(V{}, block, group, place, rows)` for each block of values; its rows begin at `place`.
template <typename F>
void over_blocks(const at::Tensor& values, const Blocks& blocks, F kernel) {
  by_type(values, [&](auto v) {
    blocks.run([&](int64_t block, int64_t group, int64_t row, int64_t rows) {
      kernel(v, block, group, row * blocks.width, rows);
    });
  });
}

at::Tensor bias_gelu_(at::Tensor z, const at::Tensor& bias, bool slope) {
  const auto blocks = Blocks::of(z, bias);
  check(z, {});
  auto y = at::empty_like(z);
  over_blocks(z, blocks, [&](auto v, int64_t, int64_t group, int64_t at, int64_t rows) {
    using V = decltype(v);
    const auto kernel = slope ? RECSYS_WIDEST(gelu_rows, V, true) : RECSYS_WIDEST(gelu_rows, V, false);
    kernel(out<V>(z) + at, in<float>(bias) + group * blocks.width, out<V>(y) + at, rows, blocks.width);
  });
  return y;
}

// Of either activation: `of` is GELU's slope, or ReLU's output. The second result is [G, width].
template <bool Slope>
std::tuple<at::Tensor, at::Tensor> activation_backward(const at::Tensor& grad, const at::Tensor& of,
                                                       const Blocks& blocks) {
  check(of, {grad});
  auto grad_z = at::empty_like(of), sums = blocks.sums();
  over_blocks(of, blocks, [&](auto v, int64_t block, int64_t, int64_t at, int64_t rows) {
    using V = decltype(v);
    const auto kernel = Slope ? RECSYS_WIDEST(scaled_rows, V) : RECSYS_WIDEST(passed_rows, V);
    kernel(in<V>(grad) + at, in<V>(of) + at, out<V>(grad_z) + at, out<float>(sums) + block * blocks.width, rows,
           blocks.width);
  });
  return {grad_z, sums.sum(2)[0]};
}

std::tuple<at::Tensor, at::Tensor> gelu_backward(const at::Tensor& grad, const at::Tensor& slope,
                                                 const at::Tensor& bias) {
  return activation_backward<true>(grad, slope, Blocks::of(slope, bias));
}

at::Tensor relu_(at::Tensor z) {
  const auto blocks = Blocks::of(z);
  check(z, {});
  over_blocks(z, blocks, [&](auto v, int64_t, int64_t, int64_t at, int64_t rows) {
    using V = decltype(v);
    RECSYS_WIDEST(relu_rows, V)(out<V>(z) + at, rows, blocks.width);
  });
  return z;
}

std::tuple<at::Tensor, at::Tensor> relu_backward(const at::Tensor& grad, const at::Tensor& y) {
  const auto [by_z, sums] = activation_backward<false>(grad, y, Blocks::of(y));
  return {by_z, sums[0]};
}

at::Tensor cross(const at::Tensor& x0, const at::Tensor& z, const at::Tensor& x) {
  const auto blocks = Blocks::of(z);
  check(z, {x0, x});
  auto y = at::empty_like(z);
  over_blocks(z, blocks, [&](auto v, int64_t, int64_t, int64_t at, int64_t rows) {
    using V = decltype(v);
    RECSYS_WIDEST(cross_rows, V)(in<V>(x0) + at, in<V>(z) + at, in<V>(x) + at, out<V>(y) + at, rows, blocks.width);
  });
  return y;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> cross_backward(const at::Tensor& grad, const at::Tensor& x0,
                                                              const at::Tensor& z) {
  const auto blocks = Blocks::of(z);
  check(z, {grad, x0});
  auto grad_x0 = at::empty_like(z), grad_z = at::empty_like(z), sums = blocks.sums();
  over_blocks(z, blocks, [&](auto v, int64_t block, int64_t, int64_t at, int64_t rows) {
    using V = decltype(v);
    RECSYS_WIDEST(cross_rows_backward, V)(in<V>(grad) + at, in<V>(x0) + at, in<V>(z) + at, out<V>(grad_x0) + at,
                                          out<V>(grad_z) + at, out<float>(sums) + block * blocks.width, rows,
                                          blocks.width);
  });
  return {grad_x0, grad_z, sums.sum(2)[0][0]};
}

void check_norm(const at::Tensor& x, const at::Tensor& gain) {
  check(x, {});
  TORCH_CHECK(gain.scalar_type() == at::kFloat && gain.is_contiguous() && gain.numel() == x.size(-1) && gain.numel() > 0,
              "a contiguous float32 gain of ", x.size(-1), " expected, not ", gain.scalar_type(), " ", gain.sizes());
}

void check_tokens(const at::Tensor& x) {
  TORCH_CHECK(x.dim() == 3 && x.size(0) > 0 && x.size(2) % x.size(0) == 0,
              "tokens [T, B, D] with D a multiple of T expected, not ", x.sizes());
}

// Room of a thread's own for one row, aligned and of whole lanes, and `more` floats after it.
float* scratch_of(int64_t width, int64_t more = 0) {
  struct alignas(64) Lanes {
    float values[kWidest];
  };
  thread_local std::vector<Lanes> scratch;
  const auto lanes = static_cast<size_t>((width + kWidest - 1) / kWidest + (more + kWidest - 1) / kWidest);
  if (scratch.size() < lanes) scratch.resize(lanes);
  return scratch.data()->values;
}

at::Tensor norm(const at::Tensor& x, const std::optional<at::Tensor>& residual, const at::Tensor& gain,
                const at::Tensor& shift, double eps) {
  check_norm(x, gain);
  check(gain, {shift});
  if (residual) check(x, {*residual});
  auto y = at::empty_like(x);
  const int64_t width = gain.numel();
  by_type(x, [&](auto v) {
    using V = decltype(v);
    Blocks(1, x.numel() / width, width).run([&](int64_t, int64_t, int64_t row, int64_t rows) {
      RECSYS_FOR_WIDTH(width, 128, {
        RECSYS_WIDEST(norm_rows, N, V)(in<V>(x), residual ? in<V>(*residual) : nullptr, in<float>(gain),
                                       in<float>(shift), out<V>(y), scratch_of(width), row, row + rows, width, eps);
      })
    });
  });
  return y;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_backward(const at::Tensor& grad, const at::Tensor& x,
                                                             const std::optional<at::Tensor>& residual,
                                                             const at::Tensor& gain, double eps) {
  check_norm(x, gain);
  check(x, {grad});
  if (residual) check(x, {*residual});
  const int64_t width = gain.numel();
  const Blocks blocks(1, x.numel() / width, width);
  auto grad_x = at::empty_like(x), sums = blocks.sums(2);
  float *by_gain = out<float>(sums), *by_shift = by_gain + blocks.each * width;
  by_type(x, [&](auto v) {
    using V = decltype(v);
    blocks.run([&](int64_t block, int64_t, int64_t row, int64_t rows) {
      const int64_t at = block * width;
      RECSYS_FOR_WIDTH(width, 128, {
        RECSYS_WIDEST(norm_rows_backward, N, V)(in<V>(grad), in<V>(x), residual ? in<V>(*residual) : nullptr,
                                                in<float>(gain), out<V>(grad_x), by_gain + at, by_shift + at,
                                                scratch_of(width), row, row + rows, width, eps);
      })
    });
  });
  const auto total = sums.sum(2).view({2, width});
  return {grad_x, total[0].clone(), total[1].clone()};  // each with memory of its own
}

at::Tensor mix_norm(const at::Tensor& x, const at::Tensor& gain, const at::Tensor& shift, double eps) {
  check_norm(x, gain);
  check(gain, {shift});
  check_tokens(x);
  auto y = at::empty_like(x);
  const int64_t tokens = x.size(0), batch_size = x.size(1), width = gain.numel();
  by_type(x, [&](auto v) {
    using V = decltype(v);
    Blocks(1, batch_size, tokens * width).run([&](int64_t, int64_t, int64_t row, int64_t rows) {
      RECSYS_FOR_WIDTH(width, 128, {
        RECSYS_WIDEST(mix_norm_rows, N, V)(in<V>(x), in<float>(gain), in<float>(shift), out<V>(y),
                                           scratch_of(width, 3 * tokens * width), row, row + rows, tokens, batch_size, width,
                                           eps);
      })
    });
  });
  return y;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> mix_norm_backward(const at::Tensor& grad, const at::Tensor& x,
                                                                 const at::Tensor& gain, double eps) {
  check_norm(x, gain);
  check(x, {grad});
  check_tokens(x);
  const int64_t tokens = x.size(0), batch_size = x.size(1), width = gain.numel();
  const Blocks blocks(1, batch_size, tokens * width);
  auto grad_x = at::empty_like(x), sums = at::zeros({2, blocks.each, width}, gain.options());
  float *by_gain = out<float>(sums), *by_shift = by_gain + blocks.each * width;
  by_type(x, [&](auto v) {
    using V = decltype(v);
    blocks.run([&](int64_t block, int64_t, int64_t row, int64_t rows) {
      const int64_t at = block * width;
      RECSYS_FOR_WIDTH(width, 128, {
        RECSYS_WIDEST(mix_norm_rows_backward, N, V)(in<V>(grad), in<V>(x), in<float>(gain), out<V>(grad_x),
                                                    by_gain + at, by_shift + at, scratch_of(width, 3 * tokens * width), row,
                                                    row + rows, tokens, batch_size, width, eps);
      })
    });
  });
  const auto total = sums.sum(1);
  return {grad_x, total[0].clone(), total[1].clone()};  // each with memory of its own
}

at::Tensor transposed(const at::Tensor& x) {
  check(x, {});
  TORCH_CHECK(x.dim() == 3, "[B, T, D] expected, not ", x.sizes());
  auto y = at::empty({x.size(0), x.size(2), x.size(1)}, x.options());
  const int64_t size = x.size(1) * x.size(2);
  by_type(x, [&](auto v) {
    using V = decltype(v);
    Blocks(1, x.size(0), size).run([&](int64_t, int64_t, int64_t row, int64_t rows) {
      RECSYS_WIDEST(transpose_each, V)(in<V>(x) + row * size, out<V>(y) + row * size, rows, x.size(1), x.size(2));
    });
  });
  return y;
}

// fm [B, F * D], tokens [B, D, N], and the residual x [B, F + L, D] where N is L; else it is the last F + L of the
// tokens, and N is L + F + L.
template <typename V>
Wukong<V> wukong(const at::Tensor& fm, const at::Tensor& tokens, const std::optional<at::Tensor>& x,
                 const at::Tensor& gain) {
  check(fm, {});
  check(tokens, {});
  const int64_t dim = gain.numel(), num_fm = dim ? fm.numel() / std::max<int64_t>(fm.size(0) * dim, 1) : 0;
  TORCH_CHECK(gain.scalar_type() == at::kFloat && gain.is_contiguous(), "a contiguous float32 gain expected");
  TORCH_CHECK(tokens.dim() == 3 && tokens.size(1) == dim && tokens.scalar_type() == fm.scalar_type() &&
                  tokens.size(0) == fm.size(0) && fm.numel() == fm.size(0) * num_fm * dim,
              "fm [B, F * ", dim, "] and tokens [B, ", dim, ", N] expected, not ", fm.sizes(), " and ", tokens.sizes());
  const int64_t num_tokens = tokens.size(2), num_out = x ? num_fm + num_tokens : (num_tokens + num_fm) / 2;
  TORCH_CHECK(x || (num_tokens + num_fm) % 2 == 0, num_tokens, " tokens cannot be L + ", num_fm, " + L");
  if (x) {
    check(*x, {});
    TORCH_CHECK(x->sizes() == at::IntArrayRef({fm.size(0), num_out, dim}) && x->scalar_type() == fm.scalar_type(),
                "a residual [", fm.size(0), ", ", num_out, ", ", dim, "] expected, not ", x->sizes());
  }
  return {in<V>(fm), in<V>(tokens), x ? in<V>(*x) : nullptr, num_fm, num_tokens, num_out, dim};
}

at::Tensor wukong_norm(const at::Tensor& fm, const at::Tensor& tokens, const std::optional<at::Tensor>& x,
                       const at::Tensor& gain, const at::Tensor& shift, double eps) {
  check(gain, {shift});
  at::Tensor y;
  by_type(fm, [&](auto v) {
    using V = decltype(v);
    const auto all = wukong<V>(fm, tokens, x, gain);
    y = at::empty({fm.size(0), all.num_out, all.dim}, fm.options());
    Blocks(1, fm.size(0), all.num_out * all.dim).run([&](int64_t, int64_t, int64_t row, int64_t rows) {
      RECSYS_FOR_WIDTH(all.dim, 16, {
        RECSYS_WIDEST(wukong_norm_rows, N, V)(all, in<float>(gain), in<float>(shift), out<V>(y),
                                              scratch_of(all.dim, all.num_tokens * all.dim), row, row + rows, eps);
      })
    });
  });
  return y;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> wukong_norm_backward(
    const at::Tensor& grad, const at::Tensor& fm, const at::Tensor& tokens, const std::optional<at::Tensor>& x,
    const at::Tensor& gain, double eps) {
  auto by_fm = at::empty_like(fm), by_tokens = at::empty_like(tokens);
  auto by_x = x ? at::empty_like(*x) : at::empty({0}, fm.options());
  at::Tensor sums;
  by_type(fm, [&](auto v) {
    using V = decltype(v);
    const auto all = wukong<V>(fm, tokens, x, gain);
    TORCH_CHECK(grad.is_contiguous() && grad.scalar_type() == fm.scalar_type() &&
                    grad.sizes() == at::IntArrayRef({fm.size(0), all.num_out, all.dim}),
                "a gradient of the output's shape and type expected, not ", grad.sizes());
    const Blocks blocks(1, fm.size(0), all.num_out * all.dim);
    sums = at::zeros({2, blocks.each, all.dim}, gain.options());
    float *by_gain = out<float>(sums), *by_shift = by_gain + blocks.each * all.dim;
    blocks.run([&](int64_t block, int64_t, int64_t row, int64_t rows) {
      RECSYS_FOR_WIDTH(all.dim, 16, {
        RECSYS_WIDEST(wukong_norm_rows_backward, N, V)(
            in<V>(grad), all, in<float>(gain), out<V>(by_fm), out<V>(by_tokens), out<V>(by_x),
            by_gain + block * all.dim, by_shift + block * all.dim, scratch_of(all.dim, 2 * all.num_tokens * all.dim),
            row, row + rows, eps);
      })
    });
  });
  const auto total = sums.sum(1);
  return {by_fm, by_tokens, by_x, total[0].clone(), total[1].clone()};
}

}  // namespace
}  // namespace recsys

TORCH_LIBRARY_FRAGMENT(recsys, library) {
  library.def("bias_gelu_(Tensor(a!) z, Tensor bias, bool slope) -> Tensor");
  library.def("gelu_backward(Tensor grad, Tensor slope, Tensor bias) -> (Tensor, Tensor)");
  library.def("relu_(Tensor(a!) z) -> Tensor(a!)");
  library.def("relu_backward(Tensor grad, Tensor out) -> (Tensor, Tensor)");
  library.def("cross(Tensor x0, Tensor z, Tensor x) -> Tensor");
  library.def("cross_backward(Tensor grad, Tensor x0, Tensor z) -> (Tensor, Tensor, Tensor)");
  library.def("norm(Tensor x, Tensor? residual, Tensor gain, Tensor shift, float eps) -> Tensor");
  library.def(
      "norm_backward(Tensor grad, Tensor x, Tensor? residual, Tensor gain, float eps) -> (Tensor, Tensor, Tensor)");
  library.def("mix_norm(Tensor x, Tensor gain, Tensor shift, float eps) -> Tensor");
  library.def("mix_norm_backward(Tensor grad, Tensor x, Tensor gain, float eps) -> (Tensor, Tensor, Tensor)");
  library.def("transposed(Tensor x) -> Tensor");
  library.def("fused_sources() -> str", [] { return std::string(RECSYS_SOURCES); });
  library.def("wukong_norm(Tensor fm, Tensor tokens, Tensor? x, Tensor gain, Tensor shift, float eps) -> Tensor");
  library.def(
      "wukong_norm_backward(Tensor grad, Tensor fm, Tensor tokens, Tensor? x, Tensor gain, float eps) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(recsys, CPU, library) {
  library.impl("bias_gelu_", &recsys::bias_gelu_);
  library.impl("gelu_backward", &recsys::gelu_backward);
  library.impl("relu_", &recsys::relu_);
  library.impl("relu_backward", &recsys::relu_backward);
  library.impl("cross", &recsys::cross);
  library.impl("cross_backward", &recsys::cross_backward);
  library.impl("norm", &recsys::norm);
  library.impl("norm_backward", &recsys::norm_backward);
  library.impl("mix_norm", &recsys::mix_norm);
  library.impl("mix_norm_backward", &recsys::mix_norm_backward);
  library.impl("transposed", &recsys::transposed);
  library.impl("wukong_norm", &recsys::wukong_norm);
  library.impl("wukong_norm_backward", &recsys::wukong_norm_backward);
}
