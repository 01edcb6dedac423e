"""AdamW with clipping over flat buffers."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch

from cat_rs.arguments import check, check_memory, check_no_mode, check_tensor, refusing
from cat_rs.dtypes import wide_dtype
from cat_rs.errors import DeviceError, DtypeError, InvalidValueError, LayoutError, ShapeError
from cat_rs.ops.adamw import adamw_step, sum_of_squares
from cat_rs.ops.operator import LOW_PRECISION
from cat_rs.step import collectives, device_values
from cat_rs.step.device_values import DeviceValues
from cat_rs.step.flat_buffers import FlatBuffers, Params

__all__ = ["FlatAdamW"]


def _check_state(param: torch.nn.Parameter, state: dict[str, Any]) -> None:
    for key in ("exp_avg", "exp_avg_sq", "master"):
        if key in state and state[key].shape != param.shape:
            expected, got = list(param.shape), list(state[key].shape)
            raise ShapeError(f"FlatAdamW: `state_dict` must have {key} of shape {expected}, got {got}")
        if key in state:
            check_memory("FlatAdamW", "state_dict", state[key])


def _check_param(param: torch.nn.Parameter) -> None:
    if not param.is_floating_point():
        raise DtypeError(f"FlatAdamW: `params` must have a float dtype, got {param.dtype}")
    sharding = collectives.sharding_of(param)
    if sharding is not None:
        raise InvalidValueError(f"FlatAdamW: `params` must be whole on every rank, got {sharding}")
    if param.is_meta:
        raise DeviceError("FlatAdamW: `params` must be on the CPU or an accelerator, got a parameter on meta")
    if param.layout != torch.strided or param.is_nested:
        got = "a nested one" if param.is_nested else f"one of layout {param.layout}"
        raise LayoutError(f"FlatAdamW: `params` must be dense, got {got}")
    check_memory("FlatAdamW", "params", param)


def _check_settings(settings: dict[str, Any]) -> None:
    """Checks numbers of the host; a tensor on a device is not waited for."""
    for name in ("lr", "eps", "weight_decay"):
        value = settings[name]
        # Every step asks: what is usual first.
        if not ((type(value) is float and 0 <= value < math.inf) or isinstance(value, torch.Tensor)):
            check("FlatAdamW", name, value, "a finite number >= 0", lambda value: 0 <= value < math.inf)
    betas = settings["betas"]
    check("FlatAdamW", "betas", betas, "two numbers in [0, 1)", lambda betas: _are_betas(*betas))


def _are_betas(first: float, second: float) -> bool:
    return 0 <= first < 1 and 0 <= second < 1


class FlatAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) with gradient-norm clipping in one pass over flat memory.

    The parameters of one group and dtype share one flat buffer, and so do their gradients: the norm is one pass, and
    clipping, decay, moments, update, the low-precision copy and zeroing are a second one. Equal, step by step and up
    to rounding, to ``torch.nn.utils.clip_grad_norm_`` followed by ``torch.optim.AdamW``. Parameters in bfloat16 or
    float16 keep a float32 master copy and float32 moments.

    Each parameter, gradient and moment has a storage of its own over its part of the buffer, so that what saves,
    copies, pickles or averages them sees separate tensors, as with ``torch.optim.AdamW``; ``copy.deepcopy`` and
    pickle of the optimizer give the copy buffers of its own.

    ``step()`` leaves the gradients zero. As in ``torch.optim.AdamW``, a parameter that got no gradient since the last
    ``step()`` or ``zero_grad()`` is left alone: neither decay nor moments nor its step count change. With a
    ``process_group``, where a gradient may exist on other ranks, and in recorded steps, ``requires_grad`` decides
    instead. A step whose gradient norm is not finite changes nothing but the gradients, which become zero, and raises
    ``skipped_steps`` by one. The state dict has the layout of ``torch.optim.AdamW``.

    With a ``process_group``, each of its ranks gets rank 0's parameters when they are added, and ``step()`` averages
    the gradients over the ranks before their norm is taken: one all_reduce for each flat buffer, that is for each
    group and dtype; most adapters have one. So the ranks take, or skip, the same steps. Adding parameters and
    ``step()`` are then collective: every rank calls them.

    Args:
        params: Parameters or parameter groups, dense, of a float dtype, all on the CPU or all on one accelerator.
        lr: Learning rate.
        betas: Decay rates of the moments.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        max_grad_norm: Gradients are scaled so that their joint L2 norm is at most this; None does not clip.
        process_group: Ranks that train the same parameters, each on its own data: ``torch.distributed.group.WORLD``
            for all. None, the default, trains alone, also where torch.distributed is initialized.
        low_precision: torch.bfloat16 or torch.float16: float32 parameters are also kept in this dtype, written in the
            same pass over memory; see :meth:`low_precision_copy`. Not part of the state.

    Attributes:
        grad_norm: The norm before clipping, and after averaging, at the last step, a float; NaN before the first.
        skipped_steps: Steps skipped because their gradient norm was not finite.
        last_norm: ``grad_norm`` as the device has it: a 0-dim float32 tensor on CUDA, else the float.

    On CUDA ``step()`` does not wait for the device; who reads ``grad_norm`` or ``skipped_steps`` does.

    Raises:
        DtypeError, DeviceError, InvalidValueError: Naming what was expected and what came.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        max_grad_norm: float | None = None,
        process_group: Any = None,
        low_precision: torch.dtype | None = None,
    ) -> None:
        check_no_mode("FlatAdamW")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        _check_settings(defaults)
        check("FlatAdamW", "max_grad_norm", max_grad_norm, "> 0 or None", lambda limit: limit is None or limit > 0)
        if process_group is not None:
            collectives.check_group("FlatAdamW", process_group)
        expected = "torch.bfloat16, torch.float16 or None"
        check("FlatAdamW", "low_precision", low_precision, expected, lambda dtype: dtype in (None, *LOW_PRECISION))
        self.max_grad_norm = max_grad_norm
        self.process_group = process_group
        self._low_precision = low_precision
        self._reset()
        if not isinstance(params, torch.Tensor):  # which PyTorch refuses
            with refusing("FlatAdamW", "params", "parameters or groups of them", params):
                params = list(params)
        super().__init__(params, defaults)

    def _reset(self) -> None:
        """Begins without parameters."""
        self.last_norm: float | torch.Tensor = math.nan
        self._averaged = False
        self._flats: list[FlatBuffers] = []
        self._copied: dict[torch.Tensor, tuple[FlatBuffers, int]] = {}
        # On the parameters' device, so that the host need not wait for it: of each flat buffer lr, beta1, beta2, eps,
        # weight_decay, max_grad_norm; the sums of squared gradients; how many steps were skipped.
        self._settings: list[DeviceValues] = []
        self._sums = torch.zeros(0, dtype=torch.float64)
        self._earlier_sums: list[torch.Tensor] = []
        self._skipped = torch.zeros((), dtype=torch.int64)

    @property
    def grad_norm(self) -> float:
        """The norm before clipping at the last step."""
        return float(self.last_norm)

    @property
    def skipped_steps(self) -> int:
        """Steps that changed nothing."""
        return int(self._skipped)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group and moves its parameters into flat buffers."""
        with refusing("FlatAdamW", "param_group", "a parameter group", param_group):
            super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_settings(group)
            for param in group["params"]:
                _check_param(param)
            devices = list(dict.fromkeys(param.device for each in self.param_groups for param in each["params"]))
            if len(devices) > 1:
                raise DeviceError(
                    f"FlatAdamW: `params` must be on one device, got parameters on {' and '.join(map(str, devices))}"
                )
            if self.process_group is not None:
                collectives.check_alike("FlatAdamW", self.process_group, group["params"])
        except Exception:
            del self.param_groups[-1]
            raise
        for flat in self._flatten(group):
            if self.process_group is not None:
                flat.broadcast_(self.process_group)

    def _flatten(self, group: dict[str, Any]) -> list[FlatBuffers]:
        """Moves a group's parameters into flat buffers, one for each dtype."""
        by_dtype: dict[torch.dtype, Params] = {}
        for param in group["params"]:
            by_dtype.setdefault(param.dtype, []).append(param)
        with refusing("FlatAdamW", "params", "plain dense parameters", group["params"]):
            made = [FlatBuffers(group, params, self._low_precision) for params in by_dtype.values()]
        for flat in made:
            if flat.copied:
                self._copied.update({param: (flat, index) for index, param in enumerate(flat.params)})
            self._flats.append(flat)
            device = flat.master.device
            self._settings.append(DeviceValues(self._settings_of(group), device))
            # Steps recorded before write to the sums of their time.
            self._earlier_sums.append(self._sums)
            self._sums = torch.zeros(len(self._flats), dtype=wide_dtype(device), device=device)
            self._skipped = self._skipped.to(device)
            self.state.update(flat.state_of())
        return made

    def _settings_of(self, group: dict[str, Any]) -> list[Any]:
        _check_settings(group)
        limit = math.inf if self.max_grad_norm is None else self.max_grad_norm
        return [group["lr"], *group["betas"], group["eps"], group["weight_decay"], limit]

    def low_precision_copy(self, param: torch.Tensor) -> torch.Tensor | None:
        """The parameter in the dtype ``low_precision``, a view that later steps write to; it has no gradient.

        None where the optimizer keeps none, and where somebody has written to the parameter since the copy was made:
        the next ``step()`` or ``load_state_dict()`` renews it. What is written through ``param.data`` is not noticed.

        Args:
            param: One of the optimizer's parameters, or any tensor.
        """
        check_tensor("FlatAdamW", "param", param)
        flat, index = self._copied.get(param, (None, 0))
        if flat is None or flat.copied_versions[index] != param._version or flat.addresses[index] != param.data_ptr():
            return None
        return flat.copies[index]

    @torch.no_grad()
    def average_gradients(self) -> None:
        """Averages the gradients over the ranks of ``process_group`` now; ``step()`` then does not do it again.

        For what must see the averaged gradients before the step, as a ``GradScaler`` must.
        """
        if self.process_group is None or self._averaged:
            return
        for flat in self._flats:
            flat.attach_grads()
            collectives.average_(flat.grad, self.process_group)
        self._averaged = True

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step; the gradients are zero afterwards.

        Args:
            closure: Recomputes the loss and the gradients first, as for every torch optimizer.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            check("FlatAdamW", "closure", closure, "a function or None", callable)
            with torch.enable_grad():
                loss = closure()
        self.before_launch(gradients_follow=False)
        self.average_gradients()
        self._averaged = False
        # Before the kernels, which drive all of these small objects out of the caches.
        for flat in self._flats:
            flat.note_kernel_writes()
        self.last_norm = self.launch()
        return loss

    @torch.no_grad()
    def before_launch(self, *, gradients_follow: bool = True) -> None:
        """The host's part of a step: takes over what others did to parameters, gradients and settings since the last.

        ``step()`` calls it. It has to be called before a graph of :meth:`launch`, with what filled the gradients or
        without, is recorded or replayed.

        Args:
            gradients_follow: Whether the gradients are still to come, so that only ``requires_grad`` tells which
                parameters take part.
        """
        for flat, settings in zip(self._flats, self._settings, strict=True):
            flat.take_back()
            settings.write(self._settings_of(flat.group))
            flat.refresh_master()
            flat.attach_grads()
            if flat.choose_active(touched_only=not gradients_follow and self.process_group is None):
                self.state.update(flat.state_of())

    @property
    def active_spans(self) -> tuple[tuple[tuple[int, int, int], ...], ...]:
        """Which parameters the coming step updates, in which pieces, and the addresses of the pieces' step counts.

        A recorded step depends on it.
        """
        spans_of = (flat.active_spans() for flat in self._flats)
        return tuple(tuple((span.start, span.stop, span.step.data_ptr()) for span in spans) for spans in spans_of)

    @torch.no_grad()
    def launch(self) -> float | torch.Tensor:
        """The kernels of a step: norm, clipping, update and zeroing, in place; returns the norm.

        On CUDA it only queues work, whose every input is on the device, at an address that stays, so that a graph may
        record it, and the norm is a 0-dim float32 tensor there.
        """
        for index, flat in enumerate(self._flats):
            sum_of_squares(flat.grad, self._sums, index)
        skipped: torch.Tensor | None = self._skipped
        for flat, settings in zip(self._flats, self._settings, strict=True):
            for span in flat.active_spans():
                adamw_step(*span.buffers, settings=settings.tensor, sums=self._sums, step=span.step, skipped=skipped)
                # A step counts as skipped once.
                skipped = None
        if device_values.is_gpu(self._sums.device):
            return self._sums.sum().sqrt().to(torch.float32)
        return math.sqrt(sum(self._sums.tolist()))

    def after_launch(self, norm: torch.Tensor) -> None:
        """Takes note, on the host, of a recorded :meth:`launch` that was replayed and returned this norm."""
        self.last_norm = norm
        # What the wrapper that a learning-rate scheduler puts around step() notes.
        self._opt_called = True
        for flat in self._flats:
            flat.note_kernel_writes()
            flat.note_zeroed_grads()

    def after_gradients(self) -> None:
        """Takes note that a replayed graph added to the gradients, behind autograd's back."""
        for flat in self._flats:
            torch.autograd.graph.increment_version(flat.grads)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zeroes the gradients; free after ``step()``. They stay in place, so ``set_to_none`` has no effect."""
        for flat in self._flats:
            flat.zero_grads()

    def state_dict(self) -> dict[str, Any]:
        """The state in the layout of ``torch.optim.AdamW``; the moments are those of the optimizer, not copies."""
        state_dict = super().state_dict()
        # The parameters of a span share one count here; torch would raise a shared one once for each.
        state_dict["state"] = {
            key: {**state, "step": state["step"].clone()} for key, state in state_dict["state"].items()
        }
        return state_dict

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of FlatAdamW or torch.optim.AdamW into the flat buffers, without rounding the moments."""
        # torch's own method would round the float32 moments of parameters in lower precision.
        expected = "a state dict of FlatAdamW or torch.optim.AdamW"
        check("FlatAdamW", "state_dict", state_dict, expected, lambda state: isinstance(state, dict))
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        with refusing("FlatAdamW", "state_dict", expected, state_dict):
            self._load_groups(state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _load_groups(self, state_dict: dict[str, Any]) -> None:
        saved_groups = copy.deepcopy(state_dict["param_groups"])
        sizes, saved_sizes = (
            [len(group["params"]) for group in groups] for groups in (self.param_groups, saved_groups)
        )
        if sizes != saved_sizes:
            raise InvalidValueError(
                f"FlatAdamW: `state_dict` must have parameter groups of sizes {sizes}, got {saved_sizes}"
            )
        saved: dict[torch.nn.Parameter, dict[str, Any]] = {}
        for group, saved_group in zip(self.param_groups, saved_groups, strict=True):
            for name in ("amsgrad", "maximize"):
                if saved_group.get(name):
                    raise InvalidValueError(f"FlatAdamW: `state_dict` must have {name}=False, got True")
            for param, key in zip(group["params"], saved_group["params"], strict=True):
                saved[param] = state_dict["state"].get(key, {})
                _check_state(param, saved[param])
        self._load_state(saved)
        for group, saved_group in zip(self.param_groups, saved_groups, strict=True):
            group.update({key: value for key, value in saved_group.items() if key != "params"})

    def _load_state(self, states: dict[torch.nn.Parameter, dict[str, Any]]) -> None:
        for flat in self._flats:
            flat.load_state([states[param] for param in flat.params])
            self.state.update(flat.state_of())

    def __getstate__(self) -> dict[str, Any]:
        if self.process_group not in (None, collectives.data_parallel_group(None)):
            raise InvalidValueError(
                "FlatAdamW: `process_group` must be None or the default group for a copy or a pickle, got another one"
            )
        return {
            **super().__getstate__(),
            "max_grad_norm": self.max_grad_norm,
            "low_precision": self._low_precision,
            "whole_world": self.process_group is not None,
            "skipped_steps": self.skipped_steps,
        }

    @torch.no_grad()
    def __setstate__(self, state: dict[str, Any]) -> None:
        """The parameters of a copy or a pickle, which have memory of their own, move into flat buffers anew."""
        state = dict(state)
        states = state.pop("state")
        self.max_grad_norm, self._low_precision = state.pop("max_grad_norm"), state.pop("low_precision")
        self.process_group = collectives.data_parallel_group(None) if state.pop("whole_world") else None
        self._reset()
        self._skipped.fill_(state.pop("skipped_steps"))
        super().__setstate__({**state, "state": defaultdict(dict)})
        for group in self.param_groups:
            self._flatten(group)
        self._load_state(states)
