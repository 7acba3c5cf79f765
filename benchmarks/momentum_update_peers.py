"""The ways to move a momentum encoder that perfvl is compared with, each written as well as PyTorch allows.

Every builder takes the targets (the contender's own), the sources (everybody's) and the momentum m, prepares what a
training run prepares once, and returns ``update()``, which moves the targets one step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .workload import Unavailable, imported

Update = Callable[[], object]
Build = Callable[[list[Tensor], list[Tensor], float], Update]


def moco(targets: list[Tensor], sources: list[Tensor], momentum: float) -> Update:
    """MoCo's expression (BriVL's, ALBEF's, BLIP's): two temporaries per tensor, storage re-bound at every step."""

    def update() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.data = target.data * momentum + source.data * (1.0 - momentum)

    return update


def per_tensor(targets: list[Tensor], sources: list[Tensor], momentum: float) -> Update:
    """``mul_`` and ``add_`` in place."""

    def update() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.mul_(momentum).add_(source, alpha=1.0 - momentum)

    return update


def foreach_mul_add(targets: list[Tensor], sources: list[Tensor], momentum: float) -> Update:
    """Two foreach operations over the whole list (lightly, NeMo, DINOv2; timm where dtypes differ)."""

    def update() -> None:
        torch._foreach_mul_(targets, momentum)
        torch._foreach_add_(targets, sources, alpha=1.0 - momentum)

    return update


def foreach_lerp(targets: list[Tensor], sources: list[Tensor], momentum: float) -> Update:
    """One foreach operation: the least bytes where all dtypes are equal."""
    return lambda: torch._foreach_lerp_(targets, sources, 1.0 - momentum)


def cast_foreach_lerp(targets: list[Tensor], sources: list[Tensor], momentum: float) -> Update:
    """The sources are cast into float32 buffers that are kept (as large as the model), then foreach lerp."""
    cast = [torch.empty_like(target) for target in targets]

    def update() -> None:
        torch._foreach_copy_(cast, sources)
        torch._foreach_lerp_(targets, cast, 1.0 - momentum)

    return update


def cast_lerp_per_tensor(targets: list[Tensor], sources: list[Tensor], momentum: float) -> Update:
    """Cast and lerp tensor by tensor: a cast tensor that fits the cache is not written to memory in between."""

    def update() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.lerp_(source.to(target.dtype), 1.0 - momentum)

    return update


def averaged_model(targets: list[Tensor], sources: list[Tensor], momentum: float) -> Update:
    """``torch.optim.swa_utils.AveragedModel`` with its multi-tensor EMA; past its first call, which only copies."""
    online = holding(sources)
    average = AveragedModel(online, multi_avg_fn=get_ema_multi_avg_fn(momentum))
    average.n_averaged.fill_(1)
    share(average.module, targets)
    return lambda: average.update_parameters(online)


def timm_ema(targets: list[Tensor], sources: list[Tensor], momentum: float) -> Update:
    """timm's ``ModelEmaV3``."""
    online = holding(sources)
    average = imported("timm.utils", "timm: pip install 'perfvl[models]'").ModelEmaV3(online, decay=momentum)
    share(average.module, targets)
    return lambda: average.update(online)


def copied(targets: list[Tensor], sources: list[Tensor], momentum: float) -> Update:
    """Sources copied over targets. Not an average, but less than any average has to move."""
    return lambda: torch._foreach_copy_(targets, sources)


def where_allowed(build: Build) -> Build:
    """A peer that may refuse to mix dtypes: tried on one number, so that its reason stands where its time would."""

    def build_tried(targets: list[Tensor], sources: list[Tensor], momentum: float) -> Update:
        try:
            build([targets[0].new_zeros(1)], [sources[0].new_zeros(1)], momentum)()
        except RuntimeError as error:
            dtype = str(sources[0].dtype).removeprefix("torch.")
            raise Unavailable(f"refuses {dtype} sources: {str(error).splitlines()[0]}") from None
        return build(targets, sources, momentum)

    return build_tried


def holding(tensors: list[Tensor]) -> nn.Module:
    """A module whose parameters are these tensors, not copies of them."""
    return nn.ParameterList([nn.Parameter(tensor) for tensor in tensors])


def share(module: nn.Module, tensors: list[Tensor]) -> None:
    """Lets the parameters of ``module`` be these tensors, in order, and takes over their dtype."""
    module.to(tensors[0].dtype)
    for parameter, tensor in zip(module.parameters(), tensors, strict=True):
        parameter.data = tensor
