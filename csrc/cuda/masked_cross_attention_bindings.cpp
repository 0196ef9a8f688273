// masked_cross_attention in the Python module flamingo_kernels._cuda.

#include "cuda/attention_bindings.h"
#include "cuda/masked_cross_attention.h"

namespace flamingo {
namespace {

using SizesArg = std::tuple<int64_t, int64_t, int64_t, int, int, int, int64_t>;  // B, T, K, H, G, D, beams

MaskedSizes sizes_of(const SizesArg& arg) {
  const auto [B, T, K, H, G, D, beams] = arg;
  return {B, T, K, H, G, D, beams};
}

void forward(int precision, const SizesArg& sizes, const ViewArg& q, const ViewArg& k, const ViewArg& v,
             uintptr_t start, uintptr_t end, uintptr_t o, uintptr_t lse, double scale, const StreamArg& stream) {
  const MaskedForward call{sizes_of(sizes),
                           view_of(q),
                           view_of(k),
                           view_of(v),
                           pointer<int32_t>(start),
                           pointer<int32_t>(end),
                           pointer<void>(o),
                           pointer<float>(lse),
                           static_cast<float>(scale)};
  const auto launch = call.size.T == 1 ? masked_cross_attention_decode : masked_cross_attention_forward;
  launch(static_cast<Precision>(precision), call, stream_of(stream));
}

void backward(int precision, const SizesArg& sizes, const ViewArg& grad, const ViewArg& q, const ViewArg& k,
              const ViewArg& v, uintptr_t start, uintptr_t end, uintptr_t o, uintptr_t lse, uintptr_t runs,
              uintptr_t delta, uintptr_t dq, uintptr_t dk, uintptr_t dv, double scale, const StreamArg& stream) {
  const MaskedBackward call{sizes_of(sizes),
                            view_of(grad),
                            view_of(q),
                            view_of(k),
                            view_of(v),
                            pointer<int32_t>(start),
                            pointer<int32_t>(end),
                            pointer<void>(o),
                            pointer<float>(lse),
                            pointer<int32_t>(runs),
                            pointer<float>(delta),
                            pointer<void>(dq),
                            pointer<void>(dk),
                            pointer<void>(dv),
                            static_cast<float>(scale)};
  masked_cross_attention_backward(static_cast<Precision>(precision), call, stream_of(stream));
}

}  // namespace

void bind_masked_cross_attention(pybind11::module_& module) {
  auto op = module.def_submodule("masked_cross_attention");
  op.def("forward", &forward);
  op.def("backward", &backward);
}

}  // namespace flamingo
