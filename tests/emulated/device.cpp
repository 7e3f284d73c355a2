// An accelerator emulated in host memory, for tests: PyTorch's PrivateUse1 as two devices on CPU kernels.
//
// What CUDA refuses raises here too: tensors of two devices in one operator, a CPU generator for a device tensor.
// Every operator, and everything that makes a CUDA host wait for its device, is reported to a listener.
// Memory, streams, precision and kernels are the CPU's: nothing here says how fast a GPU is.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/GeneratorForPrivateuseone.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <string>
#include <unordered_set>
#include <vector>

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::OperatorHandle;
using torch::jit::Stack;

namespace {

constexpr c10::DeviceType DEVICE = c10::DeviceType::PrivateUse1;
constexpr DeviceIndex NUM_DEVICES = 2;
thread_local DeviceIndex current_device = 0;

// ------------------------------------------------------------------------------------------------ reports

using Listener = void (*)(const char* kind, const char* what);
std::atomic<Listener> listener{nullptr};
// Above 0 inside an operator's own work on the CPU, and inside the listener: neither is an event of the device.
thread_local int silenced = 0;

struct Silence {
  Silence() { ++silenced; }
  ~Silence() { --silenced; }
};

void report(const char* kind, const std::string& what) {
  Listener hears = listener.load();
  if (hears == nullptr || silenced > 0) return;
  Silence silence;
  hears(kind, what.c_str());
}

// ------------------------------------------------------------------------------- memory, devices, generators

struct HostMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* start = bytes > 0 ? c10::alloc_cpu(bytes) : nullptr;
    return {start, start, &c10::free_cpu, Device(DEVICE, current_device)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* target, const void* source, size_t bytes) const override {
    std::memcpy(target, source, bytes);
  }
};
HostMemory memory;
REGISTER_ALLOCATOR(DEVICE, &memory);

struct DeviceGuard final : c10::impl::NoOpDeviceGuardImpl<DEVICE> {
  Device getDevice() const override { return Device(DEVICE, current_device); }
  Device exchangeDevice(Device next) const override {
    Device before = getDevice();
    setDevice(next);
    return before;
  }
  void setDevice(Device next) const override {
    TORCH_CHECK(next.index() < NUM_DEVICES, "emulated: there is no device ", next);
    uncheckedSetDevice(next);
  }
  void uncheckedSetDevice(Device next) const noexcept override {
    if (next.index() >= 0) current_device = next.index();
  }
  DeviceIndex deviceCount() const noexcept override { return NUM_DEVICES; }

