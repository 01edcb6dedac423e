//! The up projection of a LoRA branch, added onto a layer's output in place: y += scaling B h.
//!
//! For layers whose down projection stays its own call, as a convolution's or one behind dropout. Scaling is applied
//! to the narrow h, and the product accumulates into y, where the plain recipe writes and reads three tensors as large
//! as y. Channels are the last dimension of y for linear layers and the second for convolutions.

use tch::Tensor;

use crate::error::{CatError, Result, TorchContext};
use crate::ops::product::{add_product, may_run_by_kernel, plain, sum_of_products, transposed};
use crate::tensor::{check_float, check_shape, device_of, dtype_name};

const OP: &str = "lora_up";

/// The branch's trained matrix and its geometry.
#[derive(Debug)]
pub struct UpProjection {
    /// B [out, r]
    pub lora_b: Tensor,
    /// lora_alpha / r, or lora_alpha / sqrt(r)
    pub scaling: f64,
    /// Whether channels are the second dimension, as in convolutions, or the last.
    pub channels_second: bool,
}

impl UpProjection {
    /// Adds scaling B h onto y.
    pub fn add_to(&self, y: &mut Tensor, hidden: &Tensor) -> Result<()> {
        self.check("y", y, hidden)?;
        if y.f_is_inference().during(OP)? {
            let got = "an inference tensor (call .clone())".into();
            return Err(CatError::Layout { op: OP, argument: "y", expected: "a tensor that may be written", got });
        }
        if let Some(mut rows) = self.rows(y)? {
            return add_product(OP, &mut rows, plain(&self.as_rows(hidden)?), transposed(&self.lora_b), self.scaling);
        }
        let planes = self.as_planes(hidden)?;
        let mut y = y.f_view(self.plane_shape(y).as_slice()).during(OP)?;
        if one_by_one(&planes) {
            for index in 0..planes.size()[0] {
                let (mut y, plane) = (y.f_select(0, index).during(OP)?, planes.f_select(0, index).during(OP)?);
                add_product(OP, &mut y, plain(&self.lora_b), plain(&plane), self.scaling)?;
            }
            return Ok(());
        }
        let lora_b = self.lora_b.f_unsqueeze(0).during(OP)?.f_expand([planes.size()[0], -1, -1], false);
        let planes = if self.scaling == 1.0 { planes } else { planes.f_mul_scalar(self.scaling).during(OP)? };
        y.f_baddbmm_(&lora_b.during(OP)?, &planes).map(drop).during(OP)
    }

    /// dL/dh and dL/dB, each where wanted, from dL/dy and h.
    pub fn backward(&self, grad: &Tensor, hidden: &Tensor, wanted: [bool; 2]) -> Result<[Option<Tensor>; 2]> {
        self.check("grad", grad, hidden)?;
        if !self.channels_second || is_channels_last(grad) {
            let rows = self.as_rows(grad)?;
            let dh = wanted[0].then(|| self.rows_gradient(&rows, hidden)).transpose()?;
            let hidden = self.as_rows(hidden)?;
            let db = || sum_of_products(OP, &[(transposed(&rows), plain(&hidden))], self.scaling, None);
            return Ok([dh, wanted[1].then(db).transpose()?]);
        }
        let planes = self.as_planes(grad)?;
        let dh = wanted[0].then(|| self.planes_gradient(&planes, hidden)).transpose()?;
        let db = wanted[1].then(|| self.matrix_gradient(&planes, &self.as_planes(hidden)?)).transpose()?;
        Ok([dh, db])
    }

    fn rows_gradient(&self, rows: &Tensor, hidden: &Tensor) -> Result<Tensor> {
        let dh = sum_of_products(OP, &[(plain(rows), plain(&self.lora_b))], self.scaling, None)?;
        let shape = hidden.size();
        if !self.channels_second {
            return dh.f_view(shape.as_slice()).during(OP);
        }
        // [B, H, W, r] in memory, as h's own channels_last layout.
        let mut last: Vec<i64> = vec![shape[0]];
        last.extend(&shape[2..]);
        last.push(shape[1]);
        dh.f_view(last.as_slice()).during(OP)?.f_movedim_int(-1, 1).during(OP)
    }

    fn planes_gradient(&self, planes: &Tensor, hidden: &Tensor) -> Result<Tensor> {
        let of_plane =
            |plane: Tensor| sum_of_products(OP, &[(transposed(&self.lora_b), plain(&plane))], self.scaling, None);
        let dh = match planes.size()[0] {
            1 => of_plane(planes.f_squeeze_dim(0).during(OP)?)?,
            _ if one_by_one(planes) => {
                let all: Result<Vec<_>> = each(planes)?.into_iter().map(of_plane).collect();
                Tensor::f_stack(&all?, 0).during(OP)?
            }
            _ => self.scaled(self.lora_b.f_tr().and_then(|lora_b| lora_b.f_matmul(planes)).during(OP)?)?,
        };
        dh.f_view(hidden.size().as_slice()).during(OP)
    }

