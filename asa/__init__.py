"""asa: self-supervised learning on brain MRI.

The public names are listed, with their types, in `__init__.pyi`. They load when they are first used, so that `import
asa` takes little time.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
