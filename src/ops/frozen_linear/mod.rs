//! A linear layer whose weight is frozen: y = x W^T + b. The input is not needed for the gradient.

use tch::{Device, Tensor};

use crate::error::{CatError, Result, TorchContext};
use crate::ops::product::{plain, sum_of_products, transposed};
use crate::tensor::{check_float, check_shape, dtype_name};

const OP: &str = "frozen_linear";

/// The frozen layer: W [out, in], b [out].
#[derive(Debug)]
pub struct Linear {
    /// W
    pub weight: Tensor,
    /// b
    pub bias: Option<Tensor>,
}

impl Linear {
    /// y [..., out] of x [..., in].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let [out, inner] = self.check("x", x)?;
        if let Some(bias) = &self.bias {
            check_shape(OP, "bias", bias, &[out])?;
        }
        let rows = rows_of("x", x, inner)?;
        let y = sum_of_products(OP, &[(plain(&rows), transposed(&self.weight))], 1.0, self.bias.as_ref())?;
        with_last(&y, x, out)
    }

    /// dL/dx [..., in] from dL/dy [..., out].
    pub fn backward(&self, grad: &Tensor) -> Result<Tensor> {
        let [out, inner] = self.check("grad", grad)?;
        let rows = rows_of("grad", grad, out)?;
        let dx = sum_of_products(OP, &[(plain(&rows), plain(&self.weight))], 1.0, None)?;
        with_last(&dx, grad, inner)
    }

    /// Checks dtypes and the weight; its shape.
    fn check(&self, argument: &'static str, tensor: &Tensor) -> Result<[i64; 2]> {
        let kind = check_float(OP, argument, tensor, Device::Cpu)?;
        for (name, own) in [("weight", Some(&self.weight)), ("bias", self.bias.as_ref())] {
            let Some(own) = own else { continue };
            let got = check_float(OP, name, own, Device::Cpu)?;
            if got != kind {
                let got = format!("{} beside {argument} of {}", dtype_name(got), dtype_name(kind));
                return Err(CatError::Dtype { op: OP, argument: name, expected: "the dtype of the input", got });
            }
        }
        let shape = self.weight.size();
        let &[out, inner] = shape.as_slice() else {
            return Err(CatError::shape(OP, "weight", "[out, in]", &shape));
        };
        Ok([out, inner])
    }
}

/// [..., width] as [M, width]: a view where the strides allow it.
fn rows_of(argument: &'static str, tensor: &Tensor, width: i64) -> Result<Tensor> {
    let shape = tensor.size();
    match shape.split_last() {
        Some((&last, leading)) if last == width => {
            tensor.f_reshape([leading.iter().product(), width]).and_then(|rows| rows.f_contiguous()).during(OP)
        }
        _ => Err(CatError::shape(OP, argument, format!("[..., {width}]"), &shape)),
    }
}

/// Rows [M, width], which nothing else holds, in the shape of `like`, but for its last dimension.
fn with_last(rows: &Tensor, like: &Tensor, width: i64) -> Result<Tensor> {
    let mut shape = like.size();
    if let Some(last) = shape.last_mut() {
        *last = width;
    }
    // A plain view would be refused where the caller's autograd function returns it and something is added in place.
    rows.f_internal_unsafe_view(shape.as_slice()).during(OP)
}
