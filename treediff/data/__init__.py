"""Readers of data files, all behind `load_dataset`, and `Rows`, a data set that is read when it is indexed.

Nothing is downloaded and nothing is unpickled. The error for a file that does not fit names the file, what was
expected and what was found. Shape letters: `n` rows, `C H W` image, `F` features.
"""

from treediff.core.rows import Rows
from treediff.data.dataset import ImageDataset
from treediff.data.loading import load_dataset

__all__ = ["ImageDataset", "Rows", "load_dataset"]
