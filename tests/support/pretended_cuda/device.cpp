// A CUDA device that the CPU plays, so that tests see what a GPU would refuse or wait for.
//
// Tensors say cuda:0 or cuda:1, their memory is the host's, and every operation runs the CPU's kernel
// on that memory. Before it runs, what CUDA refuses is refused: tensors of the CPU or of the other
// device among the arguments, generators of the CPU. After it, the result says "cuda" again.
// Counted are kernel launches, copies to and from the host, waits and allocations.
//
// It cannot show: speed, streams (all work is in order, but copies of other streams than the default one
// run as late as they may: streams.py), cuDNN and its precision (TF32), kernels that
// add in another order on every run, dtypes that CUDA lacks.
//
// The library must be loaded before torch looks for CUDA (LD_PRELOAD): torch asks once. It talks to
// Python by torch.ops.pretended_cuda alone, so no header of Python is needed.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/native/Resize.h>
#include <ATen/native/transformers/attention.h>
#include <torch/library.h>

#include <map>
#include <set>
#include <string>

#include "device_state.h"
#include "recurrent_cells.h"

namespace {

// -- tensors: made, viewed and copied --------------------------------------------------------------

struct OnDevice {  // the allocator stamps the current device on what it hands out
  c10::DeviceIndex before = current_device;
  explicit OnDevice(std::optional<at::Device> device) {
    if (device) current_device = index_of(*device);
  }
  ~OnDevice() { current_device = before; }
};

const c10::DispatchKeySet kCuda(c10::DispatchKey::CUDA);

Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  OnDevice on(device);
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &allocator, kCuda, at::dtype_or_default(dtype), format);
}

Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  OnDevice on(device);
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &allocator,
                                           kCuda, at::dtype_or_default(dtype));
}

// The same memory as a tensor of the CPU.
Tensor host(const Tensor& tensor) {
  if (!tensor.is_cuda()) return tensor;
  auto same = at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), tensor.options().device(at::kCPU));
  if (tensor.is_conj()) same = same.conj();
  if (tensor.is_neg()) same = same._neg_view();
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) same.unsafeGetTensorImpl()->set_wrapped_number(true);
  return same;
}

Tensor& copy_(Tensor& self, const Tensor& from, bool non_blocking) {
  if (self.is_cuda() != from.is_cuda()) {
    const std::string direction = self.is_cuda() ? "host_to_device" : "device_to_host";
    if (non_blocking)
      count(direction);
    else
      wait_for(direction, direction + " copy");  // CUDA waits for both directions
    count(direction + "_bytes", static_cast<int64_t>(from.numel() * from.element_size()));
  } else {
    count(self.device() == from.device() ? "launches" : "device_to_device");
  }
  host(self).copy_(host(from));
  return self;
}

Tensor copy_from(const Tensor& self, const Tensor& to, bool non_blocking) {
  auto out = to;
  return copy_(out, self, non_blocking);
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& to) {
  if (self.sizes() != to.sizes()) at::native::resize_(to, self.sizes());
  auto out = to;
  return copy_(out, self, false);
}

void record_stream(Tensor&, c10::Stream) {}  // memory is given away when nobody has it any more

at::Scalar local_scalar_dense(const Tensor& tensor) {
  wait_for("item_reads", "item");
  return host(tensor).item();
}

