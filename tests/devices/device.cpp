// A simulated device for torch's CPU build, of the kind that KIND names (CUDA, XPU or MPS): memory of its own, streams whose copies come as late as they may, and a
// clock per stream that shows every access which nothing orders. What is computed is computed by the CPU's kernels.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/detail/MPSHooksInterface.h>
#include <ATen/detail/XPUHooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <deque>
#include <map>
#include <mutex>
#include <set>

namespace {
using Lock = std::lock_guard<std::recursive_mutex>;
using Text = std::string;
constexpr auto kType = c10::DeviceType::KIND;
const bool kFloat64 = kType != c10::DeviceType::MPS, kPins = kFloat64;
const int kDevices = kFloat64 ? 2 : 1;  // the second one shows where an index is wrong
const uint8_t kUnset = 0xFF;   // NaN in every floating dtype
const size_t kStreams = 32;    // of a device, as torch's pool of streams; then they are given out again
const int kSlots = kStreams + 1;  // streams of a device with its default one; below a stream is a number among those of all
const size_t kGranule = 512;   // bytes, as CUDA's caching allocator rounds

// What lives until the process ends is never destroyed: threads of torch may still be using it.
std::recursive_mutex& mutex = *new std::recursive_mutex;

// ---- Clocks: at[s] is how much of stream s is known to have been done before -------------------------------------
struct Clock {
  std::vector<uint64_t> times;
  uint64_t at(size_t s) const { return s < times.size() ? times[s] : 0; }
  void learn(const Clock& other) {
    if (times.size() < other.times.size()) times.resize(other.times.size());
    for (size_t i = 0; i < other.times.size(); i++) times[i] = std::max(times[i], other.times[i]);
  }
};

struct Work {
  std::function<void()> run;
  int stream = -1;    // or: wait until this stream
  uint64_t upto = 0;  // has done so much
};
struct StreamState {
  std::deque<Work> queue;
  uint64_t sent = 0, done = 0;
  Clock clock;
};
auto& streams = *new std::deque<StreamState>(2 * kSlots);
auto& host = *new Clock;
size_t streams_given[2] = {0, 0};
thread_local int device_now = 0;                 // the current device
thread_local int current_of[2] = {0, kSlots};    // the current stream of each
int owner_of(int stream) { return stream / kSlots; }
c10::Device device_at(int index) { return c10::Device(kType, index); }
int here_now() { return current_of[device_now]; }
c10::Stream stream_at(int s) { return c10::Stream(c10::Stream::UNSAFE, device_at(owner_of(s)), s % kSlots); }
int number_of(const c10::Stream& stream) { return stream.device_index() * kSlots + int(stream.id()); }

void run_until(int s, uint64_t upto) {
  while (streams[s].done < upto && !streams[s].queue.empty()) {
    Work work = std::move(streams[s].queue.front());
    streams[s].queue.pop_front();
    if (work.stream >= 0) run_until(work.stream, work.upto);
    if (work.run) work.run();
    streams[s].done++;
  }
}
void run_all(int s) { run_until(s, streams[s].sent); }
void send(int s, Work work) {
  streams[s].queue.push_back(std::move(work));
  streams[s].sent++;
}
uint64_t tick(int s) {  // something is launched: after all that the host knows to have ended
  Clock& clock = streams[s].clock;
  clock.learn(host);
  if (clock.times.size() <= size_t(s)) clock.times.resize(s + 1);
  return ++clock.times[s];
}

// ---- Memory, on the device and pinned; who wrote and read it last -------------------------------------------------
struct Access {
  int stream = -1;
  uint64_t time = 0;
  Text what;
  bool before(const Clock& clock) const { return stream < 0 || time <= clock.at(stream); }
};
struct Block {
  char* start;
  size_t bytes, requested;
  int stream;
  bool pinned = false, freed = false, set = false;
  std::set<int> recorded;  // streams that Tensor.record_stream named
  Access write{};
  std::map<int, Access> reads{};
  std::vector<std::pair<int, uint64_t>> waits{};  // before freed memory is given to others
};
auto& blocks = *new std::map<char*, Block*>;
auto& cached = *new std::map<std::pair<int, size_t>, std::vector<char*>>;  // freed memory, by stream and size
auto& leaving = *new std::vector<Block*>;
struct Counts {
  size_t allocated = 0, requested = 0, reserved = 0, cached_bytes = 0, limit = ~size_t(0);
  size_t peak_allocated = 0, peak_requested = 0, peak_reserved = 0;
} counts[2];

void fault(const Text& text) {  // into a file that processes share; one without tests around it has none
  const char* name = getenv("TUNEKIT_SIMULATED_FAULTS");
  FILE* file = name ? fopen(name, "a") : stderr;
  fprintf(file, "%s\n", text.c_str());
  if (name) fclose(file);
}
Block* block_of(const void* pointer) {
  auto after = blocks.upper_bound((char*)pointer);
  if (!pointer || after == blocks.begin()) return nullptr;
  Block* block = (--after)->second;
  return (char*)pointer < block->start + block->bytes ? block : nullptr;
}
bool is_pinned(const void* pointer) {
  Lock lock(mutex);
  Block* block = block_of(pointer);
  return block && block->pinned;
}
void unordered(const char* kind, const Access& before, int s, const Text& what) {
  fault(Text(kind) + ": " + what + " on stream " + std::to_string(s) + " is not ordered after " + before.what +
        " on stream " + std::to_string(before.stream));
}
void touch(Block* block, bool writes, int s, uint64_t time, const Text& what) {
  if (!block) return;
  const Clock& clock = streams[s].clock;
  if (block->freed) unordered("use after free", block->write, s, what);
  if (!block->set && !writes && !block->pinned) fault("unset memory is read: " + what);
  if (block->write.stream != s && !block->write.before(clock))
    unordered(writes ? "write after write" : "read after write", block->write, s, what);
  if (!writes) {
    block->reads[s] = {s, time, what};
    return;
  }
  for (auto& [reader, read] : block->reads)
    if (reader != s && !read.before(clock)) unordered("write after read", read, s, what);
  block->write = {s, time, what};
  block->reads.clear();
  block->set = true;
}

void give_back(Block* block) {
  memset(block->start, kUnset, block->bytes);
  blocks.erase(block->start);
  cached[{block->stream, block->bytes}].push_back(block->start);
  counts[owner_of(block->stream)].cached_bytes += block->bytes;
  delete block;
}
void give_back_what_has_ended() {
  std::vector<Block*> kept;
  for (Block* block : leaving) {
    bool ended = true;
    for (auto& [s, upto] : block->waits) ended &= streams[s].done >= upto;
    if (ended) give_back(block); else kept.push_back(block);
  }
  leaving.swap(kept);
}
void empty_cache() {
  give_back_what_has_ended();
  for (auto& [key, pointers] : cached) for (char* pointer : pointers) free(pointer);
  cached.clear();
  for (Counts& of : counts) of.reserved -= std::exchange(of.cached_bytes, 0);
}

struct DeviceAllocator final : c10::Allocator {
  static void release(void* pointer) {
    Lock lock(mutex);
    auto found = blocks.find((char*)pointer);
    if (found == blocks.end()) return;
    Block* block = found->second;
    counts[owner_of(block->stream)].allocated -= block->bytes;
    counts[owner_of(block->stream)].requested -= block->requested;
    auto check = [&](const char* kind, const Access& access) {
      if (access.stream < 0 || access.stream == block->stream || block->recorded.count(access.stream)) return;
      if (!access.before(streams[block->stream].clock) && !access.before(host))
        unordered(kind, access, block->stream, "the release of its memory");
    };
    for (auto& [reader, read] : block->reads) check("freed while read", read);
    check("freed while written", block->write);
    block->recorded.insert(block->stream);
    for (int s : block->recorded) if (streams[s].done < streams[s].sent) block->waits.push_back({s, streams[s].sent});
    block->freed = true;
    leaving.push_back(block);
    give_back_what_has_ended();
  }
  c10::DataPtr allocate(size_t n) override {
    Lock lock(mutex);
    const int current = here_now();
    Counts& of = counts[device_now];
    if (!n) return {nullptr, nullptr, &release, device_at(device_now)};
    give_back_what_has_ended();
    size_t bytes = (n + kGranule - 1) / kGranule * kGranule;
    TORCH_CHECK_WITH(OutOfMemoryError, of.allocated + bytes <= of.limit, "CUDA out of memory. Tried to allocate ", n, " bytes.");
    void* pointer = nullptr;
    auto& fitting = cached[{current, bytes}];
    if (!fitting.empty()) {
      pointer = fitting.back();
      fitting.pop_back();
      of.cached_bytes -= bytes;
    } else {
      if (of.reserved + bytes > of.limit) empty_cache();
      TORCH_CHECK(posix_memalign(&pointer, kGranule, bytes) == 0);
      of.reserved += bytes;
      of.peak_reserved = std::max(of.peak_reserved, of.reserved);
    }
    memset(pointer, kUnset, bytes);
    Block* block = new Block{(char*)pointer, bytes, n, current};
    block->write = {current, tick(current), "its allocation"};  // what had this memory before may still be computed
    blocks[block->start] = block;
    of.allocated += bytes;
    of.requested += n;
    of.peak_allocated = std::max(of.peak_allocated, of.allocated);
    of.peak_requested = std::max(of.peak_requested, of.requested);
    return {pointer, pointer, &release, device_at(device_now)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t n) const override { memcpy(to, from, n); }
};
struct PinnedAllocator final : c10::Allocator {
  static void release(void* pointer) {
    Lock lock(mutex);
    Block* block = block_of(pointer);
    if (!block) return;
    memset(pointer, kUnset, block->bytes);
    blocks.erase(block->start);
    delete block;
    free(pointer);
  }
  c10::DataPtr allocate(size_t n) override {
    Lock lock(mutex);
    void* pointer = nullptr;
    if (n) {
      TORCH_CHECK(posix_memalign(&pointer, 4096, n) == 0);
      memset(pointer, kUnset, n);
      blocks[(char*)pointer] = new Block{(char*)pointer, n, n, -1, true};
    }
    return {pointer, pointer, &release, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t n) const override { memcpy(to, from, n); }
};
DeviceAllocator device_allocator;
PinnedAllocator pinned_allocator;

// ---- The host: what it waits for, and what it may see --------------------------------------------------------------
struct Arrival {  // a copy to the host is seen there once the host has waited for it, not before
  int stream;
  uint64_t time;
  at::Tensor target, value;
};
auto& arrivals = *new std::vector<Arrival>;
auto& waits = *new std::vector<Text>;
int watched = 0;  // as torch.cuda.set_sync_debug_mode: 1 counts, 2 raises

template <typename Condition>
void show(Condition seen) {
  std::vector<Arrival> kept;
  for (Arrival& arrival : arrivals) {
    if (seen(arrival)) {
      at::NoGradGuard no_grad;
      arrival.target.copy_(arrival.value);
    } else kept.push_back(arrival);
  }
  arrivals.swap(kept);
}
void host_learns(const Clock& clock) {
  host.learn(clock);
  show([](const Arrival& arrival) { return arrival.time <= host.at(arrival.stream); });
}
void host_waits(int s, const Text& what, bool told_by_torch = true) {
  if (watched) waits.push_back(what);
  TORCH_CHECK(watched < 2 || !told_by_torch, "called a synchronizing CUDA operation: ", what);
  run_all(s);
  host_learns(streams[s].clock);
}

struct Event {
  int stream = -1;
  uint64_t upto = 0;
  Clock clock;
  bool ended() const { return stream < 0 || streams[stream].done >= upto; }
};
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kType; }
  c10::Device exchangeDevice(c10::Device device) const override {
    TORCH_CHECK(device.index() < kDevices, "CUDA error: invalid device ordinal");
    return device_at(std::exchange(device_now, std::max<int>(device.index(), 0)));
  }
  c10::Device getDevice() const override { return device_at(device_now); }
  void setDevice(c10::Device device) const override { exchangeDevice(device); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { device_now = std::max<int>(device.index(), 0); }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
  int index_of(c10::Device device) const { return device.has_index() ? device.index() : device_now; }
  c10::Stream getStream(c10::Device device) const override { return stream_at(current_of[index_of(device)]); }
  c10::Stream getDefaultStream(c10::Device device) const override { return stream_at(index_of(device) * kSlots); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream getNewStream(c10::Device device, int) const override {
    Lock lock(mutex);
    int index = index_of(device);
    return stream_at(index * kSlots + 1 + streams_given[index]++ % kStreams);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return stream_at(std::exchange(current_of[stream.device_index()], number_of(stream)));
  }
  void* getStreamNativeHandle(const c10::Stream stream) const override { return (void*)(intptr_t)stream.id(); }
  bool queryStream(const c10::Stream& stream) const override {
    return streams[number_of(stream)].done == streams[number_of(stream)].sent;
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    Lock lock(mutex);
    host_waits(number_of(stream), "stream.synchronize");
  }
  void synchronizeDevice(const c10::DeviceIndex index) const override {
    Lock lock(mutex);
    for (int s = index * kSlots; s < (index + 1) * kSlots; s++)
      if (streams[s].sent || s % kSlots == 0) host_waits(s, "device synchronize", false);
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete (Event*)event; }
  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex, const c10::EventFlag) const override {
    Lock lock(mutex);
    int s = number_of(stream);
    if (!*event) *event = new Event();
    tick(s);
    *(Event*)*event = Event{s, streams[s].sent, streams[s].clock};
  }
  void block(void* event, const c10::Stream& stream) const override {
    Lock lock(mutex);
    auto* passed = (Event*)event;
    if (!passed || passed->stream < 0) return;
    const int s = number_of(stream);
    streams[s].clock.learn(passed->clock);
    if (passed->stream != s && !passed->ended()) send(s, {nullptr, passed->stream, passed->upto});
  }
  bool queryEvent(void* event) const override {
    Lock lock(mutex);
    auto* passed = (Event*)event;
    if (passed && !passed->ended()) return false;
    if (passed) host_learns(passed->clock);
    return true;
  }
  void synchronizeEvent(void* event) const override {
    Lock lock(mutex);
    auto* passed = (Event*)event;
    if (!passed || passed->stream < 0) return;
    if (watched) waits.push_back("event.synchronize");
    run_until(passed->stream, passed->upto);
    host_learns(passed->clock);
  }
  void recordDataPtrOnStream(const c10::DataPtr& memory, const c10::Stream& stream) const override {
    Lock lock(mutex);
    if (Block* block = block_of(memory.get())) block->recorded.insert(number_of(stream));
  }
  double elapsedTime(void*, void*, const c10::DeviceIndex) const override { return 1.0; }
};

struct Generator final : c10::GeneratorImpl {
  at::Generator inner = at::detail::createCPUGenerator();
  explicit Generator(int index) : c10::GeneratorImpl(device_at(index), c10::DispatchKeySet(c10::DispatchKey::KIND)) {
    inner.seed();  // by nobody, as one that only the host's seed reached would be
  }
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner.unsafeGetGeneratorImpl()->get_state(); }
  static c10::DeviceType device_type() { return kType; }

