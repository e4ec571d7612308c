"""Restoration of 2-D images by the region attention transformer (RAT, MICCAI 2024): a task in a package of its own.

Networks, attention within regions, loss, images and their pairs, simulation, the task, its measures and its page. It
uses the other packages; they know it by name only, as they know a package of the user's own.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
