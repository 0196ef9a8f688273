"""Reading a prompt once gives what reading everything anew for each token gives."""

import pytest
import torch
from torch import Tensor

from flamingo import Batch, Flamingo, Prompt, collate
from flamingo.generate import generate_text, greedy, rank
from tests.flamingo.conftest import VOCABULARY, images, tiny_flamingo

NO_STOP = -1
ANSWERS = {
    "unlike": [" a two", " a handwritten seven\n", " nine", " big big big one"],
    "alike at first": [" a big two\n", " a big", " a big handwritten nine"],
    "one token": [" two", " nine"],
    "one answer": [" a big two"],
}


def prompts() -> list[Prompt]:
    """0, 1, 1 and 3 images; texts of unequal lengths."""
    one, two, three, four, five = images(5)
    return [
        Prompt(" a big seven\n a"),
        Prompt("<image>", [one]),
        Prompt("<image> a", [five]),
        Prompt("<image> a two\n<image><image> big", [two, three, four]),
    ]


def full_logits(model: Flamingo, batch: Batch, continuation: Tensor) -> Tensor:
    """Logits that predict continuation [B, n] and the token after it, from one pass without a cache."""
    ids = torch.cat([batch.input_ids, continuation], dim=1)
    added = continuation.shape[1]
    mask = torch.nn.functional.pad(batch.attention_mask, (0, added), value=1)
    locations = torch.nn.functional.pad(batch.media_locations, (0, added), value=False)
    logits = model(ids, model.condition(batch.media, len(ids)), locations, mask)
    return logits[:, batch.input_ids.shape[1] - 1 :]


@torch.no_grad()
def full_greedy(model: Flamingo, batch: Batch, tokens: int) -> Tensor:
    ids = batch.input_ids[:, :0]
    for _ in range(tokens):
        ids = torch.cat([ids, full_logits(model, batch, ids)[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


@pytest.mark.parametrize("seed", range(3))
def test_greedy_with_caches_is_greedy_without(family, tokenizer, seed):
    model = tiny_flamingo(family, gates=0.7, seed=seed)
    for batch in (collate(prompts(), tokenizer), collate(prompts()[:1], tokenizer), collate(prompts()[1:3], tokenizer)):
        with_caches = torch.stack(greedy(model, batch, NO_STOP, max_new_tokens=12))
        assert torch.equal(with_caches, full_greedy(model, batch, 12))


def test_images_reach_the_generated_text(tokenizer):
    model = tiny_flamingo(gates=0.7)
    ids = [
        torch.stack(greedy(model, collate([Prompt("<image>", [image])], tokenizer), NO_STOP)).tolist()
        for image in images(6)
    ]
    assert len({str(row) for row in ids}) > 1


def test_each_row_stops_for_itself(family, tokenizer):
    model = tiny_flamingo(family, gates=0.7)
    batch = collate(prompts(), tokenizer)
    unstopped = full_greedy(model, batch, 12)
    stop = int(unstopped[1, 3])
    stopped = greedy(model, batch, stop, max_new_tokens=12)
    for row, ids in zip(stopped, unstopped.tolist(), strict=True):
        assert row.tolist() == (ids[: ids.index(stop)] if stop in ids else ids)
    assert len(stopped[1]) <= 3


def test_text_is_decoded_up_to_the_stop(tokenizer):
    model = tiny_flamingo(gates=0.7)
    batch = collate(prompts(), tokenizer)
    ids = greedy(model, batch, VOCABULARY.index(" two"))
    assert generate_text(model, tokenizer, batch, stop=" two") == [tokenizer.decode(row) for row in ids]


@torch.no_grad()
@pytest.mark.parametrize("kind", ANSWERS)
def test_ranking_with_caches_is_ranking_without(family, tokenizer, kind):
    model = tiny_flamingo(family, gates=0.7)
    answers = [tokenizer.text_ids(answer) for answer in ANSWERS[kind]]
    for batch in (collate(prompts(), tokenizer), collate(prompts()[:1], tokenizer)):
        expected = torch.empty(len(batch.input_ids), len(answers))
        for i, answer in enumerate(answers):
            ids = torch.tensor(answer).expand(len(batch.input_ids), -1)
            log_p = full_logits(model, batch, ids)[:, :-1].log_softmax(-1)
            expected[:, i] = log_p.gather(2, ids.unsqueeze(-1)).sum((1, 2))
        torch.testing.assert_close(rank(model, batch, answers), expected, atol=1e-4, rtol=1e-4)


def test_an_empty_answer_is_refused(tokenizer):
    with pytest.raises(ValueError, match="rank: answers"):
        rank(tiny_flamingo(), collate(prompts(), tokenizer), [[1], []])
