// Launches the forward kernels of latent attention, and the one that merges parts.

#include "cuda/latent_attention_checks.cuh"
#include "cuda/latent_attention_forward.cuh"
#include "cuda/latent_attention_merge.cuh"

namespace flamingo {

void latent_attention_forward(Precision precision, const LatentForward& call, Stream stream) {
  check_latent(precision, call.in);
  const LatentSizes& size = call.in.size;
  dispatch(kLatentOp, precision, size.D, [&](auto p, auto d) {
    using Tiling = LatentForwardTiling<p(), d()>;
    launch<latent_attention_fwd_kernel<p(), d()>>("latent_attention_fwd_kernel",
                                                  int64_t{latent_tiles(size)} * size.splits * size.G * size.N,
                                                  Tiling::kThreads, Tiling::kBytes, stream, call);
  });
}

void latent_attention_merge(Precision precision, const LatentMerge& call, Stream stream) {
  dispatch(kLatentOp, precision, 64, [&](auto p, auto) {
    using T = Element<p()>;
    if (call.splits < 1 || call.R < 1 || call.H < 1 || call.D < 1 || call.D % Vector<T>::kSize) {
      throw std::invalid_argument(std::string(kLatentOp) + ": parts of rows that end on 16 bytes were expected");
    }
    launch<latent_attention_merge_kernel<T>>("latent_attention_merge_kernel",
                                             ceil_div(call.rows * (call.D / Vector<T>::kSize), kLatentMergeThreads),
                                             kLatentMergeThreads, 0, stream, call);
  });
}

}  // namespace flamingo
