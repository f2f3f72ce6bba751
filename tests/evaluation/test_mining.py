"""Hard negatives of queries, against sentence-transformers where it is installed, and by hand."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tunekit.evaluation.mining import mine_negatives

HAS_ORACLE = importlib.util.find_spec("sentence_transformers") is not None


def test_negatives_are_the_most_similar_documents_under_the_margin() -> None:
    angles = torch.tensor([0.1, 0.2, 0.3, 0.3, 0.9, 1.2])  # of the documents, from the query; the second is relevant
    documents = torch.stack([angles.cos(), angles.sin()], dim=1)
    [mined] = mine_negatives(torch.tensor([[1.0, 0.0]]), documents, [[1]], [[5]], count=2, margin=0.1)
    assert (mined.places, mined.left_out) == ([4], [0, 2, 3])
    [mined] = mine_negatives(torch.tensor([[1.0, 0.0]]), documents, [[1]], [[5]], count=2, margin=0.0)
    assert (mined.places, mined.left_out) == ([2, 3], [0])
    assert mined.positive == pytest.approx(float(torch.tensor(0.2).cos()))


def test_a_query_without_a_possible_negative_has_none() -> None:
    [mined] = mine_negatives(torch.ones(1, 2), torch.ones(2, 2), [[0]], [[1]], count=3, margin=0.05)
    assert (mined.places, mined.scores, mined.left_out) == ([], [], [])


@pytest.mark.skipif(not HAS_ORACLE, reason="sentence_transformers is not installed")
def test_negatives_are_those_of_sentence_transformers() -> None:
    from datasets import Dataset
    from sentence_transformers.util import cos_sim, mine_hard_negatives, pairwise_cos_sim

    generator = torch.Generator().manual_seed(0)
    vectors = {f"q{n}": torch.randn(8, generator=generator) for n in range(30)}
    vectors |= {f"d{n}": vectors[f"q{n % 30}"] + torch.randn(8, generator=generator) for n in range(60)}

    def embed(texts: list[str], **_: Any) -> Any:
        return F.normalize(torch.stack([vectors[text] for text in texts]), dim=-1).numpy()

    rows = Dataset.from_dict({"query": [f"q{n % 30}" for n in range(60)], "document": [f"d{n}" for n in range(60)]})
    model: Any = SimpleNamespace(
        device=torch.device("cpu"),
        get_embedding_dimension=lambda: 8,
        model_card_data=None,
        encode_query=embed,
        encode_document=embed,
        encode=embed,
        similarity=cos_sim,
        similarity_pairwise=pairwise_cos_sim,
    )
    theirs = mine_hard_negatives(
        rows, model, num_negatives=3, relative_margin=0.05, range_max=60, output_format="n-tuple", verbose=False
    )
    wanted = {(row["query"], row["document"]): [row[f"negative_{n}"] for n in (1, 2, 3)] for row in theirs}
    assert len(wanted) > 40
    queries, documents = (
        torch.stack([vectors[f"{kind}{n}"] for n in range(count)]) for kind, count in (("q", 30), ("d", 60))
    )
    mined = list(mine_negatives(queries, documents, [[n, n + 30] for n in range(30)], [[]] * 30, count=3, margin=0.05))
    for (query, _), negatives in wanted.items():
        assert [f"d{place}" for place in mined[int(query[1:])].places] == negatives
