"""Reading a prompt once, in chunks or in turns, gives what reading everything anew for each token gives."""

import itertools
import random
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flamingo import Batch, Flamingo, Prompt, collate
from flamingo.generate import generate, generate_text, rank, read
from flamingo.train import Recipe, Trainer, train
from tests.flamingo.conftest import VOCABULARY, images, tiny_flamingo
from tests.support.calls import Calls

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


def further_prompts() -> list[Prompt]:
    """What a second turn adds to them: 2, 0, 1 and 1 images."""
    one, two, three, four = images(4, seed=7)
    return [
        Prompt("<image> nine<image>", [one, two]),
        Prompt(" big one\n"),
        Prompt(" a\n<image> big", [three]),
        Prompt("<image>", [four]),
    ]


def joined(*turns: list[Prompt]) -> list[Prompt]:
    """The turns of each row as one prompt."""
    return [
        Prompt("".join(part.text for part in row), [item for part in row for item in part.media])
        for row in zip(*turns, strict=True)
    ]


def row_groups(family: str) -> list[slice]:
    """The rows that may take turns together: MPT counts padding between them."""
    return [slice(row, row + 1) for row in range(4)] if family == "mpt" else [slice(None)]


def full_logits(model: Flamingo, batch: Batch, continuation: Tensor) -> Tensor:
    """Logits that predict continuation [B, n] and the token after it, from one pass without a cache."""
    ids = torch.cat([batch.input_ids, continuation], dim=1)
    added = continuation.shape[1]
    mask = F.pad(batch.attention_mask, (0, added), value=1)
    locations = F.pad(batch.media_locations, (0, added), value=False)
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
        with_caches = torch.stack(generate(model, batch, max_new_tokens=12))
        assert torch.equal(with_caches, full_greedy(model, batch, 12))


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_chunks_give_what_one_pass_gives(family, tokenizer, chunk):
    model = tiny_flamingo(family, gates=0.7)
    batch = collate(prompts(), tokenizer)
    reading = read(model, batch, chunk=chunk)
    assert torch.equal(torch.stack(generate(model, reading, max_new_tokens=8)), full_greedy(model, batch, 8))


@pytest.mark.parametrize("chunk", [None, 2])
def test_turns_with_new_images_give_what_one_pass_gives(family, tokenizer, chunk):
    model = tiny_flamingo(family, gates=0.7)
    for rows in row_groups(family):
        first, second, third = prompts()[rows], further_prompts()[rows], further_prompts()[::-1][rows]
        reading = None
        for turns in ([first], [first, second], [first, second, third]):
            reading = read(model, collate(turns[-1], tokenizer), reading, chunk=chunk)
            expected = full_greedy(model, collate(joined(*turns), tokenizer), 6)
            assert torch.equal(torch.stack(generate(model, reading, max_new_tokens=6)), expected)


def test_padding_between_turns_is_refused_where_it_would_count(tokenizer):
    model = tiny_flamingo("mpt")
    reading = read(model, collate(prompts(), tokenizer))
    with pytest.raises(ValueError, match="read: batch must have no padding behind what was read"):
        read(model, collate(further_prompts(), tokenizer), reading)


def test_sampling_draws_from_the_distribution_of_one_pass(family, tokenizer):
    model = tiny_flamingo(family, gates=0.7)
    batch = collate(prompts(), tokenizer)
    torch.manual_seed(3)
    drawn = torch.stack(generate(model, batch, max_new_tokens=6, do_sample=True, temperature=2.0, top_k=0))
    torch.manual_seed(3)
    ids = batch.input_ids[:, :0]
    with torch.no_grad():
        for _ in range(6):
            p = (full_logits(model, batch, ids)[:, -1].float() / 2).softmax(-1)
            ids = torch.cat([ids, torch.multinomial(p, 1)], dim=1)
    assert torch.equal(drawn, ids)


@torch.no_grad()
def test_as_many_beams_as_words_find_the_likeliest_two(family, tokenizer):
    """With a beam for every first word, beam search of two words is exact, and all pairs can be scored in one pass."""
    model, words = tiny_flamingo(family, gates=0.7), len(VOCABULARY)
    batch = collate(prompts(), tokenizer)
    with Calls() as calls:
        found = torch.stack(generate(model, batch, max_new_tokens=2, num_beams=words))
    assert len(calls.args("media_kv")) == 2
    assert {args[4].shape[0] for args in calls.args("gated_block")} == {4}  # keys of 4 rows, not of beams
    for row, prompt in enumerate(prompts()):
        alone = collate([prompt] * words, tokenizer)
        logits = full_logits(model, alone, torch.arange(words)[:, None]).float().log_softmax(-1)
        pairs = logits[torch.arange(words), 0, torch.arange(words), None] + logits[:, 1]
        assert found[row].tolist() == list(divmod(int(pairs.argmax()), words))


