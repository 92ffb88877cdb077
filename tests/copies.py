"""Processes that are copies of one that has imported everything, which takes longer than much of what tests do."""

import multiprocessing as mp

context = mp.get_context("forkserver")
# torch._dynamo, too: the first step of an optimizer imports it.
modules = "munkey treediff torch._dynamo kornia.augmentation matplotlib.pyplot scipy.optimize sklearn.datasets"
context.set_forkserver_preload([*modules.split(), "sklearn.metrics"])
