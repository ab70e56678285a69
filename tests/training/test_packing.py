"""What heads are asked to guess: the right tokens, never across the border of two documents, never padding."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medusa_core.config import ModelConfig
from medusa_core.errors import UnsupportedModelError
from medusa_core.model.loader import load_model
from medusa_core.model.sequential_heads import draft_ids
from medusa_core.training.packing import NO_TARGET, check_packing, pack_samples
from medusa_core.training.samples import Sample
from medusa_core.training.vocabulary import choose_draft_vocabulary
from tests.engine.tiny_model import save_tiny_model

samples = st.lists(
    st.lists(st.tuples(st.integers(0, 50), st.booleans()), min_size=1, max_size=12).map(
        lambda pairs: Sample(token_ids=[token for token, _ in pairs], learned=[flag for _, flag in pairs])
    ),
    max_size=8,
)


@given(samples, st.integers(3, 20), st.integers(1, 4))
def test_targets_are_those_of_each_document_alone(samples, row_len, num_heads):
    rows, num_cut = pack_samples(samples, row_len)
    assert all(len(row.token_ids_T) == row_len for row in rows)
    assert num_cut == sum(max(len(sample.token_ids) - row_len, 0) for sample in samples)
    packed = []
    for row in rows:
        targets = row.targets(num_heads).tolist()
        for position in range(row_len):
            if row.document_T[position] >= 0:
                packed.append((int(row.token_ids_T[position]), int(row.position_ids_T[position]), targets[position]))
            else:
                assert targets[position] == [NO_TARGET] * num_heads
    expected = []
    for sample in samples:
        ids, learned = sample.token_ids[:row_len], sample.learned[:row_len]
        if not any(learned):
            continue
        for position, token in enumerate(ids):
            ahead = range(position + 2, position + 2 + num_heads)
            targets = [ids[i] if i < len(ids) and learned[i] else NO_TARGET for i in ahead]
            expected.append((token, position, targets))
    assert packed == expected


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("packing") / "tiny")
    return load_model(ModelConfig(model=str(folder), dtype="float32", device="cpu"), progress=False)


def test_packed_documents_do_not_see_each_other(loaded):
    first, second = ([5, 9, 33, 8], [70, 6, 41, 12, 9])
    rows, _ = pack_samples([Sample(token_ids=ids, learned=[True] * len(ids)) for ids in (first, second)], 12)
    (row,) = rows
    with torch.inference_mode():
        packed = loaded.base_model(input_ids=row.token_ids_T[None], position_ids=row.position_ids_T[None], use_cache=False)
        alone = [loaded.base_model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0] for ids in (first, second)]
    torch.testing.assert_close(packed.last_hidden_state[0, :9], torch.cat(alone), atol=1e-4, rtol=1e-4)
    check_packing(loaded)


def test_a_model_that_looks_across_documents_is_refused(loaded):
    """Its positions are not passed on, so it takes the row for one text."""

    def forward(*, input_ids, position_ids, use_cache):
        return loaded.base_model(input_ids=input_ids, use_cache=use_cache)

    careless = SimpleNamespace(
        base_model=forward, vocab_size=loaded.vocab_size, device=loaded.device, dtype=loaded.dtype, model=loaded.model
    )
    with pytest.raises(UnsupportedModelError, match="attends from one packed document to another"):
        check_packing(careless)


def test_the_draft_vocabulary_holds_the_most_frequent_tokens_to_be_learned():
    ids = [7, 7, 7, 3, 3, 9, 9, 9, 9]
    learned = [True, True, True, True, True, False, False, False, True]
    rows, _ = pack_samples([Sample(token_ids=ids, learned=learned)], 16)
    # 7 three times, 3 twice, 9 once; then the lowest ids of those never seen
    assert choose_draft_vocabulary(rows, 20, 3).tolist() == [3, 7, 9]
    assert choose_draft_vocabulary(rows, 20, 5).tolist() == [0, 1, 3, 7, 9]
    assert choose_draft_vocabulary(rows, 20, 20) is None


def test_draft_ids_lead_back_to_base_ids():
    token_map = torch.tensor([3, 7, 9])
    ids = draft_ids(token_map, 12, outside=NO_TARGET)
    assert [int(ids[base]) for base in (3, 7, 9)] == [0, 1, 2]
    assert int(ids[4]) == NO_TARGET
    assert draft_ids(None, 12, outside=NO_TARGET).tolist() == list(range(12))