  // One stream per device, which is always done: work on the CPU ends before it returns.
  static c10::Stream only_stream(Device device) { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getStream(Device device) const noexcept override { return only_stream(device); }
  c10::Stream getDefaultStream(Device device) const override { return only_stream(device); }
  c10::Stream getNewStream(Device device, int) const override { return only_stream(device); }
  c10::Stream getStreamFromGlobalPool(Device device, bool) const override { return only_stream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
  void record(void** event, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {
    *event = this->recorded();
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  double elapsedTime(void*, void*, const DeviceIndex) const override { return 0; }
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
  void synchronizeStream(const c10::Stream&) const override { report("synchronize", "stream"); }
  void synchronizeEvent(void*) const override { report("synchronize", "event"); }
  void synchronizeDevice(const DeviceIndex) const override { report("synchronize", "device"); }

 private:
  static void* recorded() {
    static int event = 0;
    return &event;
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, DeviceGuard);

struct DeviceGenerator final : at::CPUGeneratorImpl {
  explicit DeviceGenerator(DeviceIndex index) {
    device_ = Device(DEVICE, index);
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  }
};

const at::Generator& default_generator(DeviceIndex index) {
  static const std::vector<at::Generator> generators = {
      at::make_generator<DeviceGenerator>(0), at::make_generator<DeviceGenerator>(1)};
  return generators.at(index < 0 ? current_device : index);
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return NUM_DEVICES; }
  DeviceIndex getCurrentDevice() const override { return current_device; }
  void setCurrentDevice(DeviceIndex next) const override { current_device = next; }
  DeviceIndex exchangeDevice(DeviceIndex next) const override {
    DeviceIndex before = current_device;
    if (next >= 0) current_device = next;
    return before;
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex next) const override { return exchangeDevice(next); }
  Device getDeviceFromPtr(void*) const override { return Device(DEVICE, 0); }
  bool isPinnedPtr(const void*) const override { return false; }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  const at::Generator& getDefaultGenerator(DeviceIndex index) const override {
    return default_generator(index);
  }
  at::Generator getNewGenerator(DeviceIndex index) const override {
    return at::make_generator<DeviceGenerator>(index < 0 ? current_device : index);
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    c10::StorageImpl* owner = storage.unsafeGetStorageImpl();
    const c10::DeviceGuard guard(owner->device());
    c10::DataPtr grown = memory.allocate(bytes);
    const size_t kept = std::min(bytes, owner->nbytes());
    if (kept > 0) std::memcpy(grown.get(), owner->data(), kept);
    owner->set_data_ptr_noswap(std::move(grown));
    owner->set_nbytes(bytes);
  }
};

// --------------------------------------------------------------------------------- tensors on both sides

bool is_emulated(const Tensor& tensor) { return tensor.defined() && tensor.device().type() == DEVICE; }

// The same memory as a CPU tensor, for CPU kernels to read and to write.
Tensor on_cpu(const Tensor& tensor) {
  const auto options = tensor.options().device(at::kCPU);
  if (tensor.numel() == 0) return at::empty_strided(tensor.sizes(), tensor.strides(), options);
  void* start = const_cast<void*>(tensor.const_data_ptr());
  auto keeps_storage = [storage = tensor.storage()](void*) {};
  Tensor view = at::from_blob(start, tensor.sizes(), tensor.strides(), keeps_storage, options);
  if (tensor.is_conj()) view = view.conj();
  if (tensor.is_neg()) view = view._neg_view();
  return view;
}

constexpr c10::DispatchKeySet KEYS{c10::DispatchKey::PrivateUse1};

Tensor make_empty(
    c10::IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
    std::optional<Device> device, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  const c10::DeviceGuard guard(c10::device_or_default(device));
  return at::detail::empty_generic(size, &memory, KEYS, c10::dtype_or_default(dtype), format);
}

Tensor make_strided(
    c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<c10::ScalarType> dtype,
    std::optional<c10::Layout>, std::optional<Device> device, std::optional<bool>) {
  const c10::DeviceGuard guard(c10::device_or_default(device));
  return at::detail::empty_strided_generic(size, stride, &memory, KEYS, c10::dtype_or_default(dtype));
}

void report_copy(const Tensor& source, const Tensor& target, bool non_blocking) {
  if (is_emulated(source) == is_emulated(target)) {
    if (source.device() != target.device()) report("between devices", "copy");
    return;
  }
  std::string kind = is_emulated(source) ? "to host" : "from host";
  if (non_blocking) kind += ", asynchronous";
  report(kind.c_str(), c10::str("copy of ", source.scalar_type(), source.sizes()));
}

Tensor copy_into(const Tensor& source, const Tensor& target, bool non_blocking) {
  if (source.numel() == 0 && target.numel() == 0) return target;
  report_copy(source, target, non_blocking);
  Silence silence;
  Tensor writes_to = is_emulated(target) ? on_cpu(target) : target;
  writes_to.copy_(is_emulated(source) ? on_cpu(source) : source);
  return target;
}

Tensor copy_and_resize(const Tensor& source, const Tensor& target) {
  const bool same_shape = source.sizes() == target.sizes();
  // A CPU kernel wrote in place, through `on_cpu`: the result is in this memory already.
  const bool is_view = is_emulated(target) && source.device().is_cpu() && same_shape &&
      source.const_data_ptr() == target.const_data_ptr();
  if (is_view) return target;
  if (!same_shape) target.resize_(source.sizes());
  return copy_into(source, target, false);
}

std::vector<Tensor> all_on_cpu(at::TensorList tensors) {
  std::vector<Tensor> result;
  for (const Tensor& tensor : tensors) result.push_back(is_emulated(tensor) ? on_cpu(tensor) : tensor);
  return result;
}

at::Scalar read_scalar(const Tensor& tensor) {
  report("item", "read of one number");
  Silence silence;
  return at::_local_scalar_dense(on_cpu(tensor));
}

Tensor& set_storage(Tensor& tensor, at::Storage storage) {
  const int64_t entries = storage.nbytes() / tensor.dtype().itemsize();
  return at::native::set_storage_cpu_(tensor, storage, 0, {entries}, {});
}

// Memory that grows stays on its own device, whichever is the current one.
const Tensor& resize(
    const Tensor& tensor, c10::IntArrayRef size, std::optional<c10::MemoryFormat> format) {
  const c10::DeviceGuard guard(tensor.device());
  return at::native::resize_(tensor, size, format);
}

// The plain mathematics: the fused kernels are those of real devices.
int64_t plain_attention(
    const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool,
    std::optional<double>, bool) {
  return 0;
}

// ------------------------------------------------------------------------ every other operator: its CPU kernel

// Operators whose result has a shape, or whose method has steps, that only the device knows: CUDA's host waits.
const std::unordered_set<std::string> WAITS = {
    "aten::nonzero", "aten::nonzero.out", "aten::masked_select", "aten::masked_select.out",
    "aten::_unique", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
    "aten::equal", "aten::is_set_to", "aten::repeat_interleave.Tensor", "aten::bincount", "aten::histc",
    "aten::linalg_eig", "aten::_linalg_eigh", "aten::_linalg_eigh.eigenvalues", "aten::linalg_cholesky_ex",
    "aten::_linalg_svd", "aten::_linalg_svd.U", "aten::linalg_lstsq.out", "aten::_linalg_solve_ex",
    "aten::_linalg_solve_ex.result"};

// Operators that take indices from the host, and copy them.
const std::unordered_set<std::string> INDEXING = {
    "aten::index.Tensor", "aten::index.Tensor_out", "aten::_unsafe_index.Tensor", "aten::index_put",
    "aten::index_put_", "aten::_index_put_impl_"};

// Operators that refuse even a single number (a 0-d tensor) of another device.
const std::unordered_set<std::string> NO_HOST_NUMBERS = {
    "aten::index_select", "aten::index_select.out", "aten::gather", "aten::gather.out",
    "aten::scatter.src_out", "aten::embedding", "aten::mm", "aten::mm.out", "aten::addmm.out",
    "aten::bmm.out", "aten::cat", "aten::cat.out", "aten::nll_loss_forward.output", "aten::masked_scatter_"};

struct Operands {
  std::vector<Tensor> emulated;
  std::vector<Tensor> host;
  std::vector<Tensor> host_numbers;

  void add(const Tensor& tensor) {
    if (!tensor.defined()) return;
    if (is_emulated(tensor)) emulated.push_back(tensor);
    else if (tensor.dim() > 0) host.push_back(tensor);
    else host_numbers.push_back(tensor);
  }
};

std::string described(const std::vector<Tensor>& tensors) {
  std::string words;
  for (const Tensor& tensor : tensors) {
    words += c10::str(" ", tensor.device(), ":", tensor.scalar_type(), tensor.sizes());
  }
  return words;
}

void add_index(const std::string& name, const Tensor& subject, const Tensor& index, Operands& operands) {
  if (!INDEXING.count(name) || is_emulated(index)) {
    operands.add(index);
    const bool is_mask = index.scalar_type() == at::kBool || index.scalar_type() == at::kByte;
    // Reading by a mask calls `nonzero` by itself; writing by one does not.
    if (is_mask && name == "aten::_index_put_impl_") report("shape", name + " by a mask");
    return;
  }
  TORCH_CHECK(is_emulated(subject), "emulated: ", name, ": a CPU tensor with indices", described({index}));
  report("from host", name + ": indices");
}

Operands operands_of(const std::string& name, const c10::ArrayRef<c10::IValue>& arguments) {
  Operands operands;
  for (const c10::IValue& argument : arguments) {
    if (argument.isTensor()) {
      operands.add(argument.toTensor());
    } else if (argument.isTensorList()) {
      for (const Tensor& tensor : argument.toTensorVector()) operands.add(tensor);
    } else if (argument.isOptionalTensorList()) {
      for (const std::optional<Tensor>& index : argument.toOptionalTensorVector()) {
        if (index.has_value() && index->defined()) {
          add_index(name, arguments[0].toTensor(), *index, operands);
        }
      }
    }
  }
  return operands;
}

void refuse_mixtures(const std::string& name, const Operands& operands) {
  const std::vector<Tensor>& emulated = operands.emulated;
  if (emulated.empty()) return;
  const char* rule = "emulated: Expected all tensors to be on the same device: ";
  TORCH_CHECK(operands.host.empty(), rule, name, described(emulated), " and", described(operands.host));
  TORCH_CHECK(
      operands.host_numbers.empty() || !NO_HOST_NUMBERS.count(name), rule, name, described(emulated), " and",
      described(operands.host_numbers));
  for (const Tensor& tensor : emulated) {
    TORCH_CHECK(tensor.device() == emulated[0].device(), rule, name, described(emulated));
  }
}

void inspect(const OperatorHandle& op, Stack* stack) {
  const std::string name = c10::toString(op.schema().operator_name());
  const auto arguments = torch::jit::last(*stack, op.schema().arguments().size());
  const Operands operands = operands_of(name, arguments);
  if (INDEXING.count(name)) {
    TORCH_CHECK(
        is_emulated(arguments[0].toTensor()), "emulated: ", name, ": a CPU tensor with indices",
        described(operands.emulated));
  }
  refuse_mixtures(name, operands);
  if (WAITS.count(name)) report("shape", name);
  report("operator", name);
}

// A device's generator for the time of one operator as the CPU generator that the kernel asks for.
class BorrowedGenerator {
 public:
  BorrowedGenerator(const OperatorHandle& op, Stack* stack) {
    const auto& declared = op.schema().arguments();
    const size_t begin = stack->size() - declared.size();
    bool on_device = false;
    for (size_t i = 0; i < declared.size(); ++i) {
      const c10::IValue& value = (*stack)[begin + i];
      on_device = on_device || (value.isTensor() && is_emulated(value.toTensor()));
    }
    for (size_t i = 0; i < declared.size(); ++i) {
      if (declared[i].type()->str().find("Generator") == std::string::npos) continue;
      c10::IValue& value = (*stack)[begin + i];
      at::Generator given = value.isNone() ? default_generator(-1) : value.toGenerator();
      const bool fits = given.device().type() == DEVICE;
      TORCH_CHECK(fits || !on_device, "emulated: Expected a 'emu' device type for generator but found 'cpu'");
      if (!fits) continue;
      lender_ = given;
      borrowed_ = at::make_generator<at::CPUGeneratorImpl>();
      borrowed_.set_state(given.get_state());
      value = borrowed_;
    }
  }
  void give_back() {
    if (lender_.defined()) lender_.set_state(borrowed_.get_state());
  }

 private:
  at::Generator lender_;
  at::Generator borrowed_;
};

void run_on_cpu(const OperatorHandle& op, Stack* stack) {
  inspect(op, stack);
  Silence silence;
  BorrowedGenerator generator(op, stack);
  at::native::cpu_fallback(op, stack, /*error_on_views=*/true);
  generator.give_back();
}

// --------------------------------------------------------------------------- sparse tensors, through sparse CPU ones

Tensor plain(const Tensor& tensor) {
  if (!is_emulated(tensor)) return tensor;
  if (!tensor.is_sparse()) return on_cpu(tensor);
  return at::_sparse_coo_tensor_unsafe(
      on_cpu(tensor._indices()), on_cpu(tensor._values()), tensor.sizes(), tensor.options().device(at::kCPU),
      tensor.is_coalesced());
}

Tensor moved_back(const Tensor& tensor, Device device) {
  if (!tensor.defined() || is_emulated(tensor)) return tensor;
  if (!tensor.is_sparse()) return tensor.to(device);
  return at::_sparse_coo_tensor_unsafe(
      tensor._indices().to(device), tensor._values().to(device), tensor.sizes(),
      tensor.options().device(device), tensor.is_coalesced());
}

// The argument that this result writes into, or an undefined tensor.
Tensor written_argument(const OperatorHandle& op, const c10::Argument& result, const std::vector<Tensor>& given) {
  const auto* alias = result.alias_info();
  if (alias == nullptr || !alias->isWrite()) return Tensor();
  for (size_t i = 0; i < given.size(); ++i) {
    const auto* other = op.schema().arguments()[i].alias_info();
    if (other != nullptr && *other == *alias && given[i].defined()) return given[i];
  }
  return Tensor();
}

void run_sparse_on_cpu(const OperatorHandle& op, Stack* stack) {
  inspect(op, stack);
  Silence silence;
  const auto& schema = op.schema();
  const size_t begin = stack->size() - schema.arguments().size();
  Device device(DEVICE, 0);
  std::vector<Tensor> given(schema.arguments().size());
  for (size_t i = 0; i < given.size(); ++i) {
    c10::IValue& value = (*stack)[begin + i];
    if (value.isDevice()) value = Device(at::kCPU);
    if (!value.isTensor() || !value.toTensor().defined()) continue;
    given[i] = value.toTensor();
    if (is_emulated(given[i])) device = given[i].device();
    value = plain(given[i]);
  }
  op.callBoxed(stack);
  const size_t results = stack->size() - schema.returns().size();
  for (size_t i = 0; i < schema.returns().size(); ++i) {
    c10::IValue& value = (*stack)[results + i];
    if (!value.isTensor()) continue;
    const Tensor written = written_argument(op, schema.returns()[i], given);
    TORCH_CHECK(!written.defined() || !written.is_sparse(), "emulated: in place on a sparse tensor: ", schema);
    value = written.defined() ? written : moved_back(value.toTensor(), device);
  }
}

Tensor make_sparse(
    int64_t sparse_dim, int64_t dense_dim, c10::SymIntArrayRef size, const Tensor& indices,
    const Tensor& values, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout> layout,
    std::optional<Device> device, std::optional<bool> pinned, std::optional<bool> coalesced) {
  TORCH_CHECK(
      indices.device() == values.device(), "emulated: sparse indices", described({indices}), ", values",
      described({values}));
  return at::native::new_with_dims_and_tensor_sparse_symint(
      sparse_dim, dense_dim, size, indices, values, dtype, layout, device, pinned, coalesced);
}

}  // namespace

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &plain_attention)
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", make_empty);
  library.impl("empty_strided", make_strided);
  library.impl("resize_", resize);
  library.impl("_copy_from", copy_into);
  library.impl("_copy_from_and_resize", copy_and_resize);
  library.impl("_to_cpu", all_on_cpu);
  library.impl("_local_scalar_dense", read_scalar);
  library.impl("_fused_sdp_choice", plain_attention);
  // Views do not touch the entries: PyTorch's own functions serve every device.
  library.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  library.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  library.impl("view", TORCH_FN(at::native::view));
  library.impl("unfold", TORCH_FN(at::native::unfold));
  library.impl("view_as_real", TORCH_FN(at::native::view_as_real));
  library.impl("view_as_complex", TORCH_FN(at::native::view_as_complex));
  library.impl("set_.source_Tensor", TORCH_FN(at::native::set_tensor_));
  library.impl("set_.source_Storage", set_storage);
  library.impl("set_.source_Storage_storage_offset", TORCH_FN(at::native::set_storage_cpu_));
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, SparsePrivateUse1, library) {
  library.impl("_sparse_coo_tensor_with_dims_and_tensors", make_sparse);
  library.impl("_indices", TORCH_FN(at::native::_indices_sparse));
  library.impl("_values", TORCH_FN(at::native::_values_sparse));
  library.impl("_nnz", TORCH_FN(at::native::_nnz_sparse));
  library.impl("is_coalesced", TORCH_FN(at::native::is_coalesced_sparse));
  library.impl("sparse_dim", TORCH_FN(at::native::sparse_dim_sparse));
  library.impl("dense_dim", TORCH_FN(at::native::dense_dim_sparse));
}

TORCH_LIBRARY_IMPL(_, SparsePrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_sparse_on_cpu>());
}

