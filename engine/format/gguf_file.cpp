// GgufFile: a model file's mapping into memory.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "core/error.h"
#include "format/gguf.h"

namespace sbd {
namespace {

[[noreturn]] void fail_system(const std::filesystem::path& path, std::string_view doing,
                              std::string_view mend) {
  fail(ErrorKind::file, "{}: cannot {} the model file: {}; {}", path.string(), doing,
       std::strerror(errno), mend);
}

struct Descriptor {
  int fd;
  ~Descriptor() { ::close(fd); }
};

std::span<const std::byte> map_file(const std::filesystem::path& path) {
  // Opening a pipe would wait for its writer without O_NONBLOCK; a regular file does not care.
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) {
    fail_system(path, "open", "check the path and its permissions");
  }
  const Descriptor descriptor{fd};
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
  if (status.st_size == 0) {
    return {};  // cannot be mapped; the parser says what is wrong with it
  }
  const auto size = static_cast<std::size_t>(status.st_size);
  void* start = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd, 0);
  if (start == MAP_FAILED) {
    fail_system(path, "map", "check the address space limit (ulimit -v)");
  }
  return {static_cast<const std::byte*>(start), size};
}

}  // namespace

// Delegates first: the destructor unmaps even where parsing throws.
GgufFile::GgufFile(const std::filesystem::path& path) : GgufFile(map_file(path)) {
  contents_ = parse_gguf(image_, path.string());
  for (const FileTensor& tensor : contents_.tensors) {
    by_name_.push_back(&tensor);
  }
  std::ranges::sort(by_name_, {}, &FileTensor::name);
}

GgufFile::~GgufFile() {
  if (!image_.empty()) {
    ::munmap(const_cast<std::byte*>(image_.data()), image_.size());
  }
}

const FileTensor* GgufFile::find(std::string_view name) const {
  const auto tensor = std::ranges::lower_bound(by_name_, name, {}, &FileTensor::name);
  return tensor == by_name_.end() || (*tensor)->name != name ? nullptr : *tensor;
}

void GgufFile::release(const FileTensor& tensor) const {
  // Whole pages: a neighbour's part of one is read again from the file if it is needed.
  const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  const auto begin = static_cast<std::size_t>(tensor.data.data() - image_.data()) / page * page;
  const auto end =
      static_cast<std::size_t>(tensor.data.data() - image_.data()) + tensor.data.size();
  ::madvise(const_cast<std::byte*>(image_.data()) + begin, end - begin, MADV_DONTNEED);
}

}  // namespace sbd
