"""Training from random weights with 2:4 masks beside dense training of the same steps, on a small model."""

from __future__ import annotations

from functools import cache

import pytest
from harness_plugins.sparsity import sr_ste

from tests.sparsity.nano import nano_context, nano_model
from tests.zoo_models import held_out_nll

pytestmark = pytest.mark.slow


@cache
def _trained(lambda_w: float | str | None) -> tuple[float, float]:
    """Held-out nats, and the share of masks that changed at each step of the last half; None: dense."""
    model = nano_model()
    context = nano_context(model)
    if lambda_w is None:
        context.train(model)
        return held_out_nll(model, seq_len=64), 0.0
    model = sr_ste.METHOD.transform(model, sr_ste.SrSteOptions(lambda_w=lambda_w), context)
    flips = next(record.value for record in context.records if record.metric == "mask_flips_last_half")
    return held_out_nll(model, seq_len=64), flips
