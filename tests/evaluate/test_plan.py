"""The plan of forward passes, against brute force."""

from __future__ import annotations

import random

import numpy as np
import pytest

from harness.evaluate.plan import Limits, Query, Row, ancestor_mask, batches, plan_rows

WIDE = Limits(row_tokens=64, batch_tokens=256)


def random_queries(seed, count=60, alphabet=3, longest=12):
    rng = random.Random(seed)
    queries = []
    for _ in range(count):
        length = rng.randint(2, longest)
        tokens = tuple(rng.randrange(alphabet) for _ in range(length))
        queries.append(Query(tokens, rng.randint(1, length - 1)))
    return queries


def sequence_to(row, node):
    """The tokens that a node sees, itself last, in the order of their depth; by the mask alone."""
    seen = np.flatnonzero(ancestor_mask([row], len(row.tokens))[0, node])
    assert [row.depths[each] for each in seen] == list(range(len(seen)))
    return tuple(row.tokens[each] for each in seen)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_every_token_is_scored_after_what_comes_before_it(seed, share):
    queries = random_queries(seed)
    answered = []
    for row in plan_rows(queries, WIDE, share=share):
        assert share or row.is_chain
        for index, pairs in row.members:
            query = queries[index]
            answered.append(index)
            first = len(query.tokens) - query.scored
            for place, pair in zip(range(first, len(query.tokens)), pairs, strict=True):
                node, target = row.pairs[pair]
                assert target == query.tokens[place]
                assert sequence_to(row, node) == query.tokens[:place]
    assert sorted(answered) == list(range(len(queries)))


@pytest.mark.parametrize("seed", range(5))
def test_a_row_holds_no_prefix_twice(seed):
    for row in plan_rows(random_queries(seed), WIDE, share=True):
        prefixes = [sequence_to(row, node) for node in range(len(row.tokens))]
        assert len(set(prefixes)) == len(prefixes)
        assert len(set(row.pairs)) == len(row.pairs)


def test_without_a_price_of_attention_all_that_shares_is_computed_once():
    queries = random_queries(0)
    rows = plan_rows(queries, Limits(row_tokens=10_000, batch_tokens=10_000), share=True)
    prefixes = {query.tokens[:end] for query in queries for end in range(1, len(query.tokens))}
    assert sum(len(row.tokens) for row in rows) == len(prefixes)
    assert len(rows) == 3  # one for each first token


def test_the_choices_of_one_context_share_it():
    context = (5, 6, 7, 8)
    queries = [Query((*context, 1, 2, 3), 3), Query((*context, 4), 1), Query((*context, 1, 9), 2)]
    (row,) = plan_rows(queries, WIDE, share=True)
    assert row.tokens == [5, 6, 7, 8, 1, 2]  # the last token of each is only predicted
    assert sorted(row.pairs) == [(3, 1), (3, 4), (4, 2), (4, 9), (5, 3)]
    assert row.is_chain


def test_choices_of_one_token_are_read_from_one_place_without_sharing_too():
    queries = [Query((5, 6, choice), 1) for choice in range(4)]
    (row,) = plan_rows([*queries, queries[0]], WIDE, share=False)
    assert (row.tokens, row.scored_nodes, len(row.pairs)) == ([5, 6], [1], 4)
    assert [index for index, _ in row.members] == [0, 1, 2, 3, 4]


def test_little_in_common_is_not_worth_a_long_row():
    far = [Query((1, *range(10 * n, 10 * n + 9)), 1) for n in range(1, 4)]
    dear = Limits(row_tokens=64, batch_tokens=256, pair_cost=0.1)
    assert len(plan_rows(far, WIDE, share=True)) == 1
    assert len(plan_rows(far, dear, share=True)) == 3
    near = [Query((*range(20), choice, 7), 2) for choice in range(30, 33)]
    assert len(plan_rows(near, dear, share=True)) == 1


def test_rows_and_batches_keep_their_limits():
    queries = random_queries(3, count=200, alphabet=4, longest=20)
    limits = Limits(row_tokens=30, batch_tokens=90, batch_scored=25)
    rows = plan_rows(queries, limits, share=True)
    sizes = [len(row.tokens) for row in rows]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) <= 30
    cut = list(batches(rows, limits))
    assert [row for batch in cut for row in batch] == rows
    for batch in cut:
        assert len(batch) == 1 or len(batch) * len(batch[0].tokens) <= 90
        assert len(batch) == 1 or sum(len(row.scored_nodes) for row in batch) <= 25
    longer = [Query(tuple(range(200)), 3)]
    assert [len(row.tokens) for row in plan_rows(longer, limits, share=True)] == [199]


def test_padding_sees_itself_and_is_not_seen():
    row = Row(tokens=[1, 2], depths=[0, 1], segments=[(0, 2, -1)])
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert ancestor_mask([row], 4)[0].astype(int).tolist() == expected


@pytest.mark.parametrize("scored", [0, 2, 3])
def test_a_query_that_cannot_be_scored(scored):
    with pytest.raises(ValueError, match=f"{scored} of 2 tokens"):
        Query((1, 2), scored)