 private:
  Generator* clone_impl() const override {
    auto* copy = new Generator(device_.index());
    copy->inner = inner.clone();
    return copy;
  }
};
const at::Generator& default_generator(int index) {
  static at::Generator generators[] = {at::make_generator<Generator>(0), at::make_generator<Generator>(1)};
  return generators[index];
}
at::Generator inner_generator(const at::Generator& generator) {
  return static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->inner;
}
}  // namespace

namespace at {
template <typename Interface>
struct Hooks : Interface {  // what torch asks every kind of
  void init() const override {}
  const Generator& getDefaultGenerator(DeviceIndex index) const override {
    return default_generator(index < 0 ? device_now : index);
  }
  Generator getNewGenerator(DeviceIndex index) const override {
    static bool first[] = {true, true};  // Python asks once for each default one
    index = index < 0 ? device_now : index;
    if (!std::exchange(first[index], false)) return at::make_generator<::Generator>(index);
    return default_generator(index);
  }
  Device getDeviceFromPtr(void* pointer) const override {
    Block* block = block_of(pointer);
    return device_at(block ? owner_of(block->stream) : device_now);
  }
  bool isPinnedPtr(const void* pointer) const override { return is_pinned(pointer); }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex getCurrentDevice() const override { return device_now; }
  void setCurrentDevice(DeviceIndex index) const override { device_now = index; }
  DeviceIndex exchangeDevice(DeviceIndex index) const override { return std::exchange(device_now, index); }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override {
    return index < 0 ? device_now : std::exchange(device_now, index);
  }
  Allocator* getPinnedMemoryAllocator() const override {
    TORCH_CHECK(kPins, "there is no pinned memory");
    return &pinned_allocator;
  }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  DeviceIndex deviceCount() const override { return kDevices; }
};
struct CUDAHooks final : Hooks<CUDAHooksInterface> {  // torch looks for classes of these names
  CUDAHooks(CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  DeviceIndex current_device() const override { return device_now; }
  Allocator* getCUDADeviceAllocator() const override { return &device_allocator; }
};
struct XPUHooks final : Hooks<XPUHooksInterface> {
  bool hasXPU() const override { return true; }
  DeviceIndex getNumGPUs() const override { return kDevices; }
  DeviceIndex current_device() const override { return device_now; }
};
struct MPSHooks final : Hooks<MPSHooksInterface> {
  bool hasMPS() const override { return true; }
  bool isOnMacOSorNewer(unsigned, unsigned) const override { return true; }
  Allocator* getMPSDeviceAllocator() const override { return &device_allocator; }
};
#define REGISTER_HOOKS_OF(kind) REGISTER_##kind##_HOOKS(kind##Hooks)
#define REGISTER_HOOKS(kind) REGISTER_HOOKS_OF(kind)
REGISTER_HOOKS(KIND)
}  // namespace at

namespace {
C10_REGISTER_GUARD_IMPL(KIND, Guard)

// ---- Operators: the CPU's kernel over the device's memory ----------------------------------------------------------
void take_shape(c10::TensorImpl* to, const at::Tensor& from) {
  to->set_storage_offset(from.storage_offset());
  to->set_sizes_and_strides(from.sizes(), from.strides());
}
c10::Storage storage_of(size_t bytes, c10::DataPtr memory, c10::Allocator* allocator) {
  return c10::Storage(c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), bytes, std::move(memory), allocator, true));
}
bool here(const at::Tensor& t) { return t.device().type() == kType; }
void check_kind(c10::ScalarType dtype) {
  TORCH_CHECK_TYPE(kFloat64 || dtype != at::kDouble, "Cannot convert a MPS Tensor to float64 dtype as the MPS framework "
                   "doesn't support float64. Please use float32 instead.");
}
at::Tensor on_host(const at::Tensor& t) {  // a tensor of the CPU over the same memory
  auto& storage = t.storage();
  auto memory = c10::DataPtr(storage.mutable_data(), c10::Device(c10::kCPU));
  auto out = at::detail::make_tensor<c10::TensorImpl>(
      storage_of(storage.nbytes(), std::move(memory), c10::GetAllocator(c10::kCPU)),
      c10::DispatchKeySet(c10::DispatchKey::CPU), t.dtype());
  take_shape(out.unsafeGetTensorImpl(), t);
  if (t.is_conj()) out.unsafeGetTensorImpl()->_set_conj(true);
  if (t.is_neg()) out.unsafeGetTensorImpl()->_set_neg(true);
  return out;
}
at::Tensor on_device(const at::Tensor& result, const Text& name) {  // what the CPU computed, in the device's memory
  check_kind(result.scalar_type());
  auto& storage = result.storage();
  size_t bytes = storage.nbytes();
  c10::DataPtr memory = device_allocator.allocate(bytes);
  if (bytes) memcpy(memory.get(), storage.data(), bytes);
  if (Block* block = block_of(memory.get())) {
    block->set = true;
    block->write.what = name;
  }
  auto out = at::detail::make_tensor<c10::TensorImpl>(
      storage_of(bytes, std::move(memory), &device_allocator), c10::DispatchKeySet(c10::DispatchKey::KIND), result.dtype());
  take_shape(out.unsafeGetTensorImpl(), result);
  return out;
}

