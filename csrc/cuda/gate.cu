// Launchers of the gates: a kernel for each type of rows, in groups and without.

#include "cuda/gate.cuh"

namespace flamingo {
namespace {

// f(a value of the type, group) with the number of columns in a group as a type
template <typename F>
void with_type_and_group(Element type, bool in_groups, F f) {
  with_type(type,
            [&](auto value) { with_group<kGroup<decltype(value)>>(in_groups, [&](auto group) { f(value, group); }); });
}

}  // namespace

void gate_residual(const GateResidual& call, Stream stream) {
  require(call.residual.data == nullptr || call.residual.type == call.x.type, "gate: the residual must be of x's type");
  GateResidual p = call;
  const bool one_piece = p.x.stride == p.columns && (p.residual.data == nullptr || p.residual.stride == p.columns);
  if (one_piece && !p.per_column) p.columns *= std::exchange(p.rows, 1);
  const bool rows =
      aligned(p.x, p.rows) && aligned(p.residual, p.rows) && aligned(p.y) && (p.columns % 8 == 0 || p.rows == 1);
  const bool in_groups = rows && (!p.per_column || aligned(p.gate.data));
  with_type_and_group(p.x.type, in_groups, [&](auto value, auto group) {
    const int64_t threads = ceil_div(p.rows, kGateRows) * ceil_div(p.columns, group);
    launch<gate_residual_fwd_kernel<decltype(value), group>>(
        "gate_residual_fwd_kernel", ceil_div(threads, kGateThreads), kGateThreads, 0, stream, p);
  });
}

void gate_backward(const GateBackward& call, Stream stream) {
  const bool in_groups = call.step == 1 && call.columns % 8 == 0 && aligned(call.p) && aligned(call.weight, call.rows);
  const int team = team_for(call.columns, 8, kGateThreads);
  with_type_and_group(call.weight.type, in_groups, [&](auto value, auto group) {
    launch<gate_bwd_kernel<decltype(value), group>>("gate_bwd_kernel", ceil_div(call.rows, kGateThreads / team),
                                                    kGateThreads, TeamSums<1>::kFloats * sizeof(float), stream,
                                                    GateBackwardParams{call, team});
  });
}

}  // namespace flamingo
