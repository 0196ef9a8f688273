// Host side of masked_cross_attention on the CPU: intervals checked and planned once per call, outputs allocated, the
// kernels of the machine's ISA called. Shapes and dtypes are checked by flamingo_kernels/ops/masked_cross_attention.py.

#include "masked_cross_attention.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>

#include <tuple>

#include "isa.h"
#include "ops.h"

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

AttentionSizes sizes_of(const at::Tensor& q, const at::Tensor& k) {
  return {q.size(0), q.size(1), q.size(2), k.size(0), k.size(1), k.size(2), q.size(3)};
}

void check_within_keys(const AttentionSizes& size, const at::Tensor& start, const at::Tensor& end) {
  const auto *starts = start.const_data_ptr<int32_t>(), *ends = end.const_data_ptr<int32_t>();
  const int64_t outside = first_outside(start.numel(), size.keys, starts, ends);
  TORCH_CHECK_VALUE(outside < 0, "masked_cross_attention: intervals must lie within 0..", size.keys,
                    ", the key axis, got start ", starts[outside], " and end ", ends[outside], " at row ",
                    outside / size.tokens, ", token ", outside % size.tokens);
}

Plan plan_of(const AttentionSizes& size, const at::Tensor& start, const at::Tensor& end) {
  const PlanSizes sizes{size.kv_rows, size.rows / size.kv_rows * size.tokens, size.keys, size.heads / size.kv_heads};
  return make_plan(sizes, start.const_data_ptr<int32_t>(), end.const_data_ptr<int32_t>());
}

// Nothing to multiply: no query, no key, or an empty head dim, where all scores are 0.
bool trivial(const at::Tensor& q, const at::Tensor& k) { return q.numel() == 0 || k.numel() == 0; }

}  // namespace

std::tuple<at::Tensor, at::Tensor> masked_cross_attention_forward(const at::Tensor& q_, const at::Tensor& k_,
                                                                  const at::Tensor& v_, const at::Tensor& start_,
                                                                  const at::Tensor& end_, double softmax_scale) {
  const at::Tensor q = rows_contiguous(q_), k = rows_contiguous(k_), v = rows_contiguous(v_);
  const at::Tensor start = start_.contiguous(), end = end_.contiguous();
  const AttentionSizes size = sizes_of(q, k);
  const auto lse_options = q.options().dtype(at::toOpMathType(q.scalar_type()));
  at::Tensor o = at::empty(q.sizes(), q.options());
  at::Tensor lse = at::empty({size.rows, size.heads, size.tokens}, lse_options);
  check_within_keys(size, start, end);
  if (trivial(q, k)) {
    lse.copy_((end - start).clamp_min(0).to(lse.scalar_type()).log().unsqueeze(1));
    return {o.zero_(), lse};
  }
  const Plan plan = plan_of(size, start, end);
  const ForwardArgs args{size,
                         q.const_data_ptr(),
                         k.const_data_ptr(),
                         v.const_data_ptr(),
                         strides_of(q),
                         strides_of(k),
                         strides_of(v),
                         start.const_data_ptr<int32_t>(),
                         end.const_data_ptr<int32_t>(),
                         softmax_scale,
                         o.mutable_data_ptr(),
                         lse.mutable_data_ptr(),
                         &plan};
  kernels().forward(q.scalar_type(), narrow_tiles(), args);
  return {o, lse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> masked_cross_attention_backward(
    const at::Tensor& d_out_, const at::Tensor& q_, const at::Tensor& k_, const at::Tensor& v_,
    const at::Tensor& start_, const at::Tensor& end_, const at::Tensor& o_, const at::Tensor& lse_,
    double softmax_scale) {
  const at::Tensor d_out = rows_contiguous(d_out_);
  const at::Tensor q = rows_contiguous(q_), k = rows_contiguous(k_), v = rows_contiguous(v_);
  const at::Tensor start = start_.contiguous(), end = end_.contiguous();
  const AttentionSizes size = sizes_of(q, k);
  const at::Tensor o = o_.contiguous(), lse = lse_.contiguous();
  at::Tensor dq = at::empty(q.sizes(), q.options());
  at::Tensor dk = at::empty(k.sizes(), k.options());
  at::Tensor dv = at::empty(v.sizes(), v.options());
  check_within_keys(size, start, end);
  if (trivial(q, k)) return {dq.zero_(), dk.zero_(), dv.zero_()};
  const Plan plan = plan_of(size, start, end);
  const BackwardArgs args{size,
                          d_out.const_data_ptr(),
                          q.const_data_ptr(),
                          k.const_data_ptr(),
                          v.const_data_ptr(),
                          o.const_data_ptr(),
                          lse.const_data_ptr(),
                          strides_of(d_out),
                          strides_of(q),
                          strides_of(k),
                          strides_of(v),
                          start.const_data_ptr<int32_t>(),
                          end.const_data_ptr<int32_t>(),
                          softmax_scale,
                          dq.mutable_data_ptr(),
                          dk.mutable_data_ptr(),
                          dv.mutable_data_ptr(),
                          &plan};
  kernels().backward(q.scalar_type(), narrow_tiles(), args);
  return {dq, dk, dv};
}

}  // namespace flamingo
