"""Losses against hand-computed numbers and slow float64 references written from the formulas."""

import math

import numpy as np
import pytest
import torch

from nlpxfer.losses import label_loss, soft_target_loss


def softmax(row):
    largest = max(row)
    shifted = [math.exp(value - largest) for value in row]
    return [value / sum(shifted) for value in shifted]


def slow_label_loss(logits, labels, smoothing):
    """-sum_c q_c log p_c with q = (1 - smoothing) one-hot + smoothing / C."""
    losses = []
    for row, label in zip(logits, labels, strict=True):
        p = softmax(row)
        target = [smoothing / len(row) + (1 - smoothing) * (index == label) for index in range(len(row))]
        losses.append(0.0 if label == -100 else -sum(q * math.log(pc) for q, pc in zip(target, p, strict=True)))
    return losses


def slow_soft_target_loss(student, teacher, temperature):
    """T^2 sum_c t_c log(t_c / s_c) of the softened distributions."""
    losses = []
    for student_row, teacher_row in zip(student, teacher, strict=True):
        s = softmax([value / temperature for value in student_row])
        t = softmax([value / temperature for value in teacher_row])
        losses.append(temperature**2 * sum(tc * math.log(tc / sc) for sc, tc in zip(s, t, strict=True)))
    return losses


def random_logits(rows=7, classes=5, seed=0):
    return np.random.default_rng(seed).normal(scale=3, size=(rows, classes))


def test_label_loss_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]))
    expected = torch.tensor([math.log(2), math.log(5)])
    torch.testing.assert_close(label_loss(logits, torch.tensor([0, 1])), expected)


def test_smoothed_label_loss_by_hand():
    # p = (1/2, 1/4, 1/4), label 0, smoothing 0.3: q = (0.8, 0.1, 0.1); 0.8 ln 2 + 0.2 ln 4 = 1.2 ln 2
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25]]))
    loss = label_loss(logits, torch.tensor([0]), label_smoothing=0.3)
    assert loss.item() == pytest.approx(1.2 * math.log(2), rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_label_loss_equals_the_formula(smoothing):
    logits, labels = random_logits(), [0, 4, -100, 2, 1, -100, 3]
    found = label_loss(torch.from_numpy(logits), torch.tensor(labels), label_smoothing=smoothing)
    np.testing.assert_allclose(found, slow_label_loss(logits.tolist(), labels, smoothing), rtol=1e-12)
    torch_mean = torch.nn.CrossEntropyLoss(label_smoothing=smoothing)(torch.from_numpy(logits), torch.tensor(labels))
    assert found.sum().item() / 5 == pytest.approx(torch_mean.item(), rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_rows_without_a_label_cost_nothing_and_get_no_gradient(smoothing):
    logits = torch.randn(3, 4, requires_grad=True)
    rows = label_loss(logits, torch.tensor([-100, 2, -100]), label_smoothing=smoothing)
    rows.sum().backward()
    assert rows[[0, 2]].tolist() == [0.0, 0.0]
    assert logits.grad[[0, 2]].abs().max() == 0
    assert logits.grad[1].abs().min() > 0


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_weighted_and_adjusted_loss_equals_the_formula(gamma):
    logits, labels = random_logits(), [0, 4, -100, 2, 1, -100, 3]
    weights, offsets = [0.5, 1.0, 2.0, 0.0, 3.0], [-0.1, -2.0, 0.3, -1.0, -0.7]
    found = label_loss(
        torch.from_numpy(logits),
        torch.tensor(labels),
        focal_gamma=gamma,
        class_weights_C=torch.tensor(weights, dtype=torch.float64),
        offsets_C=torch.tensor(offsets, dtype=torch.float64),
    )
    expected = []
    for row, label in zip(logits, labels, strict=True):
        p = softmax([value + offset for value, offset in zip(row, offsets, strict=True)])[max(label, 0)]
        expected.append(0.0 if label == -100 else -weights[label] * (1 - p) ** gamma * math.log(p))
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_gradient_of_a_row_that_is_surely_right_is_finite(gamma):
    logits = torch.tensor([[50.0, 0.0], [0.3, 0.1]], requires_grad=True)
    label_loss(logits, torch.tensor([0, 0]), focal_gamma=gamma).sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[1].abs().min() > 0


def test_gradient_of_the_focal_loss():
    logits = torch.from_numpy(random_logits(rows=3)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: label_loss(x, torch.tensor([0, 1, 2]), focal_gamma=2.0), logits)


def test_soft_target_loss_by_hand():
    # T = 1: teacher (1/2, 1/2), student (1/4, 3/4): 1/2 ln 2 + 1/2 ln(2/3)
    teacher, student = torch.log(torch.tensor([[0.5, 0.5]])), torch.log(torch.tensor([[0.25, 0.75]]))
    loss = soft_target_loss(student, teacher, temperature=1.0)
    assert loss.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-6)
    # T = 2 softens (1/10, 9/10) to (1/4, 3/4), and T^2 = 4
    student = torch.log(torch.tensor([[0.1, 0.9]]))
    loss = soft_target_loss(student, teacher, temperature=2.0)
    assert loss.item() == pytest.approx(4 * (0.5 * math.log(2) + 0.5 * math.log(2 / 3)), rel=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0, 20.0])