    fn matrix_gradient(&self, planes: &Tensor, hidden: &Tensor) -> Result<Tensor> {
        if one_by_one(planes) {
            let (planes, hidden) = (each(planes)?, each(hidden)?);
            let terms: Vec<_> = planes.iter().zip(&hidden).map(|(grad, h)| (plain(grad), transposed(h))).collect();
            return sum_of_products(OP, &terms, self.scaling, None);
        }
        let product = || planes.f_bmm(&hidden.f_transpose(1, 2)?)?.f_sum_dim_intlist([0i64].as_slice(), false, None);
        self.scaled(product().during(OP)?)
    }

    fn scaled(&self, mut tensor: Tensor) -> Result<Tensor> {
        if self.scaling != 1.0 {
            let _ = tensor.f_mul_scalar_(self.scaling).during(OP)?;
        }
        Ok(tensor)
    }

    /// Checks the layer's output or its gradient, which have one shape, and the rest beside it.
    fn check(&self, name: &'static str, y: &Tensor, hidden: &Tensor) -> Result<()> {
        let on = device_of(OP, name, y)?;
        let kind = check_float(OP, name, y, on)?;
        for (argument, tensor) in [("hidden", hidden), ("lora_B", &self.lora_b)] {
            let got = check_float(OP, argument, tensor, on)?;
            if got != kind {
                let got = format!("{} beside {name} of {}", dtype_name(got), dtype_name(kind));
                let expected = if name == "y" { "the dtype of `y`" } else { "the dtype of `grad`" };
                return Err(CatError::Dtype { op: OP, argument, expected, got });
            }
        }
        let shape = y.size();
        let least = if self.channels_second { 2 } else { 1 };
        if shape.len() < least {
            let expected = if self.channels_second { "[B, out, ...]" } else { "[..., out]" };
            return Err(CatError::shape(OP, name, expected, &shape));
        }
        let channel = if self.channels_second { 1 } else { shape.len() - 1 };
        let lora_b = self.lora_b.size();
        let &[_, rank] = lora_b.as_slice() else {
            return Err(CatError::shape(OP, "lora_B", "[out, r]", &lora_b));
        };
        check_shape(OP, "lora_B", &self.lora_b, &[shape[channel], rank])?;
        let mut expected = shape;
        expected[channel] = rank;
        check_shape(OP, "hidden", hidden, &expected)?;
        if !self.scaling.is_finite() {
            return Err(CatError::value(OP, "scaling", "a finite number", self.scaling));
        }
        Ok(())
    }

    /// y as [M, out] over the same memory, where its layout has the channels innermost.
    fn rows(&self, y: &Tensor) -> Result<Option<Tensor>> {
        if self.channels_second && !is_channels_last(y) {
            if !y.is_contiguous() {
                return Err(layout_error());
            }
            return Ok(None);
        }
        if !self.channels_second && !y.is_contiguous() {
            return Err(layout_error());
        }
        let moved = if self.channels_second { y.f_movedim_int(1, -1).during(OP)? } else { y.shallow_clone() };
        let shape = moved.size();
        let (rows, out) = (shape[..shape.len() - 1].iter().product::<i64>(), self.lora_b.size()[0]);
        moved.f_view([rows, out]).during(OP).map(Some)
    }

    /// [..., c] or [B, c, ...] as [M, c]: a view where the strides allow it.
    fn as_rows(&self, tensor: &Tensor) -> Result<Tensor> {
        let moved = if self.channels_second { tensor.f_movedim_int(1, -1) } else { Ok(tensor.shallow_clone()) };
        let moved = moved.during(OP)?;
        let shape = moved.size();
        let (channels, rows) = (shape[shape.len() - 1], shape[..shape.len() - 1].iter().product::<i64>());
        moved.f_reshape([rows, channels]).during(OP)
    }

    /// [B, c, ...] as [B, c, n]: a view where the strides allow it.
    fn as_planes(&self, tensor: &Tensor) -> Result<Tensor> {
        tensor.f_reshape(self.plane_shape(tensor).as_slice()).during(OP)
    }

    fn plane_shape(&self, tensor: &Tensor) -> [i64; 3] {
        let shape = tensor.size();
        [shape[0], shape[1], shape[2..].iter().product()]
    }
}

/// Whether the products of a batch [B, c, n] are taken one by one: a batch of one, and where the kernel takes them. The
/// library's product of batches is slower for a batch of one.
fn one_by_one(planes: &Tensor) -> bool {
    match planes.size()[0] {
        0 => false,
        1 => true,
        _ => may_run_by_kernel(planes),
    }
}

/// The matrices of a batch.
fn each(planes: &Tensor) -> Result<Vec<Tensor>> {
    (0..planes.size()[0]).map(|index| planes.f_select(0, index)).collect::<tch::Result<_>>().during(OP)
}

/// Whether a [B, C, ...] tensor has its channels innermost in dense memory, and not also the usual order.
fn is_channels_last(tensor: &Tensor) -> bool {
    if tensor.is_contiguous() {
        return false;
    }
    let (shape, strides) = (tensor.size(), tensor.stride());
    let mut order: Vec<usize> = vec![1];
    order.extend((2..shape.len()).rev());
    order.push(0);
    let mut step = 1;
    order.iter().all(|&axis| {
        let dense = shape[axis] == 1 || strides[axis] == step;
        step *= shape[axis];
        dense
    })
}

fn layout_error() -> CatError {
    let got = "one with other strides".into();
    CatError::Layout { op: OP, argument: "y", expected: "a contiguous or channels_last tensor", got }
}
