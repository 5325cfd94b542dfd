#include "backend/cuda/cuda_backend.h"

#include <algorithm>

#include "backend/cuda/cuda.h"
#include "backend/cuda/device.h"
#include "backend/cuda/kv.h"
#include "core/error.h"

namespace sbd::cuda {

namespace {

// Rows up to which a forward's graph is kept: decoding's. A prompt's shapes hardly come twice.
constexpr int kMaxGraphRows = 128;
constexpr std::size_t kRowMetadataBytes = 512;  // with room to spare

}  // namespace

std::unique_ptr<Backend> make_backend(int device) { return std::make_unique<CudaBackend>(device); }

CudaBackend::CudaBackend(int device) : device_(choose_device(device)), knobs_(read_knobs()) {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, device), "asking for its properties");
  name_ = properties.name;
  overlap_ = may_overlap(properties) && knobs_.overlap;
  shape_ = {properties.multiProcessorCount, static_cast<int>(properties.sharedMemPerMultiprocessor),
            static_cast<int>(properties.sharedMemPerBlockOptin)};
  check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "making a stream");
}

CudaBackend::~CudaBackend() {
  cudaSetDevice(device_);
  cudaStreamSynchronize(stream_);
  graphs_.clear();
  cudaStreamDestroy(stream_);
}

std::string CudaBackend::description() const { return format("cuda:{} ({})", device_, name_); }

// The current device belongs to the calling thread, and any thread may call.
void CudaBackend::use_device() const {
  refuse_after_failure();
  check(cudaSetDevice(device_), "choosing the device");
}

std::size_t CudaBackend::free_memory() const {
  use_device();
  std::size_t available = 0, total = 0;
  check(cudaMemGetInfo(&available, &total), "asking for its free memory");
  return available;
}

double CudaBackend::weight_bytes(DType dtype, double rows, double cols) const {
  return packed_bytes(dtype, rows, cols);
}

std::unique_ptr<Weight> CudaBackend::load_weight(const Tensor& tensor) {
  use_device();
  return pack(tensor);
}

std::unique_ptr<Weight> CudaBackend::pack(const Tensor& tensor) {
  auto weight = std::make_unique<PackedWeight>(tensor, stream_);
  if (weight->dtype() != tensor.dtype) {
    converted_.insert(name(tensor.dtype));
    converted_from_ += tensor.data.size();
    converted_to_ += weight->size();
  }
  return weight;
}

std::vector<std::string> CudaBackend::notes() const {
  if (converted_.empty()) return {};
  constexpr std::size_t kMiB = 1 << 20;
  return {
      format("device cuda keeps weights of {} as f16: {} MiB of the file are {} MiB of the GPU's "
             "memory",
             joined(converted_), converted_from_ / kMiB + 1, converted_to_ / kMiB + 1)};
}

Buffer CudaBackend::allocate(std::size_t n_floats) {
  use_device();
  auto memory = std::make_shared<DeviceMemory>(
      with_room([&] { return DeviceMemory(n_floats * sizeof(float), "a buffer"); }));
  auto* data = memory->as<float>();
  return {data, [this, memory](float*) mutable {
            settle();
            memory.reset();
          }};
}

Buffer CudaBackend::upload(std::span<const float> values) {
  Buffer buffer = allocate(values.size());
  check(cudaMemcpyAsync(buffer.get(), values.data(), values.size_bytes(), cudaMemcpyHostToDevice,
                        stream_),
        "uploading values");
  check(cudaStreamSynchronize(stream_), "uploading values");
  return buffer;
}

std::vector<float> CudaBackend::download(const float* values, std::size_t n) {
  finish();
  std::vector<float> result(n);
  check(cudaMemcpy(result.data(), values, n * sizeof(float), cudaMemcpyDeviceToHost),
        "downloading values");
  return result;
}

std::unique_ptr<KvStorage> CudaBackend::allocate_kv(int n_layers, const HeadShape& heads, int n_ctx,
                                                    DType dtype) {
  use_device();
  SBD_CHECK(heads.head_dim <= kMaxHeadDim && heads.head_dim % 2 == 0,
            "head_dim {}: the CUDA backend computes even ones up to {}; use device cpu",
            heads.head_dim, kMaxHeadDim);
  const int group = heads.num_attention_heads / heads.num_key_value_heads;
  SBD_CHECK(group <= kTileQueries,
            "{} attention heads share a key-value head: the CUDA backend computes up to {}; use "
            "device cpu",
            group, kTileQueries);
  return std::make_unique<CudaKv>(*this, n_layers, heads, n_ctx, dtype);
}