// Operators that take tensors of the host beside those of the device; that make the host wait; that have no kernel; that
// look at shapes alone; that a GPU adds up in no fixed order.
const std::set<Text> kMixed = {"aten::index.Tensor", "aten::index_put_", "aten::_index_put_impl_", "aten::index_put",
    "aten::_unsafe_index.Tensor", "aten::_unsafe_index_put", "aten::set_.source_Tensor", "aten::_fused_adamw_",
    "aten::_fused_adamw_.tensor_lr"};
const std::set<Text> kWaits = {"aten::_local_scalar_dense", "aten::nonzero", "aten::nonzero.out", "aten::masked_select",
    "aten::masked_select.out", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::equal",
    "aten::is_nonzero", "aten::repeat_interleave.Tensor", "aten::bincount", "aten::_linalg_check_errors"};
const std::set<Text> kAbsent = {"aten::_fused_rms_norm"};
const std::set<Text> kUnordered = {"aten::cumsum", "aten::cumsum_", "aten::cumsum.out", "aten::kthvalue", "aten::median.dim"};
const std::set<Text> kShapes = {"aten::_fused_sdp_choice"};

// One call of an operator: its tensors of the device as tensors of the CPU over the same memory, and back again.
struct Call {
  const c10::FunctionSchema& schema;
  const Text name;
  std::map<c10::StorageImpl*, c10::Storage> aliases, originals;  // device's storage -> CPU's; CPU's -> device's
  std::map<c10::StorageImpl*, c10::DispatchKeySet> keys;
  std::map<c10::TensorImpl*, at::Tensor> tensors;                // CPU's tensor -> device's
  std::vector<std::pair<Block*, bool>> touched;                  // whether it is written
  bool uses_device = false, uses_host = false, made_here = false, by_mask = false;
  int index = device_now;  // the device whose tensors these are

