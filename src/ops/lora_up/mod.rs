//! The up projection of a LoRA branch, added onto a layer's output in place: y += scaling B h.
//!
//! For layers whose down projection stays its own call, as a convolution's or one behind dropout. Scaling is applied
//! to the narrow h, and the product accumulates into y, where the plain recipe writes and reads three tensors as large
//! as y. Channels are the last dimension of y for linear layers and the second for convolutions.

use tch::Tensor;

use crate::error::{CatError, Result, TorchContext};
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
        self.check(y, hidden)?;
        let hidden =
            if self.scaling == 1.0 { hidden.shallow_clone() } else { hidden.f_mul_scalar(self.scaling).during(OP)? };
        if let Some(mut rows) = self.rows(y)? {
            let _ = rows.f_addmm_(&self.as_rows(&hidden)?, &self.lora_b.f_tr().during(OP)?).during(OP)?;
            return Ok(());
        }
        let planes = self.as_planes(&hidden)?;
        let mut y = y.f_view(self.plane_shape(y).as_slice()).during(OP)?;
        if let &[1, ..] = planes.size().as_slice() {
            // One matrix product: the library's product of batches is slower for a batch of one.
            let plane = planes.f_squeeze_dim(0).during(OP)?;
            let _ = y.f_squeeze_dim(0).during(OP)?.f_addmm_(&self.lora_b, &plane).during(OP)?;
        } else {
            let lora_b = self.lora_b.f_unsqueeze(0).during(OP)?.f_expand([planes.size()[0], -1, -1], false);
            let _ = y.f_baddbmm_(&lora_b.during(OP)?, &planes).during(OP)?;
        }
        Ok(())
    }

    /// dL/dh and dL/dB, each where wanted, from dL/dy and h.
    pub fn backward(&self, grad: &Tensor, hidden: &Tensor, wanted: [bool; 2]) -> Result<[Option<Tensor>; 2]> {
        self.check(grad, hidden)?;
        if !self.channels_second || is_channels_last(grad) {
            let rows = self.as_rows(grad)?;
            let dh = wanted[0].then(|| self.rows_gradient(&rows, hidden)).transpose()?;
            let hidden = self.as_rows(hidden)?;
            let db = wanted[1].then(|| rows.f_tr()?.f_mm(&hidden)).transpose().during(OP)?;
            return Ok([dh, db.map(|db| self.scaled(db)).transpose()?]);
        }
        let planes = self.as_planes(grad)?;
        let dh = wanted[0].then(|| self.planes_gradient(&planes, hidden)).transpose()?;
        let hidden = self.as_planes(hidden)?;
        if let &[1, ..] = planes.size().as_slice() {
            let product = || planes.f_squeeze_dim(0)?.f_mm(&hidden.f_squeeze_dim(0)?.f_tr()?);
            let db = wanted[1].then(product).transpose().during(OP)?;
            return Ok([dh, db.map(|db| self.scaled(db)).transpose()?]);
        }
        let product = || planes.f_bmm(&hidden.f_transpose(1, 2)?)?.f_sum_dim_intlist([0i64].as_slice(), false, None);
        let db = wanted[1].then(product).transpose().during(OP)?;
        Ok([dh, db.map(|db| self.scaled(db)).transpose()?])
    }

    fn rows_gradient(&self, rows: &Tensor, hidden: &Tensor) -> Result<Tensor> {
        let dh = self.scaled(rows.f_mm(&self.lora_b).during(OP)?)?;
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
        let lora_b = self.lora_b.f_tr().during(OP)?;
        let dh = match planes.size().as_slice() {
            &[1, ..] => planes.f_squeeze_dim(0).and_then(|plane| lora_b.f_mm(&plane)),
            _ => lora_b.f_matmul(planes),
        };
        let dh = self.scaled(dh.during(OP)?)?;
        dh.f_view(hidden.size().as_slice()).during(OP)
    }

    fn scaled(&self, mut tensor: Tensor) -> Result<Tensor> {
        if self.scaling != 1.0 {
            let _ = tensor.f_mul_scalar_(self.scaling).during(OP)?;
        }
        Ok(tensor)
    }

    fn check(&self, y: &Tensor, hidden: &Tensor) -> Result<()> {
        let on = device_of(OP, "y", y)?;
        let kind = check_float(OP, "y", y, on)?;
        for (argument, tensor) in [("hidden", hidden), ("lora_B", &self.lora_b)] {
            let got = check_float(OP, argument, tensor, on)?;
            if got != kind {
                let got = format!("{} beside y of {}", dtype_name(got), dtype_name(kind));
                return Err(CatError::Dtype { op: OP, argument, expected: "the dtype of `y`", got });
            }
        }
        let shape = y.size();
        let least = if self.channels_second { 2 } else { 1 };
        if shape.len() < least {
            let expected = if self.channels_second { "[B, out, ...]" } else { "[..., out]" };
            return Err(CatError::shape(OP, "y", expected, &shape));
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
        let out = self.lora_b.size()[0];
        moved.f_view([-1, out]).during(OP).map(Some)
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
