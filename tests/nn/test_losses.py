"""The losses of a student: closed forms, exact gradients, and what cannot be compared."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from harness.errors import ConfigError
from harness.nn.losses import hidden_state_loss, outputs_of, soft_target_loss, task_loss
from harness.testing import tiny_model


def _normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_gradient_of_soft_targets_is_that_of_the_formula(temperature):
    teacher = 3 * _normal(2, 5, 11, seed=0)
    mine, reference = (3 * _normal(2, 5, 11, seed=1) for _ in range(2))
    loss = soft_target_loss(mine.requires_grad_(), teacher, temperature)
    loss.backward()
    p = (teacher / temperature).softmax(-1)
    log_q = (reference.requires_grad_() / temperature).log_softmax(-1)
    expected = temperature**2 * (p * (p.log() - log_q)).sum(-1).mean()
    (3 * expected).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(3 * mine.grad, reference.grad)


def test_equal_predictions_have_no_gradient_at_all():
    logits = 3 * _normal(2, 5, 11, seed=0)
    student = logits.clone().requires_grad_()
    loss = soft_target_loss(student, logits, 2.0)
    loss.backward()
    assert float(loss.detach()) == 0
    assert not student.grad.any()


def test_hidden_states_are_compared_relative_to_the_teachers():
    student, teacher = ([scale * _normal(2, 3, 4, seed=s) for scale in (1, 10)] for s in (0, 1))
    expected = (
        sum(float((a - b).square().mean() / b.square().mean()) for a, b in zip(student, teacher, strict=True))
        / 2
    )
    assert float(hidden_state_loss(student, teacher)) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ConfigError, match="1 layers of width 4, the teacher 0 of width 4"):
        hidden_state_loss(student, teacher[:1])
    with pytest.raises(ConfigError, match="width 3"):
        hidden_state_loss(student, [each[..., :3] for each in teacher])


def test_labels_that_count_for_nothing():
    logits, labels = _normal(2, 4, 9, seed=0), torch.tensor([[1, -100, 3, 4], [-100, -100, -100, 0]])
    expected = F.cross_entropy(logits[labels != -100], labels[labels != -100])
    torch.testing.assert_close(task_loss(logits, labels), expected)
    assert float(task_loss(logits, torch.full_like(labels, -100))) == 0


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "bert"])
def test_outputs_hold_every_layer(family):
    with torch.no_grad():
        outputs = outputs_of(tiny_model(family), torch.arange(12).view(1, 12))
    assert [tuple(states.shape) for states in outputs.layers] == [(1, 12, 128)] * 3
    assert torch.equal(outputs.layers[-1], outputs.hidden)
