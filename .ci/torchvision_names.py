"""Has torchvision imported beside a torch for the CPU, whose compiled operators are built for one with CUDA.

Python runs this at its start, where it is named `sitecustomize`. torchvision says at once how its operators run on no
data, so that they have to have a name; nothing that reads text alone calls them.
"""

import importlib.abc
import sys

OPERATORS = ("nms", "qnms")


class Names(importlib.abc.MetaPathFinder):
    """Gives the operators their names before torchvision is looked for, and finds nothing itself."""

    def find_spec(self, name, path, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in OPERATORS:
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            KEPT.append(self)


KEPT: list = []
"""A library's names go with it."""

sys.meta_path.insert(0, Names())
