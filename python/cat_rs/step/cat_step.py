"""The CAT training step: base prediction, doubled student batch, fused loss, flat AdamW."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from cat_rs.arguments import check, refusing
from cat_rs.errors import AdapterError, InvalidValueError
from cat_rs.ops.cat_loss import student_loss
from cat_rs.ops.noising import noising
from cat_rs.step import collectives, device_values, inputs
from cat_rs.step.accumulation import Accumulation
from cat_rs.step.adapters import Adapters
from cat_rs.step.captured_step import CapturedStep
from cat_rs.step.cat_factor import CatFactor, TermFollower, check_cat_factor, factor_after
from cat_rs.step.conditions import Cond, evaluate_conditions, join_conditions
from cat_rs.step.denoiser import Predict, convention_of, denoiser_predict, predicted
from cat_rs.step.device_values import DeviceValues
from cat_rs.step.inputs import PreservationSamples, StepInputs
from cat_rs.step.noise_schedule import NoiseSchedule
from cat_rs.step.preservation import NO_PRESERVATION, Preservation, consistency_loss, find_preservation

if TYPE_CHECKING:
    from cat_rs.step.teacher_bank import TeacherBank

__all__ = ["CatStep", "StepMetrics"]


class StepMetrics(NamedTuple):
    """What a step measured, 0-dim tensors.

    Attributes:
        loss: diffusion + preserve_every * cat_factor * cat; diffusion alone in a step without a preservation term.
            With preservation "dco", its loss.
        diffusion: The diffusion term.
        cat: The preservation term, without its factor; 0 with cat_factor 0, and NaN, as nothing measures it, in the
            steps that ``preserve_every`` leaves without one. With "dco", by how much the diffusion term exceeds the
            base model's.
        grad_norm: The gradient's L2 norm before clipping; NaN on a step that only accumulates.
        cat_factor: The weight of the preservation term, a mean over the steps: without ``preserve_every``.
    """

    loss: torch.Tensor
    diffusion: torch.Tensor
    cat: torch.Tensor
    grad_norm: torch.Tensor
    cat_factor: torch.Tensor


class CatStep:
    """One training step of Contrastive Adapter Training (arXiv 2404.07554).

    A step draws noise and timesteps, writes noisy latents and target in one pass, predicts with the base model
    (the same modules with the adapter off) and, in one call at batch 2B, with the adapted model for the prompts with
    and without the trigger, evaluates the loss and its gradient in one pass, runs the model's backward and one
    :class:`FlatAdamW` step. Given noise and timesteps, the adapter equals that of the plain recipe (two model calls,
    ``F.mse_loss``, ``clip_grad_norm_``, ``AdamW``) up to float32 rounding.

    The model's PEFT LoRA layers get the fused forward of :func:`cat_rs.patch_peft`, its large frozen convolutions run
    as matrix products where the picture is small, and its trainable parameters become views of a flat buffer; names
    and state dict stay. A float32 adapter over a model in bfloat16 or float16 computes in the model's dtype, on copies
    of its weights that the optimizer writes; a weight that anything else writes to is rounded again in every call.

    Args:
        model: A diffusers denoiser with a PEFT adapter (``model.add_adapter(LoraConfig(...))``), on the CPU or on one
            CUDA device. Parameters that require a gradient are trained.
        scheduler: The model's diffusers scheduler: one with ``alphas_cumprod`` or a flow-matching one.
        lr: The learning rate; it and the next four are those of :class:`FlatAdamW`.
        betas: Decay rates of the moments.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        max_grad_norm: The gradient is clipped to this L2 norm; None does not clip.
        cat_factor: Weight of the preservation term; 0 trains plain LoRA, at its cost. A number, a function of the
            number of finished optimizer steps such as :class:`cat_rs.CatFactorRamp`, or what follows the terms of the
            loss: :class:`cat_rs.CatFactorTarget`, :class:`cat_rs.CatFactorRatio`. May be set between steps.
        preserve_every: The preservation term is part of every ``preserve_every``-th optimizer step only, at
            ``preserve_every`` times its weight, so that its mean is the same (lazy regularization, as StyleGAN2 does
            it: arXiv 1912.04958, appendix B). The other steps cost what plain LoRA costs. With accumulation a term
            belongs to all calls of its step. The first term is in step number ``preserve_every``: a new adapter has
            nothing to preserve yet. See ``preserves_next``.
        preservation: What keeps the base model; docs/preserving.md has the formulas and says when to use which.
            "cat": the student's predictions for ``cond_no_trigger`` stay at the base model's. "prior": the student
            learns pictures that the base model drew, those of ``preserve`` (DreamBooth's prior preservation). "dco":
            the loss is that of Direct Consistency Optimization, with ``cat_factor`` as its beta; 1000 is usual. "l2":
            the squared norm of what the adapter adds to the weights. "layers": what the adapter would change in each
            layer, at the base model's activations. "dco" and "l2" look at neither ``cond_no_trigger`` nor
            ``preserve``.
        snr_gamma: Min-SNR weighting of both terms (arXiv 2303.09556); None for uniform weights.
        noise_offset: Adds this much of one more draw for each sample and channel to the noise that the step draws, so
            that brightness is learned too; for latents [B, C, H, W] or [B, C, F, H, W]. 0.05 to 0.1 is usual.
        prediction_type: "epsilon", "v_prediction" or "flow"; by default the scheduler's.
        accumulate: Calls per optimizer step; each contributes 1/accumulate of its gradient.
        predict: ``predict(model, latents, timesteps, cond) -> prediction`` for models that are not called like a
            diffusers denoiser; ``cond`` is a mapping. docs/families.md lists the models that need none.
        text_encoders: Modules with PEFT adapters that train with the model's; the base prediction runs with all of
            the adapters off. The conditions must then be functions that call the text encoders. In
            :meth:`state_dict` the names of their parameters begin with ``text_encoders[0].`` and so on.
        unbatched: Keys of conditioning tensors without a batch dimension. Needed only where the first dimension of
            such a tensor may equal B by chance: see ``cond``.
        grad_scaler: Scales the gradient for a model in float16 or float16 autocast (``torch.amp.GradScaler("cpu")``);
            without one, small errors, which the preservation term is made of, have no gradient in float16. The step
            unscales it, skips where it is not finite, and calls ``update()``. Saved with the state. The adapter must
            not be in float16, in which PyTorch unscales nothing.
        generator: Draws noise and timesteps, on the model's device; by default torch's global one. With a teacher bank
            it chooses among the stored draws, on the CPU. Saved with the state.
        teacher_bank: Stored draws of noise, timestep and base prediction, instead of fresh ones: the step then takes
            indices of the bank's pictures, and skips the base model's forward. The bank is on the CPU, whatever the
            model's device. Not with ``text_encoders`` or ``noise_offset``.
        process_group: The ranks that train this adapter together; by default all, if torch.distributed is
            initialized. A group of this rank alone trains alone.
        capture: On CUDA: records the step as a CUDA graph, which one launch replays. The first three steps with an
            input signature (shapes, dtypes, and the values of all that is not a tensor) run eagerly, the fourth is
            recorded; with ``preserve_every``, steps with and without the term are two. Not with ``text_encoders``.
            Where the model cannot be recorded, a RuntimeWarning says why and every step runs eagerly. See docs/gpu.md.
        max_captures: Largest number of input signatures that are recorded; one more is an error.

    On CUDA a step never waits for the device, and neither do its metrics until they are read. So values on the device
    are not checked: the range of timesteps, the signs of weights.

    Under torch.distributed every rank makes a step of its own model and calls it with its own data. When the step is
    made, all get rank 0's adapter; the gradients are averaged once in ``accumulate`` calls, by one all_reduce of the
    flat buffer before its norm is taken, so that the adapters stay the same bit for bit, and all ranks skip a step
    that is not finite on one. N ranks at batch B train as one process does at batch N B. ``loss``, ``diffusion`` and
    ``cat`` stay those of the rank's own data; ``grad_norm`` is of the average. A model in DistributedDataParallel, as
    ``accelerator.prepare`` returns it, is unwrapped: its own reduction does not run. Under FSDP shard only the frozen
    base.

    Seed each rank differently (``torch.manual_seed(seed + rank)``, ``accelerate.utils.set_seed(seed,
    device_specific=True)``, or ``generator``): ranks seeded alike draw the same noise and timesteps. For the same
    reason a resuming rank needs its own generator state; the rest of the state is the same on every rank as long as
    no gradient is accumulated.

    Attributes:
        optimizer: The :class:`FlatAdamW`; learning-rate schedulers attach to it.
        cat_factor: As above.
        steps_done: Finished optimizer steps.

    Raises:
        AdapterError, InvalidValueError, ShapeError, DtypeError, DeviceError: Naming what was expected and what came.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        scheduler: Any,
        *,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        max_grad_norm: float | None = 1.0,
        cat_factor: CatFactor = 1.0,
        preserve_every: int = 1,
        preservation: str = "cat",
        snr_gamma: float | None = None,
        noise_offset: float = 0.0,
        prediction_type: str | None = None,
        accumulate: int = 1,
        predict: Predict | None = None,
        text_encoders: Sequence[torch.nn.Module] = (),
        unbatched: Sequence[str] = (),
        grad_scaler: torch.amp.GradScaler | None = None,
        generator: torch.Generator | None = None,
        teacher_bank: TeacherBank | None = None,
        process_group: Any = None,
        capture: bool = False,
        max_captures: int = 4,
    ) -> None:
        check("CatStep", "predict", predict, "a function or None", lambda it: it is None or callable(it))
        check("CatStep", "unbatched", unbatched, "a sequence of keys", lambda keys: frozenset(keys) is not None)
        check("CatStep", "capture", capture, "True or False", lambda it: it in (True, False))
        self._adapters = Adapters(model, text_encoders)
        self.model, self.text_encoders = self._adapters.model, self._adapters.text_encoders
        self.trainable = self._adapters.parameters
        if grad_scaler is not None:
            self._adapters.check_no_float16()
        device = next(iter(self.trainable.values())).device
        device_values.warn_of_slow_bfloat16("CatStep", device, self.model.parameters())
        inputs.check_options(
            device, accumulate, preserve_every, noise_offset, generator, teacher_bank, self.text_encoders
        )
        self.preservation = preservation
        self._term = find_preservation(
            preservation,
            every=preserve_every,
            has_bank=teacher_bank is not None,
            trains_text=bool(self.text_encoders),
        )
        self.cat_factor, self.preserve_every = cat_factor, preserve_every
        self.snr_gamma, self.noise_offset = snr_gamma, noise_offset
        self.accumulate, self.grad_scaler, self.generator = accumulate, grad_scaler, generator
        self._schedule = NoiseSchedule(scheduler, prediction_type, device)
        self._schedule.check_snr_gamma(snr_gamma)
        self._teacher_bank = teacher_bank
        # On a GPU, for whose values a step would wait, in the first one alone.
        self._compares_conditions = True
        if teacher_bank is not None:
            teacher_bank.check_model(self.model, self._schedule)
        self._predict = predict or denoiser_predict(self.model)
        self._join_conditions = functools.partial(
            join_conditions, unbatched=frozenset(unbatched), convention=convention_of(self.model)
        )
        process_group = collectives.data_parallel_group(process_group)
        if process_group is not None:
            collectives.check_group("CatStep", process_group)
        self.optimizer = self._adapters.make_optimizer(
            lr, betas, eps, weight_decay, max_grad_norm=max_grad_norm, process_group=process_group
        )
        # What weighs the preservation term, and the factor of the gradient.
        self._factors = DeviceValues([0.0, 1.0], device)
        self._captured = None
        if capture:
            self._captured = CapturedStep(self.model, self.optimizer, device, max_captures, self.text_encoders)
        self.steps_done = 0
        self._accumulation = Accumulation()
        # The sum of [diffusion, cat] over the calls of the optimizer step, for a factor that follows them.
        self._terms: torch.Tensor | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Copies of the weights belong to the optimizer of the copied step.
        self.__dict__.update(state)
        self._adapters.use_copies_of(self.optimizer)

    @property
    def cat_factor(self) -> CatFactor:
        """Weight of the preservation term, or its schedule."""
        return self._cat_factor

    @cat_factor.setter
    def cat_factor(self, value: CatFactor) -> None:
        if isinstance(value, TermFollower) and not self._term.adds_up:
            kind = type(value).__name__
            raise InvalidValueError(
                f"CatStep: `cat_factor` must be a number or a function of the step with "
                f"preservation={self.preservation!r}, which has one term, got a {kind}"
            )
        self._cat_factor = value if callable(value) else check_cat_factor(value)

    @property
    def preserves_next(self) -> bool:
        """Whether the next call looks at ``cond_no_trigger`` and ``preserve``; if not, they need not be given."""
        factor = factor_after(self._cat_factor, self.steps_done)
        return self._term.looks_at_samples and self._is_in_turn() and _is_positive(factor)

    def _is_in_turn(self) -> bool:
        """Whether ``preserve_every`` puts a preservation term into the coming optimizer step."""
        return (self.steps_done + 1) % self.preserve_every == 0

    def __call__(
        self,
        latents: torch.Tensor,
        cond: Cond | Callable[[], Cond],
        cond_no_trigger: Cond | Callable[[], Cond] | None = None,
        *,
        noise: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        sample_weight: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        preserve: PreservationSamples | None = None,
        sync_gradients: bool | None = None,
    ) -> StepMetrics:
        """Runs one step; every ``accumulate``-th call updates the adapter.

        Args:
            latents: x, [B, ...], in the model's dtype, scaled as the model expects. With a teacher bank, indices of
                its pictures instead, [B] int64; noise and timesteps must not be given then.
            cond: The prompts with the trigger: ``encoder_hidden_states`` [B, L, D], or a nested mapping of the model's
                keyword arguments, or a function without arguments that returns either. A tensor whose first dimension
                is B is taken to have a batch dimension; every other value, tensors such as FLUX's ``img_ids`` [L, 3]
                included, must be the same in both conditions (on CUDA the same tensor) and is passed as it is.
            cond_no_trigger: The same prompts without the trigger, in the same form; or any other prompts whose
                pictures are to stay. With ``text_encoders``, the function is called twice: for the student, and under
                no_grad with all adapters off for the base. Not needed where ``preserves_next`` is False.
            noise: [B, ...]; drawn from the standard normal by default.
            timesteps: [B], on the latents' device; drawn uniformly from the schedule by default.
            sample_weight: w, [B], >= 0; multiplies the min-SNR weights.
            mask: m, of the latents' shape up to dimensions of size 1.
            preserve: Samples of the preservation term, [P, ...], with noise, timesteps, weights and mask of their own,
                to which ``cond_no_trigger`` then belongs; each term is a mean over its own samples. With their base
                predictions, the step skips the base model's forward. By default the concept's latents are preserved,
                as CAT does. Not with a teacher bank.
            sync_gradients: Whether this call updates the adapter, as ``accelerator.sync_gradients`` says inside
                ``accelerator.accumulate``, which also ends an accumulation with the dataloader; by default every
                ``accumulate``-th call does.

        Returns:
            The step's metrics. Where ``grad_norm`` is not finite, the adapter was left as it was.
        """
        update_due = self._accumulation.is_due(self.accumulate, sync_gradients)
        inputs.check_tensors("CatStep", sample_weight=sample_weight, mask=mask)
        inputs.check_preserve(preserve, self._teacher_bank)
        cat_factor, in_turn = factor_after(self._cat_factor, self.steps_done), self._is_in_turn()
        preserves = in_turn and _is_positive(cat_factor)
        looks_at_samples = preserves and self._term.looks_at_samples
        if not looks_at_samples:
            preserve = None
        elif preserve is None and self._term.base is None:
            # On the concept's own, the words without the trigger would learn the concept.
            raise InvalidValueError(
                f"CatStep: `preserve` must be PreservationSamples with preservation={self.preservation!r}, which "
                "learns their pictures, got None"
            )
        predicts_base = preserves and (preserve is None or preserve.base_pred is None)
        base = self._term.base if predicts_base else None
        conditions = evaluate_conditions(cond, cond_no_trigger, self._adapters, preserve=looks_at_samples, base=base)
        if self._teacher_bank is None:
            drawn = inputs.draw(latents, noise, timesteps, self._schedule, self.noise_offset, self.generator)
        else:
            bank, generator, device = self._teacher_bank, self.generator, self._schedule.device
            compare = self._compares_conditions or not device_values.is_gpu(device)
            drawn = inputs.draw_stored(latents, noise, timesteps, bank, conditions, generator, device, compare=compare)
            self._compares_conditions &= not preserves
        if preserve is not None:
            preserve = inputs.draw_preserved(preserve, latents, self._schedule, self.noise_offset, self.generator)
        given = StepInputs(*drawn, sample_weight, mask, conditions, preserves, preserve)
        self._factors.write([self.preserve_every * cat_factor, 1.0 / self.accumulate])
        if self._captured is None:
            loss, parts, grad_norm = *self._forward_backward(given), None
        else:
            # Between gradient and update these three do what a graph cannot hold, or not in every call.
            whole = self.accumulate == 1 and self.grad_scaler is None and self.optimizer.process_group is None
            settings = self.snr_gamma, self.model.training
            loss, parts, grad_norm = self._captured(self._forward_backward, given, settings, with_update=whole)
        calls = self._accumulation.calls + 1
        grad_norm = self._update(grad_norm, update_due)
        diffusion, cat = parts.unbind()
        if not in_turn:
            cat = torch.full_like(cat, math.nan)
        elif isinstance(self._cat_factor, TermFollower):
            self._terms = parts if self._terms is None else self._terms + parts
            if update_due:
                self._follow(self._terms / calls)
                self._terms = None
        cat_factor = self._factors.tensor[0] / self.preserve_every
        return StepMetrics(loss, diffusion, cat, grad_norm, cat_factor.to(torch.float32))

    def _forward_backward(self, given: StepInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds the loss's gradient to the parameters'; returns the loss and [diffusion, cat]."""
        term = self._term if given.preserves else NO_PRESERVATION
        batch, own, timesteps = given.latents.shape[0], given.preserve, given.timesteps
        cond, cond_no_trigger, cond_base = given.conditions
        noisy, target, weight = self._noised(given, 2 if term.pairs and own is None else 1)
        # Of the preservation samples; of what their predictions are compared with, where it is known.
        preserved, own_timesteps, own_weight, own_mask = noisy[:batch], timesteps, weight, given.mask
        reference = given.base_pred if term.pairs else None
        if own is not None:
            assert own.timesteps is not None
            preserved, own_target, own_weight = self._noised(own, 1)
            own_timesteps, own_mask = own.timesteps, own.mask
            if term.pairs:
                reference = own_target if term.base is None else own.base_pred
                noisy = torch.cat([noisy, preserved])
        penalty = None
        if term.base is not None and reference is None:
            base_cond = cond_base or (cond if term.base == "cond" else cond_no_trigger)
            reference, penalty = self._base_prediction(term, preserved, own_timesteps, base_cond)
        if term.pairs:
            assert cond_no_trigger is not None
            cond = self._join_conditions(cond, cond_no_trigger, (batch, preserved.shape[0]))
            timesteps = torch.cat([timesteps, own_timesteps])
        student = self._prediction(noisy, timesteps, cond)
        if not student.requires_grad:
            got = "a prediction without a gradient: call the step outside of torch.no_grad()"
            raise AdapterError(f"CatStep: `model` must compute what its adapter changes, got {got}")
        cat_factor, grad_factor = self._factors.tensor.unbind()
        if self.grad_scaler is not None:
            # In the kernel: small errors would leave no gradient in float16 that could be scaled.
            grad_factor = self.grad_scaler.scale(grad_factor)
        # Autocast is for forward passes: the backward of each operation runs in the dtype of its forward.
        with torch.autocast(student.device.type, enabled=False):
            if term.adds_up:
                loss, parts, grad = student_loss(
                    student, target, reference, weight, given.mask, own_weight, own_mask, cat_factor, grad_factor
                )
            else:
                assert reference is not None
                loss, parts, grad = consistency_loss(
                    student, target, reference, weight, given.mask, cat_factor, grad_factor
                )
            del reference  # not kept during the backward pass
            roots, gradients = [student], [grad]
            if term.penalty == "update":
                penalty = self._adapters.update_norm()
            if penalty is not None:
                value = penalty.detach().to(loss.dtype)
                loss, parts = loss + (cat_factor * value).to(loss.dtype), torch.stack([parts[0], value])
                roots.append(penalty)
                gradients.append((cat_factor * grad_factor).to(penalty.dtype))
            torch.autograd.backward(roots, gradients)
        return loss, parts

    def _base_prediction(
        self, term: Preservation, latents: torch.Tensor, timesteps: torch.Tensor, cond: Mapping[str, Any] | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What the base model predicts; of a penalty of its layers the penalty alone."""
        assert cond is not None
        assert term.base is not None
        with torch.no_grad(), self._adapters.disabled():
            if term.penalty is None:
                return self._prediction(latents, timesteps, cond, term.base), None
            with self._adapters.layer_changes() as changes:
                self._prediction(latents, timesteps, cond, term.base)
        return None, torch.stack(changes).mean()

    def _noised(
        self, samples: StepInputs | PreservationSamples, copies: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Noisy latents, ``copies`` times; the target; the samples' weights."""
        latents, noise, timesteps, schedule = samples.latents, samples.noise, samples.timesteps, self._schedule
        assert noise is not None
        assert timesteps is not None
        rates = schedule.rates(timesteps, latents.shape[0])
        noisy, target = noising(latents, noise, *rates, schedule.prediction_type, copies=copies)
        return noisy, target, schedule.weights(timesteps, self.snr_gamma, samples.sample_weight)

    def _prediction(
        self, latents: torch.Tensor, timesteps: torch.Tensor, cond: Mapping[str, Any], cond_name: str = "cond"
    ) -> torch.Tensor:
        prediction = predicted("CatStep", self._predict, self.model, latents, timesteps, cond, cond_name)
        # Under autocast the loss is taken in the latents' dtype, and the scaled gradient is rounded once.
        return prediction.to(latents.dtype) if torch.is_autocast_enabled(latents.device.type) else prediction

    def _follow(self, terms: torch.Tensor) -> None:
        """Hands the terms of an optimizer step, means over all processes, to the factor that follows them."""
        assert isinstance(self._cat_factor, TermFollower)
        if self.optimizer.process_group is not None:
            collectives.average_(terms, self.optimizer.process_group)
        self._cat_factor.update(*terms.unbind())

    def _update(self, grad_norm: torch.Tensor | None, due: bool) -> torch.Tensor:
        """Counts the call, and makes the optimizer step where it is due.

        Args:
            grad_norm: Of a graph that made the optimizer step already.
            due: Whether it is.

        Returns:
            The gradient norm; NaN where no optimizer step is due.
        """
        self._accumulation.count(due)
        if not due:
            return torch.full((), math.nan, device=self._schedule.device)
        if grad_norm is None:
            grad_norm = self._optimizer_step()
        self.steps_done += 1
        return grad_norm

    def _optimizer_step(self) -> torch.Tensor:
        if self.grad_scaler is not None:
            # Averaged first, an overflow on one rank lowers the scale on all.
            self.optimizer.average_gradients()
            self.grad_scaler.unscale_(self.optimizer)
        self.optimizer.step()
        if self.grad_scaler is not None:
            self.grad_scaler.update()
        # Around several steps, autocast would keep the copies of the old weights.
        torch.clear_autocast_cache()
        return torch.as_tensor(self.optimizer.last_norm)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bit-for-bit resume needs: adapter, optimizer, accumulated gradients and terms, generator.

        What is accumulated and the generator are the rank's own. Taking and loading a state is not collective.
        """
        accumulated = self._accumulation.calls
        grads = {name: param.grad for name, param in self.trainable.items()} if accumulated else {}
        return {
            "parameters": {name: param.detach().clone() for name, param in self.trainable.items()},
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "steps_done": self.steps_done,
            "accumulated": accumulated,
            "cat_factor": self._cat_factor.state_dict() if isinstance(self._cat_factor, TermFollower) else None,
            "terms": None if self._terms is None else self._terms.clone(),
            "gradients": {name: grad.clone() for name, grad in grads.items() if grad is not None},
            "grad_scaler": None if self.grad_scaler is None else self.grad_scaler.state_dict(),
            "generator": None if self.generator is None else self.generator.get_state(),
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continues where :meth:`state_dict` was taken.

        Raises:
            AdapterError: The state is of an adapter with other parameters.
        """
        with refusing("CatStep", "state_dict", "what state_dict() returned", state_dict):
            self._load_state_dict(state_dict)

    def _load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._adapters.load(state_dict["parameters"])
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.optimizer.zero_grad()
        self.steps_done = state_dict["steps_done"]
        self._accumulation.calls = state_dict["accumulated"]
        for name, saved_grad in state_dict["gradients"].items():
            grad = self.trainable[name].grad
            if grad is not None:
                grad.copy_(saved_grad)
        terms = state_dict.get("terms")
        self._terms = None if terms is None else terms.to(self._schedule.device)
        if isinstance(self._cat_factor, TermFollower) and state_dict["cat_factor"] is not None:
            self._cat_factor.load_state_dict(state_dict["cat_factor"])
        if self.grad_scaler is not None and state_dict["grad_scaler"] is not None:
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
        if self.generator is not None and state_dict["generator"] is not None:
            self.generator.set_state(state_dict["generator"])


def _is_positive(cat_factor: float | torch.Tensor) -> bool:
    """Whether there is a term to weigh; a factor on a device, which nobody waits for, counts as one."""
    return isinstance(cat_factor, torch.Tensor) or cat_factor > 0
