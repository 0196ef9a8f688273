// Launchers of the activations: a kernel for each type of h, and of da, in groups and without.

#include "cuda/activation.cuh"

namespace flamingo {
namespace {

// Rows of `width` that follow one another.
bool one_piece(const Rows& rows, int64_t width) { return rows.data == nullptr || rows.stride == width; }

// Of every row, but for the end of one long row.
template <typename Call>
bool whole_groups(const Call& call) {
  return call.columns % 8 == 0 || (call.rows == 1 && call.activation != Activation::swiglu);
}

}  // namespace

int64_t activation_blocks(int64_t rows, int64_t columns) { return ceil_div(rows * columns, kActivationTile); }

void activation_forward(const ActivationForward& call, Stream stream) {
  ActivationForward p = call;
  if (p.activation != Activation::swiglu && one_piece(p.h, p.columns)) p.columns *= std::exchange(p.rows, 1);
  const bool in_groups = whole_groups(p) && aligned(p.h, p.rows) && aligned(p.a);
  with_type(p.h.type, [&](auto value) {
    using T = decltype(value);
    with_group<kGroup<T>>(in_groups, [&](auto group) {
      launch<activation_fwd_kernel<T, group>>("activation_fwd_kernel", activation_blocks(p.rows, p.columns),
                                              kActivationThreads, 0, stream, p);
    });
  });
}

void activation_backward(const ActivationBackward& call, Stream stream) {
  require(call.da.type == call.h.type || call.da.type == Element::fp32, "activation: da may be of h's type, or fp32");
  ActivationBackward p = call;
  if (p.activation != Activation::swiglu && one_piece(p.h, p.columns) && one_piece(p.da, p.columns)) {
    p.columns *= std::exchange(p.rows, 1);
  }
  const bool rows = aligned(p.h, p.rows) && aligned(p.da, p.rows);
  const bool in_groups = whole_groups(p) && rows && aligned(p.dh) && aligned(p.a);
  with_type(p.h.type, [&](auto of_h) {
    const auto with_da = [&](auto of_da) {
      using T = decltype(of_h);
      using D = decltype(of_da);
      with_group<kGroup<T, D>>(in_groups, [&](auto group) {
        launch<activation_bwd_kernel<T, D, group>>("activation_bwd_kernel", activation_blocks(p.rows, p.columns),
                                                   kActivationThreads, TeamSums<1>::kFloats * sizeof(float), stream, p);
      });
    };
    if (p.da.type == p.h.type) {
      with_da(of_h);
    } else {
      with_da(float{});
    }
  });
}

}  // namespace flamingo
