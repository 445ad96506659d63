"""Looking at a network by name, file or run, on the command line and in Python, and the picture of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model
from torch import nn

import medseg
from medseg.cli import USAGE, run
from medseg.errors import ConfigError, ModelError
from medseg.inspect import inspect_network
from medseg.inspect.picture import effective_field
from medseg.model import read_model


class TestTargets:
    def test_a_name_is_looked_at_in_3d(self) -> None:
        report = inspect_network("deeplabv3plus").report
        assert (report.name, report.spatial_dims, report.patch) == ("deeplabv3plus", 3, (96, 96, 96))

    def test_the_patch_says_the_dimensions(self) -> None:
        assert inspect_network("deeplabv3plus", patch=(64, 48)).report.spatial_dims == 2

    def test_a_bare_section_in_a_file(self, tmp_path: Path) -> None:
        file = tmp_path / "n.yaml"
        file.write_text("name: deeplabv3\nencoder: light\nchannels: [8, 8]\noutput_stride: 2\n")
        assert inspect_network(file, patch=(32,)).report.output_stride == 2

    def test_a_network_section_in_a_file_with_a_setting_laid_over(self, tmp_path: Path) -> None:
        file = tmp_path / "n.yaml"
        file.write_text("network: {name: deeplabv3, encoder: light, channels: [8, 8], output_stride: 2}\n")
        settings = {"network": {"channels": [8, 8, 8], "output_stride": 4}}
        assert inspect_network(file, patch=(32,), settings=settings).report.output_stride == 4

    def test_a_whole_configuration_brings_its_own_patch(self, tmp_path: Path) -> None:
        file = tmp_path / "n.yaml"
        file.write_text(
            "data: {spatial_dims: 2, channels: [a, b, c], labels: {x: 1}}\nwindows: {patch_size: [40, 48]}\n"
            "preprocess: {intensity: [{}, {}, {}]}\naugment: {flip_axes: [0]}\nnetwork: {name: deeplabv3}\n"
        )
        report = inspect_network(file).report
        assert (report.patch, report.in_channels) == ((40, 48), 3)

    def test_a_run_holds_the_trained_network(self, tmp_path: Path) -> None:
        found = inspect_network(tiny_model(tmp_path / "run"))
        assert found.trained is not None
        assert found.report.patch == (8, 8, 8)

    def test_a_setting_that_a_trained_model_cannot_have_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"network\.aspp_channels"):
            inspect_network(tiny_model(tmp_path / "run"), settings={"network": {"aspp_channels": 16}})

    def test_a_run_whose_weights_do_not_fit_a_setting_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="aspp_rates"):
            inspect_network(tiny_model(tmp_path / "run"), settings={"network": {"aspp_rates": [1, 2]}})

    def test_a_run_is_looked_at_with_the_settings_of_infer(self, tmp_path: Path) -> None:
        found = inspect_network(tiny_model(tmp_path / "run"), settings={"windows": {"patch_size": [12, 8, 8]}})
        assert found.report.patch == (12, 8, 8)

    @pytest.mark.parametrize("patch", [(99_999_999, 99_999_999), (2_000_000,), (2048, 2048, 2048)])
    def test_an_absurd_patch_is_refused(self, patch: tuple[int, ...]) -> None:
        with pytest.raises(ConfigError, match="expected at most"):
            inspect_network("deeplabv3plus", patch=patch)

    def test_progress_names_the_layers(self) -> None:
        seen: list[tuple[float, float, str]] = []

        def watch(stage: str, done: float, total: float, detail: str = "") -> None:
            seen.append((done, total, detail))

        layers = inspect_network("unet", patch=(64,), progress=watch).report.layers
        assert seen == [(n, len(layers), layer.name) for n, layer in enumerate(layers)]

    def test_an_unknown_name_is_answered_with_the_closest(self) -> None:
        with pytest.raises(ConfigError, match="did you mean deeplabv3plus"):
            inspect_network("deeplabv3pluss")

    def test_a_patch_of_other_dimensions_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="expected 3"):
            inspect_network("deeplabv3plus", spatial_dims=3, patch=(64, 64))

    def test_settings_of_other_sections_are_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"train"):
            inspect_network("deeplabv3plus", settings={"train": {"batch_size": 2}})


class TestCommand:
    def test_the_list_as_json_is_the_register(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["inspect", "--list", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == list(medseg.list_networks())

    def test_json_is_all_that_is_printed(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["inspect", "deeplabv3plus", "--spatial-dims", "1", "--patch", "128", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["name"], found["spatial_dims"], found["output_stride"]) == ("deeplabv3plus", 1, 4)
        assert len(found["receptive_field"]) == 1

    def test_the_table_names_layers_and_totals(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["inspect", "deeplabv3plus", "--patch", "128"]) == 0
        text = capsys.readouterr().out
        assert "aspp.branches.1.0" in text
        assert "field of view    159" in text

    @pytest.mark.parametrize(
        "arguments",
        [
            [],
            ["fcn8x"],
            ["deeplabv3plus", "--patch", "a,b"],
            ["deeplabv3plus", "--spatial-dims", "4"],
            ["deeplabv3plus", "--device", "banana"],
            ["deeplabv3plus", "--patch", "99999999,99999999"],
        ],
    )
    def test_wrong_use_exits_with_2(self, arguments: list[str]) -> None:
        assert run(["inspect", *arguments]) == USAGE

    def test_a_field_that_is_not_known_is_not_stated(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = inspect_network("deeplabv3plus", patch=(64,))
        unknown = replace(found, report=replace(found.report, field_is_exact=False))
        monkeypatch.setattr("medseg.inspect_network", lambda *_, **__: unknown)
        assert run(["inspect", "deeplabv3plus"]) == 0
        assert capsys.readouterr().out.splitlines()[-1].endswith("field of view not known (whole patch at most)")

    def test_a_trained_run_is_drawn_with_its_weights(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder, picture = tiny_model(tmp_path / "run"), tmp_path / "a.png"
        drawn: list[nn.Module] = []
        field = effective_field

        def watched(network: nn.Module, **options: Any) -> Any:
            drawn.append(network)
            return field(network, **options)

        monkeypatch.setattr("medseg.inspect.picture.effective_field", watched)
        assert run(["inspect", str(folder), "--png", str(picture), "--device", "cpu"]) == 0
        wanted = read_model(folder).network.state_dict()
        assert all(torch.equal(value, wanted[key]) for key, value in drawn[0].state_dict().items())
        assert capsys.readouterr().out.splitlines()[-1] == f"Picture: {picture}"
        with Image.open(picture) as opened:
            assert opened.format == "PNG"


class TestPicture:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            (".", "is a folder"),
            ("a.jpg", r"expected \.png"),
            ("a", r"expected \.png"),
            ("file/a.png", "nothing can be written"),
        ],
    )
    def test_a_path_that_cannot_be_is_refused_before_any_work(
        self, tmp_path: Path, name: str, message: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setattr("medseg.inspect.analyse", lambda *_, **__: pytest.fail("worked before looking at the path"))
        with pytest.raises(ConfigError, match=message):
            inspect_network("deeplabv3plus", patch=(32,), png=tmp_path / name)

    def test_a_patch_too_large_to_run_is_not_drawn(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="choose a smaller patch"):
            inspect_network("deeplabv3plus", patch=(8192, 8192), png=tmp_path / "a.png")

    @pytest.mark.parametrize("patch", [(64,), (32, 40), (16, 16, 20)])
    def test_is_a_png_with_more_than_paper_on_it(self, tmp_path: Path, patch: tuple[int, ...]) -> None:
        settings = {"network": {"channels": [8, 8, 8], "aspp_channels": 8}}
        inspect_network("deeplabv3plus", patch=patch, settings=settings).save_png(tmp_path / "a.png")
        with Image.open(tmp_path / "a.png") as picture:
            assert picture.format == "PNG"
            assert np.asarray(picture.convert("L")).std() > 10

    def test_the_effective_field_of_a_mean_is_flat(self) -> None:
        strength = effective_field(nn.AvgPool1d(5, 1, 2), in_channels=1, shape=(11,), voxel=(5,))
        assert strength.tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0]