  void on(c10::Device device) {
    const int other = device.has_index() ? device.index() : device_now;
    TORCH_CHECK(!(uses_device || made_here) || index == other, "Expected all tensors to be on the same device, but found at "
                "least two devices, cuda:", index, " and cuda:", other, "! (", name, ")");
    index = other;
  }

  at::Tensor there(const at::Tensor& t, bool writes, bool views) {
    if (t.defined() && t.is_cpu() && t.dim() > 0) uses_host = true;
    if (!t.defined() || !here(t)) return t;
    on(t.device());
    uses_device = true;
    if (!t.has_storage()) return t;
    if (!views) touched.push_back({block_of(t.storage().data()), writes});
    at::Tensor alias = on_host(t);
    auto* storage = t.storage().unsafeGetStorageImpl();
    auto known = aliases.emplace(storage, alias.storage()).first;
    alias.unsafeGetTensorImpl()->set_storage_keep_dtype(known->second);
    originals.emplace(known->second.unsafeGetStorageImpl(), t.storage());
    keys.emplace(known->second.unsafeGetStorageImpl(), t.key_set());
    tensors.emplace(alias.unsafeGetTensorImpl(), t);
    return alias;
  }
  at::Tensor back(const at::Tensor& t) {
    if (!t.defined() || !t.is_cpu()) return t;
    auto given = tensors.find(t.unsafeGetTensorImpl());
    if (given != tensors.end()) {
      at::Tensor& original = given->second;
      if (t.storage().data() != original.storage().data()) {  // the kernel took memory of its own
        at::native::resize_impl_cpu_(original.unsafeGetTensorImpl(), t.sizes(), std::nullopt);
        on_host(original).copy_(t);
        if (Block* block = block_of(original.storage().data())) block->set = true;
      } else {
        original.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides());
      }
      return original;
    }
    auto view = originals.find(t.storage().unsafeGetStorageImpl());
    if (view == originals.end()) return uses_device || made_here ? on_device(t, name) : t;
    auto out = at::detail::make_tensor<c10::TensorImpl>(
        c10::TensorImpl::VIEW, c10::Storage(view->second), keys.at(view->first), t.dtype());
    take_shape(out.unsafeGetTensorImpl(), t);
    return out;
  }
  c10::IValue argument(size_t i, const c10::IValue& value) {
    auto* alias = schema.arguments()[i].alias_info();
    bool writes = alias && alias->isWrite(), views = alias && !writes;
    if (value.isTensor()) return there(value.toTensor(), writes, views);
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& t : value.toTensorVector()) list.push_back(there(t, writes, views));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& t : value.toOptionalTensorList()) {
        by_mask |= t && (t->scalar_type() == at::kBool || t->scalar_type() == at::kByte);
        list.push_back(t ? std::optional<at::Tensor>(there(*t, writes, views)) : std::nullopt);
      }
      return list;
    }
    if (value.isDevice() && value.toDevice().type() == kType) {
      on(value.toDevice());
      made_here = true;
      return c10::Device(c10::kCPU);
    }
    if (value.isGenerator() && value.toGenerator().device().type() == kType) return inner_generator(value.toGenerator());
    if (value.isNone() && schema.arguments()[i].name() == "generator") return inner_generator(default_generator(index));
    return value;
  }
  c10::IValue result(const c10::IValue& value) {
    if (value.isTensor()) return back(value.toTensor());
    if (!value.isTensorList()) return value;
    c10::List<at::Tensor> list;
    for (const at::Tensor& t : value.toTensorVector()) list.push_back(back(t));
    return list;
  }
};