@pytest.mark.parametrize("rows", [slice(None), slice(1, 2)], ids=["ragged", "one token"])
def test_several_sequences_of_a_row_stand_together(tokenizer, rows):
    model = tiny_flamingo(gates=0.7)
    reading = read(model, collate(prompts()[rows], tokenizer))
    best = generate(model, reading, num_beams=3)
    several = generate(model, reading, num_beams=3, num_return_sequences=2)
    assert len(several) == 2 * len(best)
    assert all(torch.equal(a, b) for a, b in zip(best, several[::2], strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(several[::2], several[1::2], strict=True))
    drawn = generate(model, reading, do_sample=True, num_return_sequences=3)
    assert len(drawn) == 3 * len(best)
    assert not torch.equal(drawn[0], drawn[1])


def test_defaults_of_the_language_model_change_nothing(tokenizer):
    model = tiny_flamingo(gates=0.7)
    batch = collate(prompts(), tokenizer)
    own = model.lm.generation_config
    own.repetition_penalty, own.max_new_tokens, own.do_sample, own.top_k = 50.0, 1, True, 3
    assert torch.equal(torch.stack(generate(model, batch, max_new_tokens=5)), full_greedy(model, batch, 5))
    assert model.lm.generation_config is own


def test_images_reach_the_generated_text(tokenizer):
    model = tiny_flamingo(gates=0.7)
    rows = [generate(model, collate([Prompt("<image>", [image])], tokenizer)) for image in images(6)]
    assert len({str(row) for row in rows}) > 1


def test_each_row_stops_for_itself(family, tokenizer):
    model = tiny_flamingo(family, gates=0.7)
    batch = collate(prompts(), tokenizer)
    unstopped = full_greedy(model, batch, 12)
    stops = [int(unstopped[1, 3]), int(unstopped[3, 5])]
    stopped = generate(model, batch, stops, max_new_tokens=12)
    for row, ids in zip(stopped, unstopped.tolist(), strict=True):
        assert row.tolist() == list(itertools.takewhile(lambda token: token not in stops, ids))
    assert len(stopped[1]) <= 3


def test_text_is_decoded_up_to_the_stop_and_holds_no_image(tokenizer):
    model = tiny_flamingo(gates=0.7)
    batch = collate(prompts(), tokenizer)
    ids = generate(model, batch, [VOCABULARY.index(" two")], suppress_tokens=[tokenizer.image_id])
    texts = generate_text(model, tokenizer, batch, stop=" two")
    assert texts == [tokenizer.decode(row) for row in ids]
    assert not any("<image>" in text for text in texts)


def test_after_training_on_five_images_it_reads_forty(tokenizer):
    """The last image decides what is written, as it did in training."""
    pictures = dict(zip((" big two\n", " a nine\n"), images(2), strict=True))
    rng = random.Random(0)

    def prompt(count: int, target: str) -> Prompt:
        shown = [*rng.choices(list(pictures), k=count - 1), target]
        text = "".join(f"<image>{caption}" for caption in shown).removesuffix(target)
        return Prompt(text, [pictures[caption] for caption in shown], target)

    def batches() -> Iterator[Batch]:
        while True:
            yield collate([prompt(count, rng.choice(list(pictures))) for count in (1, 2, 3, 4, 5) * 2], tokenizer)

    model = tiny_flamingo()
    train(Trainer(model, Recipe(100, 3e-3, 3e-2, warmup=5)), {"captions": batches()})
    model.eval()
    asked = [prompt(40, target) for target in (*pictures, *pictures)]
    batch = collate([Prompt(p.text, p.media) for p in asked], tokenizer)
    assert [f"{text}\n" for text in generate_text(model, tokenizer, batch)] == [p.target for p in asked]
    assert generate_text(model, tokenizer, read(model, batch, chunk=7)) == generate_text(model, tokenizer, batch)


@torch.no_grad()
@pytest.mark.parametrize("kind", ANSWERS)
def test_ranking_with_caches_is_ranking_without(family, tokenizer, kind):
    model = tiny_flamingo(family, gates=0.7)
    answers = [tokenizer.text_ids(answer) for answer in ANSWERS[kind]]
    for batch in (collate(prompts(), tokenizer), collate(prompts()[:1], tokenizer)):
        torch.testing.assert_close(rank(model, batch, answers), full_rank(model, batch, answers), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_queries_share_what_stands_before_them(family, tokenizer):
    """A prefix is read once for all queries and answers."""
    model = tiny_flamingo(family, gates=0.7)
    answers = [tokenizer.text_ids(answer) for answer in ANSWERS["alike at first"]]
    prefix = [prompts()[3]]
    reading = read(model, collate(prefix, tokenizer))
    for rows in row_groups(family):
        queries = further_prompts()[rows]
        batch, times = collate(queries, tokenizer), len(queries)
        with Calls() as calls:
            scores = rank(model, batch, answers, after=reading.repeat(times))
        whole = collate(joined(prefix * times, queries), tokenizer)
        torch.testing.assert_close(scores, full_rank(model, whole, answers), atol=1e-4, rtol=1e-4)
        assert max(args[0].shape[1] for args in calls.args("gated_block")) < reading.input_ids.shape[1]
        assert torch.equal(scores, rank(model, batch, answers, after=reading.repeat(times)))


def full_rank(model: Flamingo, batch: Batch, answers: list[list[int]]) -> Tensor:
    scores = torch.empty(len(batch.input_ids), len(answers))
    for i, answer in enumerate(answers):
        ids = torch.tensor(answer).expand(len(batch.input_ids), -1)
        log_p = full_logits(model, batch, ids)[:, :-1].log_softmax(-1)
        scores[:, i] = log_p.gather(2, ids.unsqueeze(-1)).sum((1, 2))
    return scores


def test_an_empty_answer_is_refused(tokenizer):
    with pytest.raises(ValueError, match="rank: answers"):
        rank(tiny_flamingo(), collate(prompts(), tokenizer), [[1], []])


def test_rows_that_do_not_fit_are_refused(tokenizer):
    model = tiny_flamingo()
    reading = read(model, collate(prompts(), tokenizer))
    with pytest.raises(ValueError, match="read: batch must have 4 rows, as what was read, got 2"):
        read(model, collate(prompts()[:2], tokenizer), reading)
    with pytest.raises(ValueError, match="read: batch must be padded on the left"):
        read(tiny_flamingo(), collate(prompts(), tokenizer, padding="right"))