void CudaBackend::flush() {
  if (tape_.empty()) return;
  use_device();
  metadata_.send(stream_);
  asks_.send(stream_);
  const struct Emptied {  // even where it fails
    Tape& tape;
    ~Emptied() { tape.clear(); }
  } emptied{tape_};
  if (recorded_ != nullptr) recorded_->append(tape_);
  try {
    if (keep_graph_ && knobs_.graphs) {
      graphs_.run(tape_, stream_, overlap_);
    } else {
      tape_.run(stream_, overlap_);
    }
  } catch (const Error& error) {
    // Kernels are missing, of forwards that may have ended well: caches count rows as written that
    // are not.
    lose_device(error.what());
  }
}

void CudaBackend::finish() {
  use_device();
  flush();
  check(cudaStreamSynchronize(stream_), "computing a forward");
}

void CudaBackend::settle() noexcept {
  try {
    finish();
  } catch (...) {  // recorded (runtime.h): the next operation is refused
  }
}

// Cleared: the counters of linear.cu are 0 between two kernels.
void* CudaBackend::grown_bytes(Scratch& scratch, std::size_t bytes) {
  if (scratch.memory.size() < bytes) {
    finish();
    scratch.memory = DeviceMemory();  // the old one is given back first
    scratch.memory = with_room([&] { return DeviceMemory(bytes, scratch.purpose); });
    check(cudaMemsetAsync(scratch.memory.data(), 0, bytes, stream_), "clearing memory");
  }
  return scratch.memory.data();
}

void CudaBackend::begin(const ForwardRows& rows, std::span<const float> inverse_frequencies,
                        bool rope_interleaved) {
  use_device();
  flush();
  n_rows_ = static_cast<int>(rows.tokens.size());
  keep_graph_ = n_rows_ <= kMaxGraphRows;
  rope_interleaved_ = rope_interleaved;
  sequence_rows_.assign(rows.sequences.begin(), rows.sequences.end());
  kv_end_.assign(rows.kv_end.begin(), rows.kv_end.end());
  last_mixes_.clear();
  tile_infos_.clear();
  tiles_ = nullptr;

  const std::span<const int> places = rows.places.empty() ? rows.positions : rows.places;
  std::vector<SequenceInfo> sequences;
  int max_pages = 0;
  std::vector<int> row_sequence(static_cast<std::size_t>(n_rows_));
  for (const SequenceRows& sequence : rows.sequences) {
    auto& kv = static_cast<CudaKv&>(*sequence.kv);
    int n_positions = 0;
    for (int row = sequence.first_row; row < sequence.first_row + sequence.n_rows; ++row) {
      const auto at = static_cast<std::size_t>(row);
      n_positions = std::max({n_positions, rows.kv_end[at], places[at] + 1});
    }
    kv.reserve(n_positions);
    max_pages = std::max(max_pages, kv.max_pages());
    std::fill_n(row_sequence.begin() + sequence.first_row, sequence.n_rows,
                static_cast<int>(sequences.size()));
    sequences.push_back(kv.info(sequence.first_row));
  }
  std::vector<std::uint8_t*> pages(sequences.size() * static_cast<std::size_t>(max_pages));
  for (std::size_t i = 0; i < rows.sequences.size(); ++i) {
    const auto& kv = static_cast<const CudaKv&>(*rows.sequences[i].kv);
    std::ranges::transform(kv.pages(), pages.begin() + static_cast<std::ptrdiff_t>(i) * max_pages,
                           [](const DeviceMemory& page) { return page.as<std::uint8_t>(); });
  }
  const std::size_t metadata_bytes = (rows.tokens.size() + 16) * kRowMetadataBytes +
                                     std::span<std::uint8_t* const>(pages).size_bytes();
  if (metadata_.size() < metadata_bytes) finish();  // what is under way reads the old one
  metadata_.clear(metadata_bytes);
  tokens_ = metadata_.add(rows.tokens);
  positions_ = metadata_.add(rows.positions);
  places_ = rows.places.empty() ? positions_ : metadata_.add(rows.places);
  row_kv_end_ = metadata_.add(rows.kv_end);
  unseen_ = rows.unseen.empty() ? nullptr : metadata_.add(rows.unseen);
  row_sequence_ = metadata_.add(std::span<const int>(row_sequence));
  sequences_ = metadata_.add(std::span<const SequenceInfo>(sequences));
  page_table_ = {metadata_.add(std::span<std::uint8_t* const>(pages)), max_pages};
  query_scale_ = rows.query_scale.empty() ? nullptr : metadata_.add(rows.query_scale);
  adapted_ = nullptr;
  if (!rows.adapted.empty()) {
    std::vector<Mix> adapted(rows.tokens.size());
    for (int row = 0; row < n_rows_; ++row) adapted[static_cast<std::size_t>(row)] = {row, 0, 0, 0};
    for (const Interval& range : rows.adapted) {
      for (int row = range.begin; row < range.end; ++row) {
        adapted[static_cast<std::size_t>(row)].a = 1;
      }
    }
    adapted_ = metadata_.add(std::span<const Mix>(adapted));
  }
  frequencies_ = metadata_.add(inverse_frequencies);
  const int n_frequencies = static_cast<int>(inverse_frequencies.size());
  if (n_frequencies == 0) return;
  const int n_angles = n_rows_ * n_frequencies;
  auto* table = grown<float>(angles_, 2 * static_cast<std::size_t>(n_angles));
  angles(tape_, {positions_, frequencies_, table, n_frequencies, n_angles});
  angle_table_ = table;
}

