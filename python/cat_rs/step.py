"""The CAT training step: base prediction, doubled student batch, fused loss, flat AdamW."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from cat_rs import device, distributed, nested
from cat_rs.capture import CapturedFunctions
from cat_rs.cat_factor import CatFactor, CatFactorRatio, check_cat_factor
from cat_rs.denoiser import Cond, Predict, as_kwargs, convention_of, denoiser_predict, join_conditions
from cat_rs.device import DeviceValues
from cat_rs.errors import AdapterError, DeviceError, DtypeError, InvalidValueError, ShapeError
from cat_rs.ops.cat_loss import student_loss
from cat_rs.ops.noising import noising
from cat_rs.optim import FlatAdamW
from cat_rs.schedule import NoiseSchedule

if TYPE_CHECKING:
    from cat_rs.teacher_bank import TeacherBank

__all__ = ["CatStep", "StepMetrics"]


class StepMetrics(NamedTuple):
    """What a step measured, 0-dim tensors.

    Attributes:
        loss: diffusion + cat_factor * cat.
        diffusion: The diffusion term.
        cat: The preservation term, without its factor; 0 with cat_factor 0.
        grad_norm: The gradient's L2 norm before clipping; NaN on a step that only accumulates.
        cat_factor: The weight that the preservation term had.
    """

    loss: torch.Tensor
    diffusion: torch.Tensor
    cat: torch.Tensor
    grad_norm: torch.Tensor
    cat_factor: torch.Tensor


class _Preservation(NamedTuple):
    """Inputs of the preservation term.

    Attributes:
        cond: c0, keyword arguments of the model.
        cond_base: The same as the base text encoders make it.
        base: f_base(z_t, t, c0) where it is known already.
    """

    cond: Mapping[str, Any]
    cond_base: Mapping[str, Any]
    base: torch.Tensor | None


class _Inputs(NamedTuple):
    """What a step computes with, once everything is drawn.

    Attributes:
        latents, noise, timesteps: [B, ...], [B, ...] and [B].
        sample_weight, mask: As given.
        cond: c, keyword arguments of the model.
        preservation: None for plain LoRA.
        cat_factor: On the CPU; a GPU has it already.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    sample_weight: torch.Tensor | None
    mask: torch.Tensor | None
    cond: Mapping[str, Any]
    preservation: _Preservation | None
    cat_factor: float = 0.0


