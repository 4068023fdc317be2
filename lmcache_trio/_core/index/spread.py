"""Several dicts where one of a million entries would stop the loop for over 10 ms each time that it grows.

Dicts of equal shares would only put that off: all of them reach the size at which they grow within a few messages. So
their shares differ, by equal ratios and by up to two, and the moments at which they grow lie as far apart as can be.
"""

from itertools import accumulate

__all__ = ["spread"]


def spread(keys: int, tables: int, *, first: float = 0.0) -> list[int]:
    """The number of a table for each of *keys*, such that the tables have shares by equal ratios, within two.

    *first*, from 0 to 1, shifts the ratios: two spreads with another *first* each do not grow at the same moments.
    """
    shares = [2 ** ((first + number) / tables) for number in range(tables)]
    ends = [round(keys * end / sum(shares)) for end in accumulate(shares)]
    starts = [0, *ends[:-1]]
    return [number for number in range(tables) for _ in range(starts[number], ends[number])]
