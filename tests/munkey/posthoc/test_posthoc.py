"""Unlearning methods on cases whose answer is known.

A table is a linear layer on one-hot inputs: each instance has logits of its own, so that what a method does to one says
nothing about another. Its slopes and fixed points are known in closed form.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
from stores import seeded
from torch import Tensor, nn
from torch.nn import functional as F

from munkey.posthoc import (
    Examples,
    adversarial_examples,
    amun,
    bad_teacher,
    fine_tune,
    l1_sparse,
    neg_grad,
    neg_grad_plus,
    random_labels,
    sal_un,
    scrub,
    ssd,
)
from munkey.posthoc.relabelling import wrong_labels

METHODS = [
    fine_tune,
    neg_grad,
    neg_grad_plus,
    l1_sparse,
    random_labels,
    bad_teacher,
    scrub,
    sal_un,
    partial(ssd, alpha=1.5),
    amun,
]
CLASSES, COUNT = 3, 6
LABELS = torch.arange(COUNT) % CLASSES
RETAIN: Examples = (torch.eye(COUNT)[:4], LABELS[:4])
FORGET: Examples = (torch.eye(COUNT)[4:], LABELS[4:])


def table(seed: int = 0) -> nn.Linear:
    """A table that knows all labels, more or less."""
    built = nn.Linear(COUNT, CLASSES, bias=False)
    with torch.no_grad():
        built.weight.copy_(torch.randn(CLASSES, COUNT, generator=seeded(seed)) + 2 * F.one_hot(LABELS, CLASSES).T)
    return built


def logits(built: nn.Module) -> tuple[Tensor, Tensor]:
    """Of what stays and of what goes."""
    return built(RETAIN[0]).detach(), built(FORGET[0]).detach()


def sgd(built: nn.Module, rate: float = 1.0, **options: float) -> torch.optim.SGD:
    return torch.optim.SGD(built.parameters(), rate, **options)


def slope(found: Tensor, labels: Tensor) -> Tensor:
    """Of the mean cross-entropy by the logits: `(p - y) / n`."""
    return (found.softmax(1) - F.one_hot(labels, CLASSES)) / len(labels)


def test_fine_tuning_of_a_strictly_convex_loss_ends_where_retraining_does() -> None:
    x, y = torch.randn(60, 4, generator=seeded(0)).double(), torch.randint(3, (60,), generator=seeded(1))
    keep, go = (x[:40], y[:40]), (x[40:], y[40:])
    ends = []
    for start in (1, 2):
        model = nn.Linear(4, 3, dtype=torch.float64)
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_(torch.randn(weight.shape, generator=seeded(start)))
        if start == 1:
            fine_tune(model, (x, y), go, optimizer=sgd(model, 0.5, weight_decay=0.1), steps=200, batch_size=60)
        fine_tune(model, keep, go, optimizer=sgd(model, 0.5, weight_decay=0.1), steps=600, batch_size=40)
        ends.append([weight.detach().clone() for weight in model.parameters()])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other)


def test_one_step_of_each_method_of_descent() -> None:
    """Rows of a table move by the closed form of the slope, and by nothing else."""
    start, (kept, gone) = table(), logits(table())
    ours, theirs = slope(kept, RETAIN[1]), slope(gone, FORGET[1])
    for method, options, expected in (
        (fine_tune, {}, (-ours, 0 * theirs)),
        (neg_grad, {}, (0 * ours, theirs)),
        (neg_grad_plus, {"retain_weight": 0.7}, (-0.7 * ours, 0.3 * theirs)),
        (l1_sparse, {"gamma": 0.1}, (-ours - 0.1 * kept.sign(), -0.1 * gone.sign())),
    ):
        model = copy.deepcopy(start)
        method(model, RETAIN, FORGET, optimizer=sgd(model, 0.5), steps=1, **options)  # type: ignore[operator]
        for found, before, moved in zip(logits(model), (kept, gone), expected, strict=True):
            torch.testing.assert_close(found, before + 0.5 * moved)


def test_the_penalty_falls_to_nothing_and_weights_without_use_to_zero() -> None:
    model, rates = nn.Linear(1, 2, bias=False), []
    with torch.no_grad():
        model.weight.fill_(5.0)
    zeros = (torch.zeros(2, 1), torch.tensor([0, 1]))
    optimizer = sgd(model, 1.0)
    optimizer.register_step_post_hook(lambda *_: rates.append(model.weight[0, 0].item()))
    l1_sparse(model, zeros, zeros, optimizer=optimizer, steps=4, gamma=1.0)
    assert rates == pytest.approx([4.0, 3.25, 2.75, 2.5])


def test_random_labels_are_wrong_each_as_likely_and_learned() -> None:
    labels = torch.arange(3000) % 3
    shifts = ((wrong_labels(labels, 3, generator=seeded(0)) - labels) % 3).bincount(minlength=3)
    assert shifts[0] == 0 and abs(int(shifts[1]) - 1500) < 110
    model = table()
    random_labels(model, RETAIN, FORGET, optimizer=sgd(model, 3.0), steps=200)
    kept, gone = logits(model)
    assert (kept.argmax(1) == RETAIN[1]).all() and (gone.argmax(1) != FORGET[1]).all()
    assert F.cross_entropy(gone, gone.argmax(1)) < 0.02, "one wrong label each, the same in every step"


def test_saliency_leaves_all_but_the_steepest_weights_as_they_were() -> None:
    start = table()
    steep = torch.zeros(CLASSES, COUNT)
    steep[:, 4:] = slope(logits(start)[1], FORGET[1]).T.abs()
    chosen = steep >= steep.flatten().sort(descending=True).values[3]  # the 4 steepest of 18
    for optimizer_of in (
        lambda m: torch.optim.AdamW(m.parameters(), lr=0.1, weight_decay=0.3),
        lambda m: sgd(m, 0.5, momentum=0.9, weight_decay=0.3),
    ):
        model = copy.deepcopy(start)
        optimizer = optimizer_of(model)
        sal_un(model, RETAIN, FORGET, optimizer=optimizer, steps=5, share=4 / 18, batch_size=1)
        assert torch.equal(model.weight != start.weight, chosen)
        optimizer.step()
        assert not optimizer._optimizer_step_post_hooks, "the optimiser is as free as before"


def test_with_all_weights_salient_it_is_random_labels() -> None:
    one, other = table(), table()
    sal_un(one, RETAIN, FORGET, optimizer=sgd(one), steps=5, share=1.0, generator=seeded(3))
    random_labels(other, RETAIN, FORGET, optimizer=sgd(other), steps=5, generator=seeded(3))
    assert torch.equal(one.weight, other.weight)


@pytest.mark.parametrize("incompetent", [None, table(seed=9)])
def test_a_student_of_two_teachers_ends_as_each_of_them(incompetent: nn.Module | None) -> None:
    model, before = table(), logits(table())[0].softmax(1)
    bad_teacher(model, RETAIN, FORGET, optimizer=sgd(model, 3.0), steps=400, incompetent=incompetent)
    kept, gone = (found.softmax(1) for found in logits(model))
    wanted = torch.full((2, 3), 1 / 3) if incompetent is None else logits(incompetent)[1].softmax(1)
    torch.testing.assert_close(kept, before)
    torch.testing.assert_close(gone, wanted, atol=1e-4, rtol=1e-4)


def test_scrubbing_leaves_the_teacher_where_something_goes_and_not_where_it_stays() -> None:
    """The slope of a distance to the teacher is zero at the teacher: a shared bias, moved by what stays, begins it."""
    model = nn.Linear(COUNT, CLASSES)
    with torch.no_grad():
        model.weight.copy_(table().weight), model.bias.zero_()
    before = [found.softmax(1) for found in logits(model)]
    scrub(model, RETAIN, FORGET, optimizer=sgd(model, 0.5), steps=300, alpha=1.0, temperature=1.0, rounds=50)
    kept, gone = ((p * (p / found.softmax(1)).log()).sum(1) for p, found in zip(before, logits(model), strict=True))
    assert gone.min() > 1 and kept.max() < 1
    assert (logits(model)[0].argmax(1) == RETAIN[1]).all()


def test_scrubbing_steps_up_and_down_in_turns() -> None:
    """By hand: up on what goes, down on what stays, and down again once the rounds are over."""
    model, rate = nn.Linear(COUNT, CLASSES), 0.2
    teacher, by_hand = copy.deepcopy(model), copy.deepcopy(model)
    scrub(model, RETAIN, FORGET, optimizer=sgd(model, rate), steps=5, rounds=2, temperature=2.0, alpha=0.5, gamma=0.8)
    for up in (True, False, True, False, False):
        x, y = FORGET if up else RETAIN
        p, q = ((net(x) / 2).log_softmax(1) for net in (teacher, by_hand))
        loss = 4 * (p.exp() * (p - q)).sum(1).mean()
        loss = -loss if up else 0.5 * loss + 0.8 * F.cross_entropy(by_hand(x), y)
        for weight, steep in zip(
            by_hand.parameters(), torch.autograd.grad(loss, list(by_hand.parameters())), strict=True
        ):
            weight.data -= rate * steep
    torch.testing.assert_close(model.weight, by_hand.weight)
    torch.testing.assert_close(model.bias, by_hand.bias)


def test_dampening_in_closed_form() -> None:
    """With batches of one: `F = mean (p - y)^2` of what goes, `I` the same of all."""
    model, start = table(), table()
    before = logits(start)
    ssd(model, RETAIN, FORGET, optimizer=sgd(model), batch_size=1, alpha=1.5, lam=0.2)
    squares = [
        (found.softmax(1) - F.one_hot(y, CLASSES)).square()
        for found, y in zip(before, (RETAIN[1], FORGET[1]), strict=True)
    ]
    # What goes is 2 of 6 instances, so that F = squares / 2 and I = squares / 6: F > 1.5 I there and nowhere else.
    torch.testing.assert_close(logits(model)[1], before[1] * 0.2 * 2 / 6)
    assert torch.equal(logits(model)[0], before[0])
    assert all(part.min() > 0 for part in squares)
    for alpha, lam in ((3.5, 0.2), (1.5, 4.0)):
        model = table()
        ssd(model, RETAIN, FORGET, optimizer=sgd(model), batch_size=1, alpha=alpha, lam=lam)
        assert torch.equal(model.weight, start.weight), "not selected, or not turned down"


def test_dampening_from_a_few_batches_only() -> None:
    models = [table() for _ in range(3)]
    for model, steps in zip(models, (None, 6, 1), strict=True):
        ssd(model, RETAIN, FORGET, optimizer=sgd(model), batch_size=1, alpha=1.5, lam=0.2, steps=steps)
    torch.testing.assert_close(models[0].weight, models[1].weight)
    assert not torch.equal(models[0].weight, models[2].weight)


def test_adversarial_examples_of_a_linear_model_lie_just_beyond_the_nearest_boundary() -> None:
    model = nn.Linear(5, 2)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=seeded(0)))
    x = torch.randn(40, 5, generator=seeded(1))
    labels = model(x).argmax(1)
    near, taken_for, found = adversarial_examples(model, (x, labels), radius=0.05, rounds=8, bounds=None)
    assert found.all() and (taken_for == 1 - labels).all() and torch.equal(model(near).argmax(1), taken_for)
    line, shift = model.weight[0] - model.weight[1], model.bias[0] - model.bias[1]
    distance = ((x @ line + shift).abs() / line.norm()).detach()
    moved = (near - x).norm(dim=1)
    # Steps of a tenth of a radius that is at most twice what is needed, and never beyond the radius.
    assert (moved >= distance - 1e-5).all() and (moved <= 1.3 * distance + 0.006).all()


def test_adversarial_examples_of_what_is_wrong_already_and_of_what_is_out_of_reach() -> None:
    model = nn.Linear(1, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0], [1.0]])), model.bias.copy_(torch.tensor([0.5, 0.0]))
    x = torch.tensor([[0.2], [0.9], [0.45]])
    near, taken_for, found = adversarial_examples(model, (x, torch.tensor([1, 1, 0])), radius=0.1, rounds=1)
    assert found.tolist() == [True, False, True] and taken_for.tolist() == [0, 1, 1]
    assert near[0].item() == x[0].item() and near[1].item() == x[1].item() and 0.5 <= near[2].item() <= 0.55
    beyond = adversarial_examples(model, (torch.tensor([[0.45]]), torch.tensor([0])), bounds=(0.0, 0.48))
    assert not beyond[2].item()


def test_own_mistakes_are_learned_beside_both_sets() -> None:
    """`amun` is fine-tuning on the union of three sets."""
    one, other = table(), table()
    amun(one, RETAIN, FORGET, optimizer=sgd(one), steps=4, radius=0.5, bounds=None, batch_size=100)
    near, taken_for, found = adversarial_examples(other, FORGET, radius=0.5, bounds=None)
    assert found.all()
    union = torch.cat([RETAIN[0], FORGET[0], near]), torch.cat([LABELS, taken_for])
    fine_tune(other, union, FORGET, optimizer=sgd(other), steps=4, batch_size=100)
    torch.testing.assert_close(one.weight, other.weight)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_the_mode_leaves_no_gradient_and_repeats_itself(method: Callable[..., None]) -> None:
    found = []
    for _ in range(2):
        model = nn.Sequential(table(), nn.Dropout(0.0), nn.BatchNorm1d(CLASSES)).eval()
        before = torch.random.get_rng_state()
        method(model, RETAIN, FORGET, optimizer=sgd(model, 0.1), steps=3, batch_size=2, generator=seeded(4))
        assert torch.equal(before, torch.random.get_rng_state())
        assert not model.training and all(weight.grad is None for weight in model.parameters())
        found.append(model.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not torch.equal(found[0]["0.weight"], table().weight)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_says_what_is_wrong_and_changes_nothing(method: Callable[..., None]) -> None:
    model, empty = table(), (FORGET[0][:0], FORGET[1][:0])
    for sets, error, message in (
        ((empty, FORGET), ValueError, "expected inputs (n, ...) to retain and labels (n,), found (0, 6) and (0,)"),
        ((RETAIN, empty), ValueError, "expected inputs (n, ...) to forget and labels (n,), found (0, 6) and (0,)"),
        ((RETAIN, (FORGET[0], LABELS)), ValueError, "to forget and labels (n,), found (2, 6) and (6,)"),
        ((RETAIN, (FORGET[0], FORGET[1].int())), TypeError, "expected labels of torch.int64, found torch.int32"),
        ((RETAIN, (FORGET[0], torch.full_like(FORGET[1], -100))), ValueError, "a label is at least 0, found -100"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            method(model, *sets, optimizer=sgd(model), steps=1)
    with pytest.raises(ValueError, match="steps must be at least 1, found 0"):
        method(model, RETAIN, FORGET, optimizer=sgd(model), steps=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, found 0"):
        method(model, RETAIN, FORGET, optimizer=sgd(model), steps=1, batch_size=0)
    assert torch.equal(model.weight, table().weight)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (neg_grad_plus, {"retain_weight": 1.5}, "retain_weight must be between 0 and 1, found 1.5"),
        (l1_sparse, {"gamma": -1}, "gamma must be at least 0, found -1"),
        (sal_un, {"share": 0}, "share must be above 0 and at most 1, found 0"),
        (scrub, {"alpha": math.nan}, "alpha must be at least 0, found nan"),
        (scrub, {"gamma": -0.1}, "gamma must be at least 0, found -0.1"),
        (scrub, {"rounds": -1}, "rounds must be at least 0, found -1"),
        (scrub, {"temperature": 0}, "temperature must be above 0, found 0"),
        (ssd, {"alpha": 0}, "alpha must be above 0, found 0"),
        (ssd, {"lam": math.inf}, "lam must be above 0, found inf"),
        (amun, {"radius": 0}, "radius must be above 0, found 0"),
        (amun, {"rounds": 0}, "rounds must be at least 1, found 0"),
        (amun, {"attack_steps": 0}, "steps must be at least 1, found 0"),
    ],
)
def test_numbers_out_of_range(method: Callable[..., None], options: dict[str, float], message: str) -> None:
    model = table()
    with pytest.raises(ValueError, match=re.escape(message)):
        method(model, RETAIN, FORGET, optimizer=sgd(model), steps=1, **options)


def test_one_class_has_no_wrong_label() -> None:
    model, labels = nn.Linear(COUNT, 1), torch.zeros(2, dtype=torch.int64)
    for method in (random_labels, sal_un):
        with pytest.raises(ValueError, match="a wrong label needs two classes or more, found 1"):
            method(model, (RETAIN[0][:2], labels), (FORGET[0], labels), optimizer=sgd(model), steps=1)