// Operators that draw from the default generator and take none: while such a one runs, the host's has the device's state.
const std::set<Text> kDraws = {"aten::native_dropout", "aten::_fused_dropout", "aten::rrelu_with_noise"};
struct Drawing {
  const int index;
  at::Generator host = at::detail::getDefaultCPUGenerator();
  at::Tensor before;
  explicit Drawing(int index) : index(index) {
    if (index < 0) return;
    before = host.get_state();
    host.set_state(default_generator(index).get_state());
  }
  ~Drawing() {
    if (index < 0) return;
    inner_generator(default_generator(index)).set_state(host.get_state());
    host.set_state(before);
  }
};

// cuBLAS's workspace, which each thread that multiplies matrices keeps until it ends.
size_t workspace_bytes = 0;
const std::set<Text> kProducts = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mm.out", "aten::addmm.out",
    "aten::bmm.out"};
void keep_workspace(int index) {
  static thread_local auto& kept = *new std::map<int, c10::DataPtr>;
  if (!kept.count(index)) kept.emplace(index, device_allocator.allocate(workspace_bytes));
  if (Block* block = block_of(kept.at(index).get())) block->set = true;
}

void compute(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  std::unique_lock<std::recursive_mutex> lock(mutex);
  Call call{op.schema(), toString(op.operator_name())};
  const size_t count = call.schema.arguments().size();
  std::vector<c10::IValue> arguments;
  for (size_t i = 0; i < count; i++) arguments.push_back(call.argument(i, torch::jit::peek(*stack, i, count)));
  c10::DeviceGuard device(device_at(call.index));  // as torch's kernels have: the current stream of the tensors' device
  const int s = here_now();
  run_all(s);
  TORCH_CHECK(!call.uses_device || !call.uses_host || kMixed.count(call.name),
              "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (", call.name, ")");
  TORCH_CHECK_NOT_IMPLEMENTED(!kAbsent.count(call.name), "Could not run '", call.name, "' with the simulated device");
  if (call.uses_device && !kShapes.count(call.name)) {
    uint64_t time = tick(s);
    for (bool writes : {false, true})
      for (auto& [block, written] : call.touched) if (written == writes) touch(block, writes, s, time, call.name);
  }
  if (kUnordered.count(call.name) && c10::isFloatingType(torch::jit::peek(*stack, 0, count).toTensor().scalar_type()))
    at::globalContext().alertNotDeterministic(call.name);
  if (workspace_bytes && kProducts.count(call.name)) keep_workspace(call.index);
  if (kWaits.count(call.name)) host_waits(s, call.name);
  if (call.by_mask) host_waits(s, call.name + " by a mask");
  torch::jit::drop(*stack, count);
  // Copied: a kernel returns references to its outputs among these, which the stack drops before it takes them.
  for (const auto& argument : arguments) stack->push_back(argument);
  lock.unlock();
  {
    const Drawing drawing(kDraws.count(call.name) && call.uses_device ? call.index : -1);
    op.callBoxedForDispatchKey(c10::DispatchKey::CPU, *stack);
  }
  lock.lock();
  for (auto& value : torch::jit::pop(*stack, call.schema.returns().size())) stack->push_back(call.result(value));
  lock.unlock();  // before anything is destroyed: the last reference of a tensor of Python needs the interpreter
}