// Operations on sizes and storages alone, whose code is the same for all devices but registered per device.
Tensor view(const Tensor& t, c10::SymIntArrayRef size) { return at::native::view(t, C10_AS_INTARRAYREF_SLOW(size)); }
Tensor as_strided(const Tensor& t, c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::SymInt> start) {
  std::optional<int64_t> offset;
  if (start) offset = start->expect_int();
  return at::native::as_strided_tensorimpl(t, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), offset);
}
Tensor reshape_alias(const Tensor& t, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(t, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}
Tensor unfold(const Tensor& t, int64_t dim, int64_t size, int64_t step) { return at::native::unfold(t, dim, size, step); }
const Tensor& resize_(const Tensor& t, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  return at::native::resize_(t, C10_AS_INTARRAYREF_SLOW(size), format);
}
Tensor& set_view(Tensor& t, at::Storage storage, c10::SymInt start, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::set_storage_cpu_(t, std::move(storage), start.expect_int(), C10_AS_INTARRAYREF_SLOW(size),
                                      C10_AS_INTARRAYREF_SLOW(stride));
}
Tensor& set_storage(Tensor& t, at::Storage storage) {
  const auto n = static_cast<int64_t>(storage.nbytes() / t.element_size());
  return at::native::set_storage_cpu_(t, std::move(storage), 0, {n}, {1});
}
Tensor& set_tensor(Tensor& t, const Tensor& from) {
  return t.set_(from.storage(), from.storage_offset(), from.sizes(), from.strides());
}

// -- every other operation -------------------------------------------------------------------------

// Indices may lie on the host: CUDA copies them.
const std::set<std::string> kTakeHostIndices = {
    "aten::index",          "aten::index_put",          "aten::index_put_",          "aten::_index_put_impl_",
    "aten::_unsafe_index",  "aten::_unsafe_index_put",  "aten::_unsafe_masked_index"};

// Their CUDA kernels read a result on the host: a size, a truth value, whether a factorization failed.
const std::set<std::string> kWait = {
    "aten::nonzero",      "aten::_unique2",         "aten::unique_dim",   "aten::unique_consecutive",
    "aten::unique_dim_consecutive", "aten::equal",  "aten::masked_select", "aten::bincount",
    "aten::_linalg_eigh", "aten::linalg_eig",       "aten::_linalg_svd",  "aten::linalg_lstsq",
    "aten::_linalg_eigvals", "aten::histc",         "aten::repeat_interleave"};

// What is known of one call: the device of its tensors and their aliases on the host.
class Call {
 public:
  explicit Call(const c10::OperatorHandle& op) : schema_(op.schema()), name_(op.schema().name()) {}

  // All arguments, seen once before any is exchanged: which device is it?
  void find_device(const Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cuda()) return;
    TORCH_CHECK(!on_device_ || tensor.device().index() == index_ || tensor.dim() == 0, mixed(tensor));
    if (!on_device_) index_ = tensor.device().index();
    on_device_ = true;
  }
  void find_device(at::Device device) {
    if (!device.is_cuda() || on_device_) return;
    index_ = index_of(device);
    on_device_ = true;
  }

  Tensor exchange(const Tensor& tensor, const c10::Argument& argument, bool is_index) {
    if (!tensor.defined()) return tensor;
    if (!tensor.is_cuda()) {
      if (on_device_ && is_index && kTakeHostIndices.count(name_))
        wait_for("host_to_device", "indices of the host");
      else  // `scalars` of foreach operations are read on the host
        TORCH_CHECK(!on_device_ || tensor.dim() == 0 || argument.name() == "scalars", mixed(tensor));
      return tensor;
    }
    const auto* alias = argument.alias_info();
    if (alias && alias->isWrite() && tensor.numel() == 0) {
      // An out= to be resized: borrowed memory cannot grow.
      auto grows = at::empty(tensor.sizes(), tensor.options().device(at::kCPU));
      grown_.emplace_back(grows, tensor);
      originals_[grows.unsafeGetTensorImpl()] = tensor;
      return grows;
    }
    auto alias_on_host = host(tensor);
    originals_[alias_on_host.unsafeGetTensorImpl()] = tensor;
    return alias_on_host;
  }

  c10::IValue exchange(const c10::IValue& value, const c10::Argument& argument) {
    if (value.isTensor()) return exchange(value.toTensor(), argument, false);
    if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : value.toTensorVector()) list.push_back(exchange(tensor, argument, false));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<OptionalTensor> list;
      for (const OptionalTensor& tensor : value.toOptionalTensorVector())
        list.push_back(tensor ? OptionalTensor(exchange(*tensor, argument, true)) : std::nullopt);
      return list;
    }
    if (!on_device_) return value;
    if (value.isDevice() && value.toDevice().is_cuda()) return at::Device(at::kCPU);
    if (value.isGenerator()) {
      TORCH_CHECK(value.toGenerator().device().is_cuda(),
                  "Expected a 'cuda' device type for generator but found 'cpu' (", name_, ")");
      return on_host(value.toGenerator());
    }
    if (value.isNone() && argument.type()->str().find("Generator") != std::string::npos)
      return on_host(default_generator(index_));
    return value;
  }

  // The call's own result, as CUDA would return it: an argument, a view of one, or something new.
  Tensor give_back(const Tensor& tensor) const {
    if (!tensor.defined() || !on_device_ || tensor.is_cuda()) return tensor;
    if (const auto found = originals_.find(tensor.unsafeGetTensorImpl()); found != originals_.end()) return found->second;
    if (const Tensor* viewed = find_viewed(tensor)) {
      const auto* start = static_cast<const char*>(viewed->storage().data());
      const auto bytes = static_cast<const char*>(tensor.data_ptr()) - start;
      auto same = at::empty({0}, tensor.options().device(viewed->device()));
      return same.set_(viewed->storage(), bytes / static_cast<int64_t>(tensor.element_size()), tensor.sizes(), tensor.strides());
    }
    auto out = at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(at::Device(at::kCUDA, index_)));
    host(out).copy_(tensor);
    return out;
  }

  c10::IValue give_back(const c10::IValue& value) const {
    if (value.isTensor()) return give_back(value.toTensor());
    if (!value.isTensorList()) return value;
    c10::List<Tensor> list;
    for (const Tensor& tensor : value.toTensorVector()) list.push_back(give_back(tensor));
    return list;
  }

  void resize_grown() const {
    for (const auto& [grown, tensor] : grown_) {
      if (!grown.numel()) continue;
      at::native::resize_(tensor, grown.sizes());
      host(tensor).copy_(grown);
    }
  }

 private:
  std::string mixed(const Tensor& tensor) const {
    return c10::str("Expected all tensors to be on the same device, but found at least two devices, cuda:",
                    static_cast<int>(index_), " and ", tensor.device(), "! (", name_, ", argument of shape ",
                    tensor.sizes(), ")");
  }
  const Tensor* find_viewed(const Tensor& tensor) const {
    if (tensor.numel() == 0 || tensor.is_sparse()) return nullptr;
    const auto* at_byte = static_cast<const char*>(tensor.data_ptr());
    for (const auto& [alias, original] : originals_) {
      if (original.numel() == 0) continue;
      const auto* begin = static_cast<const char*>(original.storage().data());
      if (begin <= at_byte && at_byte < begin + original.storage().nbytes()) return &original;
    }
    return nullptr;
  }

  const c10::FunctionSchema& schema_;
  const std::string name_;
  c10::DeviceIndex index_ = current_device;
  bool on_device_ = false;
  std::map<c10::TensorImpl*, Tensor> originals_;          // by their aliases on the host
  std::vector<std::pair<Tensor, Tensor>> grown_;
};

