"""Parameters of one group and dtype, with gradients and moments, in flat memory."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch.utils.dlpack import from_dlpack

from cat_rs.errors import DeviceError, DtypeError
from cat_rs.step import collectives, device_values

__all__ = ["FlatBuffers", "Params"]

Params = list[torch.nn.Parameter]


def _addresses(params: Params) -> list[int]:
    # Hundreds of small tensors in every step: the method itself takes half the time of a methodcaller.
    return list(map(torch.Tensor.data_ptr, params))


def _views(flat: torch.Tensor, params: Params) -> list[torch.Tensor]:
    pieces = flat.split([param.numel() for param in params])
    return [piece.view(param.shape) for piece, param in zip(pieces, params, strict=True)]


def _own_storages(flat: torch.Tensor, params: Params) -> list[torch.Tensor]:
    """As `_views`, each with a storage of its own over its part of the memory.

    Whoever looks for tied weights looks for tensors of one storage: accelerate and safetensors would save one of them
    and drop the others, and a deep copy of one would copy all.
    """
    return [from_dlpack(view) for view in _views(flat, params)]


class _Span(NamedTuple):
    """Consecutive parameters of a flat buffer that have taken the same steps.

    Attributes:
        start, stop: The parameters' indices.
        buffers: The kernel's: weights, gradients, first and second moments, weights in lower precision.
        step: The step count.
    """

    start: int
    stop: int
    buffers: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]
    step: torch.Tensor


class FlatBuffers:
    """The parameters of one group and dtype, in flat buffers.

    Attributes:
        group: The parameter group.
        params: Its parameters of one dtype, of which each has a storage of its own over the flat memory.
        grads: Their gradients, likewise.
        master: The weights that the kernel updates: the parameters, or float32 ones of parameters in lower precision.
        grad: The gradients.
        spans: Parameters by the steps that they have taken.
        active: Whether each parameter takes part in the step that is being made.
    """

    def __init__(self, group: dict[str, Any], params: Params, copy_dtype: torch.dtype | None) -> None:
        dtype, size, device = params[0].dtype, sum(param.numel() for param in params), params[0].device
        self.group, self.params = group, params
        self.master = torch.empty(size, dtype=dtype if dtype == torch.float64 else torch.float32, device=device)
        for view, param in zip(_views(self.master, params), params, strict=True):
            view.copy_(param.detach())
        self._low_precision = None if dtype == self.master.dtype else self.master.to(dtype)
        weights = self.master if self._low_precision is None else self._low_precision
        self._weights = _own_storages(weights, params)
        for param, own in zip(params, self._weights, strict=True):
            param.data = own
        self.grad = torch.zeros(size, dtype=dtype, device=device)
        self.grads = _own_storages(self.grad, params)
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.master), torch.zeros_like(self.master)
        # Float32 parameters in the lower precision that layers compute in.
        self._copy = self.master.to(copy_dtype) if copy_dtype is not None and dtype == torch.float32 else None
        self.copies = [] if self._copy is None else _views(self._copy, params)
        self.addresses = _addresses(params)
        # Versions of the parameters and gradients when this class last wrote to them: whoever wrote since raised them.
        self.versions, self.copied_versions = ([param._version for param in params] for _ in range(2))
        self._zeroed_versions = self._seen_versions = [grad._version for grad in self.grads]
        self.spans = self._spans_of([torch.zeros((), dtype=torch.float32, device=device)] * len(params))
        self.active = [True] * len(params)
        # Gradients from before the optimizer count.
        self.attach_grads()

    def _grad_versions(self) -> list[int]:
        return [grad._version for grad in self.grads]

    @property
    def copied(self) -> bool:
        """Whether the parameters are kept in lower precision too."""
        return self._copy is not None

    def _spans_of(self, steps: list[torch.Tensor]) -> list[_Span]:
        """The spans of parameters with these step counts: neighbours whose count is the same tensor are one."""
        lowered = self._low_precision if self._copy is None else self._copy
        offsets = [0]
        for param in self.params:
            offsets.append(offsets[-1] + param.numel())
        borders = [index for index in range(len(steps)) if index == 0 or steps[index] is not steps[index - 1]]
        spans = []
        for start, stop in zip(borders, [*borders[1:], len(steps)], strict=True):
            part = slice(offsets[start], offsets[stop])
            buffers = (self.master[part], self.grad[part], self.exp_avg[part], self.exp_avg_sq[part])
            spans.append(_Span(start, stop, (*buffers, None if lowered is None else lowered[part]), steps[start]))
        return spans

    @property
    def steps(self) -> list[torch.Tensor]:
        """The step count of each parameter; those of one span share one tensor."""
        return [span.step for span in self.spans for _ in range(span.start, span.stop)]

    def choose_active(self, *, touched_only: bool) -> bool:
        """Settles which parameters take part in the coming step, and splits spans of which only a part does.

        Args:
            touched_only: Parameters take part that got a gradient since the gradients were zeroed, as
                torch.optim.AdamW steps where .grad is not None; else those that require one.

        Returns:
            Whether spans were split.
        """
        versions = self._grad_versions()
        active = touched = list(map(operator.ne, versions, self._zeroed_versions))
        if not touched_only:
            active = [param.requires_grad for param in self.params]
            for index, grad in enumerate(self.grads):
                if touched[index] and not active[index]:
                    grad.zero_()
                    versions[index] = grad._version
        elif not all(touched):
            # What was written through .data raised no version; a GPU would have to be waited for.
            look = not device_values.is_gpu(self.grad.device)
            active = [wrote or (look and bool(grad.any())) for wrote, grad in zip(touched, self.grads, strict=True)]
        self._seen_versions = versions
        if active == self.active:
            return False
        self.active = active
        return self._split_spans()

    def _split_spans(self) -> bool:
        steps, active = self.steps, self.active
        split = steps[:1]
        for index in range(1, len(steps)):
            if steps[index] is not steps[index - 1]:
                split.append(steps[index])
            else:
                split.append(split[-1] if active[index] == active[index - 1] else steps[index].clone())
        if all(ours is theirs for ours, theirs in zip(split, steps, strict=True)):
            return False
        self.spans = self._spans_of(split)
        return True

    def active_spans(self) -> list[_Span]:
        """The spans that the coming step updates."""
        return [span for span in self.spans if self.active[span.start]]

    def state_of(self) -> Iterable[tuple[torch.nn.Parameter, dict[str, torch.Tensor]]]:
        """Each parameter's state in the layout of torch.optim.AdamW, over the flat memory."""
        columns = {
            "step": self.steps,
            "exp_avg": _own_storages(self.exp_avg, self.params),
            "exp_avg_sq": _own_storages(self.exp_avg_sq, self.params),
        }
        if self._low_precision is not None:
            columns["master"] = _own_storages(self.master, self.params)
        for index, param in enumerate(self.params):
            yield param, {name: column[index] for name, column in columns.items()}

    def load_state(self, states: list[dict[str, Any]]) -> None:
        """Takes over the state of each parameter; an empty one is that of a parameter before its first step."""
        counts = [float(state.get("step", 0.0)) for state in states]
        if all(len(set(counts[span.start : span.stop])) == 1 for span in self.spans):
            # Recorded steps read the counts where they are.
            for span in self.spans:
                span.step.fill_(counts[span.start])
        else:
            steps: list[torch.Tensor] = []
            for index, count in enumerate(counts):
                same = index > 0 and count == counts[index - 1]
                steps.append(steps[-1] if same else torch.full_like(self.spans[0].step, count))
            self.spans = self._spans_of(steps)
            # The new spans may join parameters that do and do not take part: the next step looks.
            self.active = []
        for key, buffer in (("exp_avg", self.exp_avg), ("exp_avg_sq", self.exp_avg_sq)):
            for view, state in zip(_views(buffer, self.params), states, strict=True):
                view.copy_(state[key]) if key in state else view.zero_()
        if self._low_precision is not None:
            # A state of torch.optim.AdamW has no master copy: the parameters as they are become it.
            for master, param, state in zip(_views(self.master, self.params), self.params, states, strict=True):
                master.copy_(state.get("master", param))
                param.copy_(master)
        self._note_versions()
        self._refresh_copy()

    def broadcast_(self, group: Any) -> None:
        """Gives every rank the weights of rank 0."""
        collectives.broadcast_(self.master, group)
        if self._low_precision is not None:
            self._low_precision.copy_(self.master)
        if self._copy is not None:
            self._copy.copy_(self.master)

    def take_back(self) -> None:
        """Puts parameters back that somebody gave other memory, as DistributedDataParallel does, with their values.

        Raises:
            DeviceError, DtypeError: They were moved or converted.
        """
        if _addresses(self.params) == self.addresses:
            return
        for index, (param, own) in enumerate(zip(self.params, self._weights, strict=True)):
            if param.data_ptr() == self.addresses[index]:
                continue
            advice = "move or convert the model, and call accelerator.prepare, before creating the optimizer"
            if param.device != own.device:
                raise DeviceError(
                    f"FlatAdamW: `params` must stay on {own.device}, got one on {param.device}: {advice}"
                )
            if param.dtype != own.dtype or param.shape != own.shape:
                raise DtypeError(
                    f"FlatAdamW: `params` must stay {own.dtype} of shape {list(own.shape)}, got {param.dtype} of "
                    f"shape {list(param.shape)}: {advice}"
                )
            own.copy_(param)
            param.data = own
            self.versions[index] = self.copied_versions[index] = -1

    def refresh_master(self) -> None:
        """Takes over what somebody wrote to the parameters since the last step."""
        self._refresh_copy()
        if self._low_precision is None:
            return
        masters = _views(self.master, self.params)
        for param, version, master in zip(self.params, self.versions, masters, strict=True):
            if param._version != version:
                master.copy_(param)
        self._note_versions()

    def _refresh_copy(self) -> None:
        """Rounds anew where somebody wrote to the parameters since."""
        if self._copy is None:
            return
        versions = [param._version for param in self.params]
        if versions != self.copied_versions:
            self._copy.copy_(self.master)
            self.copied_versions = versions

    def attach_grads(self) -> None:
        """Makes every .grad the flat one again where somebody replaced it; None counts as zero."""
        for index, (param, grad) in self._replaced_grads():
            if param.grad is not None:
                grad.copy_(param.grad)
            elif grad._version != self._zeroed_versions[index]:
                grad.zero_()
                self._zeroed_versions[index] = grad._version
            param.grad = grad

    def zero_grads(self) -> None:
        """Zeroes what is not zero, and attaches the gradients."""
        versions = self._grad_versions()
        if versions != self._zeroed_versions:
            self.grad.zero_()
            self._zeroed_versions = versions
        for _, (param, grad) in self._replaced_grads():
            param.grad = grad

    def _replaced_grads(self) -> list[tuple[int, tuple[torch.nn.Parameter, torch.Tensor]]]:
        """The parameters, with index and flat gradient, whose .grad is another tensor or None."""
        if all(map(operator.is_, [param.grad for param in self.params], self.grads)):
            return []
        pairs = enumerate(zip(self.params, self.grads, strict=True))
        return [(index, (param, grad)) for index, (param, grad) in pairs if param.grad is not grad]

    def note_kernel_writes(self) -> None:
        """Counts what the kernel writes behind autograd's back: a graph that saved the old weights must notice.

        The kernel zeroes the gradients that `choose_active` saw, without raising their versions.
        """
        torch.autograd.graph.increment_version(self.params if self._copy is None else [*self.params, self._copy])
        self._note_versions()
        if self._copy is not None:
            self.copied_versions = list(self.versions)
        self._zeroed_versions = self._seen_versions

    def note_zeroed_grads(self) -> None:
        """Takes note that the gradients are zero now."""
        self._zeroed_versions = self._grad_versions()

    def _note_versions(self) -> None:
        """Remembers the parameters' versions, where their values are kept in another precision too."""
        if self._copy is not None or self._low_precision is not None:
            self.versions = [param._version for param in self.params]