void CudaBackend::embed(const Weight& table, const float* mask, float* out) {
  const PackedWeight& weight = PackedWeight::of(table);
  cuda::embed(tape_, {weight.data(), weight.dtype(), weight.cols(), tokens_, mask, out}, n_rows());
}

// The same rows often come again, once for each layer.
void CudaBackend::mix(std::span<const Mix> rows, const float* x, const float* y, int cols,
                      float* out) {
  const auto same = [](const Mix& a, const Mix& b) {
    return a.x_row == b.x_row && a.a == b.a && a.y_row == b.y_row && a.b == b.b;
  };
  if (!std::ranges::equal(rows, last_mixes_, same)) {
    last_mixes_.assign(rows.begin(), rows.end());
    mixes_ = metadata_.add(rows);
  }
  cuda::mix(tape_, {mixes_, x, y, out, cols}, static_cast<int>(rows.size()));
}

CudaBackend::Activations CudaBackend::prepare(const Input& input, std::span<const Linear> linears,
                                              int n_rows, const int* source_rows) {
  PrepareArgs args{};
  args.x = input.x;
  args.up = input.up;
  args.norm_weight = input.norm_weight;
  args.eps = input.eps;
  args.source_rows = source_rows;
  args.cols = linears[0].weight->cols();
  args.padded_cols = round_up(args.cols, kChunk);
  const auto rows = static_cast<std::size_t>(n_rows);
  const std::size_t n = rows * static_cast<std::size_t>(args.padded_cols);
  const bool as_it_is =
      source_rows == nullptr && input.norm_weight == nullptr && input.up == nullptr;
  Activations x{input.x, nullptr, nullptr, nullptr};
  for (const Linear& l : linears) {
    switch (l.weight->dtype()) {
      case DType::f32:
        if (!as_it_is) x.values = args.values = grown<float>(values_, n);
        break;
      case DType::bf16: x.bf16 = args.bf16 = grown<std::uint16_t>(bf16_, n); break;
      default:
        x.halves = args.halves = grown<std::uint16_t>(halves_, n);
        args.half_scale = grown<float>(half_scales_, rows);
        if (has_mins(l.weight->dtype())) {
          x.step_sums = args.step_sums = grown<float>(step_sums_, n / kStepInputs);
        }
        break;
    }
  }
  if (args.values != nullptr || args.bf16 != nullptr || args.halves != nullptr) {
    cuda::prepare(tape_, args, n_rows);
  }
  return x;
}

