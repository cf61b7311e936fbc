"""Training with masks as the papers write it: dense values kept aside, a masked copy computed with.

Uses nothing of `harness.nn.held_masks` or of the training loop; batches and rates are given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.func import functional_call
from torch.nn import functional as F

from harness.training import TrainSettings

Masks = Mapping[str, torch.Tensor]
ChooseMasks = Callable[[int, Mapping[str, torch.Tensor]], tuple[Masks, Masks]]


def masked_training(
    model: torch.nn.Module,
    batches: list[torch.Tensor],
    rates: list[float],
    settings: TrainSettings,
    choose: ChooseMasks,
    penalty: Callable[[str, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> list[dict[str, torch.Tensor]]:
    """The dense values of all parameters before the first step and after each one.

    `choose(step, values)` gives the masks of the forward pass and of the update, for the masked parameters by
    full name. `penalty(name, values, forward, update)` is added to the gradient.
    """
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    matrices = [value for value in values.values() if value.ndim >= 2]
    vectors = [value for value in values.values() if value.ndim < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}]
    groups += [{"params": vectors, "weight_decay": 0.0}] if vectors else []
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95))
    history = [{name: value.clone() for name, value in values.items()}]
    for step, (tokens, rate) in enumerate(zip(batches, rates, strict=True)):
        forward, update = choose(step, values)
        used = {
            name: (value * forward[name] if name in forward else value).detach().requires_grad_()
            for name, value in values.items()
        }
        logits = functional_call(model, used, kwargs={"input_ids": tokens, "use_cache": False}).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        gradients = dict(zip(used, torch.autograd.grad(loss, list(used.values())), strict=True))
        before = {name: value.clone() for name, value in values.items()}
        for name, value in values.items():
            value.grad = gradients[name]
            if name in update:
                value.grad = value.grad * update[name]
                for moment in optimizer.state.get(value, {}).values():
                    if moment.shape == value.shape:
                        moment.mul_(update[name])
                if penalty is not None:
                    value.grad += penalty(name, value, forward[name], update[name])
        torch.nn.utils.clip_grad_norm_(list(values.values()), settings.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        for name, keep in update.items():
            values[name].copy_(torch.where(keep, values[name], before[name]))
        history.append({name: value.clone() for name, value in values.items()})
    return history