size_t checksum(const at::Tensor& t) {
  at::Tensor bytes = t.contiguous();
  return std::hash<std::string_view>()({(const char*)bytes.data_ptr(), bytes.nbytes()});
}
at::Tensor& copy_(at::Tensor& to, const at::Tensor& from, bool non_blocking) {
  Lock lock(mutex);
  if (to.numel() == 0 || from.is_meta()) return to;
  c10::DeviceGuard device((here(from) ? from : to).device());  // a copy between devices is on the first one's stream
  const int s = here_now();
  const bool arrives = here(to) && !here(from), leaves = here(from) && !here(to), crosses = arrives || leaves;
  Block* const of_from = block_of(from.storage().data());
  Block* const of_to = block_of(to.storage().data());
  const bool pinned = crosses && is_pinned((arrives ? from : to).storage().data());
  const bool waits_here = crosses && !(non_blocking && pinned);
  const Text what = arrives ? "a copy to the device" : leaves ? "a copy to the host" : "a copy on the device";
  at::Tensor target = here(to) ? on_host(to) : to.detach(), source = here(from) ? on_host(from) : from.detach();
  if (leaves && !waits_here) run_all(s);  // what was copied from the target before is on its way
  const int other = here(to) ? current_of[to.device().index()] : s;
  if (other != s) {  // of another device: both current streams wait for each other
    run_all(other);
    streams[s].clock.learn(streams[other].clock);
  }
  const uint64_t time = tick(s);
  if (other != s) streams[other].clock.learn(streams[s].clock);
  touch(of_from, false, s, time, what);
  touch(of_to, true, s, time, what);
  auto copy = [=]() mutable {
    at::AutoDispatchBelowADInplaceOrView below;
    at::NoGradGuard no_grad;
    target.copy_(source.expand(target.sizes()));
  };
  if (waits_here) {
    host_waits(s, crosses && pinned ? "a blocking copy" : what + (arrives ? " from" : " into") + " pageable memory", !non_blocking);
    copy();
  } else if (leaves) {
    if (target.is_contiguous()) memset(target.data_ptr(), kUnset, target.nbytes());  // what is read there now is undefined
    send(s, {[=]() mutable {
      at::AutoDispatchBelowADInplaceOrView below;
      at::NoGradGuard no_grad;
      arrivals.push_back({s, time, target, at::empty_like(target).copy_(source.expand(target.sizes()))});
    }});
  } else if (arrives) {
    const bool by_host = of_from->write.before(host);  // else the device itself writes what is copied
    const size_t before = by_host ? checksum(source) : 0;
    send(s, {[=]() mutable {
      show([&](const Arrival& arrival) { return block_of(arrival.target.storage().data()) == of_from; });
      if (by_host && checksum(source) != before) fault("the host writes what a copy to the device has yet to read");
      copy();
    }});
  } else {
    if (s % kSlots == 0 || other != s) {
      run_all(s);
      copy();
    } else send(s, {copy});
  }
  return to;
}

