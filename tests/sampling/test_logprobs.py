"""Log-probabilities of tokens, and which tokens count as the most likely."""

import torch

from medusa_core.sampling.logprobs import logprobs_of_hidden, token_logprobs


def test_they_are_of_the_softmax():
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, 10.0]])
    rows = token_logprobs(logits, torch.tensor([2, 0]), 2)
    expected = logits.double().log_softmax(dim=-1)
    torch.testing.assert_close(rows.logprob_R, torch.stack([expected[0, 2], expected[1, 0]]).float(), atol=1e-6, rtol=0.0)
    assert rows.top_ids_RC.tolist() == [[1, 2], [2, 0]]
    torch.testing.assert_close(rows.top_logprobs_RC, expected.gather(1, rows.top_ids_RC).float(), atol=1e-6, rtol=0.0)


def test_the_lowest_ids_come_first_among_equals():
    """As the greedy token does, so that it is the first of the most likely ones."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randint(-2, 3, (50, 300), generator=generator).float()
    logits[logits == 0] *= torch.where(torch.rand(int((logits == 0).sum()), generator=generator) < 0.5, -1.0, 1.0)
    rows = token_logprobs(logits, torch.zeros(50, dtype=torch.int64), 7)
    assert rows.top_ids_RC.tolist() == logits.sort(dim=-1, descending=True, stable=True).indices[:, :7].tolist()
    assert torch.equal(rows.top_ids_RC[:, 0], logits.argmax(dim=-1))


def test_no_alternatives_and_more_than_there_are():
    logits = torch.randn(3, 5)
    token = torch.tensor([0, 1, 2])
    assert token_logprobs(logits, token, 0).top_ids_RC.shape == (3, 0)
    assert token_logprobs(logits, token, 20).top_ids_RC.shape == (3, 5)


def test_many_rows_are_projected_a_few_at_a_time():
    weight, hidden = torch.randn(40, 8), torch.randn(100, 8)
    token = torch.randint(40, (100,))
    sizes = []

    def project(hidden_RE):
        sizes.append(len(hidden_RE))
        return hidden_RE @ weight.T

    rows = logprobs_of_hidden(hidden, token, 3, project=project)
    expected = token_logprobs(hidden @ weight.T, token, 3)
    assert max(sizes) <= 32
    torch.testing.assert_close(rows.logprob_R, expected.logprob_R)
    assert torch.equal(rows.top_ids_RC, expected.top_ids_RC)
