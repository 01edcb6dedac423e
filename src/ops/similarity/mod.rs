//! Similarities of embeddings: what the Knowledge Preservation Score is made of.

mod cpu;
mod cuda;

use tch::{Device, Kind, Tensor};

use self::cpu::Rows;
pub use self::cuda::variant;
use self::cuda::Similarities;
use super::{compute_kind, threads};
use crate::cuda::Stream;
use crate::error::{CatError, Result, TorchContext};
use crate::tensor::{check_float, contiguous, device_of, from_values, numbers, strided_elements};

const OP: &str = "similarity";

/// What becomes of the similarities of a row of `a` with all rows of `b`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduce {
    /// Their mean.
    Mean,
    /// Their maximum.
    Max,
}

impl Reduce {
    /// From "mean" or "max".
    pub fn parse(name: &str) -> Result<Self> {
        match name {
            "mean" => Ok(Self::Mean),
            "max" => Ok(Self::Max),
            _ => Err(CatError::value(OP, "reduce", "'mean' or 'max'", format!("'{name}'"))),
        }
    }
}

/// s(a_i, b_i) = (1 + cos(a_i, b_i)) / 2 in [0, 1]; a, b: [N, D]; returns [N].
///
/// Sums accumulate in f32 lanes and f64 totals; the result is float32, or float64 where an input is. On a GPU, of which
/// `stream` is a raw stream, the call waits for the values, to see whether a row has no direction.
pub fn similarity(a: &Tensor, b: &Tensor, stream: u64) -> Result<Tensor> {
    let on = device_of(OP, "a", a)?;
    let (a_shape, _) = (check_rows("a", a, on)?, check_rows("b", b, on)?);
    if b.size() != a_shape {
        return Err(CatError::shape(OP, "b", format!("{a_shape:?}"), &b.size()));
    }
    if let Device::Cuda(gpu) = on {
        return on_gpu(a, b, &Stream::new(OP, gpu, stream)?, on, |kernels, a, b| kernels.paired(a, b));
    }
    with_rows(a, b, |kind, a, b| match kind {
        Kind::Double => cpu::paired::<f64>(OP, threads(), a, b),
        _ => cpu::paired::<f32>(OP, threads(), a, b),
    })
}

/// The mean or maximum over j of s(a_i, b_j); a: [N, D], b: [M, D]; returns [N], as [`similarity`]. No N x M matrix is
/// formed.
pub fn cross_similarity(a: &Tensor, b: &Tensor, reduce: Reduce, stream: u64) -> Result<Tensor> {
    let on = device_of(OP, "a", a)?;
    let (a_shape, b_shape) = (check_rows("a", a, on)?, check_rows("b", b, on)?);
    if a_shape[1] != b_shape[1] {
        return Err(CatError::shape(OP, "b", format!("[M, {}]", a_shape[1]), &b_shape));
    }
    if let Device::Cuda(gpu) = on {
        return on_gpu(a, b, &Stream::new(OP, gpu, stream)?, on, |kernels, a, b| kernels.cross(a, b, reduce));
    }
    with_rows(a, b, |kind, a, b| match (kind, reduce) {
        (Kind::Double, Reduce::Mean) => cpu::cross_mean::<f64>(OP, threads(), a, b),
        (Kind::Double, Reduce::Max) => cpu::cross_max::<f64>(OP, threads(), a, b),
        (_, Reduce::Mean) => cpu::cross_mean::<f32>(OP, threads(), a, b),
        (_, Reduce::Max) => cpu::cross_max::<f32>(OP, threads(), a, b),
    })
}

fn check_rows(argument: &'static str, tensor: &Tensor, on: Device) -> Result<Vec<i64>> {
    check_float(OP, argument, tensor, on)?;
    let shape = tensor.size();
    if shape.len() != 2 || shape.contains(&0) {
        return Err(CatError::shape(OP, argument, "[N, D] with N, D >= 1", &shape));
    }
    Ok(shape)
}

fn rows<'t>(argument: &'static str, tensor: &'t Tensor) -> Result<Rows<'t>> {
    let (count, dim) = tensor.size2().during(OP)?;
    let (row_stride, stride) = tensor.stride2().during(OP)?;
    Ok(Rows {
        argument,
        elements: strided_elements(OP, tensor)?,
        count: count as usize,
        dim: dim as usize,
        strides: (row_stride as usize, stride as usize),
    })
}

fn with_rows(a: &Tensor, b: &Tensor, kernel: impl Fn(Kind, Rows, Rows) -> Result<Vec<f64>>) -> Result<Tensor> {
    let kind = compute_kind(&[a.f_kind().during(OP)?, b.f_kind().during(OP)?]);
    let (a_rows, b_rows) = (rows("a", a)?, rows("b", b)?);
    let mut values = kernel(kind, a_rows, b_rows)?;
    if values.iter().any(|value| value.is_nan()) {
        for rows in [a_rows, b_rows] {
            check_directions(rows.argument, &cpu::norms::<f64>(OP, threads(), rows)?)?;
        }
        // Sound rows whose squares leave the range of f32.
        values = kernel(Kind::Double, a_rows, b_rows)?;
    }
    from_values(OP, &values)?.f_to_kind(kind).during(OP)
}

/// As `with_rows`, on a GPU.
fn on_gpu(
    a: &Tensor,
    b: &Tensor,
    stream: &Stream,
    on: Device,
    kernel: impl Fn(&Similarities, &Tensor, &Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let kind = compute_kind(&[a.f_kind().during(OP)?, b.f_kind().during(OP)?]);
    let (a, b) = (contiguous(OP, a)?, contiguous(OP, b)?);
    let mut values = kernel(&Similarities { stream, on, kind }, &a, &b)?;
    let any_nan = values.f_isnan().and_then(|nan| nan.f_any()).and_then(|any| any.f_int64_value(&[])).during(OP)?;
    if any_nan != 0 {
        let kernels = Similarities { stream, on, kind: Kind::Double };
        for (argument, rows) in [("a", &a), ("b", &b)] {
            let norms = kernels.norms(rows)?.f_to_device(Device::Cpu).during(OP)?;
            check_directions(argument, &numbers(OP, &norms)?)?;
        }
        values = kernel(&kernels, &a, &b)?;
    }
    values.f_to_kind(kind).during(OP)
}

/// Refuses rows whose norm says that they have no direction.
fn check_directions(argument: &'static str, norms: &[f64]) -> Result<()> {
    match norms.iter().position(|norm| !(*norm > 0.0 && norm.is_finite())) {
        Some(row) => {
            let got = format!("row {row}, which is zero, infinite or NaN");
            Err(CatError::value(OP, argument, "finite with no zero row", got))
        }
        None => Ok(()),
    }
}
