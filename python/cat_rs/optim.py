"""AdamW with clipping over flat buffers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from cat_rs import device, distributed
from cat_rs.device import DeviceValues
from cat_rs.errors import DeviceError, DtypeError, InvalidValueError, ShapeError
from cat_rs.ops.adamw import adamw_step, sum_of_squares
from cat_rs.ops.operator import LOW_PRECISION

__all__ = ["FlatAdamW"]


@dataclass
class _Flat:
    """The parameters of one group and dtype, as views of flat buffers."""

    params: list[torch.nn.Parameter]
    grads: list[torch.Tensor]
    master: torch.Tensor
    grad: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    low_precision: torch.Tensor | None
    step: torch.Tensor
    addresses: list[int]
    # Versions of the parameters at the last step: whoever wrote to one since raised it.
    versions: list[int]
    # The version of `grad` when the kernel last zeroed it: autograd's additions raise it.
    zeroed_version: int = -1
    # Float32 parameters in the lower precision that layers compute in, its views, and of which versions it is.
    copy: torch.Tensor | None = None
    copies: list[torch.Tensor] = field(default_factory=list)
    copied_versions: list[int] = field(default_factory=list)

    def check_in_place(self) -> None:
        """Refuses parameters that were moved out of the flat buffer, by ``model.to`` for example."""
        for param, address in zip(self.params, self.addresses, strict=True):
            if param.data_ptr() != address:
                raise InvalidValueError(
                    "FlatAdamW: `params` must stay where the optimizer put them, got a parameter whose memory was "
                    "replaced: move or convert the model before creating the optimizer"
                )

    def refresh_master(self) -> None:
        """Takes over what somebody wrote to the parameters since the last step."""
        self.refresh_copy()
        if self.low_precision is None:
            return
        masters = _views(self.master, self.params)
        for param, version, master in zip(self.params, self.versions, masters, strict=True):
            if param._version != version:
                master.copy_(param)
        self.note_versions()

    def make_copy(self, dtype: torch.dtype) -> None:
        """Begins to keep the parameters in lower precision too."""
        self.copy = self.master.to(dtype)
        self.copies = _views(self.copy, self.params)
        self.copied_versions = [param._version for param in self.params]

    def refresh_copy(self) -> None:
        """Rounds anew where somebody wrote to the parameters since."""
        if self.copy is None:
            return
        versions = [param._version for param in self.params]
        if versions != self.copied_versions:
            self.copy.copy_(self.master)
            self.copied_versions = versions

    def note_kernel_writes(self) -> None:
        """Counts what the kernel writes behind autograd's back: a graph that saved the old weights must notice."""
        torch.autograd.graph.increment_version(self.params if self.copy is None else [*self.params, self.copy])
        self.note_versions()
        self.copied_versions = self.versions

    def note_versions(self) -> None:
        """Remembers the parameters' versions."""
        self.versions = [param._version for param in self.params]

    def attach_grads(self) -> None:
        """Makes every .grad a view again where somebody replaced it; None counts as zero."""
        for param, grad in zip(self.params, self.grads, strict=True):
            if param.grad is not grad:
                if param.grad is None:
                    grad.zero_()
                else:
                    grad.copy_(param.grad)
                param.grad = grad


@dataclass
class _GpuState:
    """What a step on a GPU leaves on the device, so that the host need not wait for it.

    Attributes:
        settings: Of each flat buffer: lr, beta1, beta2, eps, weight_decay, max_grad_norm.
        sums: Of each flat buffer: the sum of its squared gradients, float64.
        skipped: Steps skipped, 0-dim int64.
    """

    settings: list[DeviceValues]
    sums: torch.Tensor
    skipped: torch.Tensor


