"""Post-hoc unlearning: methods that change the weights of any classifier, as baselines.

Each method is a function `method(model, retain, forget, *, optimizer, steps, generator, ...)` on any module from inputs
to logits. The method changes the model in place, and restores its mode. The given optimiser decides which weights may
change, and how fast. No method guarantees that forgotten instances cannot be inferred; `munkey.audit` measures this.
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
