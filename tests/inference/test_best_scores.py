"""The best of scores that come block after block are those of all scores sorted."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrec_qr.inference.best_scores import BestScores


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from([1, 2, 5, 63, 64, 65, 130, 1000]), min_size=1, max_size=5),
    st.sampled_from([0, 1, 4]),
    st.integers(0, 1000),
    st.sampled_from([1, 4, 10**6]),
    st.data(),
)
def test_the_best_are_those_of_all_scores_sorted(
    sizes: list[int], count: int, seed: int, values: int, data: st.DataObject
) -> None:
    """With few values most scores are equal, and some are infinite."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-values, values + 1, (count, sum(sizes)), generator=generator).float()
    scores[scores == -values] = -torch.inf
    scores[scores == values] = torch.inf
    k = data.draw(st.integers(1, sum(sizes)))
    best, first = BestScores(count, k, torch.device("cpu")), 0
    for i, block in enumerate(scores.split(sizes, dim=1)):
        # The scores of a user are contiguous in some blocks, and those of an id in others.
        assert best.add(first, block.T.contiguous().T if i % 2 else block)
        first += block.shape[1]
    expected, ids = scores.sort(dim=1, descending=True, stable=True)
    assert torch.equal(best.scores, expected[:, :k])
    assert torch.equal(best.ids, ids[:, :k])


def test_zeros_of_both_signs_are_equal() -> None:
    best = BestScores(1, 3, torch.device("cpu"))
    best.add(0, torch.tensor([[-0.0, 0.0]]))
    best.add(2, torch.tensor([[0.0, -0.0, -1.0]]))
    assert best.ids.tolist() == [[0, 1, 2]]


def test_nan_anywhere_is_found() -> None:
    for place in (0, 63, 64, 199):
        scores = torch.zeros(2, 200)
        scores[1, place] = torch.nan
        assert BestScores(2, 1, torch.device("cpu")).add(0, torch.zeros(2, 200))
        assert not BestScores(2, 1, torch.device("cpu")).add(0, scores)
        assert not BestScores(2, 200, torch.device("cpu")).add(0, scores)
