# The public names, for lazy loading and for type checkers. Functions that end with a size (create.SIZES) are models.
from .rat import RegionAttention as RegionAttention
from .rat import RegionAttentionTransformer as RegionAttentionTransformer
from .rat import rat_base as rat_base
from .rat import rat_small as rat_small
from .rat import rat_tiny as rat_tiny
from .restormer import Restormer as Restormer
from .restormer import restormer_base as restormer_base
from .restormer import restormer_small as restormer_small
from .restormer import restormer_tiny as restormer_tiny
