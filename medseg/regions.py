"""Whether labels can be learnt, and masks of overlapping ones be read back as what was written."""

from __future__ import annotations

from medseg.cases import Dataset, Labels
from medseg.config import DataConfig, make_data_config
from medseg.errors import ConfigError
from medseg.metrics.codes import members
from medseg.region_order import larger_first, own_values


def check_labels(data: Dataset, labels: Labels) -> None:
    """Raises `ConfigError` where no configuration can hold `labels` with what else `data` says."""
    check_regions(
        make_data_config(
            spatial_dims=3,
            channels=data.channels or ("image",),
            labels=labels,
            region_values=data.region_values,
            source=str(data.path),
        )
    )


def check_regions(data: DataConfig) -> None:
    """Raises `ConfigError` where masks that hold `region_values` would not be read back as the regions they stand for.

    A region is written as a value of its own, and read as all values that make it. So the written one must be among
    these, be part of another region only where that one holds the whole of this, and not be painted over by a larger.
    """
    if not data.is_regions:
        return
    made = {name: set(members(data.labels[name])) for name in data.foreground}
    wrong, painted_over = [], False
    for n, (name, written) in enumerate(zip(made, data.region_values)):
        inside = [other for other, values in made.items() if written in values and not made[name] <= values]
        after = [other for other in list(made)[n + 1 :] if made[name] < made[other]]
        if written not in made[name]:
            wrong.append(f"`{name}` is written as {written}, which is none of its values {sorted(made[name])}")
        elif inside:
            wrong.append(f"`{name}` is written as {written}, which would be read as `{inside[0]}` too")
        if after:
            painted_over = True
            wrong.append(f"`{after[0]}` holds all of `{name}` and would be painted over it: list the larger one first")
    if not wrong:
        return
    listed = larger_first(made) if painted_over else made
    own = list(own_values(listed))
    fitting = f"; {own} fits" if own else ""
    if painted_over:
        fitting = f"; list the labels as {', '.join(listed)}{f' with {own}' if own else ''}"
    raise ConfigError(
        f"regions_class_order (data.region_values) {list(data.region_values)}: {'; '.join(wrong)}; expected for each "
        f"region, the larger before the smaller, a value that only it and those around it have{fitting}"
    )
