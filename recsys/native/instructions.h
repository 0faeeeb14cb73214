// Which instruction set kernels use. They stand in *.inl files, which are compiled once for each.

#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <string_view>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define RECSYS_X86 1
#endif

namespace recsys {

enum class Instructions { plain, avx2, avx512, avx512_bf16 };

inline constexpr std::array<std::string_view, 4> kInstructions = {"plain", "avx2", "avx512", "avx512_bf16"};

inline Instructions widest_here() {
#ifdef RECSYS_X86
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Instructions::plain;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return Instructions::avx2;
  }
  return __builtin_cpu_supports("avx512bf16") ? Instructions::avx512_bf16 : Instructions::avx512;
#else
  return Instructions::plain;
#endif
}

// This processor's widest, unless a test asks for less.
inline std::atomic<Instructions>& in_use() {
  static std::atomic<Instructions> instructions{widest_here()};
  return instructions;
}

}  // namespace recsys
