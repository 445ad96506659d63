"""Training that begins with a run of other labels: what is inherited, what stands still, what a resumed run keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyRun
from safetensors.torch import load_file

import medseg
from medseg.model import read_model
from medseg.patches import PatchSampler

# of the loop alone: the network is inherited
LOOP = ("windows.patch_size=[16,16,16]", "train.batch_size=2", "train.steps_per_epoch=2")
# label_2 has a namesake in the run, rim has none
OTHER_LABELS = "data.labels={label_2: 1, rim: 2}"


def fine_tune(tiny_run: TinyRun, folder: Path, *settings: str, epochs: int = 1, **more: Any) -> medseg.Run:
    options = medseg.TrainOptions(
        settings=medseg.settings_from((*LOOP, OTHER_LABELS, *settings)),
        fold="all",
        device="cpu",
        pretrained=tiny_run.folder,
        **more,
    )
    return medseg.train(tiny_run.dataset, folder, epochs=epochs, options=options)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_the_network_is_that_of_the_run_and_what_is_loaded_stands_still(tiny_run: TinyRun, tmp_path: Path) -> None:
    run = fine_tune(tiny_run, tmp_path, "train.freeze_share=1", "train.warm_up=0")
    before, after = weights(tiny_run.folder), weights(tmp_path)
    assert run.pretrained is not None
    assert run.config.network == read_model(tiny_run.folder).config.network
    moved = {key for key in after if key not in before or not torch.equal(before[key], after[key])}
    assert moved == {"head.classifier.weight", "head.classifier.bias"} == set(after) - run.pretrained.loaded


def test_what_is_loaded_moves_too_once_it_is_let_go(tiny_run: TinyRun, tmp_path: Path) -> None:
    run = fine_tune(tiny_run, tmp_path, "train.freeze_share=0.5", "train.warm_up=0", "train.steps_per_epoch=4")
    before, after = weights(tiny_run.folder), weights(tmp_path)
    assert run.pretrained is not None
    assert not any(torch.equal(before[key], after[key]) for key in run.pretrained.loaded if key.endswith("0.weight"))


def test_a_network_that_is_asked_for_is_not_inherited(tiny_run: TinyRun, tmp_path: Path) -> None:
    asked = ("network.output_stride=2", "network.dropout=0.3")
    inherited = fine_tune(tiny_run, tmp_path / "a", *asked).config.network
    assert (inherited.dropout, inherited.channels) == (0.3, (4, 8))
    options = medseg.TrainOptions(
        settings=medseg.settings_from(("network.name=unet",)), fold="all", device="cpu", pretrained=tiny_run.folder
    )
    with pytest.raises(medseg.ModelError, match="no kernel in it fits"):
        medseg.train(tiny_run.dataset, tmp_path / "b", epochs=1, options=options)


def test_what_differs_is_told(tiny_run: TinyRun, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = fine_tune(tiny_run, tmp_path, "preprocess.spacing_mm=[2, 1, 1]")
    assert run.pretrained is not None
    there = read_model(tiny_run.folder).config.preprocess.spacing_mm
    spacing = f"preprocess.spacing_mm: {list(there or ())} where the weights were learnt, [2.0, 1.0, 1.0] here"
    labels = "labels: [label_1, label_2] where the weights were learnt, [label_2, rim] here"
    assert run.pretrained.summary().splitlines()[1:] == [f"  {labels}", f"  {spacing}"]
    assert spacing in (tmp_path / "log.txt").read_text()
    # twice as far apart: that is worth a warning, other labels are what one wanted
    (warning,) = (r.getMessage() for r in caplog.records if r.levelname == "WARNING")
    assert warning == f"{tiny_run.folder}: {spacing}"


def test_a_resumed_fine_tuning_is_the_uninterrupted_one(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # broken off while the loaded weights stand still; they are let go after half of six steps
    asked = ("train.deterministic=true", "train.save_every_s=1e-9", "train.freeze_share=0.5")
    fine_tune(tiny_run, tmp_path / "whole", *asked, epochs=3)
    draw, drawn = PatchSampler.draw, []

    def killed(sampler: PatchSampler) -> Any:
        if len(drawn) == 2:
            raise SystemExit
        drawn.append(1)
        return draw(sampler)

    monkeypatch.setattr(PatchSampler, "draw", killed)
    with pytest.raises(SystemExit):
        fine_tune(tiny_run, tmp_path / "parts", *asked, epochs=3)
    monkeypatch.undo()
    fine_tune(tiny_run, tmp_path / "parts", *asked, epochs=3, resume=True)
    torch.use_deterministic_algorithms(False)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
