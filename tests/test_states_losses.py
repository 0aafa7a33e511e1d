"""Losses on a teacher's states and on its logits, against plain loops in numpy, hand numbers and identities."""

import math

import numpy as np
import pytest
import torch

from nlpxfer.losses import (
    binary_soft_target_loss,
    contrastive_loss,
    hidden_loss,
    logit_loss,
    relation_loss,
    relational_loss,
    soft_target_loss,
    teacher_loss,
)
from nlpxfer.problem import MULTI_LABEL, REGRESSION, SINGLE_LABEL

GENERATOR = np.random.default_rng(0)
MASK = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])


def states(*shape):
    return GENERATOR.normal(size=shape)


def tensors(*arrays):
    return [torch.tensor(array) for array in arrays]


def softmax(values):
    values = np.exp(values - values.max())
    return values / values.sum()


# -- slow references: one row, one head, one token at a time


def hidden_by_hand(student, teacher, mask):
    found = []
    for row in range(len(mask)):
        tokens = [i for i in range(len(mask[row])) if mask[row][i]]
        errors = [sum((s - t) ** 2 for s, t in zip(student[row][i], teacher[row][i], strict=True)) for i in tokens]
        found.append(sum(errors) / len(tokens) / student.shape[-1])
    return found


def relation_by_hand(student, teacher, mask, heads):
    found = []
    for row in range(len(mask)):
        tokens = [i for i in range(len(mask[row])) if mask[row][i]]
        total = 0.0
        for head in range(heads):
            for i in tokens:
                shares = []
                for side in (student, teacher):
                    size = side.shape[-1] // heads
                    part = side[row][tokens][:, head * size : (head + 1) * size]
                    shares.append(softmax(np.array([part[tokens.index(i)] @ other for other in part]) / size**0.5))
                total += sum(t * (math.log(t) - math.log(s)) for s, t in zip(*shares, strict=True))
        found.append(total / heads / len(tokens))
    return found


def cosine(a, b):
    return a @ b / math.sqrt(a @ a) / math.sqrt(b @ b)


def similarity_by_hand(kind, student, teacher, others, tau):
    found = []
    for s, t in zip(student, teacher, strict=True):
        compared = [t, *(other for other in others if cosine(t, other) < 1 - 1e-6)]
        mine = softmax(np.array([cosine(s, other) / tau for other in compared]))
        theirs = softmax(np.array([cosine(t, other) / tau for other in compared]))
        if kind == "contrastive":
            found.append(-math.log(mine[0]))
        else:
            found.append(sum(p * (math.log(p) - math.log(q)) for p, q in zip(theirs, mine, strict=True)))
    return found


def test_hidden_loss():
    student, teacher = states(3, 4, 6), states(3, 4, 6)
    found = hidden_loss(*tensors(student, teacher, MASK))
    np.testing.assert_allclose(found, hidden_by_hand(student, teacher, MASK))


@pytest.mark.parametrize("heads", [1, 2, 6])
def test_relation_loss_between_unlike_widths(heads):
    student, teacher = states(3, 4, 6), states(3, 4, 12)
    found = relation_loss(*tensors(student, teacher, MASK), num_relation_heads=heads)
    np.testing.assert_allclose(found, relation_by_hand(student, teacher, MASK, heads))
    assert float(found[2]) == 0  # one token is related to itself alone


@pytest.mark.parametrize(("kind", "loss"), [("contrastive", contrastive_loss), ("relational", relational_loss)])
def test_losses_on_sentence_states(kind, loss):
    student, teacher = states(5, 6), states(5, 6)
    others = np.concatenate([states(7, 6), 3 * teacher[1:3]])  # two rows meet their own text among the others
    found = loss(*tensors(student, teacher, others), temperature=0.2)
    np.testing.assert_allclose(found, similarity_by_hand(kind, student, teacher, others, 0.2))


def test_squared_error_of_logits():
    student, teacher = states(3, 5), states(3, 5)
    expected = [
        np.mean([(s - t) ** 2 for s, t in zip(a, b, strict=True)]) for a, b in zip(student, teacher, strict=True)
    ]
    for kind in (SINGLE_LABEL, MULTI_LABEL):
        found = teacher_loss(kind, *tensors(student, teacher), temperature=3.0, kd_loss="mse")
        np.testing.assert_allclose(found, expected)
    number = teacher_loss(REGRESSION, *tensors(student[:, :1], teacher[:, :1]))
    np.testing.assert_allclose(number, (student[:, 0] - teacher[:, 0]) ** 2 / 2)


