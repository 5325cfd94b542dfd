// GgufFile: a model file on a disk.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "core/error.h"
#include "core/interrupt.h"
#include "format/gguf.h"

namespace sbd {
namespace {

constexpr std::uint64_t kPiece = 64 << 20;  // read at once: Ctrl-C waits no longer
// Keys and descriptions are read as far as they are looked at, and so much more.
constexpr std::uint64_t kReadAhead = 1 << 18;
// Ten times what the largest tokenizers take, which is most of it.
constexpr std::uint64_t kMostHeader = 1 << 29;

[[noreturn]] void fail_system(const std::filesystem::path& path, std::string_view doing,
                              std::string_view mend) {
  fail(ErrorKind::file, "{}: cannot {} the model file: {}; {}", path.string(), doing,
       std::strerror(errno), mend);
}

int open_file(const std::filesystem::path& path) {
  // Opening a pipe would wait for its writer without O_NONBLOCK; a regular file does not care.
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) {
    fail_system(path, "open", "check the path and its permissions");
  }
  return fd;
}

std::uint64_t size_of(int fd, const std::filesystem::path& path) {
  struct stat status = {};
  if (::fstat(fd, &status) != 0) {
    fail_system(path, "inspect", "check the file system");
  }
  if (S_ISDIR(status.st_mode)) {
    fail(ErrorKind::file,
         "{}: a folder, expected a model file; convert a checkpoint's folder with: "
         "sbd-engine convert {} -o model.bin",
         path.string(), path.string());
  }
  if (!S_ISREG(status.st_mode)) {
    fail(ErrorKind::file, "{}: a pipe or device, expected a model file; save it to a file first",
         path.string());
  }
  return static_cast<std::uint64_t>(status.st_size);
}

// Addresses for all of a file; memory is taken for what is written to them alone.
class Addresses {
 public:
  Addresses(std::uint64_t size, const std::filesystem::path& path) : size_(size) {
    if (size == 0) return;  // the parser says what is wrong with the file
    void* start = ::mmap(nullptr, size, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) {
      fail_system(path, "find addresses for", "check the address space limit (ulimit -v)");
    }
    start_ = static_cast<std::byte*>(start);
  }
  ~Addresses() {
    if (start_ != nullptr) ::munmap(start_, size_);
  }
  Addresses(const Addresses&) = delete;
  Addresses& operator=(const Addresses&) = delete;
  std::span<std::byte> bytes() const { return {start_, size_}; }

 private:
  std::byte* start_ = nullptr;
  std::size_t size_;
};

}  // namespace

GgufFile::Descriptor::~Descriptor() { ::close(fd); }

GgufFile::GgufFile(const std::filesystem::path& path) : path_(path), descriptor_(open_file(path)) {
  const Addresses image(size_of(descriptor_.fd, path), path);
  const std::span<std::byte> bytes = image.bytes();
  std::uint64_t filled = 0;
  contents_ = parse_gguf(bytes, path.string(), [&](std::uint64_t end) {
    if (end <= filled) return;
    SBD_CHECK(end <= kMostHeader, "{}: keys and descriptions of more than {} bytes; {}",
              path.string(), kMostHeader, "give another model");
    end = std::min<std::uint64_t>(end + kReadAhead, bytes.size());
    read(filled, bytes.subspan(filled, end - filled));
    filled = end;
  });
  for (const FileTensor& tensor : contents_.tensors) {
    by_name_.push_back(&tensor);
  }
  std::ranges::sort(by_name_, {}, &FileTensor::name);
}

const FileTensor* GgufFile::find(std::string_view name) const {
  const auto tensor = std::ranges::lower_bound(by_name_, name, {}, &FileTensor::name);
  return tensor == by_name_.end() || (*tensor)->name != name ? nullptr : *tensor;
}

void GgufFile::read(const FileTensor& tensor, std::span<std::byte> to) const {
  read(tensor.offset, to.first(tensor.n_bytes));
}

void GgufFile::read(std::uint64_t begin, std::span<std::byte> to) const {
  while (!to.empty()) {
    check_interrupt();
    const ssize_t n = ::pread(descriptor_.fd, to.data(), std::min<std::uint64_t>(to.size(), kPiece),
                              static_cast<off_t>(begin));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail_system(path_, "read", "check the disk");
    if (n == 0) {
      fail(ErrorKind::file,
           "{}: the file was cut short to {} bytes while it was read; load it once it is whole",
           path_.string(), begin);
    }
    begin += static_cast<std::uint64_t>(n);
    to = to.subspan(static_cast<std::size_t>(n));
  }
}

}  // namespace sbd