void CudaBackend::launch_parts(DType dtype, LinearArgs& args) {
  if (args.n_parts == 0) return;
  if (prefill_pays(dtype, args, shape_)) {
    prefill(tape_, dtype, args, shape_);
  } else {
    args.n_splits = dtype == DType::f32 ? 1
                                        : choose_splits(args.n_blocks, args.n_chunks,
                                                        knobs_.blocks * shape_.n_multiprocessors);
    args.prefetch = knobs_.prefetch;
    args.evict_first = knobs_.evict_first;
    const auto [partial_floats, counters] = linear_scratch(args);
    if (args.n_splits > 1) {
      args.partials = grown<float>(linear_partials_, partial_floats);
      args.counters = grown<unsigned>(linear_counters_, counters);
    }
    cuda::linear(tape_, dtype, args);
  }
  args = {};
}

void CudaBackend::multiply_type(DType dtype, const Activations& x, std::span<const Linear> linears,
                                int n_rows, bool accumulate, const HeadRuns& runs) {
  LinearArgs args{};
  for (const Linear& l : linears) {
    const PackedWeight& weight = PackedWeight::of(*l.weight);
    if (weight.dtype() != dtype) continue;
    if (args.n_parts == kMaxParts) launch_parts(dtype, args);
    args.parts[args.n_parts++] = {weight.data(), l.bias, l.out, weight.rows(), args.n_blocks};
    args.n_blocks += weight.n_blocks();
    args.n_chunks = weight.n_chunks();
    args.cols = weight.cols();
    args.n_rows = n_rows;
    args.accumulate = accumulate;
    args.head = runs;
    if (dtype == DType::f32) {
      args.x = x.values;
    } else if (dtype == DType::bf16) {
      args.x = x.bf16;
    } else {
      args.x = x.halves;
      args.row_scale = half_scales_.memory.as<float>();
      args.step_sums = x.step_sums;
    }
  }
  launch_parts(dtype, args);
}

// Weights of one type share a launch.
void CudaBackend::multiply(const Activations& x, std::span<const Linear> linears, int n_rows,
                           bool accumulate, const HeadRuns& runs) {
  for (const DType dtype : kDTypes) multiply_type(dtype, x, linears, n_rows, accumulate, runs);
}

void CudaBackend::linear(const Input& input, std::span<const Linear> linears, bool accumulate,
                         std::span<const Linear>) {
  std::vector<Linear> readers(linears.begin(), linears.end());  // of the input
  for (const Linear& l : linears) {
    if (adapted_ != nullptr && l.adapter.a != nullptr)
      readers.push_back({l.adapter.a, nullptr, nullptr});
  }
  const Activations x = prepare(input, readers, n_rows(), nullptr);
  multiply(x, linears, n_rows(), accumulate, {});
  if (readers.size() > linears.size()) add_adapters(x, linears);
}

// The first factors' products are made of all rows, which share the launch, and those of other rows
// than the adapted ones are made zeros: what is added to them changes nothing.
void CudaBackend::add_adapters(const Activations& x, std::span<const Linear> linears) {
  std::size_t n_values = 0;
  for (const Linear& l : linears) {
    if (l.adapter.a != nullptr)
      n_values += static_cast<std::size_t>(n_rows() * l.adapter.a->rows());
  }
  auto* values = grown<float>(low_rank_, 2 * n_values);
  float* chosen = values + n_values;
  std::vector<Linear> first, second;
  for (const Linear& l : linears) {
    if (l.adapter.a == nullptr) continue;
    first.push_back({l.adapter.a, nullptr, values});
    second.push_back({l.adapter.b, nullptr, l.out, l.adapter});
    values += n_rows() * l.adapter.a->rows();
  }
  multiply(x, first, n_rows(), /*accumulate=*/false, {});
  for (std::size_t i = 0; i < first.size(); ++i) {
    const int rank = first[i].weight->rows();
    cuda::mix(tape_, {adapted_, first[i].out, nullptr, chosen, rank, second[i].adapter.scale},
              n_rows());
    multiply(prepare({chosen}, {&second[i], 1}, n_rows(), nullptr), {&second[i], 1}, n_rows(),
             /*accumulate=*/true, {});
    chosen += n_rows() * rank;
  }
}

}  // namespace sbd::cuda
