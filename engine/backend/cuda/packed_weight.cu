#include "backend/cuda/packed_weight.h"

#include <algorithm>
#include <cstddef>

#include "backend/cuda/formats.h"
#include "core/error.h"
#include "core/quant_blocks.h"

namespace sbd::cuda {

namespace {

constexpr int kThreads = 256;
constexpr std::size_t kUploadBytes = 64
                                     << 20;  // of a file's rows that are in device memory at once

std::size_t block_bytes(DType dtype, int cols) {  // of 128 features
  const auto chunks = static_cast<std::size_t>(ceil_div(cols, kChunk));
  switch (dtype) {
    case DType::f16:
    case DType::bf16: return chunks * ShortLayout::kStageBytes;
    case DType::q8_0: return chunks * Q8Format::kStageBytes;
    case DType::q4_0: return chunks * Q4Format::kStageBytes;
    default: return static_cast<std::size_t>(cols) * kBlockFeatures * sizeof(float);
  }
}

// Some rows of a tensor as they stand in the file, on the device.
struct PackArgs {
  const std::uint8_t* source;
  std::uint8_t* out;  // of the first row
  int first_row;      // in the tensor
  int n_rows;
  int cols;
  Index row_bytes;
  Index n_threads;  // that have something to pack
  int* bad_row;     // the highest that holds NaN or infinity
};

__device__ bool exponent_is_full(std::uint32_t bits, std::uint32_t mask) {
  return (bits & mask) == mask;
}

__device__ std::uint32_t bits_at(const std::uint8_t* p, int n_bytes) {  // of any alignment
  std::uint32_t bits = 0;
  for (int i = 0; i < n_bytes; ++i) bits |= static_cast<std::uint32_t>(p[i]) << (8 * i);
  return bits;
}

__global__ void pack_f32(PackArgs a) {  // a thread: a value
  const Index i = Index{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= a.n_threads) return;
  const std::uint32_t bits = bits_at(a.source + i * 4, 4);
  if (exponent_is_full(bits, 0x7f800000u)) {
    atomicMax(a.bad_row, a.first_row + static_cast<int>(i / a.cols));
  }
  reinterpret_cast<std::uint32_t*>(a.out)[i] = bits;
}

__device__ void store_half(const PackArgs& a, int row, int k, std::uint32_t bits) {
  const Index stage = Index{row / kBlockFeatures} * ceil_div(a.cols, kChunk) + k / kChunk;
  std::uint8_t* out = a.out + stage * ShortLayout::kStageBytes;
  *reinterpret_cast<std::uint16_t*>(out + ShortLayout::offset(place_of(row, k))) =
      static_cast<std::uint16_t>(bits);
}

template <std::uint32_t kExponent>
__global__ void pack_halves(PackArgs a) {  // a thread: a value
  const Index i = Index{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= a.n_threads) return;
  const int row = static_cast<int>(i / a.cols), k = static_cast<int>(i % a.cols);
  const std::uint32_t bits = bits_at(a.source + i * 2, 2);
  if (exponent_is_full(bits, kExponent)) atomicMax(a.bad_row, a.first_row + row);
  store_half(a, row, k, bits);
}

// Exact enough (2^-12), and several times the memory. Blocks of the types lie on even addresses.
template <DType kType>
__global__ void pack_as_halves(PackArgs a) {  // a thread: a value
  const Index i = Index{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= a.n_threads) return;
  const int row = static_cast<int>(i / a.cols), k = static_cast<int>(i % a.cols);
  constexpr int kValues = values_per_block(kType);
  const auto* blocks = reinterpret_cast<const typename QuantType<kType>::Block*>(a.source);
  const float value = block_value<kType>(blocks[i / kValues], k % kValues);
  const std::uint32_t bits = to_halves(value, 0.0f) & 0xffffu;
  if (exponent_is_full(bits, 0x7c00u)) atomicMax(a.bad_row, a.first_row + row);
  store_half(a, row, k, bits);
}

// Of one feature's group of 32: the scale, then the quants.
template <typename Format>
__global__ void pack_quants(PackArgs a) {  // a thread: a group
  const Index i = Index{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= a.n_threads) return;
  constexpr bool kNibbles = Format::kStageBytes == Q4Format::kStageBytes;
  constexpr int kBlockBytes = kNibbles ? sizeof(BlockQ4_0) : sizeof(BlockQ8_0);
  const int groups = a.cols / kGroupSize;
  const int row = static_cast<int>(i / groups), k = static_cast<int>(i % groups) * kGroupSize;
  const Index stage = Index{row / kBlockFeatures} * ceil_div(a.cols, kChunk) + k / kChunk;
  std::uint8_t* out = a.out + stage * Format::kStageBytes;
  const std::uint8_t* group = a.source + i * kBlockBytes;

  const std::uint32_t scale = bits_at(group, 2);
  if (exponent_is_full(scale, 0x7c00u)) atomicMax(a.bad_row, a.first_row + row);
  const Place first = place_of(row, k);
  constexpr int kScalesAt = Format::kStageBytes - kQuantScaleBytes;
  const int scale_at = ((first.tile * 8 + first.lane / 4) * kChunkSteps + first.step) * 2;
  reinterpret_cast<std::uint16_t*>(out + kScalesAt)[scale_at + first.eight] =
      static_cast<std::uint16_t>(scale);

  const std::uint8_t* quants = group + 2;
  for (int j = 0; j < kGroupSize; j += 8) {  // one lane's
    const Place p = place_of(row, k + j);
    if constexpr (kNibbles) {
      std::uint32_t word = 0;
      for (int n = 0; n < 8; ++n) {
        const std::uint32_t byte = quants[(j + n) % 16];
        word |= (j + n < 16 ? byte & 15u : byte >> 4) << Q4Format::shift(n);
      }
      *reinterpret_cast<std::uint32_t*>(out + Format::offset(p)) = word;
    } else {
      for (int n = 0; n < 8; ++n) {
        out[Format::offset(p) + n] = static_cast<std::uint8_t>(quants[j + n] ^ 0x80u);
      }
    }
  }
}

// Quantised types but two, of which a kernel reads the quants, become halves.
DType stored_type(DType dtype) {
  const bool quants = dtype == DType::q8_0 || dtype == DType::q4_0;
  return values_per_block(dtype) > 1 && !quants ? DType::f16 : dtype;
}

void (*packer(DType dtype))(PackArgs) {
  switch (dtype) {
    case DType::f32: return pack_f32;
    case DType::f16: return pack_halves<0x7c00u>;
    case DType::bf16: return pack_halves<0x7f80u>;
    case DType::q8_0: return pack_quants<Q8Format>;
    case DType::q4_0: return pack_quants<Q4Format>;
    default: break;
  }
  void (*kernel)(PackArgs) = nullptr;
  with_quant_type(dtype, [&](auto type) { kernel = pack_as_halves<type()>; });
  return kernel;
}

int blocks_for(Index n) { return static_cast<int>((n + kThreads - 1) / kThreads); }

template <typename Format>
__device__ float packed_value(const EmbedArgs& a, int row, int k) {
  const Index stage = Index{row / kBlockFeatures} * ceil_div(a.cols, kChunk) + k / kChunk;
  return Format::value(a.weight + stage * Format::kStageBytes, place_of(row, k));
}

__global__ void embed_kernel(EmbedArgs a) {  // a block: some columns of a row
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int row = static_cast<int>(blockIdx.x);
  const int k = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
  if (k >= a.cols) return;
  const int token = a.tokens[row];
  if (token == kMaskSlot) {
    a.out[Index{row} * a.cols + k] = a.mask[k];
    return;
  }
  float value = 0;
  switch (a.dtype) {
    case DType::f16: value = packed_value<F16Format>(a, token, k); break;
    case DType::bf16: value = packed_value<BF16Format>(a, token, k); break;
    case DType::q8_0: value = packed_value<Q8Format>(a, token, k); break;
    case DType::q4_0: value = packed_value<Q4Format>(a, token, k); break;
    default: value = reinterpret_cast<const float*>(a.weight)[Index{token} * a.cols + k]; break;
  }
  a.out[Index{row} * a.cols + k] = value;
}

}  // namespace

PackedWeight::PackedWeight(const Tensor& tensor, cudaStream_t stream)
    : Weight(stored_type(tensor.dtype), static_cast<int>(tensor.shape[0]),
             static_cast<int>(tensor.shape[1])) {
  const std::size_t row_bytes = tensor.data.size() / static_cast<std::size_t>(rows());
  const std::size_t bytes = block_bytes(dtype(), cols());
  memory_ = DeviceMemory(bytes * static_cast<std::size_t>(n_blocks()), "a weight");
  check(cudaMemsetAsync(memory_.data(), 0, memory_.size(), stream), "clearing a weight");

  const int blocks_at_once =
      std::clamp(static_cast<int>(kUploadBytes / (row_bytes * kBlockFeatures)), 1, n_blocks());
  const int rows_at_once = std::min(blocks_at_once * kBlockFeatures, rows());
  const DeviceMemory source(row_bytes * static_cast<std::size_t>(rows_at_once), "loading weights");
  const DeviceMemory bad_row(sizeof(int), "loading weights");
  int bad = -1;
  check(cudaMemcpyAsync(bad_row.data(), &bad, sizeof bad, cudaMemcpyHostToDevice, stream),
        "loading a weight");
  const int values_per_thread = values_per_block(dtype());  // a group's, or one
  for (int row = 0; row < rows(); row += rows_at_once) {
    const int n = std::min(rows_at_once, rows() - row);
    check(cudaMemcpyAsync(source.data(),
                          tensor.data.data() + static_cast<std::size_t>(row) * row_bytes,
                          row_bytes * static_cast<std::size_t>(n), cudaMemcpyDefault, stream),
          "loading a weight");
    const Index n_threads = Index{n} * cols() / values_per_thread;
    std::uint8_t* out =
        memory_.as<std::uint8_t>() + static_cast<std::size_t>(row / kBlockFeatures) * bytes;
    launch(packer(tensor.dtype), {.x = blocks_for(n_threads), .threads = kThreads},
           PackArgs{source.as<std::uint8_t>(), out, row, n, cols(), static_cast<Index>(row_bytes),
                    n_threads, bad_row.as<int>()},
           stream, false);
    check(cudaStreamSynchronize(stream), "packing a weight");  // `source` is used again
  }
  check(cudaMemcpy(&bad, bad_row.data(), sizeof bad, cudaMemcpyDeviceToHost), "loading a weight");
  SBD_CHECK(bad < 0,
            "tensor {}: row {} holds NaN or infinity: the file is damaged, convert it again",
            tensor.name, bad);
}

void embed(Tape& tape, const EmbedArgs& args, int n_rows) {
  tape.add({"embed"}, embed_kernel,
           {.x = n_rows, .y = ceil_div(args.cols, kThreads), .threads = kThreads}, args);
}

}  // namespace sbd::cuda
