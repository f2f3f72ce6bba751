"""Packing: several rows in one sequence, by first-fit."""

from collections.abc import Sequence

from tunekit.errors import DataError


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """For each pack, the indices of its rows in `lengths`. Each row goes into the first pack that has room for it.

    A tournament tree over the free room of the packs finds this pack in O(log packs).
    Raises: DataError if a row is longer than the capacity.
    """
    size = 1
    while size < len(lengths):
        size *= 2
    room = [capacity] * (2 * size)  # room[1] is the root, room[size + pack] is a pack; empty packs have full capacity
    packs: list[list[int]] = []
    for position, length in enumerate(lengths):
        if length > capacity:
            what = f"a row of {length} tokens does not fit into a pack of {capacity}"
            raise DataError(what, "raise data.max_length, or shorten the row")
        node = 1
        while node < size:
            node *= 2
            if room[node] < length:
                node += 1
        if node - size == len(packs):
            packs.append([])
        packs[node - size].append(position)
        room[node] -= length
        while node > 1:
            node //= 2
            left, right = room[2 * node], room[2 * node + 1]
            most = left if left >= right else right
            if room[node] == most:
                break
            room[node] = most
    return packs
