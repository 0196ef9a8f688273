// Launchers of the norms: a kernel for each pair of the types of x and of z, alike or fp32 beside a narrower one, in
// groups and without.

#include <algorithm>

#include "cuda/norm.cuh"

namespace flamingo {
namespace {

constexpr int kHeld = kNormHeld<8>, kHeldWithoutGroups = kNormHeld<1>;
static_assert(kNormHeld<4> == kHeld);
constexpr int kMostHeld = kHeld * kNormMostThreads;

// How blocks divide the rows.
struct Tiling {
  bool in_groups;
  int team, threads;
  int64_t tiles;

  // What `aligned` says holds of all rows; blocks of rows in registers have at least `threads`.
  Tiling(int64_t rows, int columns, bool aligned, int least_threads)
      : in_groups(aligned && columns % 8 == 0 && columns <= kMostHeld),
        team(team_for(columns, in_groups ? kHeld : kHeldWithoutGroups, kNormMostThreads)),
        threads(in_groups ? std::max(team, least_threads) : team),
        tiles(ceil_div(rows, threads / team)) {
    require(rows > 0 && columns > 0, "norm: there must be rows and columns");
    require(columns < kMostBlocks - kMostHeld, "norm: rows are too wide");
  }

  size_t bytes(int team_sums, int sums) const {
    const int in_place = in_groups ? std::max(2 * team * kHeld, sums) : 0;
    return (team_sums + in_place) * sizeof(float);
  }
};

Tiling tiling_of(const NormBackward& call) {
  const bool rows = aligned(call.dz, call.rows) && aligned(call.x, call.rows) && aligned(call.residual, call.rows);
  const bool others = aligned(call.weight.data) && aligned(call.bias.data) && aligned(call.z.data) && aligned(call.dx);
  return Tiling(call.rows, call.columns, rows && others, kNormMostThreads);
}

// Small blocks, for they begin sooner, unless so many that each had better read weight and bias for several rows.
Tiling tiling_of(const NormForward& call, int processors) {
  const bool in = aligned(call.x, call.rows) && aligned(call.branch, call.rows);
  const bool out = aligned(call.y) && aligned(call.z.data) && aligned(call.copy);
  const bool all = in && out && aligned(call.weight.data) && aligned(call.bias.data);
  const Tiling small(call.rows, call.columns, all, kNormMostThreads / 4);
  return small.tiles <= 8 * processors ? small : Tiling(call.rows, call.columns, all, kNormMostThreads);
}

// Starts a kernel: f(x, z, group) with values of the two types, and the number of columns in a group as a type.
template <typename F>
void with_types(Element x, Element z, bool in_groups, F f) {
  require(x == z || x == Element::fp32, "norm: rows of x may be of z's type, or fp32");
  with_type(z, [&](auto of_z) {
    const auto with_x = [&](auto of_x) {
      with_group<kGroup<decltype(of_x), decltype(of_z)>>(in_groups, [&](auto group) { f(of_x, of_z, group); });
    };
    if (x == z) {
      with_x(of_z);
    } else {
      with_x(float{});
    }
  });
}

}  // namespace

void norm_forward(const NormForward& call, Stream stream) {
  require(call.branch.data == nullptr || call.branch.type == call.x.type, "norm: the branch must be of x's type");
  const int multiprocessors = processors(stream);
  const Tiling tiling = tiling_of(call, multiprocessors);
  const int64_t blocks = std::min<int64_t>(tiling.tiles, multiprocessors * (2 * kNormMostThreads / tiling.threads));
  const NormParams<NormForward> params{call, tiling.tiles, tiling.team};
  with_types(call.x.type, call.z.type, tiling.in_groups, [&](auto x, auto z, auto group) {
    constexpr auto kernel = norm_fwd_kernel<decltype(x), decltype(z), group>;
    launch<kernel>("norm_fwd_kernel", blocks, tiling.threads, tiling.bytes(TeamSums<1>::kFloats, 0), stream, params);
  });
}

int64_t norm_backward_blocks(const NormBackward& call, bool sums, Stream stream) {
  const Tiling tiling = tiling_of(call);
  return sums ? std::min<int64_t>(tiling.tiles, processors(stream) * (kNormMostThreads / tiling.threads))
              : tiling.tiles;
}

void norm_backward(const NormBackward& call, Stream stream) {
  const Tiling tiling = tiling_of(call);
  const bool sums = call.part_weight != nullptr;
  const int64_t blocks = norm_backward_blocks(call, sums, stream);
  const NormParams<NormBackward> params{call, tiling.tiles, tiling.team};
  const Element z_type = call.z.data == nullptr ? call.x.type : call.z.type;
  with_types(call.x.type, z_type, tiling.in_groups, [&](auto x, auto z, auto group) {
    constexpr auto kernel = norm_bwd_kernel<decltype(x), decltype(z), group>;
    const size_t bytes = tiling.bytes(TeamSums<2>::kFloats, sums ? kHeld * (tiling.threads + 32 / group) : 0);
    launch<kernel>("norm_bwd_kernel", blocks, tiling.threads, bytes, stream, params);
  });
}

}  // namespace flamingo
