"""The radix tree finds what a dictionary of prefixes finds, and keeps no node that nothing needs."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspeed_inference.state.radix_tree import RadixTree

PREFIXES = st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple)  # three ids: much is in common


def _array(tokens) -> np.ndarray:
    return np.array(tokens, np.int64)


def _in_common(one: tuple, other: tuple) -> int:
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return length


def _check(tree: RadixTree, model: dict[tuple, int]) -> None:
    found = {}
    for node in tree.root.below():
        for first, child in node.children.items():
            assert child.parent is node and first == child.tokens[0] and child.end == node.end + len(child.tokens)
        if node is not tree.root:
            assert len(node.tokens) and (node.value is not None or len(node.children) > 1)
        if node.value is not None:
            found[tuple(node.prefix().tolist())] = node.value
    assert found == model


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["insert", "insert", "remove", "walk"]), PREFIXES), max_size=25))
def test_it_finds_what_a_dictionary_of_prefixes_finds(calls):
    tree, model, nodes = RadixTree(), {}, {}
    for number, (call, prefix) in enumerate(calls, start=1):
        if call == "insert" and prefix not in model:
            model[prefix] = number
            nodes[prefix] = tree.insert(_array(prefix), number)
        elif call == "remove" and model:
            prefix = min(model, key=lambda known: (_in_common(known, prefix), known))
            del model[prefix]
            tree.remove(nodes.pop(prefix))
        walk = tree.walk(_array(prefix))
        assert [node.value for node in walk.passed] == [
            model[prefix[:length]] for length in range(len(prefix) + 1) if prefix[:length] in model
        ]
        assert walk.shared == max((_in_common(known, prefix) for known in model), default=0)
        assert walk.node.prefix()[: walk.shared].tolist() == list(prefix[: walk.shared])
        below = {known for known in model if known[: walk.shared] == prefix[: walk.shared]}
        assert walk.node.first_value() in ({model[known] for known in below} or {None})
        _check(tree, model)
    assert all(nodes[prefix].prefix().tolist() == list(prefix) for prefix in model)  # a node stays that of its prefix


def test_what_it_keeps_is_a_copy():
    tree, tokens = RadixTree(), np.arange(8)
    tree.insert(tokens, "value")
    tokens[:] = 7
    assert tree.walk(np.arange(8)).shared == 8
    assert tree.walk(np.arange(0)).shared == 0
