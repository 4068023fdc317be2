"""Several dicts where one of a million entries would stop the loop for over 10 ms each time that it grows.

Dicts with equal shares would all reach the size at which they grow within a few messages. So their shares differ, by
equal ratios and by a factor of two at most: then they grow at moments that lie as far apart as possible.
"""

from itertools import accumulate

__all__ = ["spread"]


def spread(keys: int, tables: int, *, first: float = 0.0) -> list[int]:
    """The number of a table for each of *keys*. The tables' shares differ by equal ratios, by a factor of two at most.

    *first*, from 0 to 1, shifts the ratios: spreads with different values of it do not grow at the same moments.
    """
    shares = [2 ** ((first + number) / tables) for number in range(tables)]
    ends = [round(keys * end / sum(shares)) for end in accumulate(shares)]
    starts = [0, *ends[:-1]]
    return [number for number in range(tables) for _ in range(starts[number], ends[number])]
