// Forced into torch-sys's C++ files when building against PyTorch 2.14 or newer: the functions that 2.14
// dropped and that the bindings of tch 0.26 still name.
#pragma once
#include <torch/torch.h>

namespace torch {
inline at::Tensor cholesky(const at::Tensor& self, bool upper = false) {
  return at::linalg_cholesky(self, upper);
}
inline at::Tensor& cholesky_out(at::Tensor& out, const at::Tensor& self, bool upper = false) {
  return at::linalg_cholesky_out(out, self, upper);
}
inline std::tuple<at::Tensor, at::Tensor> qr(const at::Tensor& self, bool some = true) {
  return at::linalg_qr(self, some ? "reduced" : "complete");
}
inline std::tuple<at::Tensor&, at::Tensor&> qr_out(
    at::Tensor& Q, at::Tensor& R, const at::Tensor& self, bool some = true) {
  return at::linalg_qr_out(Q, R, self, some ? "reduced" : "complete");
}
}  // namespace torch
