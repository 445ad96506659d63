"""Whether masks of overlapping labels can be read back as what was written."""

from __future__ import annotations

from medseg.config import DataConfig
from medseg.errors import ConfigError
from medseg.metrics.codes import members


def check_regions(data: DataConfig) -> None:
    """Raises `ConfigError` where masks that hold `region_values` would not be read back as the regions they stand for.

    A region is written as a value of its own, and read as all values that make it. So the written one must be among
    these, be part of another region only where that one holds the whole of this, and not be painted over by a larger.
    """
    if not data.is_regions:
        return
    made = {name: set(members(data.labels[name])) for name in data.foreground}
    wrong = []
    for n, (name, written) in enumerate(zip(made, data.region_values)):
        inside = [other for other, values in made.items() if written in values and not made[name] <= values]
        after = [other for other in list(made)[n + 1 :] if made[name] < made[other]]
        if written not in made[name]:
            wrong.append(f"`{name}` is written as {written}, which is none of its values {sorted(made[name])}")
        elif inside:
            wrong.append(f"`{name}` is written as {written}, which would be read as `{inside[0]}` too")
        if after:
            wrong.append(f"`{after[0]}` holds all of `{name}` and would be painted over it: list the larger one first")
    if not wrong:
        return
    own = [values.difference(*(o for o in made.values() if not values <= o)) for values in made.values()]
    fitting = f"; [{', '.join(str(min(values)) for values in own)}] fits" if all(own) else ""
    raise ConfigError(
        f"regions_class_order (data.region_values) {list(data.region_values)}: {'; '.join(wrong)}; expected for each "
        f"region, the larger before the smaller, a value that only it and those around it have{fitting}"
    )
