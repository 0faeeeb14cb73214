// bfloat16 as it lies in memory.

#pragma once

#include <bit>
#include <cstdint>

namespace recsys {

struct Bf16 {
  uint16_t bits;
};

}  // namespace recsys
