"""Unlearning after the fact: methods that change the weights of any classifier, to be compared with.

Each is a function `method(model, retain, forget, *, optimizer, steps, generator, ...)` on any module from inputs to
logits, changes the model in place, and leaves it in the mode it was in. The optimiser is yours: it says which weights
may change, and how fast. None of them promises that what was forgotten cannot be inferred; `munkey.audit` measures it.
"""

from munkey.posthoc.adversarial import adversarial_examples, amun
from munkey.posthoc.dampening import ssd
from munkey.posthoc.descent import Examples, fine_tune, l1_sparse, neg_grad, neg_grad_plus
from munkey.posthoc.distillation import bad_teacher, scrub
from munkey.posthoc.relabelling import random_labels, sal_un

__all__ = [
    "Examples",
    "adversarial_examples",
    "amun",
    "bad_teacher",
    "fine_tune",
    "l1_sparse",
    "neg_grad",
    "neg_grad_plus",
    "random_labels",
    "sal_un",
    "scrub",
    "ssd",
]
