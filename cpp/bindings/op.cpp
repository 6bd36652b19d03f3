#include "op.h"

#if defined(__linux__)
#include <dlfcn.h>
#endif

#include <atomic>
#include <mutex>
#include <set>
#include <utility>

namespace fewbit::bindings {

namespace {

std::mutex mutex;
std::set<std::pair<std::string, int>> table;
std::atomic<bool> everything{false};

// What torch says of the exception that it turned into an error code last; torch 2.13 and up know.
std::string last_error() {
#if defined(__linux__)
  using Get = const char* (*)();
  static const auto get =
      reinterpret_cast<Get>(dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  if (const char* what = get ? get() : nullptr) return what;
#endif
  return "torch has printed why";
}

}  // namespace

void set_verified(const std::string& op, int architecture) {
  const std::lock_guard<std::mutex> lock(mutex);
  table.emplace(op, architecture);
}

void allow_unverified(bool on) { everything.store(on); }

bool verified(const char* op, int architecture) {
  if (everything.load(std::memory_order_relaxed)) return true;
  const std::lock_guard<std::mutex> lock(mutex);
  return table.count({op, architecture}) > 0;
}

bool is_code(const std::runtime_error& error) {
  return std::strstr(error.what(), "API call failed") != nullptr;
}

void raise_torchs_error(const char* op) {
  const std::string why = last_error();
  // A UsageError of reference.py: its name, its sentence with its id, and where it was raised.
  const std::string kind = "UsageError: ", id = "[FB100]";
  const size_t start = why.find(kind), end = why.find(id, start);
  std::ostringstream message;
  if (start != std::string::npos && end != std::string::npos) {
    message << why.substr(start, end + id.size() - start).substr(kind.size());
    raise_value_error(message);
  }
  message << op << ": " << why;
  throw std::runtime_error(message.str());
}

std::string name_of(const torch::stable::Device& device) {
  using torch::headeronly::DeviceType;
  std::ostringstream name;
  switch (device.type()) {
    case DeviceType::CPU: return "cpu";
    case DeviceType::Meta: return "meta";
    case DeviceType::CUDA: name << "cuda"; break;
    default: name << "device " << int(device.type());
  }
  name << ":" << int(device.index());
  return name.str();
}

}  // namespace fewbit::bindings
