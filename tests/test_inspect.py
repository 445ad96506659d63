"""Looking at a network by name, file or run, on the command line and in Python, and the picture of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_model
from torch import nn

import medseg
from medseg.cli import USAGE, run
from medseg.errors import ConfigError, ModelError
from medseg.inspect import inspect_network
from medseg.inspect.picture import effective_field


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

    def test_a_run_whose_weights_do_not_fit_a_setting_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"network\.aspp_channels"):
            inspect_network(tiny_model(tmp_path / "run"), settings={"network": {"aspp_channels": 16}})

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
        [[], ["fcn8x"], ["deeplabv3plus", "--patch", "a,b"], ["deeplabv3plus", "--spatial-dims", "4"]],
    )
    def test_wrong_use_exits_with_2(self, arguments: list[str]) -> None:
        assert run(["inspect", *arguments]) == USAGE


class TestPicture:
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
