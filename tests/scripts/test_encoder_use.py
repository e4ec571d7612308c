"""How much a network uses its encoder: the changes that scripts/reproduce/encoder_use.py makes, and its table."""

import json
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import nn

from asa.config import build
from asa.data.store import Store
from asa.training.checkpoint import save_checkpoint
from scripts.reproduce import encoder_use

NODE = dict(_target_="asa.models.vit_seg.vit_seg_tiny", out_channels=4, in_channels=1, img_size=[32, 32, 32], depth=2)


def test_each_change_is_what_its_name_says_and_is_taken_back() -> None:
    torch.manual_seed(1)
    encoder, volume = build(NODE).encoder.eval(), torch.rand(1, 1, 32, 32, 32)
    torch.manual_seed(0)
    fresh = build(NODE).encoder.eval()
    with torch.no_grad():
        before, expected = encoder(volume), fresh(volume)
        with ExitStack() as stack:
            encoder_use.zero_tokens(encoder, stack)
            assert not any(state.any() for state in (encoder(volume), *encoder.hidden_states(volume)))
        with ExitStack() as stack:
            encoder_use.skip_blocks(encoder, stack)
            skipped, (first, *others) = encoder(volume), encoder.hidden_states(volume)
            assert all(torch.equal(first, other) for other in others[:-1]) and not torch.equal(skipped, before)
        with ExitStack() as stack:
            encoder_use.first_weights(NODE)(encoder, stack)
            assert torch.equal(encoder(volume), expected)
        assert torch.equal(encoder(volume), before)


def test_the_table_has_a_row_of_each_change(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, shell = Store(store), nn.Module()
    shell.model = build(NODE)
    data = {"channels": ["t1"], "labels": source.labels, "prepare": {}, "spacing": [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]}
    save_checkpoint(tmp_path, 1, shell, {"model": NODE, "data": data}, {}, keep=1)
    subjects = [record["subject"] for record in source.records]
    split = {"train": subjects[2:], "validation": [], "test": subjects[:2]}
    (tmp_path / "split.json").write_text(json.dumps(split))
    monkeypatch.setattr(sys, "argv", ["encoder_use", str(tmp_path), str(store)])
    encoder_use.main()
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head == f"| encoder | mean | {' | '.join(source.labels.values())} |"
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert [row[0] for row in cells] == ["as trained", "tokens zero", "blocks skipped", "first weights"]
    assert all(len(row) == 5 and 0 <= float(value) <= 1 for row in cells for value in row[1:])
    monkeypatch.setattr(sys, "argv", ["encoder_use", str(tmp_path), str(store), "--part", "validation"])
    with pytest.raises(SystemExit):
        encoder_use.main()
    assert "validation part of the split is empty" in capsys.readouterr().err
