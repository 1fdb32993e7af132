#include "step/plain.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <initializer_list>

#include "common/parallel.h"

namespace gdbp::step {

namespace py = pybind11;

namespace {

// Parameters that are worth waking a thread for.
constexpr int64_t kRowGrain = 128;
// How many parameters ahead memory is asked for: first what is pointed to from here, then what that points to.
constexpr int64_t kAhead = 8, kNext = 4;

// Sparse, quantized, conjugated, wrapped, inference and whatever else there may be have other sets.
bool is_plain(const c10::TensorImpl& x) {
  static const c10::DispatchKeySet plain = [] {
    const c10::InferenceMode off(false);
    return at::detail::empty_cpu({0}, at::kFloat).key_set();
  }();
  return x.key_set() == plain;
}

bool parse_dtype(const c10::TensorImpl& x, Dtype& dtype) {
  switch (c10::typeMetaToScalarType(x.dtype())) {
    case at::kFloat: dtype = Dtype::float32; return true;
    case at::kDouble: dtype = Dtype::float64; return true;
    case at::kBFloat16: dtype = Dtype::bfloat16; return true;
    case at::kHalf: dtype = Dtype::float16; return true;
    default: return false;
  }
}

bool fits(const c10::TensorImpl& x, const c10::TensorImpl& param) {
  return is_plain(x) && x.numel() == param.numel() && x.is_contiguous() && x.sizes() == param.sizes();
}

// 0 where it is no count.
double read(const c10::TensorImpl& count) {
  if (!is_plain(count) || count.numel() != 1) return 0;
  if (count.dtype() == caffe2::TypeMeta::Make<float>()) return *static_cast<const float*>(count.data()) + 1.0;
  if (count.dtype() == caffe2::TypeMeta::Make<double>()) return *static_cast<const double*>(count.data()) + 1.0;
  return 0;
}

void write(c10::TensorImpl& count, double value) {
  if (count.dtype() == caffe2::TypeMeta::Make<double>()) {
    *static_cast<double*>(count.mutable_data()) = value;
  } else {
    *static_cast<float*>(count.mutable_data()) = float(value);
  }
  count.bump_version();
}

void prefetch(const void* object, std::initializer_list<int> offsets) {
  for (const int offset : offsets) __builtin_prefetch(static_cast<const char*>(object) + offset);
}
// Where torch keeps what is read here: a hint, which may be wrong. Of 11 x 16 bytes those of the storage and the
// version, of the first sizes, and of the count of elements to the dispatch keys; of a storage, of the data and flags.
void prefetch_tensor(const c10::TensorImpl* tensor) { prefetch(tensor, {16, 64, 144, 175}); }
void prefetch_storage(const void* storage) { prefetch(storage, {16, 61}); }

template <class F>
void for_tensors(const auto& row, const F& f) {
  f(row.param);
  for (c10::TensorImpl* const state : row.states)
    if (state) f(state);
  if (row.count) f(row.count);
}

}  // namespace

// From the tensors of a parameter to the storage of its gradient it is four steps, each of which needs the one before
// to have arrived.
void PlainStep::prefetch_ahead(int64_t i, int64_t end) const {
  const auto row = [=, this](int64_t ahead) { return i + ahead < end ? &rows_[i + ahead] : nullptr; };
  const auto storage = [](const c10::TensorImpl* x) { prefetch_storage(x->unsafe_storage().unsafeGetStorageImpl()); };
  if (const Row* const r = row(14)) for_tensors(*r, prefetch_tensor);
  if (const Row* const r = row(9)) {
    for_tensors(*r, storage);
    prefetch(r->param->autograd_meta(), {0, 40});
  }
  if (const Row* const r = row(6)) prefetch_tensor(r->param->grad().unsafeGetTensorImpl());
  if (const Row* const r = row(3)) storage(r->param->grad().unsafeGetTensorImpl());
}

void PlainStep::add(int group, int rule, const optim::Member& member, optim::Counts& counts, bool ready) {
  Row row{};
  row.param = member.param.unsafeGetTensorImpl();
  for (int k = 0; k < optim::rule_states(rule); ++k)
    row.states[k] = member.states[k].defined() ? member.states[k].unsafeGetTensorImpl() : nullptr;
  row.count = counts.step.defined() ? counts.step.unsafeGetTensorImpl() : nullptr;
  row.counts = &counts;
  row.group = group;
  row.ready = ready;
  const auto at = std::find_if(lanes_.begin(), lanes_.end(), [=](const Lane& lane) { return lane.rule == rule; });
  row.lane = uint32_t(at - lanes_.begin());
  if (at == lanes_.end()) lanes_.push_back({rule, {}, 0});
  row.slot = uint32_t(lanes_[row.lane].slots.size());
  lanes_[row.lane].slots.emplace_back();
  rows_.push_back(row);
  for (const at::Tensor& scale : member.scales) possible_ = possible_ && !scale.defined();
  // NAdam's product is worked out from two numbers, and seldom.
  possible_ = possible_ && !member.master.defined() && !member.average.defined() && !member.copy.defined() &&
              !counts.product.defined();
}

void PlainStep::watch(const py::dict& state, const std::vector<py::object>& used) {
  Dict dict{state.ptr(), uint32_t(seen_.size()), uint32_t(state.size())};
  for (const auto& [key, value] : state) {
    const auto is = [](const py::handle& a) { return [a](const py::object& b) { return a.is(b); }; };
    const bool matters = std::any_of(used.begin(), used.end(), is(value));
    seen_.push_back({key.ptr(), matters ? value.ptr() : nullptr});
    if (std::none_of(keys_.begin(), keys_.end(), is(key))) keys_.push_back(py::reinterpret_borrow<py::object>(key));
    // Keys are all but always the same few strings; a search through many would be slow.
    possible_ = possible_ && keys_.size() <= 64;
  }
  dicts_.push_back(dict);
}

// The same items in the same order, so that nothing has come, gone or been replaced. Looking at them in turn is faster
// than looking each up.
bool PlainStep::unchanged(const Dict& dict) const {
  Py_ssize_t position = 0;
  PyObject *key = nullptr, *value = nullptr;
  const Seen* seen = &seen_[dict.first];
  for (const Seen* const end = seen + dict.size; seen != end; ++seen)
    if (!PyDict_Next(dict.dict, &position, &key, &value) || key != seen->key || (seen->value && value != seen->value))
      return false;
  return !PyDict_Next(dict.dict, &position, nullptr, nullptr);
}

// On any thread: reads torch's objects and nothing of Python's, and holds on to nothing.
bool PlainStep::fill(Row& row, const optim::Hyper* hyper) {
  c10::TensorImpl& param = *row.param;
  const at::Tensor& grad = param.grad();
  row.taken = grad.defined();
  if (!row.taken) return true;
  const c10::TensorImpl& g = *grad.unsafeGetTensorImpl();
  Lane& lane = lanes_[row.lane];
  optim::Slot& slot = lane.slots[row.slot];
  if (!row.ready || !fits(param, param) || !fits(g, param)) return false;
  if (!parse_dtype(param, slot.param_dtype) || !parse_dtype(g, slot.grad_dtype)) return false;
  slot.param = param.mutable_data();
  slot.grad = g.data();
  slot.numel = param.numel();
  slot.hyper = hyper;
  for (int k = 0; k < optim::kMaxStates && row.states[k]; ++k) {
    c10::TensorImpl& state = *row.states[k];
    if (!fits(state, param) || state.dtype() != row.states[0]->dtype()) return false;
    slot.state[k] = state.mutable_data();
  }
  if (row.states[0] && !parse_dtype(*row.states[0], slot.state_dtype)) return false;
  // What has lost its storage, as by resize_(0), is refused elsewhere.
  if (slot.numel != 0 && (!slot.param || !slot.grad || (row.states[0] && !slot.state[0]))) return false;
  row.step = row.count ? read(*row.count) : row.counts->fresh ? 1 : 2;
  slot.clock = {row.step, 1};
  return row.step != 0;
}

bool PlainStep::collect(const std::vector<const optim::Hyper*>& hyper) {
  if (!possible_) return false;
  const auto dicts = int64_t(dicts_.size());
  for (int64_t i = 0; i < dicts; ++i) {
    if (i + kAhead < dicts) __builtin_prefetch(dicts_[i + kAhead].dict);
    if (i + kNext < dicts)
      prefetch(reinterpret_cast<const PyDictObject*>(dicts_[i + kNext].dict)->ma_keys, {0, 64, 128});
    if (!unchanged(dicts_[i])) return false;
  }
  std::atomic<bool> plain{true}, gaps{false};
  parallel_for(0, int64_t(rows_.size()), kRowGrain, [&](int64_t begin, int64_t end) {
    bool all = true;
    for (int64_t i = begin; i < end; ++i) {
      prefetch_ahead(i, end);
      if (!fill(rows_[i], hyper[rows_[i].group])) {
        plain = false;
        return;
      }
      all = all && rows_[i].taken;
    }
    if (!all) gaps = true;
  });
  if (!plain) return false;
  for (Lane& lane : lanes_) lane.taken = lane.slots.size();
  if (gaps) close_gaps();
  return true;
}

void PlainStep::close_gaps() {
  for (Lane& lane : lanes_) lane.taken = 0;
  for (const Row& row : rows_) {
    Lane& lane = lanes_[row.lane];
    if (row.taken) lane.slots[lane.taken++] = lane.slots[row.slot];
  }
}

void PlainStep::hold() {
  for (const Row& row : rows_)
    if (row.taken) held_.push_back(row.param->grad());
}

void PlainStep::sources(std::vector<grad::Source>& to) const {
  for (const Lane& lane : lanes_)
    for (size_t i = 0; i < lane.taken; ++i)
      to.push_back({lane.slots[i].grad, lane.slots[i].numel, lane.slots[i].grad_dtype});
}

void PlainStep::run(const optim::Control* control) const {
  for (const Lane& lane : lanes_) optim::step_cpu(lane.rule, lane.slots.data(), int64_t(lane.taken), control, nullptr);
}

void PlainStep::finish() {
  parallel_for(0, int64_t(rows_.size()), kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (i + kAhead < end) for_tensors(rows_[i + kAhead], [](const c10::TensorImpl* x) { prefetch(x, {40}); });
      // A read that nothing waits for, where the bump would.
      if (i + kNext < end)
        for_tensors(rows_[i + kNext], [](const c10::TensorImpl* x) {
          if (x->version_counter().enabled()) (void)x->version_counter().current_version();
        });
      Row& row = rows_[i];
      if (!row.taken) continue;
      // A backward pass through the old values must fail, as it does after torch's own in-place updates.
      row.param->bump_version();
      for (int k = 0; k < optim::kMaxStates && row.states[k]; ++k) row.states[k]->bump_version();
      if (row.count) {
        write(*row.count, row.step);
      } else {
        row.counts->fresh = false;
      }
    }
  });
}

}  // namespace gdbp::step
