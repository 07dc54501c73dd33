"""Class numbers of a network and those of its data. A recipe's `label_map` leads from the data to the network; here is the way back.

The data's numbers are those of the labels that the reader of the data set returns. Predictions are written in them, so that they can
be compared with the data by any program.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from .. import metrics
from ..volume import label_table
from .recipe import Recipe


def find_numbers(label_map: Mapping[int, int], classes: int, present: Collection[int] = ()) -> list[int]:
    """Return the number of each class of a network in the data.

    Where several numbers of the data become one class, it is the lowest of them that occurs: 1 for a prostate whose zones are 1 and
    2, and 4 for `{4: 3}` in data without 3.

    Args:
        label_map: class of the network for those labels of the data that have another number there.
        classes: number of the network's classes; a network with a single output has two.
        present: labels that occur in the data. Without them, the numbers in `label_map` are preferred.
    """
    table, numbers = label_table(label_map), []
    for number in range(max(classes, 2)):
        sources = np.flatnonzero(table == number).tolist()
        occurring = [n for n in sources if n in present] or [n for n in sources if n in label_map]
        numbers.append((occurring or sources or [number])[0])
    return numbers


def name_numbers(
    numbers: Sequence[int],
    label_map: Mapping[int, int],
    present: Collection[int],
    names: Sequence[str] | Mapping[int, str] | None = None,
) -> dict[str, str]:
    """Return a description of each number in a prediction, such as {"1": "classes 1 and 2 of the data: zone, other zone"}.

    Args:
        numbers, label_map, present: as for `find_numbers`, and its result.
        names: names of the data's classes, by number.
    """
    named = names if isinstance(names, Mapping) else dict(enumerate(names or ()))
    table, described = label_table(label_map), {}
    for k, number in enumerate(numbers):
        joined = sorted({number, *(n for n in present if table[n] == k)})
        text = ", ".join(str(named.get(n, f"class {n}" if n else "background")) for n in joined)
        described[str(number)] = text if len(joined) == 1 else f"classes {' and '.join(map(str, joined))} of the data: {text}"
    return described


def regions_in_data(recipe: Recipe) -> str | dict[str, list[int]]:
    """Return the regions of a recipe in the data's numbers; "cells" for those of electron microscopy."""
    if recipe.regions == "cells" or not recipe.label_map:
        return recipe.regions
    table = label_table(recipe.label_map)
    return {
        region: np.flatnonzero(np.isin(table, classes)).tolist()
        for region, classes in metrics.as_regions(recipe.regions).items()
    }
