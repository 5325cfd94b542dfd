#include "backend/cuda/packed_weight.h"

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "backend/cuda/formats.h"
#include "core/error.h"
#include "core/quant_blocks.h"

namespace sbd::cuda {

namespace {

constexpr int kThreads = 256;
constexpr std::size_t kUploadBytes = 64
                                     << 20;  // of a file's rows that are in device memory at once

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

// Exact enough (2^-12), and several times the memory.
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

template <typename Format>
__device__ bool is_finite(const typename Format::Type::Block& block) {
  if constexpr (Format::kHasMins) {
    if (!half_is_finite(block.min)) return false;
  }
  return half_is_finite(block.scale);
}

// Blocks of the types lie on even addresses.
template <typename Format>
__global__ void pack_quants(PackArgs a) {  // a thread: a group of 32
  const Index i = Index{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= a.n_threads) return;
  using Block = typename Format::Type::Block;
  constexpr int kGroups = values_per_block(Format::kType) / kGroupSize;
  const int groups = a.cols / kGroupSize;
  const int row = static_cast<int>(i / groups), k = static_cast<int>(i % groups) * kGroupSize;
  const Block& block = reinterpret_cast<const Block*>(a.source)[i / kGroups];
  if (!is_finite<Format>(block)) atomicMax(a.bad_row, a.first_row + row);
  std::uint8_t* out = a.out + row / kBlockFeatures * stage_at<Format>(ceil_div(a.cols, kChunk));
  Format::store(out + stage_at<Format>(k / kChunk), out + super_at<Format>(k / kChunk),
                place_of(row, k), block, static_cast<int>(i % kGroups));
}

// As halves, the types that the kernels do not read.
DType stored_type(DType dtype) {
  return dtype == DType::f32 || with_format(dtype, [](auto) {}) ? dtype : DType::f16;
}

void (*packer(DType dtype))(PackArgs) {
  switch (dtype) {
    case DType::f32: return pack_f32;
    case DType::f16: return pack_halves<0x7c00u>;
    case DType::bf16: return pack_halves<0x7f80u>;
    default: break;
  }
  void (*kernel)(PackArgs) = nullptr;
  const bool has_format = with_format(dtype, [&](auto format) {
    if constexpr (decltype(format)::kScaled) kernel = pack_quants<decltype(format)>;
  });
  if (!has_format) {
    with_quant_type(dtype, [&](auto type) { kernel = pack_as_halves<type()>; });
  }
  return kernel;
}

int blocks_for(Index n) { return static_cast<int>((n + kThreads - 1) / kThreads); }

struct F32Rows {
  __device__ static float value(const EmbedArgs& a, int row, int k) {
    return reinterpret_cast<const float*>(a.weight)[Index{row} * a.cols + k];
  }
};

template <typename Format>
struct PackedRows {
  __device__ static float value(const EmbedArgs& a, int row, int k) {
    const int chunk = k / kChunk;
    const std::uint8_t* block =
        a.weight + row / kBlockFeatures * stage_at<Format>(ceil_div(a.cols, kChunk));
    return Format::value(block + stage_at<Format>(chunk), block + super_at<Format>(chunk),
                         place_of(row, k));
  }
};

template <typename Rows>
__global__ void embed_kernel(EmbedArgs a) {  // a block: some columns of a row
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int row = static_cast<int>(blockIdx.x);
  const int k = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
  if (k >= a.cols) return;
  const int token = a.tokens[row];
  a.out[Index{row} * a.cols + k] = token == kMaskSlot ? a.mask[k] : Rows::value(a, token, k);
}

}  // namespace

// In doubles: what a file says of its tensors may be beyond any memory.
double packed_bytes(DType dtype, double rows, double cols) {
  const double blocks = std::ceil(rows / kBlockFeatures), chunks = std::ceil(cols / kChunk);
  double bytes = cols * kBlockFeatures * sizeof(float);  // of a block
  with_format(stored_type(dtype), [&](auto format) {
    using Format = decltype(format);
    bytes = chunks * Format::kStageBytes + std::floor(chunks / kSuperChunks) * Format::kSuperBytes;
  });
  return blocks * bytes;
}

bool has_mins(DType dtype) {
  bool has = false;
  with_format(dtype, [&](auto format) { has = decltype(format)::kHasMins; });
  return has;
}

PackedWeight::PackedWeight(const Tensor& tensor, cudaStream_t stream)
    : Weight(stored_type(tensor.dtype), static_cast<int>(tensor.shape[0]),
             static_cast<int>(tensor.shape[1])) {
  const std::size_t row_bytes = tensor.data.size() / static_cast<std::size_t>(rows());
  const auto bytes = static_cast<std::size_t>(packed_bytes(dtype(), kBlockFeatures, cols()));
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
  const int values_per_thread = values_per_block(dtype()) > 1 ? kGroupSize : 1;
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
  void (*kernel)(EmbedArgs) = embed_kernel<F32Rows>;
  with_format(args.dtype,
              [&](auto format) { kernel = embed_kernel<PackedRows<decltype(format)>>; });
  tape.add({"embed"}, kernel,
           {.x = n_rows, .y = ceil_div(args.cols, kThreads), .threads = kThreads}, args);
}

}  // namespace sbd::cuda
