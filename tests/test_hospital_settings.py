"""The settings of a hospital node: what is shipped is right, what is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

pytest.importorskip("sqlalchemy", reason="the hospital node needs `pip install 'medseg[hospital]'`")

import medseg
from medseg_pipelines.hospital.settings import read_settings

ROOT = Path(__file__).parents[1]
SHIPPED = (ROOT / "configs" / "hospital.yaml", ROOT / "docker" / "hospital.yaml")


def written(folder: Path, text: str) -> Path:
    """A file of settings."""
    path = folder / "hospital.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.parent.name)
def test_what_is_shipped_is_read_and_names_a_model_that_is_there(path: Path) -> None:
    settings = read_settings(path)
    assert [rule.name for rule in settings.rules] == ["hippocampus"]
    assert medseg.weights_file(Path(settings.rules[0].model)).is_file()
    assert [d.name for d in settings.destinations_of(settings.rules[0])] == ["pacs"]


def test_containers_are_told_of_each_other() -> None:
    compose = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    settings = read_settings(ROOT / "docker" / "hospital.yaml")
    services = compose["services"]
    assert settings.database is not None
    assert urlsplit(settings.database).hostname in services
    assert settings.peers["pacs"].host in services
    pacs = json.loads((ROOT / "docker" / "orthanc.json").read_text())
    assert (pacs["DicomAet"], pacs["DicomPort"]) == (settings.peers["pacs"].ae_title, settings.peers["pacs"].port)
    assert ["MEDSEG", "gateway", settings.gateway.port] in pacs["DicomModalities"].values()
    assert str(settings.folder) in [volume.split(":")[1] for volume in services["worker-0"]["volumes"]]


def test_all_but_the_folder_may_be_left_out(tmp_path: Path) -> None:
    settings = read_settings(written(tmp_path, "folder: node\n"))
    assert settings.folder == tmp_path / "node"
    assert settings.database is None
    assert settings.rules == ()


@pytest.mark.parametrize(
    "section",
    ["gateway: {allow: [{ae_title: CT, network: 10.0.0/8/9}]}", "web: {trusted_proxies: [10.0.0/8/9]}"],
)
def test_a_wrong_network_is_told(tmp_path: Path, section: str) -> None:
    with pytest.raises(medseg.ConfigError, match=r"10\.0\.0/8/9.*expected an address or a network"):
        read_settings(written(tmp_path, f"folder: node\n{section}\n"))


def test_a_network_is_told_as_those_want_it_who_are_strict(tmp_path: Path) -> None:
    settings = read_settings(written(tmp_path, "folder: node\nweb: {trusted_proxies: [10.1.0.7/16, 10.2.0.7]}\n"))
    assert tuple(map(str, settings.web.trusted_proxies)) == ("10.1.0.0/16", "10.2.0.7/32")


def test_relative_paths_count_from_the_file(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    text = """
folder: node
gateway: {tls: {certificate: a.pem, key: /etc/a.key}}
watch: [{folder: in}]
rules: [{name: a, model: run}, {name: b, model: hippocampus}]
publish: {destinations: [{name: out, folder: out}]}
"""
    settings = read_settings(written(tmp_path, text))
    assert settings.gateway.tls is not None
    assert settings.gateway.tls.certificate == tmp_path / "a.pem"
    assert settings.gateway.tls.key == Path("/etc/a.key")
    assert settings.watch[0].folder == tmp_path / "in"
    assert settings.publish.destinations[0].folder == tmp_path / "out"
    # a name that is no folder stays a name
    assert [rule.model for rule in settings.rules] == [str(tmp_path / "run"), "hippocampus"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("folder: x\nfoldr: y\n", "foldr: no such setting"),
        ("gateway: {}\n", "folder: Field required"),
        ("folder: x\ngateway: {ae_title: 'A TITLE THAT IS TOO LONG'}\n", "expected an AE title"),
        ("folder: x\ngateway: {ae_title: 'A\\\\B'}\n", "expected an AE title"),
        ("folder: x\ngateway: {port: 0}\n", "gateway.port"),
        ("folder: x\nrules: [{name: a, model: m, when: {body_part: '('}}]\n", "expected a regular expression"),
        ("folder: x\nrules: [{name: a, model: m, send_to: [pacs]}]\n", "`send_to` pacs: no destination (none)"),
        ("folder: x\nrules: [{name: a, model: m}, {name: a, model: m}]\n", "rules: a stands there twice"),
        ("folder: x\npublish: {destinations: [{name: a}]}\n", "expected one of `peer`, `dicomweb` and `folder`"),
        ("folder: x\npublish: {destinations: [{name: a, peer: b}]}\n", "peer b: not among `peers` (none)"),
        ("folder: x\npull: [{modality: CT}]\n", "expected one of `peer` and `dicomweb`"),
        ("folder: x\nrules: [{name: ../a, model: m}]\n", "expected a name of letters"),
        ("folder: x\nworker: {most_s: .inf}\n", "worker.most_s"),
        (
            "folder: x\npeers: {p: {ae_title: P, host: h, port: 1}}\n"
            "rules: [{name: a, model: m, formats: [nifti]}]\npublish: {destinations: [{name: b, peer: p}]}\n",
            "rule a: nothing of nifti is for b",
        ),
        (
            "folder: x\nrules: [{name: a, model: m, send_to: [b, c]}]\n"
            "publish: {destinations: [{name: b, folder: f}, {name: c, folder: f, formats: [dicom-sr]}]}\n",
            "rule a: nothing of dicom-seg is for c",
        ),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(medseg.ConfigError) as caught:
        read_settings(written(tmp_path, text))
    assert said in str(caught.value)
    assert str(tmp_path / "hospital.yaml") in str(caught.value)
