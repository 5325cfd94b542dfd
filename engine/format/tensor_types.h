// The types a GGUF file's tensors can have, by their numbers in the format.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <optional>
#include <string_view>

#include "core/dtype.h"

namespace sbd {

struct TensorType {
  std::uint32_t id;
  std::string_view name;
  std::uint32_t values, bytes;  // of a block
  std::optional<DType> dtype;   // ours, where the engine computes with it

  constexpr TensorType(std::uint32_t number, std::string_view text, DType ours)
      : id(number),
        name(text),
        values(static_cast<std::uint32_t>(values_per_block(ours))),
        bytes(static_cast<std::uint32_t>(bytes_per_block(ours))),
        dtype(ours) {}
  constexpr TensorType(std::uint32_t number, std::string_view text, std::uint32_t block_values,
                       std::uint32_t block_bytes)
      : id(number), name(text), values(block_values), bytes(block_bytes) {}
};

inline constexpr TensorType kTensorTypes[] = {
    {0, "F32", DType::f32},    {1, "F16", DType::f16},    {30, "BF16", DType::bf16},
    {8, "Q8_0", DType::q8_0},  {2, "Q4_0", DType::q4_0},  {3, "Q4_1", DType::q4_1},
    {6, "Q5_0", DType::q5_0},  {7, "Q5_1", DType::q5_1},  {20, "IQ4_NL", DType::iq4_nl},
    {10, "Q2_K", DType::q2_k}, {11, "Q3_K", DType::q3_k}, {12, "Q4_K", DType::q4_k},
    {13, "Q5_K", DType::q5_k}, {14, "Q6_K", DType::q6_k}, {23, "IQ4_XS", DType::iq4_xs},
    {9, "Q8_1", 32, 40},       {15, "Q8_K", 256, 292},    {16, "IQ2_XXS", 256, 66},
    {17, "IQ2_XS", 256, 74},   {18, "IQ3_XXS", 256, 98},  {19, "IQ1_S", 256, 50},
    {21, "IQ3_S", 256, 110},   {22, "IQ2_S", 256, 82},    {24, "I8", 1, 1},
    {25, "I16", 1, 2},         {26, "I32", 1, 4},         {27, "I64", 1, 8},
    {28, "F64", 1, 8},         {29, "IQ1_M", 256, 56},    {34, "TQ1_0", 256, 54},
    {35, "TQ2_0", 256, 66},    {39, "MXFP4", 32, 17},     {40, "NVFP4", 64, 36},
    {41, "Q1_0", 128, 18},
};

// nullptr where no type known here has that number.
inline const TensorType* find_tensor_type(std::uint32_t id) {
  const auto* type = std::ranges::find(kTensorTypes, id, &TensorType::id);
  return type == std::end(kTensorTypes) ? nullptr : type;
}

}  // namespace sbd
