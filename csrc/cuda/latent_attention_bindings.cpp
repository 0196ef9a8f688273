// latent_attention in the Python module flamingo_kernels._cuda.

#include "cuda/attention_bindings.h"
#include "cuda/latent_attention.h"

namespace flamingo {
namespace {

using SizesArg = std::tuple<int64_t, int, int, int, int, int, int, int>;  // N, R, S, latents, H, G, D, splits
using InputsArg = std::tuple<ViewArg, ViewArg, ViewArg, ViewArg, ViewArg, uintptr_t>;  // ..., lengths

LatentInputs inputs_of(const SizesArg& sizes, const InputsArg& inputs, double scale) {
  const auto [N, R, S, latents, H, G, D, splits] = sizes;
  const auto& [q, k_media, v_media, k_latents, v_latents, lengths] = inputs;
  return {{N, R, S, latents, H, G, D, splits},
          view_of(q),
          view_of(k_media),
          view_of(v_media),
          view_of(k_latents),
          view_of(v_latents),
          pointer<int32_t>(lengths),
          static_cast<float>(scale)};
}

void forward(int precision, const SizesArg& sizes, const InputsArg& inputs, uintptr_t o, uintptr_t lse, double scale,
             const StreamArg& stream) {
  const LatentForward call{inputs_of(sizes, inputs, scale), pointer<void>(o), pointer<float>(lse)};
  latent_attention_forward(static_cast<Precision>(precision), call, stream_of(stream));
}

void merge(int precision, uintptr_t parts, uintptr_t part_lse, uintptr_t out, uintptr_t lse, int64_t rows, int R, int H,
           int D, int splits, const StreamArg& stream) {
  const LatentMerge call{
      pointer<float>(parts), pointer<float>(part_lse), pointer<void>(out), pointer<float>(lse), rows, R, H, D, splits};
  latent_attention_merge(static_cast<Precision>(precision), call, stream_of(stream));
}

void backward(int precision, const SizesArg& sizes, const ViewArg& grad, const InputsArg& inputs, uintptr_t o,
              uintptr_t lse, uintptr_t dq, uintptr_t dk_media, uintptr_t dv_media, uintptr_t dk_latents,
              uintptr_t dv_latents, double scale, const StreamArg& stream) {
  const LatentBackward call{inputs_of(sizes, inputs, scale),
                            view_of(grad),
                            pointer<void>(o),
                            pointer<float>(lse),
                            pointer<void>(dq),
                            pointer<void>(dk_media),
                            pointer<void>(dv_media),
                            pointer<void>(dk_latents),
                            pointer<void>(dv_latents)};
  latent_attention_backward(static_cast<Precision>(precision), call, stream_of(stream));
}

}  // namespace

void bind_latent_attention(pybind11::module_& module) {
  auto op = module.def_submodule("latent_attention");
  op.attr("QUERY_ROWS") = kLatentRows;
  op.def("forward", &forward);
  op.def("merge", &merge);
  op.def("backward", &backward);
}

}  // namespace flamingo
