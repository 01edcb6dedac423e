//! A linear layer with a LoRA branch (Hu et al., arXiv 2106.09685): y = x W^T + b + scaling (x A^T) B^T.
//!
//! The branch is summed into the layer's own products, scaling is applied to [M, r] tensors only, and dx is skipped
//! where unused.

use tch::{Device, Kind, Tensor};

use crate::error::{CatError, Result, TorchContext};
use crate::ops::product::{plain, sum_of_products, transposed};
use crate::tensor::{check_float, check_shape, device_of, dtype_name};

const OP: &str = "lora_linear";

/// The layer's weights: W [out, in] and b [out] frozen, A [r, in] and B [out, r] trained.
#[derive(Debug)]
pub struct Layer {
    /// W
    pub weight: Tensor,
    /// b
    pub bias: Option<Tensor>,
    /// A
    pub lora_a: Tensor,
    /// B
    pub lora_b: Tensor,
    /// lora_alpha / r, or lora_alpha / sqrt(r)
    pub scaling: f64,
}

/// The gradients that were asked for.
#[derive(Debug)]
pub struct Gradients {
    /// dL/dx, of x's shape.
    pub x: Option<Tensor>,
    /// dL/dA
    pub lora_a: Option<Tensor>,
    /// dL/dB
    pub lora_b: Option<Tensor>,
}

impl Layer {
    fn check(&self, x: &Tensor) -> Result<()> {
        let on = device_of(OP, "x", x)?;
        let kind = check_float(OP, "x", x, on)?;
        let weights = [
            ("weight", Some(&self.weight)),
            ("bias", self.bias.as_ref()),
            ("lora_A", Some(&self.lora_a)),
            ("lora_B", Some(&self.lora_b)),
        ];
        for (argument, tensor) in weights {
            let Some(tensor) = tensor else { continue };
            check_same(argument, tensor, on, kind)?;
        }
        let weight = self.weight.size();
        let &[out, inner] = weight.as_slice() else {
            return Err(CatError::shape(OP, "weight", "[out, in]", &weight));
        };
        if x.size().last() != Some(&inner) {
            return Err(CatError::shape(OP, "x", format!("[..., {inner}]"), &x.size()));
        }
        let rank = *self.lora_a.size().first().unwrap_or(&0);
        check_shape(OP, "lora_A", &self.lora_a, &[rank, inner])?;
        check_shape(OP, "lora_B", &self.lora_b, &[out, rank])?;
        if let Some(bias) = &self.bias {
            check_shape(OP, "bias", bias, &[out])?;
        }
        if !self.scaling.is_finite() {
            return Err(CatError::value(OP, "scaling", "a finite number", self.scaling));
        }
        Ok(())
    }

    /// y [..., out] and h = scaling * x A^T [M, r], which the backward pass needs.
    pub fn forward(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        self.check(x)?;
        let rows = flatten(x)?;
        let hidden = sum_of_products(OP, &[(plain(&rows), transposed(&self.lora_a))], self.scaling, None)?;
        let terms = [(plain(&rows), transposed(&self.weight)), (plain(&hidden), transposed(&self.lora_b))];
        let y = sum_of_products(OP, &terms, 1.0, self.bias.as_ref())?;
        let mut shape = x.size();
        if let (Some(last), Some(&out)) = (shape.last_mut(), self.weight.size().first()) {
            *last = out;
        }
        // A plain view would be refused where something is added to the layer's output in place.
        Ok((y.f_internal_unsafe_view(shape.as_slice()).during(OP)?, hidden))
    }

    /// Checks what the backward pass has beside the layer and x.
    fn check_backward(&self, grad: &Tensor, x: &Tensor, hidden: &Tensor) -> Result<()> {
        self.check(x)?;
        let (on, kind) = (device_of(OP, "x", x)?, x.f_kind().during(OP)?);
        let (mut y, weight, rank) = (x.size(), self.weight.size(), self.lora_a.size()[0]);
        y.pop();
        let rows = y.iter().product();
        y.push(weight[0]);
        for (argument, tensor, shape) in [("grad", grad, y), ("hidden", hidden, vec![rows, rank])] {
            check_same(argument, tensor, on, kind)?;
            check_shape(OP, argument, tensor, &shape)?;
        }
        Ok(())
    }

    /// The gradients that `wanted` names (x, A, B), from dL/dy, x and the forward's h.
    pub fn backward(&self, grad: &Tensor, x: &Tensor, hidden: &Tensor, wanted: [bool; 3]) -> Result<Gradients> {
        self.check_backward(grad, x, hidden)?;
        let [x_wanted, a_wanted, b_wanted] = wanted;
        let grad_rows = flatten(grad)?;
        let product = |a, b| sum_of_products(OP, &[(a, b)], 1.0, None);
        let lora_b = b_wanted.then(|| product(transposed(&grad_rows), plain(hidden))).transpose()?;
        let mut gradients = Gradients { x: None, lora_a: None, lora_b };
        if x_wanted || a_wanted {
            let inner = sum_of_products(OP, &[(plain(&grad_rows), plain(&self.lora_b))], self.scaling, None)?;
            if a_wanted {
                gradients.lora_a = Some(product(transposed(&inner), plain(&flatten(x)?))?);
            }
            if x_wanted {
                let terms = [(plain(&grad_rows), plain(&self.weight)), (plain(&inner), plain(&self.lora_a))];
                let dx = sum_of_products(OP, &terms, 1.0, None)?;
                gradients.x = Some(dx.f_view(x.size().as_slice()).during(OP)?);
            }
        }
        Ok(gradients)
    }
}

/// Checks that `tensor` is on x's device and of its dtype.
fn check_same(argument: &'static str, tensor: &Tensor, on: Device, kind: Kind) -> Result<()> {
    let got = check_float(OP, argument, tensor, on)?;
    if got != kind {
        let got = format!("{} beside x of {}", dtype_name(got), dtype_name(kind));
        return Err(CatError::Dtype { op: OP, argument, expected: "the dtype of `x`", got });
    }
    Ok(())
}

/// [..., d] as [M, d]: a view where the strides allow it.
fn flatten(tensor: &Tensor) -> Result<Tensor> {
    let last = tensor.size().last().copied().unwrap_or(1);
    let rows: i64 = tensor.size().iter().rev().skip(1).product();
    tensor.f_reshape([rows, last]).during(OP)
}