// Of operations on lists (_foreach_add_, ...): one kernel for all, if each list has one dtype and the
// tensors that belong together have the same strides; else one a tensor, as CUDA falls back to.
int64_t launches_of(const std::vector<std::vector<Tensor>>& lists) {
  for (const auto& list : lists)
    for (size_t i = 0; i < list.size(); ++i) {
      const bool one_dtype = list[i].scalar_type() == list[0].scalar_type();
      if (!one_dtype || (i < lists[0].size() && list[i].numel() > 1 && list[i].strides() != lists[0][i].strides()))
        return static_cast<int64_t>(lists[0].size());
    }
  return 1;
}

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const auto begin = stack->size() - arguments.size();
  Call call(op);
  std::vector<std::vector<Tensor>> lists;
  for (auto i = begin; i < stack->size(); ++i) {
    const auto& value = (*stack)[i];
    if (value.isTensor()) call.find_device(value.toTensor());
    if (value.isDevice()) call.find_device(value.toDevice());
    if (value.isTensorList()) {
      lists.push_back(value.toTensorVector());
      for (const Tensor& tensor : lists.back()) call.find_device(tensor);
    }
    if (value.isOptionalTensorList())
      for (const OptionalTensor& tensor : value.toOptionalTensorVector())
        if (tensor) call.find_device(*tensor);
  }
  for (size_t i = 0; i < arguments.size(); ++i)
    (*stack)[begin + i] = call.exchange((*stack)[begin + i], arguments[i]);
  const auto& name = op.schema().name();
  if (kWait.count(name)) wait_for("waiting_operations", name);
  const bool on_lists = name.rfind("aten::_foreach_", 0) == 0;
  count("launches", on_lists ? launches_of(lists) : 1);
  count(name);
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  call.resize_grown();
  for (auto i = stack->size() - op.schema().returns().size(); i < stack->size(); ++i)
    (*stack)[i] = call.give_back((*stack)[i]);
}

