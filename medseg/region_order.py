"""In which order overlapping regions are written, and as which values, so that they are read back as what they were."""

from __future__ import annotations

from collections.abc import Collection, Mapping


def larger_first(regions: Mapping[str, Collection[int]]) -> dict[str, Collection[int]]:
    """The regions, by name, in the order in which none is painted over one that lies inside it."""
    return dict(sorted(regions.items(), key=lambda region: -len(set(region[1]))))


def own_values(regions: Mapping[str, Collection[int]]) -> tuple[int, ...]:
    """For each region the smallest of its values that only it and those around it have; empty where one has none."""
    made = [set(values) for values in regions.values()]
    own = [values.difference(*(other for other in made if not values <= other)) for values in made]
    found = tuple(min(values) for values in own if values)
    # two names for one region cannot be told apart
    return found if len(set(found)) == len(made) else ()