using Size = c10::IntArrayRef;
using SymSize = c10::SymIntArrayRef;
template <typename T> using Maybe = std::optional<T>;
void refuse_pinned(Maybe<bool> pin) {
  TORCH_CHECK(!c10::pinned_memory_or_default(pin), "Only dense CPU tensors can be pinned");
}
const c10::DispatchKeySet kKeys(c10::DispatchKey::KIND);
at::Tensor empty(Size size, Maybe<c10::ScalarType> dtype, Maybe<c10::Layout>, Maybe<c10::Device> place, Maybe<bool> pin,
                 Maybe<c10::MemoryFormat> format) {
  c10::DeviceGuard device(place && place->has_index() ? *place : device_at(device_now));
  refuse_pinned(pin);
  check_kind(c10::dtype_or_default(dtype));
  return at::detail::empty_generic(size, &device_allocator, kKeys, c10::dtype_or_default(dtype), format);
}
at::Tensor empty_strided(Size size, Size stride, Maybe<c10::ScalarType> dtype, Maybe<c10::Layout>, Maybe<c10::Device> place,
                         Maybe<bool> pin) {
  c10::DeviceGuard device(place && place->has_index() ? *place : device_at(device_now));
  refuse_pinned(pin);
  check_kind(c10::dtype_or_default(dtype));
  return at::detail::empty_strided_generic(size, stride, &device_allocator, kKeys, c10::dtype_or_default(dtype));
}
at::Tensor as_strided(const at::Tensor& t, SymSize size, SymSize stride, Maybe<c10::SymInt> offset) {
  return at::cpu::as_strided_symint(t, size, stride, offset);
}
at::Tensor view(const at::Tensor& t, SymSize size) { return at::native::view(t, C10_AS_INTARRAYREF_SLOW(size)); }
at::Tensor reshape_alias(const at::Tensor& t, SymSize size, SymSize stride) {
  return at::native::_reshape_alias(t, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}
const at::Tensor& resize_(const at::Tensor& t, SymSize size, Maybe<at::MemoryFormat> format) {
  Block* before = block_of(t.storage().data());
  const bool set = before && before->set;
  at::native::resize_(t, C10_AS_INTARRAYREF_SLOW(size), format);  // more memory begins with what was in less
  if (Block* block = block_of(t.storage().data())) block->set |= set;
  return t;
}
at::Tensor& set_tensor(at::Tensor& t, const at::Tensor& source) { return at::native::set_tensor_(t, source); }
at::Tensor& set_storage(at::Tensor& t, at::Storage source) { return at::native::set_(t, source); }
at::Tensor& set_part(at::Tensor& t, at::Storage source, int64_t offset, Size size, Size stride) {
  return at::cpu::set_(t, source, offset, size, stride);
}
void record_stream(at::Tensor& t, c10::Stream stream) { Guard().recordDataPtrOnStream(t.storage().data_ptr(), stream); }

TORCH_LIBRARY_IMPL(aten, KIND, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("as_strided", as_strided);
  library.impl("view", view);
  library.impl("_reshape_alias", reshape_alias);
  library.impl("resize_", resize_);
  library.impl("copy_", copy_);
  library.impl("set_.source_Tensor", set_tensor);
  library.impl("set_.source_Storage", set_storage);
  library.impl("set_.source_Storage_storage_offset", set_part);
  library.impl("record_stream", record_stream);
  // Of these torch has a formula for devices without a kernel, which would come before the fallback.
  for (const char* name : {"silu_backward", "mish_backward"})
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&compute>());
}
TORCH_LIBRARY_IMPL(_, KIND, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&compute>()); }
const bool allocates = (c10::SetAllocator(kType, &device_allocator, 10), true);

}  // namespace