def test_soft_target_loss_equals_the_formula(temperature):
    student, teacher = random_logits(seed=1), random_logits(seed=2)
    found = soft_target_loss(torch.from_numpy(student), torch.from_numpy(teacher), temperature=temperature)
    expected = slow_soft_target_loss(student.tolist(), teacher.tolist(), temperature)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert (found > 0).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 7.0])
def test_no_divergence_from_oneself(temperature):
    logits = torch.from_numpy(random_logits())
    shifted = logits + torch.arange(7.0).unsqueeze(1)  # logits are known up to a constant per row
    for other in (logits, shifted):
        loss = soft_target_loss(logits, other, temperature=temperature)
        torch.testing.assert_close(loss, torch.zeros(7, dtype=torch.float64), rtol=0, atol=1e-12)


def test_gradients_equal_finite_differences():
    student = torch.from_numpy(random_logits(rows=3)).requires_grad_()
    teacher = torch.from_numpy(random_logits(rows=3, seed=1))
    labels = torch.tensor([1, -100, 4])
    assert torch.autograd.gradcheck(lambda s: soft_target_loss(s, teacher, temperature=2.5), student)
    assert torch.autograd.gradcheck(lambda s: label_loss(s, labels, label_smoothing=0.1), student)


def test_gradient_is_that_of_the_paper():
    """d/ds of T^2 KL is T (softmax(s/T) - softmax(t/T)), nearly (s - t)/C for zero-mean logits and large T."""
    student = torch.from_numpy(random_logits(rows=2)).requires_grad_()
    teacher = torch.from_numpy(random_logits(rows=2, seed=1))
    soft_target_loss(student, teacher, temperature=3.0).sum().backward()
    expected = 3.0 * (torch.softmax(student.detach() / 3, -1) - torch.softmax(teacher / 3, -1))
    torch.testing.assert_close(student.grad, expected, rtol=1e-9, atol=1e-12)

    student.grad = None
    soft_target_loss(student, teacher, temperature=1e4).sum().backward()
    centred = [values - values.mean(-1, keepdim=True) for values in (student.detach(), teacher)]
    torch.testing.assert_close(student.grad, (centred[0] - centred[1]) / 5, rtol=1e-2, atol=1e-3)


def test_temperature_keeps_the_size_of_the_gradient():
    norms = []
    for temperature in (2.0, 4.0, 8.0, 16.0):
        student = torch.from_numpy(random_logits(seed=3) / 3).requires_grad_()
        teacher = torch.from_numpy(random_logits(seed=4) / 3)
        soft_target_loss(student, teacher, temperature=temperature).sum().backward()
        norms.append(student.grad.norm().item())
    assert max(norms) / min(norms) < 1.3  # without T^2 it would be 64 times smaller at T = 16 than at T = 2


def test_order_of_the_classes_does_not_matter():
    order = torch.tensor([3, 0, 4, 1, 2])
    student, teacher = torch.from_numpy(random_logits(seed=5)), torch.from_numpy(random_logits(seed=6))
    labels = torch.tensor([0, 4, -100, 2, 1, 3, 3])
    moved = torch.where(labels >= 0, torch.argsort(order)[labels.clamp(min=0)], labels)
    torch.testing.assert_close(
        soft_target_loss(student[:, order], teacher[:, order], temperature=2.0),
        soft_target_loss(student, teacher, temperature=2.0),
    )
    torch.testing.assert_close(label_loss(student[:, order], moved), label_loss(student, labels))
    wrong = soft_target_loss(student, teacher[:, order], temperature=2.0)
    assert (wrong - soft_target_loss(student, teacher, temperature=2.0)).abs().max() > 0.1


def test_half_precision_is_computed_in_float32():
    logits = torch.from_numpy(random_logits()).float()
    rough, labels = logits.bfloat16(), torch.zeros(7, dtype=torch.long)
    assert label_loss(rough, labels).dtype == torch.float32
    torch.testing.assert_close(label_loss(rough, labels), label_loss(rough.float(), labels), rtol=0, atol=0)
    found = soft_target_loss(rough, logits, temperature=2.0)
    torch.testing.assert_close(found, soft_target_loss(rough.float(), logits, temperature=2.0), rtol=0, atol=0)


def test_extreme_logits_stay_finite():
    student, teacher = torch.tensor([[1e4, -1e4]]), torch.tensor([[-1e4, 1e4]])
    assert soft_target_loss(student, teacher, temperature=1.0).item() == pytest.approx(2e4)
    assert label_loss(student, torch.tensor([1])).item() == pytest.approx(2e4)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_impossible_temperatures_are_refused(temperature):
    with pytest.raises(ValueError, match="temperature must be"):
        soft_target_loss(torch.zeros(1, 2), torch.zeros(1, 2), temperature=temperature)


@pytest.mark.parametrize("teacher", [(2, 4), (1, 3), (3,)])
def test_other_shapes_are_refused_even_if_they_broadcast(teacher):
    with pytest.raises(ValueError, match="differ in shape"):
        soft_target_loss(torch.zeros(2, 3), torch.zeros(*teacher), temperature=1.0)