def _views(flat: torch.Tensor, params: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    pieces = flat.split([param.numel() for param in params])
    return [piece.view(param.shape) for piece, param in zip(pieces, params, strict=True)]


def _flatten(params: list[torch.nn.Parameter]) -> _Flat:
    dtype, size, place = params[0].dtype, sum(param.numel() for param in params), params[0].device
    master = torch.empty(size, dtype=dtype if dtype == torch.float64 else torch.float32, device=place)
    for view, param in zip(_views(master, params), params, strict=True):
        view.copy_(param.detach())
    low_precision = None if dtype == master.dtype else master.to(dtype)
    grad = torch.zeros(size, dtype=dtype, device=place)
    for param, view in zip(params, _views(master if low_precision is None else low_precision, params), strict=True):
        param.data = view
    flat = _Flat(
        params=params,
        grads=_views(grad, params),
        master=master,
        grad=grad,
        exp_avg=torch.zeros_like(master),
        exp_avg_sq=torch.zeros_like(master),
        low_precision=low_precision,
        step=torch.zeros((), dtype=torch.float32, device=place),
        addresses=[param.data_ptr() for param in params],
        versions=[param._version for param in params],
    )
    flat.attach_grads()
    return flat


def _check_state(param: torch.nn.Parameter, state: dict[str, Any]) -> None:
    for key in ("exp_avg", "exp_avg_sq", "master"):
        if key in state and state[key].shape != param.shape:
            expected, got = list(param.shape), list(state[key].shape)
            raise ShapeError(f"FlatAdamW: `state_dict` must have {key} of shape {expected}, got {got}")


def _check_param(param: torch.nn.Parameter) -> None:
    if not param.is_floating_point():
        raise DtypeError(f"FlatAdamW: `params` must have a float dtype, got {param.dtype}")
    sharding = distributed.sharding_of(param)
    if sharding is not None:
        raise InvalidValueError(f"FlatAdamW: `params` must be whole on every rank, got {sharding}")
    if param.device.type not in ("cpu", "cuda"):
        raise DeviceError(f"FlatAdamW: `params` must be on the CPU or on CUDA, got a parameter on {param.device}")


class FlatAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) with gradient-norm clipping in one pass over flat memory.

    The parameters become views of one flat buffer a group and dtype, and so do their gradients: the norm is one
    pass, and clipping, decay, moments, update, the low-precision copy and zeroing are a second one. Equal, step by
    step and up to rounding, to ``torch.nn.utils.clip_grad_norm_`` followed by ``torch.optim.AdamW``. Parameters in
    bfloat16 or float16 keep a float32 master copy and float32 moments.

    ``step()`` leaves the gradients zero. A step whose gradient norm is not finite changes nothing but the
    gradients, which become zero, and raises ``skipped_steps`` by one. A parameter whose ``.grad`` is None counts as
    having a gradient of zero. The state dict has the layout of ``torch.optim.AdamW``.

    With a ``process_group``, each of its ranks gets rank 0's parameters when they are added, and ``step()`` averages
    the gradients over the ranks before their norm is taken: one all_reduce for each flat buffer, that is for each
    group and dtype; most adapters have one. So the ranks take, or skip, the same steps. Adding parameters and
    ``step()`` are then collective: every rank calls them.

    Args:
        params: Parameters or parameter groups, dense, of a float dtype, all on the CPU or all on one CUDA device.
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
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not 0 <= value < math.inf:
                raise InvalidValueError(f"FlatAdamW: `{name}` must be a finite number >= 0, got {value}")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise InvalidValueError(f"FlatAdamW: `betas` must be two numbers in [0, 1), got {betas}")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise InvalidValueError(f"FlatAdamW: `max_grad_norm` must be > 0 or None, got {max_grad_norm}")
        if process_group is not None:
            distributed.check_group("FlatAdamW", process_group)
        if low_precision not in (None, *LOW_PRECISION):
            expected = "torch.bfloat16, torch.float16 or None"
            raise InvalidValueError(f"FlatAdamW: `low_precision` must be {expected}, got {low_precision}")
        self.max_grad_norm = max_grad_norm
        self._process_group = process_group
        self._averaged = False
        self.last_norm: float | torch.Tensor = math.nan
        self._skipped_steps = 0
        self._gpu: _GpuState | None = None
        self._flats: list[tuple[dict[str, Any], _Flat]] = []
        self._low_precision = low_precision
        self._copied: dict[torch.Tensor, tuple[_Flat, int]] = {}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @property
    def grad_norm(self) -> float:
        """The norm before clipping at the last step."""
        return float(self.last_norm)

    @property
    def skipped_steps(self) -> int:
        """Steps that changed nothing."""
        return self._skipped_steps if self._gpu is None else int(self._gpu.skipped)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group and moves its parameters into flat buffers."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for param in group["params"]:
                _check_param(param)
            places = list(dict.fromkeys(param.device for each in self.param_groups for param in each["params"]))
            if len(places) > 1:
                raise DeviceError(
                    f"FlatAdamW: `params` must be on one device, got parameters on {' and '.join(map(str, places))}"
                )
            if self._process_group is not None:
                distributed.check_alike("FlatAdamW", self._process_group, group["params"])
        except Exception:
            del self.param_groups[-1]
            raise
        by_dtype: dict[torch.dtype, list[torch.nn.Parameter]] = {}
        for param in group["params"]:
            by_dtype.setdefault(param.dtype, []).append(param)
        for params in by_dtype.values():
            flat = _flatten(params)
            if self._process_group is not None:
                distributed.broadcast_(flat.master, self._process_group)
                if flat.low_precision is not None:
                    flat.low_precision.copy_(flat.master)
            if self._low_precision is not None and params[0].dtype == torch.float32:
                flat.make_copy(self._low_precision)
                self._copied.update({param: (flat, index) for index, param in enumerate(params)})
            self._flats.append((group, flat))
            self._bind_state(flat)
        if any(device.is_gpu(place) for place in places):
            self._extend_gpu_state(places[0])

    def _extend_gpu_state(self, place: torch.device) -> None:
        """Makes room for the flat buffers that came."""
        if self._gpu is None:
            self._gpu = _GpuState([], torch.empty(0), torch.zeros((), dtype=torch.int64, device=place))
        for group, _ in self._flats[len(self._gpu.settings) :]:
            self._gpu.settings.append(DeviceValues(self._settings_of(group), place))
        self._gpu.sums = torch.zeros(len(self._flats), dtype=torch.float64, device=place)

    def _settings_of(self, group: dict[str, Any]) -> list[Any]:
        for name in ("lr", "eps", "weight_decay"):
            # A tensor on the device is not waited for.
            if isinstance(group[name], float | int) and not 0 <= group[name] < math.inf:
                raise InvalidValueError(f"FlatAdamW: `{name}` must be a finite number >= 0, got {group[name]}")
        limit = math.inf if self.max_grad_norm is None else self.max_grad_norm
        return [group["lr"], *group["betas"], group["eps"], group["weight_decay"], limit]

    def low_precision_copy(self, param: torch.Tensor) -> torch.Tensor | None:
        """The parameter in the dtype ``low_precision``, a view that later steps write to; it has no gradient.

        None where the optimizer keeps none, and where somebody has written to the parameter since the copy was made:
        the next ``step()`` or ``load_state_dict()`` renews it. What is written through ``param.data`` is not noticed.

        Args:
            param: One of the optimizer's parameters, or any tensor.
        """
        flat, index = self._copied.get(param, (None, 0))
        if flat is None or flat.copied_versions[index] != param._version or flat.addresses[index] != param.data_ptr():
            return None
        return flat.copies[index]

    def _bind_state(self, flat: _Flat) -> None:
        moments = zip(
            flat.params, _views(flat.exp_avg, flat.params), _views(flat.exp_avg_sq, flat.params), strict=True
        )
        for param, exp_avg, exp_avg_sq in moments:
            self.state[param] = {"step": flat.step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        if flat.low_precision is not None:
            for param, master in zip(flat.params, _views(flat.master, flat.params), strict=True):
                self.state[param]["master"] = master

    @torch.no_grad()
    def average_gradients(self) -> None:
        """Averages the gradients over the ranks of ``process_group`` now; ``step()`` then does not do it again.

        For what must see the averaged gradients before the step, as a ``GradScaler`` must.
        """
        if self._process_group is None or self._averaged:
            return
        for _, flat in self._flats:
            flat.attach_grads()
            distributed.average_(flat.grad, self._process_group)
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
            with torch.enable_grad():
                loss = closure()
        self.before_launch()
        self.average_gradients()
        self._averaged = False
        if self._gpu is None:
            self._step_on_the_cpu()
        else:
            self.after_launch(self.launch())
        return loss

    @torch.no_grad()
    def before_launch(self) -> None:
        """The host's part of a step: takes over what others did to parameters, gradients and settings since the last.

        ``step()`` calls it. It has to be called before a graph of :meth:`launch`, with what filled the gradients or
        without, is recorded or replayed.
        """
        for _, flat in self._flats:
            flat.check_in_place()
            flat.refresh_master()
            flat.attach_grads()
        if self._gpu is not None:
            for (group, _), settings in zip(self._flats, self._gpu.settings, strict=True):
                settings.write(self._settings_of(group))

    @torch.no_grad()
    def launch(self) -> torch.Tensor:
        """The GPU's part of a step: norm, clipping, update and zeroing, in place; returns the norm, 0-dim float32.

        It only queues work, whose every input is on the device, at an address that stays: a graph may record it.
        """
        assert self._gpu is not None
        gpu = self._gpu
        for index, (_, flat) in enumerate(self._flats):
            sum_of_squares(flat.grad, gpu.sums, index)
        for index, (_, flat) in enumerate(self._flats):
            adamw_step(
                flat.master,
                flat.grad,
                flat.exp_avg,
                flat.exp_avg_sq,
                flat.low_precision if flat.copy is None else flat.copy,
                settings=gpu.settings[index].tensor,
                sums=gpu.sums,
                step=flat.step,
                skipped=gpu.skipped if index == 0 else None,
            )
        return gpu.sums.sum().sqrt().to(torch.float32)

    def after_launch(self, norm: torch.Tensor) -> None:
        """Takes note, on the host, of a :meth:`launch` or its replay that returned this norm."""
        self.last_norm = norm
        # What the wrapper that a learning-rate scheduler puts around step() notes.
        self._opt_called = True
        for _, flat in self._flats:
            flat.note_kernel_writes()
            flat.zeroed_version = flat.grad._version

    def after_gradients(self) -> None:
        """Takes note that a replayed graph added to the gradients, behind autograd's back."""
        for _, flat in self._flats:
            torch.autograd.graph.increment_version(flat.grad)

    def _step_on_the_cpu(self) -> None:
        sums = torch.zeros(len(self._flats), dtype=torch.float64)
        for index, (_, flat) in enumerate(self._flats):
            sum_of_squares(flat.grad, sums, index)
        norm = self.last_norm = math.sqrt(sum(sums.tolist()))
        skipped = not math.isfinite(norm)
        self._skipped_steps += skipped
        for group, flat in self._flats:
            if not skipped:
                # Before the kernel, which drives all of these small objects out of the caches.
                flat.note_kernel_writes()
            adamw_step(
                flat.master,
                flat.grad,
                flat.exp_avg,
                flat.exp_avg_sq,
                flat.low_precision if flat.copy is None else flat.copy,
                settings=torch.tensor(self._settings_of(group), dtype=torch.float64),
                sums=sums,
                step=flat.step,
                skipped=None,
            )
            flat.zeroed_version = flat.grad._version

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zeroes the gradients; free after ``step()``. They stay views, so ``set_to_none`` has no effect."""
        for _, flat in self._flats:
            attached = all(param.grad is grad for param, grad in zip(flat.params, flat.grads, strict=True))
            if attached and flat.grad._version == flat.zeroed_version:
                continue
            for param, grad in zip(flat.params, flat.grads, strict=True):
                param.grad = grad
            flat.grad.zero_()
            flat.zeroed_version = flat.grad._version

    def state_dict(self) -> dict[str, Any]:
        """The state in the layout of ``torch.optim.AdamW``; the moments are views, as in every torch optimizer."""
        state_dict = super().state_dict()
        # The parameters of a flat buffer share one count here; torch would raise a shared one once for each.
        state_dict["state"] = {
            key: {**state, "step": state["step"].clone()} for key, state in state_dict["state"].items()
        }
        return state_dict

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of FlatAdamW or torch.optim.AdamW into the flat buffers, without rounding the moments."""
        saved_groups = state_dict["param_groups"]
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
        for _, flat in self._flats:
            self._load_flat(flat, [saved[param] for param in flat.params])
        for group, saved_group in zip(self.param_groups, saved_groups, strict=True):
            group.update({key: value for key, value in saved_group.items() if key in self.defaults})

    def _load_flat(self, flat: _Flat, states: list[dict[str, Any]]) -> None:
        steps = {float(state.get("step", 0.0)) for state in states}
        if len(steps) > 1:
            raise InvalidValueError(f"FlatAdamW: `state_dict` must have one step count a group, got {sorted(steps)}")
        flat.step.fill_(steps.pop())
        for key, buffer in (("exp_avg", flat.exp_avg), ("exp_avg_sq", flat.exp_avg_sq)):
            for view, state in zip(_views(buffer, flat.params), states, strict=True):
                view.copy_(state[key]) if key in state else view.zero_()
        if flat.low_precision is not None:
            # A state of torch.optim.AdamW has no master copy: the parameters as they are become it.
            masters = zip(_views(flat.master, flat.params), flat.params, states, strict=True)
            for master, param, state in masters:
                master.copy_(state.get("master", param))
                param.copy_(master)
            flat.note_versions()
        flat.refresh_copy()
