"""Published segmentation networks to compare with, one file a network. Checkpoints name their functions here."""

from asa.models.comparators.base import Comparator as Comparator
from asa.models.comparators.monai import swin_unetr_base as swin_unetr_base
from asa.models.comparators.monai import swin_unetr_small as swin_unetr_small
from asa.models.comparators.monai import swin_unetr_tiny as swin_unetr_tiny
from asa.models.comparators.monai import unetr_base as unetr_base
from asa.models.comparators.monai import unetr_small as unetr_small
from asa.models.comparators.monai import unetr_tiny as unetr_tiny
from asa.models.comparators.nnformer import nnformer_base as nnformer_base
from asa.models.comparators.nnformer import nnformer_tiny as nnformer_tiny
from asa.models.comparators.primus import primus_m as primus_m
from asa.models.comparators.primus import primus_tiny as primus_tiny
from asa.models.comparators.resenc import resenc_l as resenc_l
from asa.models.comparators.resenc import resenc_tiny as resenc_tiny
from asa.models.comparators.transbts import transbts_base as transbts_base
from asa.models.comparators.transbts import transbts_tiny as transbts_tiny
