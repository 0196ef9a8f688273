// The pieces of the linear ops on the CPU (linear.h), as sources and epilogues of the tiled matmul (gemm.h); compiled
// once per ISA.

#include "activations.h"
#include "gemm.h"
#include "linear.h"

namespace flamingo::CPU_CAPABILITY {
namespace {

template <typename acc_t>
const acc_t* as(const void* array) {
  return static_cast<const acc_t*>(array);
}

// ---- sources --------------------------------------------------------------------------------------------------------

// Several weights one below the other; those after the first begin at a multiple of `align` rows.
template <typename acc_t>
class Stacked : public Computed {
 public:
  Stacked(const std::vector<LinearPart>& parts, int64_t align) : parts_(parts) {
    for (const LinearPart& part : parts) {
      first_.push_back(rows_ = round_up(rows_, align));
      rows_ += part.weight.rows;
    }
  }

  int64_t rows() const { return rows_; }
  size_t part_of(int64_t row) const { return std::upper_bound(first_.begin(), first_.end(), row) - first_.begin() - 1; }
  int64_t first(size_t part) const { return first_[part]; }

  int64_t rows_of_panel(int64_t row, int64_t count) const {
    const size_t part = part_of(row);
    return std::clamp<int64_t>(first_[part] + parts_[part].weight.rows - row, 0, count);
  }
  void load(int64_t row, int64_t column, int64_t count, acc_t* out) const {
    const size_t part = part_of(row);
    Scaled<acc_t>(parts_[part].weight, as<acc_t>(parts_[part].scale)).load(row - first_[part], column, count, out);
  }

 private:
  const std::vector<LinearPart>& parts_;
  std::vector<int64_t> first_;
  int64_t rows_ = 0;
};

// The rows of a swiglu's w_in, `each` of the gate half and as many of the other in turn, so that both meet in a tile.
struct Paired : Plain {
  int64_t half, each;  // F
  Paired(const Matrix& w, int64_t each) : Plain{w}, half(w.rows / 2), each(each) {}

  int64_t rows() const { return round_up(half, each) * 2; }
  int64_t column_of(int64_t row) const { return row / (2 * each) * each + row % each; }
  int64_t rows_of_panel(int64_t row, int64_t count) const {
    return std::clamp<int64_t>(half - column_of(row), 0, count);
  }
  int64_t at(int64_t row) const { return row / each % 2 * half + column_of(row); }
  template <typename acc_t>
  void load(int64_t row, int64_t column, int64_t count, acc_t* out) const {
    Plain::load(at(row), column, count, out);
  }
  template <typename T>
  const T* memory(int64_t row, int64_t column) const {
    return rows_of_panel(row, 1) ? Plain::memory<T>(at(row), column) : nullptr;
  }
};

// act(h), for swiglu silu(gate half) ∘ other half.
template <typename acc_t>
struct Activated : Computed {
  Matrix hidden;
  Activation activation;
  Activated(const Matrix& hidden, Activation activation) : hidden(hidden), activation(activation) {}

  void load(int64_t row, int64_t column, int64_t count, acc_t* out) const {
    acc_t up[kMostDepth];
    const bool paired = activation == Activation::kSwiglu;
    load_row(hidden, row, column, count, out);
    if (paired) load_row(hidden, row, hidden.columns / 2 + column, count, up);
    activate_row(activation, out, paired ? up : nullptr, count);
  }
};

constexpr auto ask_for_nothing = [](int64_t, int64_t, int64_t, int64_t) {};

// ---- forward --------------------------------------------------------------------------------------------------------

// A tile's row to memory: [out, rest] = residual + gate ∘ (tile + bias).
template <typename acc_t>
struct StoreRow {
  const acc_t *bias, *gate;
  Matrix residual, out, rest;
  acc_t wide[kGemmColumns];

