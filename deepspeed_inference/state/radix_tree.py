"""A radix tree over token ids: what prompts have in common is held once, and found by comparing whole runs of tokens.

A node stands for the prefix that the edges from the root to it spell; some prefixes have a value. Nodes that nothing
needs are not kept: every node but the root has a value or at least two children, so that a path has at most as many
nodes as there are values and partings on it. Ids are compared, never hashes of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np


class Node:
    """A prefix.

    Attributes:
        tokens: [k] int64, the edge that leads here from the parent; empty at the root only.
        end: how many tokens the whole prefix has.
        parent: None at the root.
        children: by the first token of their edges.
        value: of this prefix, or None.
    """

    __slots__ = ("children", "end", "parent", "tokens", "value")

    def __init__(self, tokens: np.ndarray, parent: Node | None):
        self.tokens = tokens
        self.parent = parent
        self.end = len(tokens) + (parent.end if parent else 0)
        self.children: dict[int, Node] = {}
        self.value: Any = None

    def first_value(self) -> Any:
        """The value here or at some node below, the same whenever the same calls were made; None in an empty tree."""
        node = self
        while node.value is None and node.children:
            node = next(iter(node.children.values()))
        return node.value

    def below(self) -> Iterator[Node]:
        """This node and all below it."""
        nodes = [self]
        while nodes:
            node = nodes.pop()
            yield node
            nodes.extend(node.children.values())

    def prefix(self) -> np.ndarray:
        """[end] int64, all tokens of the prefix."""
        return self.tokens if self.parent is None else np.concatenate([self.parent.prefix(), self.tokens])


@dataclass(frozen=True)
class Walk:
    """How far a sequence of tokens leads into a tree.

    Args:
        shared: how many of its first tokens the tree knows.
        node: the highest node whose prefix has all of these; it ends there, or further down.
        passed: the nodes with values whose prefixes are prefixes of the sequence, the shortest first.
    """

    shared: int
    node: Node
    passed: tuple[Node, ...]


class RadixTree:
    """Prefixes with values; empty at first."""

    def __init__(self):
        self.root = Node(np.empty(0, np.int64), None)

    def walk(self, tokens: np.ndarray) -> Walk:
        """Follow [n] int64 tokens as far as the tree knows them."""
        node, shared, passed = self.root, 0, []
        while shared == node.end:
            if node.value is not None:
                passed.append(node)
            child = node.children.get(int(tokens[shared])) if shared < len(tokens) else None
            if child is None:
                break
            node = child
            shared += common_length(node.tokens, tokens[shared : shared + len(node.tokens)])
        return Walk(shared, node, tuple(passed))

    def insert(self, tokens: np.ndarray, value: Any) -> Node:
        """Give a prefix its value; it must have none.

        Args:
            tokens: [n] int64, n ≥ 1.
            value: not None.

        Returns:
            Its node, which stays the node of this prefix until the value is removed.
        """
        walk = self.walk(tokens)
        node = walk.node if walk.shared == walk.node.end else _split(walk.node, walk.shared)
        if walk.shared < len(tokens):
            node = _attach(node, Node(tokens[walk.shared :].copy(), node))  # a copy, for prompts are the caller's
        assert value is not None and node.value is None and node.parent is not None
        node.value = value
        return node

    def remove(self, node: Node) -> None:
        """Take the value from a node that `insert` returned, and what served it alone from the tree."""
        assert node.value is not None
        node.value = None
        if not node.children:
            del node.parent.children[int(node.tokens[0])]
            node = node.parent
        if node.value is None and len(node.children) == 1 and node.parent is not None:
            _merge(node)


def common_length(first: np.ndarray, second: np.ndarray) -> int:
    """How many tokens two sequences begin with in common; neither is empty."""
    length = min(len(first), len(second))
    different = first[:length] != second[:length]
    place = int(different.argmax())  # 0 where none differs
    return place if different[place] else length


def _attach(parent: Node, child: Node) -> Node:
    """Make a node its parent's child, instead of another that begins with the same token."""
    parent.children[int(child.tokens[0])] = child
    child.parent = parent
    return child


def _split(node: Node, end: int) -> Node:
    """Put a node where `end` tokens are known, in the middle of the edge to this one, which stays the node it is."""
    at = end - node.parent.end
    upper = _attach(node.parent, Node(node.tokens[:at].copy(), node.parent))
    node.tokens = node.tokens[at:].copy()
    _attach(upper, node)
    return upper


def _merge(node: Node) -> None:
    """Join a node's edge with that of its only child, which stays the node it is."""
    (child,) = node.children.values()
    child.tokens = np.concatenate([node.tokens, child.tokens])
    _attach(node.parent, child)
