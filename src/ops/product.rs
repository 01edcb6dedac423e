//! Sums of matrix products of tensors: C = scale sum_i A_i B_i + b.

use tch::Tensor;

use crate::error::{Result, TorchContext};

/// A [rows, columns] matrix, or its transpose.
#[derive(Clone, Copy, Debug)]
pub struct Factor<'t> {
    tensor: &'t Tensor,
    transposed: bool,
}

/// The matrix itself.
pub fn plain(tensor: &Tensor) -> Factor<'_> {
    Factor { tensor, transposed: false }
}

/// The matrix's transpose.
pub fn transposed(tensor: &Tensor) -> Factor<'_> {
    Factor { tensor, transposed: true }
}

impl Factor<'_> {
    fn as_tensor(self) -> tch::Result<Tensor> {
        if self.transposed {
            self.tensor.f_tr()
        } else {
            Ok(self.tensor.shallow_clone())
        }
    }
}

/// C [m, n] of at least one term, with b [n] added to every row.
///
/// The kernel of `cpu::matmul` where it is faster, else libtorch's products, the later ones added in place.
pub fn sum_of_products(
    op: &'static str,
    terms: &[(Factor<'_>, Factor<'_>)],
    scale: f64,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    if let Some(sum) = by_kernel::sum(op, terms, scale, bias)? {
        return Ok(sum);
    }
    by_library(terms, scale, bias).during(op)
}

/// C += scale A B, in place; C [m, n] is contiguous.
pub fn add_product(op: &'static str, sum: &mut Tensor, a: Factor<'_>, b: Factor<'_>, scale: f64) -> Result<()> {
    if by_kernel::add(op, sum, (a, b), scale)? {
        return Ok(());
    }
    let mut add = || {
        let (a, b) = (a.as_tensor()?, b.as_tensor()?);
        let a = if scale == 1.0 { a } else { a.f_mul_scalar(scale)? };
        sum.f_addmm_(&a, &b)
    };
    add().map(drop).during(op)
}

/// Whether products of this tensor may run by the kernel of `cpu::matmul`.
pub fn may_run_by_kernel(tensor: &Tensor) -> bool {
    by_kernel::takes(tensor)
}

fn by_library(terms: &[(Factor<'_>, Factor<'_>)], scale: f64, bias: Option<&Tensor>) -> tch::Result<Tensor> {
    let mut sum: Option<Tensor> = None;
    for (a, b) in terms {
        let (a, right) = (a.as_tensor()?, b.as_tensor()?);
        match &mut sum {
            None if b.transposed && scale == 1.0 => sum = Some(a.f_linear(b.tensor, bias)?),
            None => {
                let mut product = match scale {
                    1.0 => a.f_mm(&right)?,
                    _ if a.device().is_cuda() => scaled_product(&a, &right, scale)?,
                    _ => a.f_mm(&right)?.f_mul_scalar_(scale)?,
                };
                if let Some(bias) = bias {
                    let _ = product.f_add_(bias)?;
                }
                sum = Some(product);
            }
            Some(sum) if scale == 1.0 => drop(sum.f_addmm_(&a, &right)?),
            Some(sum) => drop(sum.f_add_(&a.f_mm(&right)?.f_mul_scalar(scale)?)?),
        }
    }
    sum.ok_or_else(|| tch::TchError::Shape("a sum needs a term".into()))
}

/// scale A B in one call; on the CPU the library takes longer for it than for a product and its scaling.
fn scaled_product(a: &Tensor, b: &Tensor, scale: f64) -> tch::Result<Tensor> {
    // With beta = 0 the values of the first argument are not read.
    let ignored = Tensor::f_empty([1, 1, 1], (a.f_kind()?, a.device()))?;
    ignored.f_baddbmm(&a.f_unsqueeze(0)?, &b.f_unsqueeze(0)?, 0.0, scale)?.f_squeeze_dim(0)
}

#[cfg(target_arch = "x86_64")]
mod by_kernel {
    use tch::{Device, Kind, Tensor};

    use super::Factor;
    use crate::cpu::matmul::{beats_library, matmul, Matrix, Onto};
    use crate::cpu::Elements;
    use crate::error::{CatError, Result, TorchContext};
    use crate::ops::threads;
    use crate::tensor::{elements, elements_mut, is_on_cpu};

    /// Below this many multiplications the library's lower cost of a call decides.
    const FEWEST: i64 = 1 << 16;
    /// With fewer rows or columns, reading the other matrix is what takes the time.
    const NARROWEST: i64 = 4;

    type Term<'t> = (Factor<'t>, Factor<'t>);

    pub fn takes(tensor: &Tensor) -> bool {
        is_on_cpu(tensor) && tensor.f_kind().is_ok_and(|kind| kind == Kind::Float) && beats_library()
    }

