"""Readers for users' files: one door, `load_dataset`.

Nothing is downloaded and nothing is unpickled. A file that does not fit is refused by name, with what was
expected and what was found. Shape letters: `n` rows, `C H W` image, `F` features.
"""

from treediff.data.dataset import ImageDataset
from treediff.data.loading import load_dataset

__all__ = ["ImageDataset", "load_dataset"]
