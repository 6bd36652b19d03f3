#include "op.h"

#if !defined(_WIN32)
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

// What torch says of the exception that it turned into an error code last, or null: 2.13 and up
// know.
const char* last_error() {
#if !defined(_WIN32)
  using Get = const char* (*)();
  static const auto get =
      reinterpret_cast<Get>(dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  return get ? get() : nullptr;
#else
  return nullptr;
#endif
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
  return std::strstr(error.what(), "API call failed") && !std::strstr(error.what(), "[FB");
}

void raise_torchs_error(const char* op, const char* otherwise) {
  const char* known = last_error();
  const std::string why = known ? known : otherwise;
  // A UsageError of reference.py: its name, its sentence with its id, and where it was raised.
  const std::string kind = "UsageError: ", id = "[FB100]";
  const size_t start = why.find(kind), end = why.find(id, start);
  std::ostringstream message;
  if (start != std::string::npos && end != std::string::npos) {
    message << why.substr(start, end + id.size() - start).substr(kind.size());
    raise_value_error(message);
  }
  if (why.rfind("KeyboardInterrupt", 0) == 0) raise_keyboard_interrupt();
  message << op << ": " << why;
  throw std::runtime_error(message.str());
}

std::string name_of(Device device) {
  std::ostringstream name;
  if (device.type == aoti_torch_device_type_cpu()) return "cpu";
  if (device.type == aoti_torch_device_type_meta()) return "meta";
  if (device.type == aoti_torch_device_type_cuda())
    name << "cuda";
  else
    name << "device " << device.type;
  name << ":" << device.index;
  return name.str();
}

}  // namespace fewbit::bindings
