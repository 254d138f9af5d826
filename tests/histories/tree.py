"""What SGLang's radix tree holds."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from sglang.srt.mem_cache.radix_cache import RadixCache, TreeNode

from sglang_tri.history import SYNTHETIC, span_number


def salt(extra_key: str | None) -> int:
    """A number for an `extra_key`, the same in every process."""
    return zlib.crc32((extra_key or "").encode())


def paths(start: int, ids: Iterable[int]) -> list[int]:
    """A number for every prefix of `ids`, which differs where a prefix or `start` does."""
    found = []
    for token in ids:
        start = hash((start, token))
        found.append(start)
    return found


@dataclass(frozen=True)
class Held:
    """All nodes but the root; the arrays are theirs one after the other, parents first.

    Attributes:
        ids: what slots are found by.
        slots: one for each id.
        paths: of the ids, from the root on.
    """

    nodes: list[TreeNode]
    ids: np.ndarray
    slots: np.ndarray
    paths: np.ndarray

    @property
    def spans(self) -> dict[int, np.ndarray]:
        """The slots of every span that is there, in whole or in part, by its number."""
        synthetic = self.ids >= SYNTHETIC
        numbers, slots = span_number(self.ids[synthetic]), self.slots[synthetic]
        return {number: slots[numbers == number] for number in np.unique(numbers).tolist()}


class Tree:
    """A reader of one tree, which remembers what never changes."""

    def __init__(self, tree: RadixCache) -> None:
        self._tree = tree
        # By a node's own number and its length: a split keeps the number and shortens the node.
        self._seen: dict[tuple[int, int], np.ndarray] = {}

    def read(self) -> Held:
        root = self._tree.root_node
        waiting = [(child, salt(child.key.extra_key)) for child in root.children.values()]
        nodes, parts = [], [np.empty((3, 0), np.int64)]
        while waiting:
            node, start = waiting.pop()
            part = self._read(node, start)
            nodes.append(node)
            parts.append(part)
            end = int(part[2, -1])
            waiting += [(child, end) for child in node.children.values()]
        return Held(nodes, *np.concatenate(parts, 1))

    def _read(self, node: TreeNode, start: int) -> np.ndarray:
        """Ids, slots and paths of a node."""
        key = node.id, len(node.value)
        if key not in self._seen:
            ids = node.key.raw_token_ids()
            assert len(ids) == len(node.value)
            self._seen[key] = np.array([ids, node.value.tolist(), paths(start, ids)], np.int64)
        return self._seen[key]
