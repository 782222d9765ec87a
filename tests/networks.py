"""Small networks, a batch and a loss for each; every other test takes its models from here.

    model, inputs, targets, loss = ZOO["resnet_train"]()

Everything is float64 and seeded, so that a factory called twice gives equal models. A network is
added by a function with the decorator `net` in one of the files `zoo_*.py`.
"""

import zoo_hard
import zoo_plain
import zoo_sequences
from zoo_base import CLASSES, ZOO, Case, N, as_tuple, net, normal, output_shape

__all__ = ["CLASSES", "ZOO", "Case", "N", "as_tuple", "net", "normal", "output_shape"]
FILES = (zoo_plain, zoo_sequences, zoo_hard)