  void operator()(int64_t row, int64_t column, int64_t count, acc_t* tile) {
    using V = Vec<acc_t>;
    if (bias) map_row(tile, count, [](V a, V b) { return a + b; }, bias + column);
    if (gate) map_row(tile, count, [](V a, V b) { return a * b; }, gate + column);
    if (residual) {
      load_row(residual, row, column, count, wide);
      map_row(tile, count, [](V a, V b) { return a + b; }, wide);
    }
    const int64_t here = rest ? std::clamp<int64_t>(out.columns - column, 0, count) : count;
    if (here > 0) store_row(out, row, column, here, tile);
    if (here < count) store_row(rest, row, column + here - out.columns, count - here, tile + here);
  }
};

void linear(Compute compute, const LinearArgs& args) {
  for_tile(compute.type, compute.narrow_tiles, [&]<typename tile_t>() {
    using acc_t = accumulate_t<tile_t>;
    const Normalised<acc_t> rows(args.x, args.norm);
    const int64_t chunk = chunk_of_rows<tile_t>(args.x.rows, args.x.columns);
    Left<tile_t> left(chunk, args.x.columns);
    const Stacked<acc_t> stacked(args.parts, kGemmColumns);
    const Plain single{args.parts[0].weight};
    for (int64_t top = 0; top < args.x.rows; top += chunk) {
      left.fill(rows, top, std::min(chunk, args.x.rows - top));
      const auto epilogue = [&](int64_t i, int64_t count, int64_t first, int64_t columns, acc_t* tile) {
        const size_t at = stacked.part_of(first);
        const LinearPart& part = args.parts[at];
        const int64_t column = first - stacked.first(at);
        StoreRow<acc_t> store{as<acc_t>(part.bias), as<acc_t>(args.gate), args.residual, part.out, part.rest, {}};
        for (int64_t r = 0; r < count; ++r) {
          store(top + i + r, column, std::min(columns, part.weight.rows - column), tile + r * kGemmColumns);
        }
      };
      const auto ask = [&](int64_t i, int64_t count, int64_t first, int64_t columns) {
        ask_for<false>(args.residual, top + i, count, first, columns);
      };
      if (args.parts.size() == 1 && !args.parts[0].scale) {
        multiply_by_rows(left, stacked.rows(), single, epilogue, ask);
      } else {
        multiply_by_rows(left, stacked.rows(), stacked, epilogue, ask);
      }
    }
  });
}

// The first matmul's epilogue makes the second one's left operand.
void mlp(Compute compute, const MlpArgs& args) {
  for_tile(compute.type, compute.narrow_tiles, [&]<typename tile_t>() {
    using acc_t = accumulate_t<tile_t>;
    const bool paired = args.activation == Activation::kSwiglu;
    const int64_t width = args.w_out.columns;  // F
    const int64_t chunk = chunk_of_rows<tile_t>(args.x.rows, args.x.columns + width);
    const Normalised<acc_t> rows(args.x, args.norm);
    const Plain w_in{args.w_in}, w_out{args.w_out};
    Left<tile_t> left(chunk, args.x.columns), activated(chunk, width);
    for (int64_t top = 0; top < args.x.rows; top += chunk) {
      left.fill(rows, top, std::min(chunk, args.x.rows - top));
      activated.resize(left.rows());
      const int64_t half = columns_at_a_time(left.rows()) / 2;  // of a tile
      const Paired w_in_paired(args.w_in, half);
      const auto activate = [&](int64_t i, int64_t count, int64_t first, int64_t columns, acc_t* tile) {
        const int64_t column = paired ? first / 2 : first;
        columns = std::min(paired ? half : columns, width - column);
        const int64_t k = column / kDepth<tile_t> * kDepth<tile_t>, ld = activated.block_depth(k);
        const int64_t padded = column + columns == width ? activated.padded_depth() - column : columns;
        tile_t* out = activated.block(i, k) + column - k;
        for (int64_t r = 0; r < count; ++r) {
          acc_t *h = tile + r * kGemmColumns, *up = paired ? h + half : nullptr;
          if (args.hidden) {
            store_row(args.hidden, top + i + r, column, columns, h);
            if (paired) store_row(args.hidden, top + i + r, width + column, columns, up);
          }
          activate_row(args.activation, h, up, columns);
          copy_row(out + r * ld, h, columns, padded);
        }
      };
      if (paired) {
        multiply_by_rows(left, w_in_paired.rows(), w_in_paired, activate, ask_for_nothing);
      } else {
        multiply_by_rows(left, width, w_in, activate, ask_for_nothing);
      }
      const auto add = [&](int64_t i, int64_t count, int64_t first, int64_t columns, acc_t* tile) {
        StoreRow<acc_t> store{nullptr, as<acc_t>(args.gate), args.x, args.out, {}, {}};
        for (int64_t r = 0; r < count; ++r) store(top + i + r, first, columns, tile + r * kGemmColumns);
      };
      const auto ask = [&](int64_t i, int64_t count, int64_t first, int64_t columns) {
        ask_for<false>(args.x, top + i, count, first, columns);
      };
      multiply_by_rows(activated, args.w_out.rows, w_out, add, ask);
    }
  });
}

// ---- backward -------------------------------------------------------------------------------------------------------

// dh = da ∘ act'(h) for a row of a tile of da.
template <typename acc_t>
void store_hidden_gradient(const InputGradientArgs& args, int64_t row, int64_t column, int64_t count, acc_t* da) {
  using V = Vec<acc_t>;
  acc_t h[kGemmColumns], other[kGemmColumns];
  load_row(args.hidden, row, column, count, h);
  if (args.activation != Activation::kSwiglu) {
    for_activation(args.activation,
                   [&](auto act) { map_row(da, count, [&](V a, V x) { return a * act.slope(x); }, h); });
    return store_row(args.dx, row, column, count, da);
  }
  const int64_t half = args.hidden.columns / 2;
  load_row(args.hidden, row, half + column, count, other);
  map_row(other, count, [](V up, V a, V x) { return a * up * Silu::slope(x); }, da, h);
  map_row(h, count, [](V x, V a) { return a * Silu::value(x); }, da);
  store_row(args.dx, row, column, count, other);
  store_row(args.dx, row, half + column, count, h);
}

void input_gradient(Compute compute, const InputGradientArgs& args) {
  for_tile(compute.type, compute.narrow_tiles, [&]<typename tile_t>() {
    using acc_t = accumulate_t<tile_t>;
    const Beside<acc_t> dy(args.dy, as<acc_t>(args.gate));
    const int64_t chunk = chunk_of_rows<tile_t>(dy.rows(), dy.columns());
    Left<tile_t> left(chunk, dy.columns());
    const Stacked<acc_t> stacked(args.parts, 1);
    const Plain single{args.parts[0].weight};
    const int64_t n = args.parts[0].weight.columns;
    for (int64_t top = 0; top < dy.rows(); top += chunk) {
      left.fill(dy, top, std::min(chunk, dy.rows() - top));
      const auto epilogue = [&](int64_t i, int64_t count, int64_t first, int64_t columns, acc_t* tile) {
        for (int64_t r = 0; r < count; ++r) {
          if (args.hidden) {
            store_hidden_gradient(args, top + i + r, first, columns, tile + r * kGemmColumns);
          } else {
            store_row(args.dx, top + i + r, first, columns, tile + r * kGemmColumns);
          }
        }
      };
      const auto ask = [&](int64_t i, int64_t count, int64_t first, int64_t columns) {
        ask_for<false>(args.hidden, top + i, count, first, columns);
        if (args.activation == Activation::kSwiglu) ask_for<false>(args.hidden, top + i, count, n + first, columns);
      };
      if (args.parts.size() == 1 && !args.parts[0].scale) {
        multiply(left, n, columns_from_columns(single), epilogue, ask);
      } else {
        multiply(left, n, columns_from_columns(stacked), epilogue, ask);
      }
    }
  });
}

// Sums a column of partial sums in their order: out[i] = Σ_p partial[p, i].
template <typename acc_t>
void reduce(const std::vector<acc_t>& partial, int64_t count, void* out) {
  acc_t* total = static_cast<acc_t*>(out);
  std::fill_n(total, count, acc_t(0));
  for (size_t at = 0; at < partial.size(); at += count) {
    map_row(total, count, [](auto a, auto b) { return a + b; }, partial.data() + at);
  }
}

void weight_gradient(Compute compute, const WeightGradientArgs& args) {
  for_tile(compute.type, compute.narrow_tiles, [&]<typename tile_t>() {
    using acc_t = accumulate_t<tile_t>;
    using V = Vec<acc_t>;
    const int64_t rows = args.weight.rows, width = args.weight.columns;
    const auto *gate = as<acc_t>(args.gate), *scale = as<acc_t>(args.scale), *bias = as<acc_t>(args.bias);
    const auto* row_sums = as<acc_t>(args.row_sums);
    std::vector<acc_t> row_dots(args.row_dots ? (width + kGemmColumns - 1) / kGemmColumns * rows : 0);
    std::vector<acc_t> column_dots(args.column_dots ? (rows + kGemmRows - 1) / kGemmRows * width : 0);
    const Beside<acc_t> dy(args.dy);
    const int64_t chunk = chunk_of_rows<tile_t>(rows, dy.rows());
    Left<tile_t> left(chunk, dy.rows());
    for (int64_t top = 0; top < rows; top += chunk) {
      left.fill_transposed(dy, top, std::min(chunk, rows - top));
      const auto epilogue = [&](int64_t i, int64_t count, int64_t first, int64_t columns, acc_t* tile) {
        acc_t weight[kGemmColumns];
        acc_t* of_columns = column_dots.empty() ? nullptr : column_dots.data() + (top + i) / kGemmRows * width + first;
        for (int64_t r = 0; r < count; ++r) {
          const int64_t row = top + i + r;
          acc_t* p = tile + r * kGemmColumns;
          if (args.row_dots || of_columns) load_row(args.weight, row, first, columns, weight);
          if (of_columns) {
            map_row(of_columns, columns, [](V a, V b, V c) { return at::vec::fmadd(b, c, a); }, p, weight);
          }
          if (args.row_dots) row_dots[first / kGemmColumns * rows + row] = dot_row<acc_t>(p, weight, columns);
          if (!args.dweight) continue;
          if (gate) map_row(p, columns, [g = V(gate[row])](V a) { return a * g; });
          if (scale) map_row(p, columns, [](V a, V b) { return a * b; }, scale + first);
          if (bias)
            map_row(p, columns, [s = V(row_sums[row])](V a, V b) { return at::vec::fmadd(s, b, a); }, bias + first);
          store_row(args.dweight, row, first, columns, p);
        }
      };
      const auto ask = [&](int64_t i, int64_t count, int64_t first, int64_t columns) {
        if (args.row_dots || args.column_dots) ask_for<false>(args.weight, top + i, count, first, columns);
        ask_for<true>(args.dweight, top + i, count, first, columns);
      };
      if (args.activation != Activation::kNone) {
        multiply(left, width, columns_from_columns(Activated<acc_t>(args.x, args.activation)), epilogue, ask);
      } else if (args.norm.kind != NormKind::kNone) {
        multiply(left, width, columns_from_columns(Normalised<acc_t>(args.x, args.norm)), epilogue, ask);
      } else {
        multiply(left, width, columns_from_columns(Plain{args.x}), epilogue, ask);
      }
    }
    if (args.row_dots) reduce(row_dots, rows, args.row_dots);
    if (args.column_dots) reduce(column_dots, width, args.column_dots);
  });
}

// ---- norms and sums -------------------------------------------------------------------------------------------------

template <typename acc_t, typename F, typename... More>
acc_t sum_row(int64_t count, const F& f, const More*... more) {
  using V = Vec<acc_t>;
  V total(0);
  int64_t i = 0;
  for (; i + V::size() <= count; i += V::size()) total = total + f(V::loadu(more + i)...);
  if (i < count) total = total + V::set(V(0), f(V::loadu(more + i, count - i)...), count - i);
  return sum(total);
}

template <typename Run>
void for_accumulate(Compute compute, const Run& run) {
  if (compute.type == at::kDouble) return run(double());
  run(float());
}

constexpr int64_t kRowsPerItem = 16;

// Calls row(r, buffer, ...) for each row with `buffers` buffers of a row's length.
template <typename acc_t, int kBuffers, typename Row>
void for_rows(int64_t rows, int64_t columns, const Row& row) {
  const int64_t length = round_up(columns, Vec<acc_t>::size());
  for_each_item((rows + kRowsPerItem - 1) / kRowsPerItem, 1 + rows * columns / 16384, [&] {
    return [&, buffer = std::vector<acc_t>(kBuffers * length)](int64_t item) mutable {
      for (int64_t r = item * kRowsPerItem; r < std::min(rows, (item + 1) * kRowsPerItem); ++r) {
        row(r, buffer.data(), length);
      }
    };
  });
}

// In two passes over a row in cache, so that a large mean costs no digits.
void norm_statistics(Compute compute, const Matrix& x, const Norm& norm) {
  for_accumulate(compute, [&](auto example) {
    using acc_t = decltype(example);
    using V = Vec<acc_t>;
    for_rows<acc_t, 1>(x.rows, x.columns, [&](int64_t r, acc_t* row, int64_t) {
      load_row(x, r, 0, x.columns, row);
      acc_t mean = 0;
      if (norm.kind == NormKind::kLayer) {
        mean = sum_row<acc_t>(x.columns, [](V a) { return a; }, row) / x.columns;
        // What the sum was rounded by: nothing may be left of a constant row, however large.
        mean += sum_row<acc_t>(x.columns, [m = V(mean)](V a) { return a - m; }, row) / x.columns;
      }
      const acc_t squares = sum_row<acc_t>(x.columns, [m = V(mean)](V a) { return (a - m) * (a - m); }, row);
      static_cast<acc_t*>(norm.mean)[r] = mean;
      static_cast<acc_t*>(norm.rstd)[r] = 1 / std::sqrt(squares / x.columns + static_cast<acc_t>(norm.eps));
    });
  });
}

// With g = weight ∘ dz and x̂ the normalised row: dx = rstd (g - mean(g) - x̂ mean(g ∘ x̂)), without mean(g) for rms;
// dweight = Σ dz ∘ x̂ and dbias = Σ dz over the rows.
void norm_backward(Compute compute, const NormBackwardArgs& args) {
  for_accumulate(compute, [&](auto example) {
    using acc_t = decltype(example);
    using V = Vec<acc_t>;
    const int64_t rows = args.x.rows, columns = args.x.columns;
    const auto *mean = as<acc_t>(args.norm.mean), *rstd = as<acc_t>(args.norm.rstd);
    const auto* weight = as<acc_t>(args.norm.weight);
    if (args.dx) {
      for_rows<acc_t, 3>(rows, columns, [&](int64_t r, acc_t* g, int64_t length) {
        acc_t *x = g + length, *residual = x + length;
        load_row(args.dz, r, 0, columns, g);
        load_row(args.x, r, 0, columns, x);
        if (weight) map_row(g, columns, [](V a, V w) { return a * w; }, weight);
        map_row(x, columns, [m = V(mean[r]), s = V(rstd[r])](V a) { return (a - m) * s; });
        const bool centred = args.norm.kind == NormKind::kLayer;
        const V m(centred ? sum_row<acc_t>(columns, [](V a) { return a; }, g) / columns : acc_t(0));
        const V slope(sum_row<acc_t>(columns, [](V a, V b) { return a * b; }, g, x) / columns), s(rstd[r]);
        map_row(g, columns, [&](V a, V b) { return (a - m - b * slope) * s; }, x);
        if (args.residual) {
          load_row(args.residual, r, 0, columns, residual);
          map_row(g, columns, [](V a, V b) { return a + b; }, residual);
        }
        store_row(args.dx, r, 0, columns, g);
      });
    }
    if (!args.dweight && !args.dbias) return;
    constexpr int64_t kColumns = 64, kBlock = 64;  // sums of blocks of rows lose fewer digits than one long sum
    for_each_item((columns + kColumns - 1) / kColumns, 1 + rows * columns / 16384, [&] {
      return [&](int64_t item) {
        const int64_t first = item * kColumns, count = std::min(kColumns, columns - first);
        acc_t total[2][kColumns] = {}, block[2][kColumns], dz[kColumns], x[kColumns];
        for (int64_t top = 0; top < rows; top += kBlock) {
          std::fill_n(block[0], 2 * kColumns, acc_t(0));
          for (int64_t r = top; r < std::min(rows, top + kBlock); ++r) {
            load_row(args.dz, r, first, count, dz);
            load_row(args.x, r, first, count, x);
            const V m(mean[r]), s(rstd[r]);
            map_row(block[0], count, [&](V t, V d, V a) { return at::vec::fmadd(d, (a - m) * s, t); }, dz, x);
            map_row(block[1], count, [](V t, V d) { return t + d; }, dz);
          }
          for (int i = 0; i < 2; ++i) map_row(total[i], count, [](V t, V b) { return t + b; }, block[i]);
        }
        if (args.dweight) std::copy_n(total[0], count, static_cast<acc_t*>(args.dweight) + first);
        if (args.dbias) std::copy_n(total[1], count, static_cast<acc_t*>(args.dbias) + first);
      };
    });
  });
}

void column_sums(Compute compute, const Matrix& x, const void* factors, void* out) {
  for_accumulate(compute, [&](auto example) {
    using acc_t = decltype(example);
    using V = Vec<acc_t>;
    constexpr int64_t kColumns = 64, kBlock = 64;
    for_each_item((x.columns + kColumns - 1) / kColumns, 1 + x.rows * x.columns / 16384, [&] {
      return [&](int64_t item) {
        const int64_t first = item * kColumns, count = std::min(kColumns, x.columns - first);
        acc_t total[kColumns] = {}, block[kColumns], row[kColumns];
        for (int64_t top = 0; top < x.rows; top += kBlock) {
          std::fill_n(block, kColumns, acc_t(0));
          for (int64_t r = top; r < std::min(x.rows, top + kBlock); ++r) {
            load_row(x, r, first, count, row);
            const V factor(factors ? as<acc_t>(factors)[r] : acc_t(1));
            map_row(block, count, [&](V t, V a) { return at::vec::fmadd(a, factor, t); }, row);
          }
          map_row(total, count, [](V t, V b) { return t + b; }, block);
        }
        std::copy_n(total, count, static_cast<acc_t*>(out) + first);
      };
    });
  });
}

void row_dots(Compute compute, const Matrix& x, const void* vector, void* out) {
  for_accumulate(compute, [&](auto example) {
    using acc_t = decltype(example);
    for_rows<acc_t, 1>(x.rows, x.columns, [&](int64_t r, acc_t* row, int64_t) {
      load_row(x, r, 0, x.columns, row);
      static_cast<acc_t*>(out)[r] = dot_row<acc_t>(row, as<acc_t>(vector), x.columns);
    });
  });
}

}  // namespace

const LinearKernels linear_kernels{norm_statistics, linear,        mlp,         input_gradient,
                                   weight_gradient, norm_backward, column_sums, row_dots};

}  // namespace flamingo::CPU_CAPABILITY
