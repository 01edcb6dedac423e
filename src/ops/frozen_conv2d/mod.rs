//! A convolution whose weight is frozen, as one matrix product: y = im2col(x) W^T + b.
//!
//! Convolution libraries bring the weight into a layout of their own in every call, forward and backward. Where the
//! weight is large beside the picture, as in the lowest resolutions of a denoiser, that costs more than the
//! arithmetic; the product reads the weight once, as it lies in memory. The input is not needed for the gradient.

use tch::{Device, Tensor};

use crate::error::{CatError, Result, TorchContext};
use crate::ops::product::{plain, sum_of_products, transposed};
use crate::tensor::{check_float, check_shape, dtype_name};

const OP: &str = "frozen_conv2d";

/// The frozen layer: W [out, in, kh, kw], b [out], and its geometry as (height, width).
#[derive(Debug)]
pub struct Convolution {
    /// W
    pub weight: Tensor,
    /// b
    pub bias: Option<Tensor>,
    /// Step between positions.
    pub stride: [i64; 2],
    /// Zeros around the picture.
    pub padding: [i64; 2],
    /// Step between the kernel's elements.
    pub dilation: [i64; 2],
}

impl Convolution {
    /// Checks weight and geometry; [out, in, kh, kw].
    fn weight_shape(&self) -> Result<[i64; 4]> {
        let shape = self.weight.size();
        let expected = || CatError::shape(OP, "weight", "[out, in, kh, kw] with no empty dimension", &shape);
        let &[out, inner, height, width] = shape.as_slice() else { return Err(expected()) };
        if shape.contains(&0) {
            return Err(expected());
        }
        for (name, values, least) in
            [("stride", self.stride, 1), ("padding", self.padding, 0), ("dilation", self.dilation, 1)]
        {
            if values.iter().any(|&value| value < least) {
                return Err(CatError::value(OP, name, format!("two integers >= {least}"), format!("{values:?}")));
            }
        }
        Ok([out, inner, height, width])
    }

    /// The output's height and width for an input of that size.
    fn output_size(&self, size: [i64; 2], kernel: [i64; 2]) -> Result<[i64; 2]> {
        let along = |axis: usize| {
            let reach = self.dilation[axis].checked_mul(kernel[axis].checked_sub(1)?)?.checked_add(1)?;
            let padded = size[axis].checked_add(self.padding[axis].checked_mul(2)?)?;
            padded.checked_sub(reach)?.div_euclid(self.stride[axis]).checked_add(1)
        };
        let too_large = || {
            let got = format!("{:?} beside a dilation of {:?}", self.padding, self.dilation);
            CatError::value(OP, "padding", "small enough for sizes below 2^63", got)
        };
        Ok([along(0).ok_or_else(too_large)?, along(1).ok_or_else(too_large)?])
    }

    fn check_dtype(&self, argument: &'static str, tensor: &Tensor) -> Result<()> {
        let kind = check_float(OP, argument, tensor, Device::Cpu)?;
        for (name, own) in [("weight", Some(&self.weight)), ("bias", self.bias.as_ref())] {
            let Some(own) = own else { continue };
            let got = check_float(OP, name, own, Device::Cpu)?;
            if got != kind {
                let got = format!("{} beside {argument} of {}", dtype_name(got), dtype_name(kind));
                return Err(CatError::Dtype { op: OP, argument: name, expected: "the dtype of the input", got });
            }
        }
        Ok(())
    }

    /// W as [out, in * kh * kw].
    fn matrix(&self, out: i64) -> Result<Tensor> {
        self.weight.f_reshape([out, -1]).during(OP)
    }

    /// y [B, out, H', W'] of x [B, in, H, W].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.check_dtype("x", x)?;
        let [out, inner, kernel_height, kernel_width] = self.weight_shape()?;
        if let Some(bias) = &self.bias {
            check_shape(OP, "bias", bias, &[out])?;
        }
        let kernel = [kernel_height, kernel_width];
        let size = x.size();
        let expected = || CatError::shape(OP, "x", format!("[B, {inner}, H, W] with room for the kernel"), &size);
        let &[batch, channels, height, width] = size.as_slice() else { return Err(expected()) };
        let [rows, columns] = self.output_size([height, width], kernel)?;
        if channels != inner || batch < 1 || rows < 1 || columns < 1 {
            return Err(expected());
        }
        let patches = x.f_im2col(kernel, self.dilation, self.padding, self.stride).during(OP)?;
        let patches = patches.f_transpose(1, 2).during(OP)?.f_reshape([batch * rows * columns, -1]).during(OP)?;
        let weight = self.matrix(out)?;
        let y = sum_of_products(OP, &[(plain(&patches), transposed(&weight))], 1.0, self.bias.as_ref())?;
        let y = y.f_view([batch, rows * columns, out]).during(OP)?.f_transpose(1, 2).during(OP)?;
        y.f_reshape([batch, out, rows, columns]).during(OP)
    }

    /// dL/dx [B, in, H, W] from dL/dy, for an input of that height and width.
    pub fn backward(&self, grad: &Tensor, size: [i64; 2]) -> Result<Tensor> {
        self.check_dtype("grad", grad)?;
        let [out, _, kernel_height, kernel_width] = self.weight_shape()?;
        let kernel = [kernel_height, kernel_width];
        if size.iter().any(|&length| length < 1) {
            return Err(CatError::value(OP, "size", "two integers >= 1", format!("{size:?}")));
        }
        let [rows, columns] = self.output_size(size, kernel)?;
        let batch = grad.size().first().copied().unwrap_or(0).max(1);
        check_shape(OP, "grad", grad, &[batch, out, rows, columns])?;
        let grad = grad.f_reshape([batch, out, -1]).during(OP)?.f_transpose(1, 2).during(OP)?;
        let (grad, weight) = (grad.f_reshape([-1, out]).during(OP)?, self.matrix(out)?);
        let patches = sum_of_products(OP, &[(plain(&grad), plain(&weight))], 1.0, None)?;
        let patches = patches.f_view([batch, rows * columns, -1]).during(OP)?.f_transpose(1, 2).during(OP)?;
        patches.f_col2im(size, kernel, self.dilation, self.padding, self.stride).during(OP)
    }
}