// Attention by its formula: the fused kernels of CUDA have no CPU kernel of the same name.
int64_t choose_math(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, double, bool,
                    std::optional<double>, bool) {
  return 0;
}

}  // namespace

namespace at::native {
REGISTER_CUDA_DISPATCH(_fused_sdp_choice_stub, &choose_math);
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy_);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar_dense);
  m.impl("record_stream", record_stream);
  m.impl("view", view);
  m.impl("as_strided", as_strided);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("unfold", unfold);
  m.impl("resize_", resize_);
  m.impl("set_.source_Storage_storage_offset", set_view);
  m.impl("set_.source_Storage", set_storage);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("_fused_sdp_choice", choose_math);
  m.impl("_thnn_fused_lstm_cell", lstm_cell);
  m.impl("_thnn_fused_lstm_cell_backward_impl", lstm_cell_backward);
  m.impl("_thnn_fused_gru_cell", gru_cell);
  m.impl("_thnn_fused_gru_cell_backward", gru_cell_backward);
  // As a whole on the host: their parts choose kernels of CUDA that have no CPU kernel of the same name.
  m.impl("convolution", torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
  m.impl("convolution_backward", torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
  // Likewise operations on lists, whose parts would each be counted.
  for (const auto& op : c10::Dispatcher::singleton().getAllOpNames())
    if (op.name.rfind("aten::_foreach_", 0) == 0 && op.overload_name.find("out") == std::string::npos) {
      const auto name = op.name.substr(6) + (op.overload_name.empty() ? "" : "." + op.overload_name);
      m.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
    }
}

TORCH_LIBRARY(pretended_cuda, m) {
  c10::SetAllocator(c10::DeviceType::CUDA, &allocator, 255);
  m.def("counts", [] {
    std::lock_guard<std::mutex> guard(mutex);
    c10::Dict<std::string, int64_t> all;
    for (const auto& [name, n] : counts) all.insert(name, n);
    all.insert("used_bytes", used_bytes);
    all.insert("peak_bytes", peak_bytes);
    return all;
  });
  m.def("reset", [] {
    std::lock_guard<std::mutex> guard(mutex);
    counts.clear();
    peak_bytes = used_bytes;
  });
  m.def("set_limit", [](int64_t bytes) {
    std::lock_guard<std::mutex> guard(mutex);
    limit_bytes = bytes > 0 ? bytes : kBytes;
  });
  m.def("limit", [] { return limit_bytes; });
  m.def("set_pinnable", [](int64_t bytes) {
    std::lock_guard<std::mutex> guard(mutex);
    pinnable_bytes = bytes >= 0 ? bytes : kBytes;
  });
  m.def("synchronize", [] { wait_for("synchronizations", "synchronize"); });
  m.def("set_sync_debug_mode", [](int64_t mode) { sync_debug_mode = mode; });
  m.def("sync_debug_mode", [] { return sync_debug_mode.load(); });
  m.def("device_count", [] { return int64_t{kDevices}; });
  m.def("current_device", [] { return int64_t{current_device}; });
  m.def("exchange_device", [](int64_t index) {
    const auto before = current_device;
    if (index >= 0) current_device = static_cast<c10::DeviceIndex>(index);
    return int64_t{before};
  });
  m.def("default_generator", [](int64_t index) { return default_generator(static_cast<c10::DeviceIndex>(index)); });
}
