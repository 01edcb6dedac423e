//! The loss of a training step over the samples of both terms in one batch, with its gradient.

use tch::Tensor;

use super::{cat_loss_into, CatLoss, Factor, LossValues, Pair};
use crate::error::{CatError, Result, TorchContext};
use crate::tensor::{check_float, device_of};

const OP: &str = "CatStep";

/// What the loss of a step is made of: tensors on the CPU or on one GPU.
#[derive(Debug)]
pub struct StudentLoss {
    /// [f(z_t, t, c), f(z'_t, t', c0)], [B + P, ...]; [B, ...] where there is no base prediction.
    pub student: Tensor,
    /// y, [B, ...].
    pub target: Tensor,
    /// f_base(z'_t, t', c0), [P, ...]; `None` trains without preservation.
    pub base: Option<Tensor>,
    /// w, [B], and w', [P].
    pub weights: [Option<Tensor>; 2],
    /// m and m'
    pub masks: [Option<Tensor>; 2],
    /// The raw handle of the GPU's stream.
    pub stream: u64,
}

impl StudentLoss {
    /// The loss and `scale` dL/dstudent, of both parts written in place into one tensor; `scale` is
    /// 1 / accumulated micro-steps.
    pub fn evaluate(&self, cat_factor: Factor, scale: Factor) -> Result<(LossValues, Tensor)> {
        let on = device_of(OP, "student", &self.student)?;
        let kind = check_float(OP, "student", &self.student, on)?;
        check_float(OP, "target", &self.target, on)?;
        if let Some(base) = &self.base {
            check_float(OP, "base_pred", base, on)?;
        }
        let samples = |tensor: &Tensor| *tensor.size().first().unwrap_or(&0);
        let (batch, preserved) = (samples(&self.target), self.base.as_ref().map_or(0, samples));
        if samples(&self.student) != batch + preserved || batch == 0 || (self.base.is_some() && preserved == 0) {
            let expected = format!("[{batch} + {preserved}, ...] as target and base have, none of them empty");
            return Err(CatError::shape(OP, "student", expected, &self.student.size()));
        }
        let grad = Tensor::f_empty(self.student.size(), (kind, on)).during(OP)?;
        let parts = |tensor: &Tensor| -> Result<[Tensor; 2]> {
            let part = |start, len| tensor.f_narrow(0, start, len).during(OP);
            Ok([part(0, batch)?, part(batch, preserved)?])
        };
        let ([pred, pred_no_trigger], [mut first_grad, mut second_grad]) = (parts(&self.student)?, parts(&grad)?);
        let [sample_weight, preserve_weight] = self.weights.each_ref().map(Option::as_ref);
        let [mask, preserve_mask] = self.masks.each_ref().map(Option::as_ref);
        let loss = CatLoss {
            diffusion: Pair { pred: &pred, target: &self.target, sample_weight, mask },
            preservation: self.base.as_ref().map(|target| Pair {
                pred: &pred_no_trigger,
                target,
                sample_weight: preserve_weight,
                mask: preserve_mask,
            }),
            cat_factor,
            scale,
            mask_normalize: false,
            stream: self.stream,
        };
        let second_grad = self.base.is_some().then_some(&mut second_grad);
        let values = cat_loss_into(&loss, [Some(&mut first_grad), second_grad])?;
        Ok((values, grad))
    }
}