def test_hand_numbers():
    one = torch.tensor([[[1.0, 2.0], [5.0, 1.0]]])
    other = torch.tensor([[[0.0, 0.0], [2.0, 1.0]]])
    assert hidden_loss(one, other, torch.tensor([[1, 1]])).item() == pytest.approx((5 / 2 + 9 / 2) / 2)
    # student: scores 0 everywhere; teacher: log 3 with itself, 0 with the other
    teacher = math.sqrt(math.log(3)) * torch.eye(2)[None]
    divergence = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    student = torch.zeros(1, 2, 1)
    scaled = teacher * 2**0.25  # before the division by sqrt(2)
    found = relation_loss(student, scaled, torch.ones(1, 2), num_relation_heads=1)
    assert found.item() == pytest.approx(divergence)


# -- properties


def all_losses(student, teacher, mask):
    sentence = {"temperature": 0.3}
    return {
        "hidden": hidden_loss(student, teacher, mask),
        "relation": relation_loss(student, teacher, mask, num_relation_heads=2),
        "contrastive": contrastive_loss(student[:, 0], teacher[:, 0], teacher[:, 1], **sentence),
        "relational": relational_loss(student[:, 0], teacher[:, 0], teacher[:, 1], **sentence),
        "logits": logit_loss(student[:, 0], teacher[:, 0]),
    }


def test_equal_states_cost_nothing():
    same = torch.tensor(states(3, 4, 6))
    found = all_losses(same, same, torch.tensor(MASK))
    least = found.pop("contrastive")
    assert all(float(values.abs().max()) < 1e-12 for values in found.values()), found
    turned = contrastive_loss(torch.tensor(states(3, 6)), same[:, 0], same[:, 1], temperature=0.3)
    assert bool((least < turned).all())


def test_gradients_are_right():
    student, teacher = torch.tensor(states(2, 3, 4), requires_grad=True), torch.tensor(states(2, 3, 4))
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    for name in all_losses(student, teacher, mask):
        assert torch.autograd.gradcheck(lambda s, name=name: all_losses(s, teacher, mask)[name], (student,))


@pytest.mark.parametrize("filled", [0.0, 1e30, float("nan"), float("inf")])
def test_padding_counts_for_nothing(filled):
    student, teacher = torch.tensor(states(2, 3, 4)), torch.tensor(states(2, 3, 4))
    short = all_losses(student.requires_grad_(), teacher, torch.ones(2, 3))
    sum(short[name].sum() for name in ("hidden", "relation")).backward()
    wide = torch.cat([student.detach(), torch.full((2, 2, 4), filled)], dim=1).requires_grad_()
    padded_teacher = torch.cat([teacher, torch.full((2, 2, 4), filled)], dim=1)
    mask = torch.tensor([[1, 1, 1, 0, 0]] * 2)
    padded = all_losses(wide, padded_teacher, mask)
    sum(padded[name].sum() for name in ("hidden", "relation")).backward()
    for name in ("hidden", "relation"):
        torch.testing.assert_close(padded[name], short[name], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(wide.grad[:, :3], student.grad, rtol=1e-12, atol=1e-12)
    assert not wide.grad[:, 3:].any()


@pytest.mark.parametrize("loss", [soft_target_loss, binary_soft_target_loss])
def test_the_gradient_keeps_its_size_over_temperatures(loss):
    """T^2 is what does it: without, it falls by a factor of more than a hundred."""
    student, teacher = torch.tensor(states(50, 8), requires_grad=True), torch.tensor(states(50, 8))
    norms = {}
    for temperature in (1.0, 2.0, 4.0, 8.0, 16.0):
        (gradient,) = torch.autograd.grad(loss(student, teacher, temperature=temperature).sum(), student)
        norms[temperature] = float(gradient.norm())
    assert max(norms.values()) / min(norms.values()) < 2
    assert norms[16.0] / norms[8.0] == pytest.approx(1, abs=0.05)


def test_a_high_temperature_is_half_the_squared_error():
    """Of logits with mean 0: Hinton et al. 2015, section 2.1; Kim et al. 2021, section 3."""
    student, teacher = (
        torch.tensor(values - values.mean(axis=1, keepdims=True)) for values in (states(4, 6), states(4, 6))
    )
    hot = soft_target_loss(student, teacher, temperature=1e4)
    torch.testing.assert_close(hot, logit_loss(student, teacher) / 2, rtol=1e-3, atol=0)


def test_what_does_not_fit_is_refused():
    one, mask = torch.zeros(2, 3, 4), torch.ones(2, 3)
    with pytest.raises(ValueError, match="4 and 5 wide"):
        hidden_loss(one, torch.zeros(2, 3, 5), mask)
    with pytest.raises(ValueError, match="differ in rows or tokens"):
        relation_loss(one, torch.zeros(2, 2, 4), mask, num_relation_heads=1)
    with pytest.raises(ValueError, match="4 numbers cannot be split into 3 relation heads"):
        relation_loss(one, one, mask, num_relation_heads=3)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        contrastive_loss(one[0], one[0], one[0], temperature=0.0)
    with pytest.raises(ValueError, match="do not fit together"):
        relational_loss(one[0], one[0], torch.zeros(3, 5), temperature=1.0)
