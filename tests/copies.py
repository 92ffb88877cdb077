"""Processes that are copies of one that has imported everything, which takes longer than much of what tests do."""

import multiprocessing as mp

context = mp.get_context("forkserver")
context.set_forkserver_preload(["munkey", "treediff", "matplotlib.pyplot", "sklearn.datasets"])