// ---- What simulated.py asks ----------------------------------------------------------------------------------------
extern "C" {
int64_t double_stream(int index) { return current_of[index] % kSlots; }
void double_set_stream(int64_t stream, int index) {
  device_now = index;
  current_of[index] = index * kSlots + int(stream);
}
int double_device() { return device_now; }
int double_set_device(int index) { return std::exchange(device_now, index); }
void double_synchronize() { Guard().synchronizeDevice(device_now); }
void double_watch(int mode) { watched = mode; }
void double_set_limit(size_t bytes, int index) { counts[index].limit = bytes; }
void double_set_workspace(size_t bytes) { workspace_bytes = bytes; }
void double_empty_cache() { Lock lock(mutex); empty_cache(); }
void double_reset_peaks(int index) {
  Lock lock(mutex);
  Counts& of = counts[index];
  of.peak_allocated = of.allocated;
  of.peak_requested = of.requested;
  of.peak_reserved = of.reserved;
}
size_t double_bytes(int which, int index) {
  Lock lock(mutex);
  const Counts& of = counts[index];
  return std::vector<size_t>{of.allocated, of.peak_allocated, of.requested, of.peak_requested, of.reserved, of.peak_reserved}.at(which);
}
const char* double_waits() {
  static Text answer;
  Lock lock(mutex);
  answer.clear();
  for (auto& line : std::exchange(waits, {})) answer += line + "\n";
  return answer.c_str();
}
}
