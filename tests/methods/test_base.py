"""What every method of this package declares."""

import pytest

from asa.methods.pretrain import MaskedPretraining
from asa.methods.sa_swin import SASwinPretraining
from asa.methods.segment import RegionSegmentation, Segmentation
from asa.methods.whole_scans import Classification, Regression
from asa.restoration.method import Restoration

TASKS = {
    MaskedPretraining: "pretraining",
    SASwinPretraining: "pretraining",
    Segmentation: "segmentation",
    RegionSegmentation: "segmentation",
    Classification: "classification",
    Regression: "regression",
    Restoration: "restoration",
}


@pytest.mark.parametrize("method", TASKS)
def test_a_method_names_its_task_and_whether_it_takes_the_mirror_image(method: type) -> None:
    assert method.task == TASKS[method]
    assert hasattr(method, "mirrored")
