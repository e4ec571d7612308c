"""Networks: modules with flat keyword arguments, and functions that make them in named sizes.

The names of `__init__.pyi` are public. They are imported when they are first used, so that `import asa.models` does
not import torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
