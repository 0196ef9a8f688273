// Launcher of the sums over rows.

#include "cuda/row_sums.cuh"

namespace flamingo {

void row_sums(const RowSums& call, Stream stream) {
  require(call.count >= 1 && call.count <= RowSums::kMost, "row_sums: one to three sums at once");
  RowSumsParams params{call, {}, {}};
  int64_t blocks = 0;
  for (int i = 0; i < call.count; i++) {
    int width = 1;
    while (width < kRowSumsColumns && width < call.sum[i].columns) width *= 2;
    params.width[i] = width;
    params.blocks[i] = ceil_div(call.sum[i].columns, width);
    blocks += params.blocks[i];
  }
  launch<row_sums_kernel<kRowSumsThreads>>("row_sums_kernel", blocks, kRowSumsThreads, kRowSumsThreads * sizeof(float),
                                           stream, params);
}

}  // namespace flamingo
