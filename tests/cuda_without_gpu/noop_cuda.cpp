// Two CUDA devices that do nothing: with it loaded before torch, fake tensors may lie on "cuda" where no GPU is.
//
// Autograd asks a device guard for devices and streams, and ATen asks hooks whether CUDA is there. A build of torch
// without CUDA has neither; a build with CUDA has both, and they fail where there is no driver. Here every device is
// idle, and the current device is the thread's own, as it is with CUDA.
#include <ATen/Context.h>
#include <ATen/DeviceAccelerator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#define EXPORTED __attribute__((visibility("default")))

namespace {

constexpr c10::DeviceType CUDA = c10::DeviceType::CUDA;
constexpr c10::DeviceIndex NUM_DEVICES = 2;
thread_local c10::DeviceIndex current = 0;

c10::DeviceIndex exchange(c10::DeviceIndex index) {
  const c10::DeviceIndex before = current;
  current = index;
  return before;
}

c10::Stream default_stream(c10::DeviceIndex index) {
  return c10::Stream(c10::Stream::DEFAULT, c10::Device(CUDA, index < 0 ? current : index));
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return CUDA; }
  c10::Device exchangeDevice(c10::Device d) const override { return c10::Device(CUDA, exchange(d.index())); }
  c10::Device getDevice() const override { return c10::Device(CUDA, current); }
  void setDevice(c10::Device d) const override { exchange(d.index()); }
  void uncheckedSetDevice(c10::Device d) const noexcept override { exchange(d.index()); }
  c10::Stream getStream(c10::Device d) const noexcept override { return default_stream(d.index()); }
  c10::Stream getNewStream(c10::Device d, int) const override { return default_stream(d.index()); }
  c10::Stream getStreamFromGlobalPool(c10::Device d, bool) const override { return default_stream(d.index()); }
  c10::Stream getDefaultStream(c10::Device d) const override { return default_stream(d.index()); }
  c10::Stream exchangeStream(c10::Stream s) const noexcept override { return s; }
  c10::DeviceIndex deviceCount() const noexcept override { return NUM_DEVICES; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};

struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return NUM_DEVICES; }
  c10::DeviceIndex deviceCount() const override { return NUM_DEVICES; }
  c10::DeviceIndex current_device() const override { return current; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex d) const override { return exchange(d); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex d) const override { return exchange(d); }
  void setCurrentDevice(c10::DeviceIndex d) const override { exchange(d); }
  bool isPinnedPtr(const void*) const override { return false; }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
};

}  // namespace

// In place of torch's own, which are looked up by these names.
namespace at::detail {
EXPORTED const CUDAHooksInterface& getCUDAHooks() {
  static const Hooks hooks;
  return hooks;
}
}  // namespace at::detail
namespace at::accelerator {
EXPORTED std::optional<c10::DeviceType> getAccelerator(bool) { return c10::kCUDA; }
}  // namespace at::accelerator

extern "C" {
// After torch: a build with CUDA has registered its own guard by then.
EXPORTED void register_guard() {
  static const Guard guard;
  const c10::impl::DeviceGuardImplRegistrar registrar(CUDA, &guard);
}
EXPORTED int exchange_device(int index) { return exchange(static_cast<c10::DeviceIndex>(index)); }
EXPORTED int current_device() { return current; }
}
