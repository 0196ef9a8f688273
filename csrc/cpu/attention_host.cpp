#include "attention_host.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>

#include "attention.h"
#include "isa.h"

namespace flamingo {
namespace {

struct AttentionKernels {
  decltype(&DEFAULT::attention_forward) forward;
  decltype(&DEFAULT::attention_backward) backward;
};

AttentionKernels kernels() {
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::kAvx512:
      return {AVX512::attention_forward, AVX512::attention_backward};
    case Isa::kAvx2:
      return {AVX2::attention_forward, AVX2::attention_backward};
    default:
      break;
  }
#endif
  return {DEFAULT::attention_forward, DEFAULT::attention_backward};
}

at::Tensor rows_contiguous(const at::Tensor& x) { return x.stride(3) == 1 || x.size(3) == 1 ? x : x.contiguous(); }

Strides strides_of(const at::Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }

// A call's inputs in the form that kernels take, and the tensors that hold them.
class Inputs {
 public:
  Inputs(const at::Tensor& q, const KeyAxis& keys, const at::Tensor& start, const at::Tensor& end)
      : q_(rows_contiguous(q)), start_(start.contiguous()), end_(end.contiguous()) {
    for (size_t i = 0; i < keys.size(); ++i) {
      if (keys[i].k.defined()) keys_[i] = {rows_contiguous(keys[i].k), rows_contiguous(keys[i].v)};
    }
    const at::Tensor& k = keys_[0].k;
    size_ = {q.size(0), q.size(1), q.size(2), k.size(0), count(keys_[0]) + count(keys_[1]), k.size(2), q.size(3)};
  }

  // Nothing to multiply: no query, no key, or an empty head dim, where all scores are 0.
  bool trivial() const { return q_.numel() == 0 || size_.kv_rows * size_.keys * size_.kv_heads == 0; }

  Plan plan() const {
    const PlanSizes sizes{size_.kv_rows, size_.rows / size_.kv_rows * size_.tokens, size_.keys, count(keys_[0]),
                          size_.heads / size_.kv_heads};
    return make_plan(sizes, start_.const_data_ptr<int32_t>(), end_.const_data_ptr<int32_t>());
  }

  AttentionArgs args(double softmax_scale, const Plan& plan) const {
    return {size_,
            q_.const_data_ptr(),
            strides_of(q_),
            {source(keys_[0], 0), source(keys_[1], count(keys_[0]))},
            start_.const_data_ptr<int32_t>(),
            end_.const_data_ptr<int32_t>(),
            softmax_scale,
            &plan};
  }

  const AttentionSizes& size() const { return size_; }

 private:
  static int64_t count(const KeysValues& keys) { return keys.k.defined() ? keys.k.size(1) : 0; }

  static KeySource source(const KeysValues& keys, int64_t first) {
    if (!keys.k.defined()) return {};
    const auto& [k, v] = keys;
    return {first, k.size(1), k.const_data_ptr(), v.const_data_ptr(), strides_of(k), strides_of(v)};
  }

  at::Tensor q_, start_, end_;
  KeyAxis keys_;
  AttentionSizes size_;
};

}  // namespace

std::tuple<at::Tensor, at::Tensor> attention_forward(const at::Tensor& q, const KeyAxis& keys, const at::Tensor& start,
                                                     const at::Tensor& end, double softmax_scale) {
  const Inputs inputs(q, keys, start, end);
  const AttentionSizes& size = inputs.size();
  at::Tensor o = at::empty(q.sizes(), q.options());
  at::Tensor lse =
      at::empty({size.rows, size.heads, size.tokens}, q.options().dtype(at::toOpMathType(q.scalar_type())));
  if (inputs.trivial()) {
    lse.copy_((end - start).clamp_min(0).to(lse.scalar_type()).log().unsqueeze(1));
    return {o.zero_(), lse};
  }
  const Plan plan = inputs.plan();
  const ForwardArgs args{inputs.args(softmax_scale, plan), o.mutable_data_ptr(), lse.mutable_data_ptr()};
  kernels().forward(q.scalar_type(), narrow_tiles(), args);
  return {o, lse};
}

std::tuple<at::Tensor, KeyAxis> attention_backward(const at::Tensor& d_out_, const at::Tensor& q, const KeyAxis& keys,
                                                   const at::Tensor& start, const at::Tensor& end, const at::Tensor& o_,
                                                   const at::Tensor& lse_, double softmax_scale) {
  const Inputs inputs(q, keys, start, end);
  const at::Tensor d_out = rows_contiguous(d_out_), o = o_.contiguous(), lse = lse_.contiguous();
  at::Tensor dq = at::empty(q.sizes(), q.options());
  KeyAxis gradients;
  for (size_t i = 0; i < keys.size(); ++i) {
    if (!keys[i].k.defined()) continue;
    gradients[i] = {at::empty(keys[i].k.sizes(), q.options()), at::empty(keys[i].v.sizes(), q.options())};
    if (inputs.trivial()) gradients[i].k.zero_(), gradients[i].v.zero_();
  }
  if (inputs.trivial()) return {dq.zero_(), gradients};
  const Plan plan = inputs.plan();
  BackwardArgs args{inputs.args(softmax_scale, plan),
                    d_out.const_data_ptr(),
                    o.const_data_ptr(),
                    lse.const_data_ptr(),
                    strides_of(d_out),
                    dq.mutable_data_ptr()};
  for (size_t i = 0; i < keys.size(); ++i) {
    if (!keys[i].k.defined()) continue;
    args.sources[i].dk = gradients[i].k.mutable_data_ptr();
    args.sources[i].dv = gradients[i].v.mutable_data_ptr();
  }
  kernels().backward(q.scalar_type(), narrow_tiles(), args);
  return {dq, gradients};
}

}  // namespace flamingo
