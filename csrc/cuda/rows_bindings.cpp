// The kernels between matmuls in the Python module flamingo_kernels._cuda: norms, activations, gates, folding, sums.
//
// An array comes as (address, type), rows as (address, type, stride); where there are none, the address is 0.

#include <pybind11/stl.h>

#include <stdexcept>
#include <vector>

#include "cuda/activation.h"
#include "cuda/bindings.h"
#include "cuda/fold.h"
#include "cuda/gate.h"
#include "cuda/norm.h"
#include "cuda/row_sums.h"

namespace flamingo {
namespace {

using Address = uintptr_t;
using ArrayArg = std::tuple<Address, int>;
using RowsArg = std::tuple<Address, int, int64_t>;

Array array_of(const ArrayArg& arg) {
  return {pointer<void>(std::get<0>(arg)), static_cast<Element>(std::get<1>(arg))};
}

Rows rows_of(const RowsArg& arg) {
  const auto [address, type, stride] = arg;
  return {pointer<void>(address), static_cast<Element>(type), stride};
}

void forward_norm(int64_t rows, int columns, const RowsArg& x, const RowsArg& branch, const ArrayArg& gate,
                  const ArrayArg& weight, const ArrayArg& bias, Address y, const ArrayArg& z, Address copy, double eps,
                  bool layer, const StreamArg& stream) {
  norm_forward({rows, columns, rows_of(x), rows_of(branch), array_of(gate), array_of(weight), array_of(bias),
                pointer<void>(y), array_of(z), pointer<void>(copy), static_cast<float>(eps), layer},
               stream_of(stream));
}

// Without results yet.
NormBackward backward_call(int64_t rows, int columns, const RowsArg& dz, const RowsArg& x, const RowsArg& residual,
                           const ArrayArg& weight, const ArrayArg& bias) {
  NormBackward call{};
  call.rows = rows;
  call.columns = columns;
  call.dz = rows_of(dz);
  call.x = rows_of(x);
  call.residual = rows_of(residual);
  call.weight = array_of(weight);
  call.bias = array_of(bias);
  return call;
}

int64_t backward_norm_blocks(int64_t rows, int columns, const RowsArg& dz, const RowsArg& x, const RowsArg& residual,
                             const ArrayArg& weight, const ArrayArg& bias, const StreamArg& stream) {
  return norm_backward_blocks(backward_call(rows, columns, dz, x, residual, weight, bias), true, stream_of(stream));
}

void backward_norm(int64_t rows, int columns, const RowsArg& dz, const RowsArg& x, const RowsArg& residual,
                   const ArrayArg& weight, const ArrayArg& bias, Address dx, const ArrayArg& z, Address part_weight,
                   Address part_bias, double eps, bool layer, const StreamArg& stream) {
  NormBackward call = backward_call(rows, columns, dz, x, residual, weight, bias);
  call.dx = pointer<void>(dx);
  call.z = array_of(z);
  call.part_weight = pointer<float>(part_weight);
  call.part_bias = pointer<float>(part_bias);
  call.eps = static_cast<float>(eps);
  call.layer = layer;
  norm_backward(call, stream_of(stream));
}

void forward_activation(int activation, int64_t rows, int64_t columns, const RowsArg& h, const ArrayArg& gate,
                        Address a, const StreamArg& stream) {
  const auto which = static_cast<Activation>(activation);
  activation_forward({which, rows, columns, rows_of(h), array_of(gate), pointer<void>(a)}, stream_of(stream));
}

void backward_activation(int activation, int64_t rows, int64_t columns, const RowsArg& da, const RowsArg& h,
                         const ArrayArg& gate, Address dh, Address a, Address part, const StreamArg& stream) {
  activation_backward({static_cast<Activation>(activation), rows, columns, rows_of(da), rows_of(h), array_of(gate),
                       pointer<void>(dh), pointer<void>(a), pointer<float>(part)},
                      stream_of(stream));
}

void residual_gate(int64_t rows, int64_t columns, const RowsArg& x, const RowsArg& residual, const ArrayArg& gate,
                   bool per_column, Address y, const StreamArg& stream) {
  gate_residual({rows, columns, rows_of(x), rows_of(residual), array_of(gate), per_column, pointer<void>(y)},
                stream_of(stream));
}

void backward_gate(int64_t rows, int columns, Address p, const RowsArg& weight, int64_t step, const ArrayArg& gate,
                   const ArrayArg& dgate, const StreamArg& stream) {
  gate_backward({rows, columns, pointer<void>(p), rows_of(weight), step, array_of(gate), array_of(dgate)},
                stream_of(stream));
}

void fold_norm(int64_t rows, int columns, const RowsArg& weight, int64_t step, const ArrayArg& scale,
               const ArrayArg& bias, Address folded, Address offset, const StreamArg& stream) {
  fold({rows, columns, rows_of(weight), step, array_of(scale), array_of(bias), pointer<void>(folded),
        pointer<void>(offset)},
       stream_of(stream));
}

void unfold_norm(int64_t rows, int columns, const ArrayArg& p, Address s, const RowsArg& weight, int64_t step,
                 const ArrayArg& scale, const ArrayArg& bias, Address dweight, const ArrayArg& dscale,
                 const ArrayArg& dbias, const StreamArg& stream) {
  unfold({rows, columns, array_of(p), pointer<float>(s), rows_of(weight), step, array_of(scale), array_of(bias),
          pointer<void>(dweight), array_of(dscale), array_of(dbias)},
         stream_of(stream));
}

using RowSumArg = std::tuple<Address, int64_t, int, ArrayArg, ArrayArg>;  // part, rows, columns, out, gate

void sum_rows(const std::vector<RowSumArg>& sums, const StreamArg& stream) {
  if (sums.size() > RowSums::kMost) throw std::invalid_argument("row_sums: at most three sums at once");
  RowSums call{};
  for (const auto& [part, rows, columns, out, gate] : sums) {
    call.sum[call.count++] = {pointer<float>(part), rows, columns, array_of(out), array_of(gate)};
  }
  row_sums(call, stream_of(stream));
}

}  // namespace

void bind_rows(pybind11::module_& module) {
  module.def("norm_forward", &forward_norm);
  module.def("norm_backward_blocks", &backward_norm_blocks);
  module.def("norm_backward", &backward_norm);
  module.def("activation_forward", &forward_activation);
  module.def("activation_blocks", &activation_blocks);
  module.def("activation_backward", &backward_activation);
  module.def("gate_residual", &residual_gate);
  module.def("gate_backward", &backward_gate);
  module.def("fold", &fold_norm);
  module.def("unfold", &unfold_norm);
  module.def("row_sums", &sum_rows);
}

}  // namespace flamingo
