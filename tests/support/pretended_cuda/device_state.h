// What the pretended device is: counts, memory, generators, and what torch asks its backend for.

#pragma once

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <string>

namespace {

constexpr c10::DeviceIndex kDevices = 2;
constexpr int64_t kBytes = int64_t{8} << 30;  // of each device, where no limit is set

thread_local c10::DeviceIndex current_device = 0;

c10::DeviceIndex index_of(c10::Device device) {
  return device.has_index() ? device.index() : current_device;
}

// -- what is counted -----------------------------------------------------------------------------

std::mutex mutex;
std::map<std::string, int64_t> counts;
int64_t limit_bytes = kBytes, used_bytes = 0, peak_bytes = 0, pinnable_bytes = kBytes;
std::atomic<int64_t> sync_debug_mode{0};  // as torch.cuda.set_sync_debug_mode: 0, 1 warn, 2 error

void count(const std::string& what, int64_t n = 1) {
  std::lock_guard<std::mutex> guard(mutex);
  counts[what] += n;
}

// The host waits until the device is done: what set_sync_debug_mode warns of.
void wait_for(const std::string& what, const std::string& why) {
  const auto mode = sync_debug_mode.load();
  TORCH_CHECK(mode != 2, "called a synchronizing CUDA operation (", why, ")");
  if (mode == 1) TORCH_WARN("called a synchronizing CUDA operation (", why, ")");
  count(what);
  count("waits");
}

// -- memory --------------------------------------------------------------------------------------

struct Allocation {
  void* pointer;
  int64_t bytes;
};

void release(void* context) {
  auto* allocation = static_cast<Allocation*>(context);
  {
    std::lock_guard<std::mutex> guard(mutex);
    used_bytes -= allocation->bytes;
  }
  free(allocation->pointer);
  delete allocation;
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    const auto bytes = static_cast<int64_t>(n);
    {
      std::lock_guard<std::mutex> guard(mutex);
      TORCH_CHECK_WITH(
          OutOfMemoryError, used_bytes + bytes <= limit_bytes, "CUDA out of memory (pretended). Tried to allocate ",
          bytes, " bytes; ", used_bytes, " bytes of ", limit_bytes, " are in use");
      used_bytes += bytes;
      peak_bytes = std::max(peak_bytes, used_bytes);
      counts["allocations"] += 1;
    }
    void* pointer = n ? aligned_alloc(64, (n + 63) / 64 * 64) : nullptr;
    // All bits set is NaN in every floating dtype: reading what was never written shows.
    if (pointer) memset(pointer, 0xff, n);
    return {pointer, new Allocation{pointer, bytes}, &release, {c10::DeviceType::CUDA, current_device}};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t n) const override { memcpy(to, from, n); }
};
DeviceAllocator allocator;