    pub fn sum(op: &'static str, terms: &[Term<'_>], scale: f64, bias: Option<&Tensor>) -> Result<Option<Tensor>> {
        let Some([rows, columns]) = worth_it(terms) else { return Ok(None) };
        let fits = bias.is_none_or(|bias| takes(bias) && bias.is_contiguous());
        let Some(terms) = fits.then(|| all_dense(terms)).flatten() else { return Ok(None) };
        let onto = bias.map(|bias| values(op, bias)).transpose()?.map_or(Onto::Nothing, Onto::Bias);
        let mut out = Tensor::f_empty([rows, columns], (Kind::Float, Device::Cpu)).during(op)?;
        multiply(op, &mut out, &terms, scale, onto)?;
        Ok(Some(out))
    }

    /// Whether it was done.
    pub fn add(op: &'static str, sum: &mut Tensor, term: Term<'_>, scale: f64) -> Result<bool> {
        let fits = worth_it(&[term]).is_some() && takes(sum) && sum.is_contiguous();
        let Some(terms) = fits.then(|| all_dense(&[term])).flatten() else { return Ok(false) };
        multiply(op, sum, &terms, scale, Onto::Itself)?;
        Ok(true)
    }

    /// Rows and columns of the sum, where the kernel is faster.
    fn worth_it(terms: &[Term<'_>]) -> Option<[i64; 2]> {
        let (first, last) = terms.first()?;
        let ([rows, inner], [_, columns]) = (shape(*first)?, shape(*last)?);
        let worth_it = rows.min(columns) >= NARROWEST && rows * inner * columns >= FEWEST;
        (worth_it && terms.iter().all(|(a, b)| takes(a.tensor) && takes(b.tensor))).then_some([rows, columns])
    }

    type Dense = (Tensor, bool);

    fn all_dense(terms: &[Term<'_>]) -> Option<Vec<(Dense, Dense)>> {
        terms.iter().map(|(a, b)| Some((dense(*a)?, dense(*b)?))).collect()
    }

    fn multiply(
        op: &'static str,
        out: &mut Tensor,
        terms: &[(Dense, Dense)],
        scale: f64,
        onto: Onto<'_>,
    ) -> Result<()> {
        let terms: Result<Vec<_>> = terms.iter().map(|(a, b)| Ok((matrix(op, a)?, matrix(op, b)?))).collect();
        let sums = elements_mut(op, out)?.typed::<f32>();
        let sums = sums.ok_or_else(|| CatError::torch_message(op, "the output changed its dtype"))?;
        // SAFETY: the only use of the output.
        let sums = unsafe { sums.range(0, sums.len()) };
        matmul(op, threads(), sums, &terms?, scale as f32, onto)
    }

    /// The factor over a contiguous tensor, itself or its transpose; `None` for other strides.
    fn dense(factor: Factor<'_>) -> Option<Dense> {
        if factor.tensor.is_contiguous() {
            return Some((factor.tensor.shallow_clone(), factor.transposed));
        }
        let transposed = factor.tensor.f_tr().ok()?;
        transposed.is_contiguous().then_some((transposed, !factor.transposed))
    }

    fn matrix<'t>(op: &'static str, (tensor, transposed): &'t Dense) -> Result<Matrix<'t>> {
        let &[rows, columns] = tensor.size().as_slice() else {
            return Err(CatError::shape(op, "a factor", "[rows, columns]", &tensor.size()));
        };
        let matrix = Matrix::new(values(op, tensor)?, rows as usize, columns as usize);
        Ok(if *transposed { matrix.transposed() } else { matrix })
    }

    fn values<'t>(op: &'static str, tensor: &'t Tensor) -> Result<&'t [f32]> {
        match elements(op, tensor)? {
            Elements::F32(values) => Ok(values),
            _ => Err(CatError::torch_message(op, "a factor changed its dtype")),
        }
    }

    fn shape(factor: Factor<'_>) -> Option<[i64; 2]> {
        let &[rows, columns] = factor.tensor.size().as_slice() else { return None };
        Some(if factor.transposed { [columns, rows] } else { [rows, columns] })
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod by_kernel {
    use tch::Tensor;

    use super::Factor;
    use crate::error::Result;

    type Term<'t> = (Factor<'t>, Factor<'t>);

    pub fn takes(_: &Tensor) -> bool {
        false
    }

    pub fn sum(_: &'static str, _: &[Term<'_>], _: f64, _: Option<&Tensor>) -> Result<Option<Tensor>> {
        Ok(None)
    }

    pub fn add(_: &'static str, _: &mut Tensor, _: Term<'_>, _: f64) -> Result<bool> {
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::scaled_product;

    #[test]
    fn a_scaled_product_reads_nothing_but_its_factors() {
        for (rows, inner, columns) in [(1, 1, 1), (7, 33, 5), (0, 4, 3), (3, 0, 2)] {
            let a = Tensor::randn([rows, inner], (Kind::Double, Device::Cpu));
            let b = Tensor::randn([columns, inner], (Kind::Double, Device::Cpu)).tr();
            let expected = a.mm(&b) * 0.5;
            assert!(scaled_product(&a, &b, 0.5).unwrap().allclose(&expected, 1e-12, 1e-12, false));
        }
    }
}
