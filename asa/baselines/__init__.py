"""Published networks and pretraining tasks to compare with, and checkpoints of other projects.

The other packages know it by name only, as they know a package of the user's own. Checkpoints name the functions here.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