def _adapter_parameters(argument: str, model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """What of the model trains, by name."""
    from cat_rs import peft

    if not peft.has_adapter(model):
        raise AdapterError(
            f"CatStep: `{argument}` must have PEFT adapter layers (model.add_adapter(LoraConfig(...))), got none"
        )
    trainable = {name: param for name, param in model.named_parameters() if param.requires_grad}
    if not trainable:
        raise AdapterError(f"CatStep: `{argument}` must have trainable adapter parameters, got all of them frozen")
    for name, param in trainable.items():
        sharding = distributed.sharding_of(param)
        if sharding is not None:
            raise AdapterError(
                f"CatStep: `{argument}` must have its trainable parameters whole on every rank, got {name}: "
                f"{sharding}; shard only the frozen base: fully_shard(model, ignored_params=...) or "
                f"FullyShardedDataParallel(model, ignored_states=...), with the adapter's parameters"
            )
    return trainable


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
    of its weights that the optimizer writes; a weight that somebody else writes to is rounded anew in every call.

    Args:
        model: A diffusers denoiser with a PEFT adapter (``model.add_adapter(LoraConfig(...))``), on the CPU or on one
            CUDA device. What requires a gradient is trained.
        scheduler: The model's diffusers scheduler: one with ``alphas_cumprod`` or a flow-matching one.
        lr, betas, eps, weight_decay, max_grad_norm: Of :class:`FlatAdamW`.
        cat_factor: Weight of the preservation term; 0 trains plain LoRA, at its cost. A number, a function of the
            number of finished optimizer steps such as :class:`cat_rs.CatFactorRamp`, or a
            :class:`cat_rs.CatFactorRatio`. May be set between steps.
        snr_gamma: Min-SNR weighting of both terms (arXiv 2303.09556); None for uniform weights.
        noise_offset: Adds this much of one more draw for each sample and channel to the noise that the step draws, so
            that brightness is learned too; for latents [B, C, H, W] or [B, C, F, H, W]. 0.05 to 0.1 is usual.
        prediction_type: "epsilon", "v_prediction" or "flow"; by default the scheduler's.
        accumulate: Calls to one optimizer step; each contributes 1/accumulate of its gradient.
        predict: ``predict(model, latents, timesteps, cond) -> prediction`` for models that are not called like a
            diffusers denoiser; ``cond`` is a mapping. docs/families.md lists the models that need none.
        text_encoders: Modules with PEFT adapters that train with the model's; the base prediction runs with all of
            the adapters off. The conditions must then be functions that call the text encoders. In
            :meth:`state_dict` the names of their parameters begin with ``text_encoders[0].`` and so on.
        unbatched: Keys of conditioning tensors without a batch dimension. Needed only where the first dimension of
            such a tensor may equal B by chance: see ``cond``.
        grad_scaler: Scales the gradient for float16 autocast (``torch.amp.GradScaler("cpu")``); the step unscales it,
            skips where it is not finite, and calls ``update()``. Saved with the state.
        generator: Draws noise and timesteps, on the model's device; by default torch's global one. Saved with the
            state.
        teacher_bank: Stored draws of noise, timestep and base prediction, instead of fresh ones: the step then takes
            indices of the bank's pictures, and skips the base model's forward. On the CPU; not with ``text_encoders``
            or ``noise_offset``.
        process_group: The ranks that train this adapter together; by default all, if torch.distributed is
            initialized. A group of this rank alone trains alone.
        capture: On CUDA: records the step as a CUDA graph, which one launch replays. The first three steps with inputs
            of a form (shapes, dtypes, and the values of what is no tensor) run eagerly, the fourth is recorded. Not
            with ``text_encoders``. Where the model cannot be recorded, a RuntimeWarning says why and every step runs
            eagerly. See docs/gpu.md.
        max_captures: Forms of inputs that may be recorded; one more is an error.

    On CUDA nothing in a step waits for the device, metrics included, until somebody reads them. So what would have to
    be waited for is not checked: the range of timesteps, the signs of weights.

    Under torch.distributed every rank makes a step of its own model and calls it with its own data. When the step is
    made, all get rank 0's adapter; the gradients are averaged once in ``accumulate`` calls, by one all_reduce of the
    flat buffer before its norm is taken, so that the adapters stay the same bit for bit, and all ranks skip a step
    that is not finite on one. N ranks at batch B train as one process does at batch N B. ``loss``, ``diffusion`` and
    ``cat`` stay those of the rank's own data; ``grad_norm`` is of the average. A model in DistributedDataParallel, as
    ``accelerator.prepare`` returns it, is taken out: its own reduction does not run. Under FSDP shard only the frozen
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
        # PEFT is imported only where a model with its layers is trained.
        from cat_rs import peft

        if accumulate < 1:
            raise InvalidValueError(f"CatStep: `accumulate` must be at least 1, got {accumulate}")
        if snr_gamma is not None and not snr_gamma > 0:
            raise InvalidValueError(f"CatStep: `snr_gamma` must be > 0 or None, got {snr_gamma}")
        if not math.isfinite(noise_offset):
            raise InvalidValueError(f"CatStep: `noise_offset` must be a finite number, got {noise_offset}")
        process_group = distributed.data_parallel_group(process_group)
        if process_group is not None:
            distributed.check_group("CatStep", process_group)
        model = distributed.without_ddp(model)
        self.model = model
        self.text_encoders = tuple(distributed.without_ddp(encoder) for encoder in text_encoders)
        self.trainable = _adapter_parameters("model", model)
        for index, encoder in enumerate(self.text_encoders):
            argument = f"text_encoders[{index}]"
            if any(encoder is other for other in (model, *self.text_encoders[:index])):
                raise InvalidValueError(f"CatStep: `{argument}` must be another module, got one that was given before")
            for name, param in _adapter_parameters(argument, encoder).items():
                self.trainable[f"{argument}.{name}"] = param
        self.cat_factor = cat_factor
        self.snr_gamma = snr_gamma
        self.noise_offset = noise_offset
        self.accumulate = accumulate
        self.grad_scaler = grad_scaler
        self.generator = generator
        place = next(iter(self.trainable.values())).device
        if generator is not None and generator.device.type != place.type:
            raise DeviceError(f"CatStep: `generator` must be on {place}, got one on {generator.device}")
        self._schedule = NoiseSchedule(scheduler, prediction_type, place)
        self._schedule.weights(torch.zeros(1, dtype=torch.long, device=place), snr_gamma)
        self._teacher_bank = teacher_bank
        if teacher_bank is not None:
            if place.type != "cpu":
                raise DeviceError(f"CatStep: `teacher_bank` must be None for a model on {place}: banks are on the CPU")
            if text_encoders or noise_offset:
                raise InvalidValueError(
                    "CatStep: `text_encoders` and `noise_offset` must not be given with a teacher bank, whose base "
                    "predictions and noise are made"
                )
            teacher_bank.check_model(model, self._schedule)
        self._predict = predict or denoiser_predict(model)
        self._convention, self._unbatched = convention_of(model), frozenset(unbatched)
        self._adapter_disabled: Callable[[torch.nn.Module], AbstractContextManager[None]] = peft.adapter_disabled
        adapted = (model, *self.text_encoders)
        for each in adapted:
            peft.patch_peft(each)
        self.optimizer = FlatAdamW(
            self.trainable.values(),
            lr,
            betas,
            eps,
            weight_decay,
            max_grad_norm=max_grad_norm,
            process_group=process_group,
            low_precision=peft.lower_dtype(adapted),
        )
        for each in adapted:
            peft.use_copies_of(self.optimizer, each)
        self._process_group = process_group
        # On a GPU: cat_factor and the gradient's factor.
        self._factors = DeviceValues([0.0, 1.0], place) if device.is_gpu(place) else None
        self._captured: CapturedFunctions | None = None
        if capture:
            self._check_capture(place, max_captures)
            self._captured = CapturedFunctions("CatStep", place, max_captures)
        self.steps_done = 0
        self._accumulated = 0

    def _check_capture(self, place: torch.device, max_captures: int) -> None:
        if not device.is_gpu(place):
            raise InvalidValueError(f"CatStep: `capture` must be False for a model on {place}, got True")
        if max_captures < 1:
            raise InvalidValueError(f"CatStep: `max_captures` must be at least 1, got {max_captures}")
        if self.text_encoders:
            raise InvalidValueError(
                "CatStep: `capture` must be False with text_encoders, got True: a graph would replay the prompts that "
                "it was recorded with"
            )

    @property
    def cat_factor(self) -> CatFactor:
        """Weight of the preservation term, or what makes it."""
        return self._cat_factor

    @cat_factor.setter
    def cat_factor(self, value: CatFactor) -> None:
        self._cat_factor = value if callable(value) else check_cat_factor(value)

    def __call__(
        self,
        latents: torch.Tensor,
        cond: Cond | Callable[[], Cond],
        cond_no_trigger: Cond | Callable[[], Cond],
        *,
        noise: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        sample_weight: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
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
                no_grad with all adapters off for the base.
            noise: [B, ...]; drawn from the standard normal by default.
            timesteps: [B], on the latents' device; drawn uniformly from the schedule by default.
            sample_weight: w, [B], >= 0; multiplies the min-SNR weights.
            mask: m, of the latents' shape up to dimensions of size 1.

        Returns:
            The step's metrics. Where ``grad_norm`` is not finite, the adapter was left as it was.
        """
        made = self._cat_factor
        cat_factor: float | torch.Tensor
        if self._factors is not None and isinstance(made, CatFactorRatio):
            cat_factor = made.factor()
        else:
            cat_factor = check_cat_factor(made(self.steps_done)) if callable(made) else made
        preserve = isinstance(cat_factor, torch.Tensor) or cat_factor > 0
        inputs = self._draw(latents, cond, cond_no_trigger, noise, timesteps, sample_weight, mask, preserve)
        if self._factors is None:
            inputs, used = inputs._replace(cat_factor=float(cat_factor)), torch.tensor(cat_factor)
        else:
            self._factors.write([cat_factor, 1.0 / self.accumulate])
            used = self._factors.tensor[0].to(torch.float32)
        if self._captured is None:
            loss, parts = self._forward_backward(inputs)
            grad_norm = self._update()
        else:
            loss, parts, grad_norm = self._call_captured(self._captured, inputs)
        diffusion, cat = parts.unbind()
        if isinstance(made, CatFactorRatio):
            made.update(diffusion, cat)
        return StepMetrics(loss, diffusion, cat, grad_norm, used)

    def _draw(
        self,
        latents: torch.Tensor,
        cond: Cond | Callable[[], Cond],
        cond_no_trigger: Cond | Callable[[], Cond],
        noise: torch.Tensor | None,
        timesteps: torch.Tensor | None,
        sample_weight: torch.Tensor | None,
        mask: torch.Tensor | None,
        preserve: bool,
    ) -> _Inputs:
        """Checks, conditions and random draws: what a recorded step must not do."""
        with_trigger = self._evaluate("cond", cond)
        without_trigger = self._evaluate("cond_no_trigger", cond_no_trigger) if preserve else None
        base = None
        if self._teacher_bank is not None:
            if noise is not None or timesteps is not None:
                raise InvalidValueError(
                    "CatStep: `noise` and `timesteps` must not be given with a teacher bank, which holds them"
                )
            if without_trigger is not None:
                self._teacher_bank.check_cond(latents, without_trigger)
            latents, noise, timesteps, base = self._teacher_bank.draw(latents, self.generator)
        elif latents.dtype == torch.int64:
            raise DtypeError(
                "CatStep: `latents` must have dtype float32, float64, bfloat16 or float16, got int64; picture indices "
                "need a teacher_bank"
            )
        if latents.dim() < 2 or latents.shape[0] == 0:
            raise ShapeError(f"CatStep: `latents` must have shape [B, ...] with B >= 1, got {list(latents.shape)}")
        if self._factors is not None and latents.device != self._schedule.device:
            raise DeviceError(f"CatStep: `latents` must be on {self._schedule.device}, got {latents.device}")
        if noise is None:
            noise = self._draw_noise(latents)
        if timesteps is None:
            timesteps = self._schedule.draw(latents.shape[0], self.generator)
        preservation = None
        if without_trigger is not None:
            cond_base = without_trigger
            if self.text_encoders:
                with torch.no_grad(), self._adapters_disabled():
                    cond_base = self._evaluate("cond_no_trigger", cond_no_trigger)
            preservation = _Preservation(without_trigger, cond_base, base)
        return _Inputs(latents, noise, timesteps, sample_weight, mask, with_trigger, preservation)

    def _forward_backward(self, inputs: _Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and [diffusion, cat]; the gradients are added to those of the parameters."""
        timesteps, batch = inputs.timesteps, inputs.latents.shape[0]
        signal_rate, noise_rate = self._schedule.rates(timesteps, batch)
        weight = self._schedule.weights(timesteps, self.snr_gamma)
        if weight is None:
            weight = inputs.sample_weight
        elif inputs.sample_weight is not None:
            if inputs.sample_weight.shape != (batch,):
                got = list(inputs.sample_weight.shape)
                raise ShapeError(f"CatStep: `sample_weight` must have shape [{batch}], got {got}")
            weight = weight * inputs.sample_weight

        preservation = inputs.preservation
        noisy, target = noising(
            inputs.latents,
            inputs.noise,
            signal_rate,
            noise_rate,
            self._schedule.prediction_type,
            copies=1 if preservation is None else 2,
        )
        base = None
        if preservation is None:
            student = self._prediction(noisy, timesteps, inputs.cond)
        else:
            base = preservation.base
            if base is None:
                with torch.no_grad(), self._adapters_disabled():
                    base = self._prediction(noisy[:batch], timesteps, preservation.cond_base)
            both = join_conditions(
                inputs.cond, preservation.cond, batch, unbatched=self._unbatched, convention=self._convention
            )
            student = self._prediction(noisy, torch.cat([timesteps, timesteps]), both)
        factors = (inputs.cat_factor, 1.0 / self.accumulate) if self._factors is None else self._factors.tensor
        loss, parts, grad = student_loss(student, target, base, weight, inputs.mask, *factors)
        del base
        if self.grad_scaler is not None:
            grad = self.grad_scaler.scale(grad)
        # Autocast is for forward passes: the backward of each operation runs in the dtype of its forward.
        with torch.autocast(grad.device.type, enabled=False):
            torch.autograd.backward(student, grad)
        return loss, parts

    def _draw_noise(self, latents: torch.Tensor) -> torch.Tensor:
        options: dict[str, Any] = {"dtype": latents.dtype, "device": latents.device, "generator": self.generator}
        noise = torch.randn(latents.shape, **options)
        if self.noise_offset:
            if latents.dim() < 4:
                raise ShapeError(
                    f"CatStep: `latents` must have shape [B, C, H, W] or [B, C, F, H, W] for noise_offset, "
                    f"got {list(latents.shape)}"
                )
            shape = (*latents.shape[:2], *(1 for _ in latents.shape[2:]))
            noise += self.noise_offset * torch.randn(shape, **options)
        return noise

    def _prediction(self, latents: torch.Tensor, timesteps: torch.Tensor, cond: Mapping[str, Any]) -> torch.Tensor:
        prediction = self._predict(self.model, latents, timesteps, cond)
        # Under autocast the loss is taken in the latents' dtype, and the scaled gradient is rounded once.
        return prediction.to(latents.dtype) if torch.is_autocast_enabled(latents.device.type) else prediction

    @contextmanager
    def _adapters_disabled(self) -> Iterator[None]:
        with ExitStack() as stack:
            for model in (self.model, *self.text_encoders):
                stack.enter_context(self._adapter_disabled(model))
            yield

    def _evaluate(self, name: str, cond: Cond | Callable[[], Cond]) -> Mapping[str, Any]:
        """The condition as keyword arguments; with text encoders, one through which their adapters get gradients."""
        if callable(cond):
            cond = cond()
        elif self.text_encoders:
            raise InvalidValueError(
                f"CatStep: `{name}` must be a function that calls the text encoders, such as "
                f"lambda: text_encoder(input_ids)[0], for text_encoders to train, got {type(cond).__name__}"
            )
        kwargs = as_kwargs(name, cond)
        if (
            self.text_encoders
            and torch.is_grad_enabled()
            and not any(tensor.requires_grad for tensor in nested.tensors(kwargs))
        ):
            raise InvalidValueError(
                f"CatStep: `{name}` must return what the text encoders compute with gradients, for text_encoders to "
                "train, got no tensor that requires a gradient"
            )
        return kwargs

    def _call_captured(
        self, captured: CapturedFunctions, inputs: _Inputs
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Loss, [diffusion, cat] and gradient norm, through a graph of the whole step where one can hold it."""
        # What has to happen between gradient and update here cannot be recorded, or not in every call.
        whole = self.accumulate == 1 and self.grad_scaler is None and self._process_group is None
        kind = inputs.latents.device.type
        variant = (
            whole,
            self.snr_gamma,
            self.model.training,
            torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        )
        self.optimizer.before_launch()
        loss, parts, *norm = captured(self._whole if whole else self._gradients, inputs, variant)
        if not whole:
            self.optimizer.after_gradients()
            return loss, parts, self._update()
        self.optimizer.after_launch(norm[0])
        self._accumulated = 0
        self.steps_done += 1
        return loss, parts, norm[0]

    def _gradients(self, inputs: _Inputs) -> tuple[torch.Tensor, ...]:
        # The copies that autocast keeps of the weights belong to a recording, or to what is outside of it.
        torch.clear_autocast_cache()
        loss, parts = self._forward_backward(inputs)
        torch.clear_autocast_cache()
        return loss, parts

    def _whole(self, inputs: _Inputs) -> tuple[torch.Tensor, ...]:
        return *self._gradients(inputs), self.optimizer.launch()

    def _update(self) -> torch.Tensor:
        """The optimizer step where it is due; returns the gradient norm, or NaN."""
        self._accumulated = (self._accumulated + 1) % self.accumulate
        if self._accumulated:
            return torch.full((), math.nan, device=self._schedule.device)
        if self.grad_scaler is not None:
            # Averaged first, an overflow on one rank lowers the scale on all.
            self.optimizer.average_gradients()
            self.grad_scaler.unscale_(self.optimizer)
        self.optimizer.step()
        if self.grad_scaler is not None:
            self.grad_scaler.update()
        # Around several steps, autocast would keep the copies of the old weights.
        torch.clear_autocast_cache()
        self.steps_done += 1
        return torch.as_tensor(self.optimizer.last_norm)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bit-for-bit resume needs: adapter, optimizer, accumulated gradients, generator.

        Accumulated gradients and the generator are the rank's own. Taking and loading a state is not collective.
        """
        return {
            "parameters": {name: param.detach().clone() for name, param in self.trainable.items()},
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "steps_done": self.steps_done,
            "accumulated": self._accumulated,
            "cat_factor": self._cat_factor.state_dict() if isinstance(self._cat_factor, CatFactorRatio) else None,
            "gradients": {name: param.grad.clone() for name, param in self.trainable.items() if param.grad is not None}
            if self._accumulated
            else {},
            "grad_scaler": None if self.grad_scaler is None else self.grad_scaler.state_dict(),
            "generator": None if self.generator is None else self.generator.get_state(),
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continues where :meth:`state_dict` was taken.

        Raises:
            AdapterError: The state is of an adapter with other parameters.
        """
        saved = state_dict["parameters"]
        shapes = {name: list(param.shape) for name, param in self.trainable.items()}
        saved_shapes = {name: list(param.shape) for name, param in saved.items()}
        if shapes != saved_shapes:
            names = sorted(name for name in shapes | saved_shapes if shapes.get(name) != saved_shapes.get(name))
            raise AdapterError(
                f"CatStep: `state_dict` must be of this adapter, got other parameters: {len(names)} differ, e.g. "
                f"{names[0]}: {shapes.get(names[0])} here, {saved_shapes.get(names[0])} there"
            )
        for name, param in self.trainable.items():
            param.copy_(saved[name])
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.optimizer.zero_grad()
        self.steps_done = state_dict["steps_done"]
        self._accumulated = state_dict["accumulated"]
        if isinstance(self._cat_factor, CatFactorRatio) and state_dict["cat_factor"] is not None:
            self._cat_factor.load_state_dict(state_dict["cat_factor"])
        for name, saved_grad in state_dict["gradients"].items():
            grad = self.trainable[name].grad
            if grad is not None:
                grad.copy_(saved_grad)
        if self.grad_scaler is not None and state_dict["grad_scaler"] is not None:
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
        if self.generator is not None and state_dict["generator"] is not None:
            self.generator.set_state(state_dict["generator"])
