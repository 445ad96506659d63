"""Who takes part and with which configuration: networks and variants, planned, brought to one size, changed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import medseg
from medseg_pipelines.claims import DEEPEST, Claim, Variant

log = logging.getLogger(__name__)

EqualTo = Literal["multiply-adds", "parameters", "none"]
BASELINE = "residual_unet"
# what all are measured by, also where a plan would have another one
USUAL = "deeplabv3plus"
LIBRARY = "monai."
"""Networks of this prefix have arguments of their own, and no width."""


@dataclass(frozen=True)
class Entry:
    """One configuration to train. `names`: every variant that it stands for, the first names its folder."""

    names: tuple[str, ...]
    data: str
    dataset: Path
    config: medseg.Config | None
    structure: Mapping[str, Any]
    reason: str | None = None
    """Why there is no configuration."""

    @property
    def name(self) -> str:
        """The name of its folder and of its row."""
        return self.names[0]


class Planner:
    """Configurations for one data set. The plan of a network is made once; nothing is trained here.

    `equal` brings every network's width to the parameters or multiply-adds (of a patch) of the usual network as it is
    planned; with `published` the widths of the papers stay.
    """

    def __init__(
        self,
        dataset: Path,
        settings: Mapping[str, Any],
        *,
        device: str,
        equal: EqualTo = "multiply-adds",
        published: bool = False,
    ) -> None:
        if "name" in settings.get("network", {}):
            raise medseg.ConfigError("--set network.name: every network takes part; choose some with --networks")
        if "width" in settings.get("network", {}) and (published or equal != "none"):
            what = "--as-published takes those of the papers" if published else f"--equal {equal} fits that of each"
            raise medseg.ConfigError(f"--set network.width: {what}; leave it out, or keep it with --equal none")
        self.dataset = dataset
        self.settings = settings
        self.device = device
        self.equal: EqualTo = "none" if published else equal
        self.published = published
        self._plans: dict[str, medseg.Plan] = {}

    @property
    def default(self) -> medseg.Config:
        """The plan of the data set with the usual network: the size of all others."""
        return self._plan(USUAL).config

    def config(self, variant: Variant) -> medseg.Config:
        """The configuration of a variant. Raises `ConfigError` where its settings contradict each other or the data."""
        fitted = self._fitted(variant)
        changed = _changed(fitted, variant.settings(fitted))
        if variant.output_stride is None:
            return changed
        dims = changed.data.spatial_dims
        whole = _changed(changed, {"aspp_rates": _divisible(changed.network, variant.output_stride)}).network
        network = medseg.at_output_stride(whole, variant.output_stride, spatial_dims=dims)
        return _changed(changed, network.model_dump(mode="json"))

    def _fitted(self, variant: Variant) -> medseg.Config:
        plan = self._plan(variant.network["name"])
        own = {k: v for k, v in variant.network.items() if k != "name"}
        if variant.deep:
            own |= _deeper(self.default)
        config = _changed(plan.config, own)
        if variant.match is not None:
            return fit(config, "parameters", structure(self._fitted(variant.match)))
        if self.published:
            return _changed(config, {"width": medseg.default_config(config.network.name).width})
        # the plan has seen to the multiply-adds itself where it gives a reason for the width
        planned = self.equal == "multiply-adds" and "network.width" in plan.reasons and not own
        fixed = config.network.name.startswith(LIBRARY)
        if self.equal == "none" or planned or fixed or config == self.default:
            return config
        return fit(config, self.equal, structure(self.default))

    def _plan(self, name: str) -> medseg.Plan:
        if name not in self._plans:
            own = {**self.settings.get("network", {}), "name": name}
            if not name.startswith(LIBRARY):
                own.pop("arguments", None)
            settings = {**self.settings, "network": own}
            self._plans[name] = medseg.plan(self.dataset, settings=settings, device=self.device)
        return self._plans[name]


def fit(config: medseg.Config, equal: EqualTo, target: Mapping[str, Any]) -> medseg.Config:
    """`config` with the width at which its network has as many parameters or multiply-adds as `target`."""
    network = medseg.fit_width(
        config.network,
        spatial_dims=config.data.spatial_dims,
        in_channels=len(config.data.channels),
        out_channels=config.data.out_channels,
        shape=config.windows.patch_size,
        multiply_adds=target["multiply_adds"] if equal == "multiply-adds" else None,
        parameters=target["parameters"] if equal == "parameters" else None,
    )
    return _changed(config, {"width": network.width})


def structure(config: medseg.Config) -> dict[str, Any]:
    """What the network is, at one patch."""
    dims, channels = config.data.spatial_dims, len(config.data.channels)
    network = medseg.build_network(
        config.network, spatial_dims=dims, in_channels=channels, out_channels=config.data.out_channels
    )
    found = medseg.analyse(network, spatial_dims=dims, in_channels=channels, shape=config.windows.patch_size)
    keys = ("parameters", "multiply_adds", "receptive_field", "coverage", "output_stride", "sees_whole_image")
    return {key: found.as_dict()[key] for key in (*keys, "field_is_exact")}


def line_up(
    networks: Sequence[str],
    claims: Sequence[Claim],
    planners: Mapping[str, Planner],
    *,
    say: Callable[[str], None] = log.info,
) -> list[Entry]:
    """One entry for each different configuration; `planners` by data set (`given`, `discs`).

    A variant whose settings cannot be is an entry with the reason, and costs no other.
    """
    variants = [Variant(name, {"name": name}) for name in networks]
    variants += list({v.name: v for claim in claims for v in claim.variants}.values())
    found: dict[tuple[str, str], Entry] = {}
    for variant in variants:
        planner = planners[variant.data]
        try:
            config = planner.config(variant)
            key = variant.data, config.model_dump_json()
            if key in found:
                earlier = found[key]
                found[key] = Entry(
                    (*earlier.names, variant.name), earlier.data, earlier.dataset, config, earlier.structure
                )
                continue
            found[key] = Entry((variant.name,), variant.data, planner.dataset, config, structure(config))
        except Exception as error:
            # whatever is wrong with one network must not cost the others
            log.debug("%s is left out", variant.name, exc_info=True)
            say(f"{variant.name}: {error}")
            found[variant.data, variant.name] = Entry(
                (variant.name,), variant.data, planner.dataset, None, {}, f"{error}" or type(error).__name__
            )
    return list(found.values())


def _deeper(config: medseg.Config) -> dict[str, Any]:
    """Channels, and strides where there are any, with as many halvings as the deepest output stride needs."""
    network, dims = config.network, config.data.spatial_dims
    more = max(0, DEEPEST.bit_length() - 1 - len(network.channels))
    channels = [*network.channels, *[network.channels[-1]] * more]
    if network.strides is None:
        return {"channels": channels}
    return {"channels": channels, "strides": [*map(list, network.strides), *[[2] * dims] * more]}


def _divisible(network: Any, output_stride: int) -> list[Any]:
    """The network's ASPP rates, each rounded to what is a whole number, 1 or more, at a larger output stride."""
    factor: int = max(1, output_stride // network.output_stride)

    def rounded(rate: int) -> int:
        return max(1, (2 * rate + factor) // (2 * factor)) * factor

    return [[rounded(r) for r in rate] if isinstance(rate, tuple) else rounded(rate) for rate in network.aspp_rates]


def _changed(config: medseg.Config, network: Mapping[str, Any]) -> medseg.Config:
    values = config.model_dump(mode="json")
    return medseg.make_config({**values, "network": {**values["network"], **network}}, source="network")