// Autocast with the lists of operators that CUDA has.
namespace at::autocast {
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
#define IN_LOWER_PRECISION(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define IN_FLOAT32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define WITH_FLOAT32_RESULT(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define IN_WIDEST(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
  AT_FORALL_LOWER_PRECISION_FP(IN_LOWER_PRECISION)
  AT_FORALL_FP32(IN_FLOAT32)
  AT_FORALL_FP32_SET_OPT_DTYPE(WITH_FLOAT32_RESULT)
  AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE(KERNEL_DIFFERENT_REDISPATCH_SIGNATURE_PRIVATEUSEONE)
  AT_FORALL_PROMOTE(IN_WIDEST)
}
}  // namespace at::autocast

// ---------------------------------------------------------------------------------- what `device.py` calls

TORCH_LIBRARY(emu, library) {
  library.def("get_rng_state(int device) -> Tensor", [](int64_t device) {
    return default_generator(device).get_state();
  });
  library.def("set_rng_state(Tensor state, int device) -> ()", [](const Tensor& state, int64_t device) {
    at::Generator generator = default_generator(device);
    generator.set_state(state);
  });
}

extern "C" {
void emu_register() {
  static Hooks hooks;
  if (!at::isPrivateUse1HooksRegistered()) at::RegisterPrivateUse1HooksInterface(&hooks);
}
void emu_listen(Listener hears) { listener = hears; }
int emu_current_device() { return current_device; }
void emu_set_device(int device) { current_device = static_cast<DeviceIndex>(device); }
void emu_synchronize() { report("synchronize", "torch.emu.synchronize"); }
void emu_seed(uint64_t seed) {
  for (DeviceIndex device = 0; device < NUM_DEVICES; ++device) {
    at::Generator generator = default_generator(device);
    generator.set_current_seed(seed);
  }
}
}
