"""Lets a torchvision that was built for another device import, for its processors of pictures and videos.

Its library does not load without that device, and its Python part gives up where the operators that the library would
bring have no schema. Import this before transformers or diffusers.
"""

from importlib.util import find_spec

import torch

if find_spec("torchvision") is not None:
    try:
        import torchvision
    except RuntimeError:
        LIBRARY = torch.library.Library("torchvision", "FRAGMENT")  # its schemas live as long as this does
        for name in ("nms", "qnms"):
            LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401
