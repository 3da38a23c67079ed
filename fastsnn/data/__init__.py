"""Images in memory: data sets as their official sites ship them, and the batches of a training run.

>>> data = fastsnn.data.load("cifar-10-python.tar.gz")
>>> train, validation = fastsnn.data.split(data.x_train, data.y_train, validation=0.1)
>>> batches = fastsnn.data.Batches(data.x_train[train], data.y_train[train], batch_size=64, seed=0, augment=fastsnn.data.Augment())
>>> for images, labels, indices in batches.epoch(0): ...
"""

from .batches import Augment, Batches, generator
from .dataset import Dataset, split
from .fetching import fetch
from .formats import FORMATS, load

__all__ = ["FORMATS", "Augment", "Batches", "Dataset", "fetch", "generator", "load", "split"]
