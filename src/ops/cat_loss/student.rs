//! The loss of a training step over the doubled batch, with its gradient.

use tch::Tensor;

use super::{cat_loss_into, CatLoss, Factor, LossValues, Pair};
use crate::error::{CatError, Result, TorchContext};
use crate::tensor::{check_float, device_of};

const OP: &str = "CatStep";

/// What the loss of a step is made of: tensors on the CPU or on one GPU.
#[derive(Debug)]
pub struct StudentLoss {
    /// f(z_t, t, [c, c0]), [2B, ...]: first half with the trigger; [B, ...] where there is no base prediction.
    pub student: Tensor,
    /// y, [B, ...].
    pub target: Tensor,
    /// f_base(z_t, t, c0), [B, ...]; `None` trains without preservation.
    pub base: Option<Tensor>,
    /// w_i, [B].
    pub sample_weight: Option<Tensor>,
    /// m
    pub mask: Option<Tensor>,
    /// The raw handle of the GPU's stream.
    pub stream: u64,
}

impl StudentLoss {
    /// The loss and `scale` dL/dstudent, both halves written in place into one tensor; `scale` is
    /// 1 / accumulated micro-steps.
    pub fn evaluate(&self, cat_factor: Factor, scale: Factor) -> Result<(LossValues, Tensor)> {
        let on = device_of(OP, "student", &self.student)?;
        let kind = check_float(OP, "student", &self.student, on)?;
        let rows = *self.student.size().first().unwrap_or(&0);
        let halves = if self.base.is_some() { 2 } else { 1 };
        if rows == 0 || rows % halves != 0 {
            let expected = format!("[{halves} * B, ...] with B >= 1");
            return Err(CatError::shape(OP, "student", expected, &self.student.size()));
        }
        let batch = rows / halves;
        let grad = Tensor::f_empty(self.student.size(), (kind, on)).during(OP)?;
        let half = |tensor: &Tensor, index| tensor.f_narrow(0, index * batch, batch).during(OP);

        let mut first_grad = half(&grad, 0)?;
        let mut second_grad = self.base.is_some().then(|| half(&grad, 1)).transpose()?;
        let pred = half(&self.student, 0)?;
        let pred_no_trigger = self.base.is_some().then(|| half(&self.student, 1)).transpose()?;
        let preservation =
            pred_no_trigger.as_ref().zip(self.base.as_ref()).map(|(pred, target)| Pair { pred, target });
        let loss = CatLoss {
            diffusion: Pair { pred: &pred, target: &self.target },
            preservation,
            cat_factor,
            scale,
            sample_weight: self.sample_weight.as_ref(),
            mask: self.mask.as_ref(),
            mask_normalize: false,
            stream: self.stream,
        };
        let values = cat_loss_into(&loss, [Some(&mut first_grad), second_grad.as_mut()])?;
        Ok((values, grad))
    }
}
