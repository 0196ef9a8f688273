// Launchers of folding: a kernel for each type of weight, and of p, in groups and without.

#include "cuda/fold.cuh"

namespace flamingo {

void fold(const Fold& call, Stream stream) {
  const bool rows = call.step == 1 && call.columns % 8 == 0 && aligned(call.weight, call.rows) && aligned(call.folded);
  const bool in_groups = rows && aligned(call.scale.data) && aligned(call.bias.data);
  const int threads = team_for(call.columns, 8, kFoldThreads);
  with_type(call.weight.type, [&](auto value) {
    with_group<kGroup<decltype(value)>>(in_groups, [&](auto group) {
      launch<media_kv_fwd_kernel<decltype(value), group>>("media_kv_fwd_kernel", ceil_div(call.rows, kFoldRows<group>),
                                                          threads, TeamSums<kFoldRows<group>>::kFloats * sizeof(float),
                                                          stream, call);
    });
  });
}

void unfold(const Unfold& call, Stream stream) {
  require(call.p.type == call.weight.type || call.p.type == Element::fp32, "fold: p may be of weight's type, or fp32");
  const bool rows = call.step == 1 && call.columns % 8 == 0 && aligned(call.weight, call.rows) && aligned(call.p.data);
  const bool in_groups = rows && aligned(call.dweight) && aligned(call.scale.data) && aligned(call.bias.data);
  const size_t bytes = kFoldThreads / 32 * 2 * kUnfoldColumns * sizeof(float);
  with_type(call.weight.type, [&](auto of_weight) {
    const auto with_p = [&](auto of_p) {
      using P = decltype(of_p);
      using T = decltype(of_weight);
      with_group<kGroup<P, T>>(in_groups, [&](auto group) {
        launch<media_kv_bwd_kernel<P, T, group>>("media_kv_bwd_kernel", ceil_div(call.columns, kUnfoldColumns),
                                                 kFoldThreads, bytes, stream, call);
      });
    };
    if (call.p.type == call.weight.type) {
      with_p(of_weight);
    } else {
      with_p(float{});
    }
  });
}

}  // namespace flamingo