// Page-locked memory of the host: ordinary memory, whose addresses are known.
struct PinnedAllocator final : c10::Allocator {
  static std::map<const char*, int64_t>& blocks() {  // bytes by their first address
    static auto* all = new std::map<const char*, int64_t>;  // outlives every tensor
    return *all;
  }
  static void release(void* pointer) {
    {
      std::lock_guard<std::mutex> guard(mutex);
      blocks().erase(static_cast<const char*>(pointer));
    }
    free(pointer);
  }
  static bool has(const void* pointer) {
    const auto* at_byte = static_cast<const char*>(pointer);
    std::lock_guard<std::mutex> guard(mutex);
    auto next = blocks().upper_bound(at_byte);
    if (next == blocks().begin()) return false;
    const auto& [begin, bytes] = *std::prev(next);
    return at_byte < begin + bytes;
  }
  c10::DataPtr allocate(size_t n) override {
    const auto bytes = static_cast<int64_t>(n);
    void* pointer = n ? aligned_alloc(64, (n + 63) / 64 * 64) : nullptr;
    if (pointer) {
      memset(pointer, 0xff, n);
      std::lock_guard<std::mutex> guard(mutex);
      int64_t pinned = bytes;
      for (const auto& block : blocks()) pinned += block.second;
      if (pinned > pinnable_bytes) free(pointer);
      TORCH_CHECK(pinned <= pinnable_bytes, "CUDA error: out of memory (pretended), pinning ", bytes, " bytes");
      blocks()[static_cast<const char*>(pointer)] = bytes;
    }
    return {pointer, pointer, &release, c10::DeviceType::CPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t n) const override { memcpy(to, from, n); }
};
PinnedAllocator pinned_allocator;

// -- the device and its generators ---------------------------------------------------------------

// One stream in which everything is done when the call returns: events and streams have nothing to do.
// (Copies on other streams are held back in Python, see streams.py.)
struct DeviceGuard final : c10::impl::DeviceGuardImplInterface {
  using Device = c10::Device;
  using Stream = c10::Stream;
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  Device getDevice() const override { return {type(), current_device}; }
  Device exchangeDevice(Device device) const override {
    const auto before = current_device;
    current_device = device.index();
    return {type(), before};
  }
  void setDevice(Device device) const override { current_device = device.index(); }
  void uncheckedSetDevice(Device device) const noexcept override { current_device = device.index(); }
  Stream getStream(Device device) const override { return Stream(Stream::DEFAULT, device); }
  Stream getNewStream(Device device, int) const override { return getStream(device); }
  Stream getDefaultStream(Device device) const override { return getStream(device); }
  Stream exchangeStream(Stream stream) const override { return getStream(stream.device()); }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
  void record(void**, const Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override { wait_for("synchronizations", "stream"); }
  void synchronizeEvent(void*) const override { wait_for("synchronizations", "event"); }
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, DeviceGuard);

struct DeviceGenerator final : c10::GeneratorImpl {
  // Other numbers than the CPU's generator gives for the same seed, as CUDA's are.
  static constexpr uint64_t kOther = 0x5eed;
  at::Generator on_host = at::detail::createCPUGenerator();

  explicit DeviceGenerator(c10::DeviceIndex index)
      : c10::GeneratorImpl({c10::DeviceType::CUDA, index}, c10::DispatchKeySet(c10::DispatchKey::CUDA)) {
    set_current_seed(c10::default_rng_seed_val);
  }
  static c10::DeviceType device_type() { return c10::DeviceType::CUDA; }
  void set_current_seed(uint64_t seed) override { on_host.set_current_seed(seed ^ kOther); }
  uint64_t current_seed() const override { return on_host.current_seed() ^ kOther; }
  uint64_t seed() override { return on_host.seed() ^ kOther; }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  void set_state(const c10::TensorImpl& state) override { on_host.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return on_host.unsafeGetGeneratorImpl()->get_state();
  }
  c10::GeneratorImpl* clone_impl() const override {
    auto* copy = new DeviceGenerator(device().index());
    copy->on_host = on_host.clone();
    return copy;
  }
};

const at::Generator& default_generator(c10::DeviceIndex index) {
  static const at::Generator generators[kDevices] = {
      at::make_generator<DeviceGenerator>(c10::DeviceIndex{0}), at::make_generator<DeviceGenerator>(c10::DeviceIndex{1})};
  return generators[index < 0 ? current_device : index];
}

at::Generator on_host(const at::Generator& generator) {
  return static_cast<DeviceGenerator*>(generator.unsafeGetGeneratorImpl())->on_host;
}

// Found by this name.
struct CUDAHooks final : at::CUDAHooksInterface {
  CUDAHooks() = default;
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  int getNumGPUs() const override { return kDevices; }
  c10::DeviceIndex current_device() const override { return ::current_device; }
  c10::DeviceIndex getCurrentDevice() const override { return ::current_device; }
  bool isPinnedPtr(const void* pointer) const override { return PinnedAllocator::has(pointer); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  at::Device getDeviceFromPtr(void*) const override { return {c10::DeviceType::CUDA, ::current_device}; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex index) const override { return default_generator(index); }
  at::Generator getNewGenerator(c10::DeviceIndex index) const override {
    return at::make_generator<DeviceGenerator>(index < 0 ? ::current_device : index);
  }
  void deviceSynchronize(c10::DeviceIndex) const override { wait_for("synchronizations", "synchronize"); }
};
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks);

}  // namespace
