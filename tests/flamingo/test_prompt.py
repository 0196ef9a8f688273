"""Prompts to token ids, and batches of them."""

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from flamingo import Prompt, PromptTokenizer, collate
from flamingo.prompt import QUESTION, Shot, few_shot, pack
from tests.flamingo.conftest import VOCABULARY, images, word_tokenizer


def ids(*words: str) -> list[int]:
    return [VOCABULARY.index(word) for word in words]


def test_each_image_is_one_token(tokenizer):
    text = "<image> a two\n<image><image> big"
    expected = ids("<image>", " a", " two", "\n", "<image>", "<image>", " big")
    assert tokenizer.prompt_ids(text) == expected
    assert tokenizer.decode(tokenizer.text_ids(" a two\n")) == " a two\n"


def test_text_alone_is_what_the_tokenizer_makes_of_it(tokenizer):
    assert tokenizer.prompt_ids(" a big two\n") == tokenizer.tokenizer(" a big two\n")["input_ids"]


def test_what_the_tokenizer_puts_first_comes_once():
    words = word_tokenizer()
    words.backend_tokenizer.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 0)])
    tokenizer, prompt = PromptTokenizer(words), Prompt("<image> a<image>", images(2), " two")
    assert tokenizer.prompt_ids(prompt.text) == ids("<pad>", "<image>", " a", "<image>")
    assert collate([prompt], tokenizer).input_ids.tolist() == [ids("<pad>", "<image>", " a", "<image>", " two")]
    further = collate([prompt], tokenizer, begins=False)
    assert further.input_ids.tolist() == [ids("<image>", " a", "<image>", " two")]


def test_rows_are_padded_on_the_left(tokenizer):
    one, two = images(2)
    batch = collate([Prompt("<image>", [one], " a two\n"), Prompt("<image> a<image>", [one, two], "\n")], tokenizer)
    assert batch.input_ids.tolist() == [
        ids("<image>", " a", " two", "\n"),
        ids("<image>", " a", "<image>", "\n"),
    ]
    longer = collate([Prompt(" a"), Prompt(" a big", target=" two\n")], tokenizer)
    assert longer.attention_mask.tolist() == [[0, 0, 0, 1], [1, 1, 1, 1]]
    assert longer.targets.tolist() == [[False] * 4, [False, False, True, True]]
    assert longer.media is None


def test_media_are_padded_with_zeros(tokenizer):
    one, two = images(2)
    batch = collate([Prompt(" a"), Prompt("<image>", [one]), Prompt("<image><image>", [one, two])], tokenizer)
    assert batch.media.shape == (3, 2, *one.shape)
    assert torch.equal(batch.media[2], torch.stack([one, two]))
    assert torch.equal(batch.media[1, 0], one)
    assert not batch.media[0].any()
    assert not batch.media[1, 1].any()
    assert batch.media_locations.sum(1).tolist() == [0, 1, 2]


@pytest.mark.parametrize("text", ["", " a", "<image><image>"])
def test_counts_that_do_not_fit_are_refused(tokenizer, text):
    with pytest.raises(ValueError, match=r"collate: prompts must .* row 1"):
        collate([Prompt(" a"), Prompt(text, images(1))], tokenizer)


def test_an_image_token_outside_the_vocabulary_is_refused(tokenizer):
    with pytest.raises(ValueError, match="image_token must be in the vocabulary, got '<picture>'"):
        PromptTokenizer(tokenizer.tokenizer, "<picture>")


def test_a_target_may_hold_images_which_are_no_targets(tokenizer):
    one, two = images(2)
    example = tokenizer.encode(Prompt(" a<image>", [one, two], " two<image> nine\n"))
    assert example.input_ids == ids(" a", "<image>", " two", "<image>", " nine", "\n")
    assert example.targets == [False, False, True, False, True, True]
    whole = tokenizer.encode(Prompt("", [one], " big<image>"))
    assert whole.targets == [False, False]  # nothing predicts the first token
    batch = collate([Prompt(" a<image>", [one, two], " two<image> nine\n"), whole], tokenizer)
    assert batch.targets.tolist() == [example.targets, [False] * 6]


def test_the_end_of_a_chunk_is_what_the_vocabulary_has(tokenizer):
    assert tokenizer.chunk_end == "\n"
    assert tokenizer.prompt_ids("<image> two<|endofchunk|> a") == ids("<image>", " two", "\n", " a")
    words = word_tokenizer()
    words.eos_token = " nine"
    assert PromptTokenizer(words).text_ids(" a<|endofchunk|>") == ids(" a", " nine")
    assert PromptTokenizer(words, chunk_end=" big").text_ids(" a<|endofchunk|>") == ids(" a", " big")
    words.add_tokens("<|endofchunk|>", special_tokens=True)
    assert PromptTokenizer(words).text_ids(" a<|endofchunk|>") == [*ids(" a"), len(VOCABULARY)]


def test_rows_may_be_padded_on_the_right(tokenizer):
    rows = [Prompt("<image>", images(1), " a two\n"), Prompt(" a")]
    left, right = (collate(rows, tokenizer, padding=side) for side in ("left", "right"))
    assert right.attention_mask.tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    assert right.input_ids[1].tolist() == [*ids(" a"), 0, 0, 0]
    assert torch.equal(left.input_ids[0], right.input_ids[0])
    assert torch.equal(left.media, right.media)
    with pytest.raises(ValueError, match="collate: padding must be left or right, got 'both'"):
        collate(rows, tokenizer, padding="both")


def test_videos_are_padded_and_counted(tokenizer):
    image, video = torch.ones(1, 5, 24), torch.ones(3, 5, 24)
    batch = collate([Prompt("<image>", [image]), Prompt("<image> a<image>", [video, image])], tokenizer)
    assert batch.media.shape == (2, 2, 3, 5, 24)
    assert batch.frame_counts.tolist() == [[1, 0], [3, 1]]
    assert batch.media[..., 0, 0].tolist() == [[[1, 0, 0], [0, 0, 0]], [[1, 1, 1], [1, 0, 0]]]
    assert collate([Prompt("<image>", [image])], tokenizer).frame_counts is None
    with pytest.raises(ValueError, match=r"collate: prompts must have media of one shape .*\(4, 24\), \(5, 24\)"):
        collate([Prompt("<image><image>", [image, torch.ones(1, 4, 24)])], tokenizer)


def test_rows_that_see_the_next_image_are_marked(tokenizer):
    rows = [Prompt(" a<image>", images(1), attend_next=True), Prompt(" a")]
    assert collate(rows, tokenizer).attend_next.tolist() == [True, False]
    assert collate(rows[1:], tokenizer).attend_next is None
    with pytest.raises(ValueError, match="collate: prompts of one row must agree on attend_next, got both in row 0"):
        collate([rows], tokenizer)


def test_documents_are_packed_into_rows_with_room(tokenizer):
    one, two = images(2)
    prompts = [
        Prompt("<image> a two", [one], "\n"),
        Prompt(" big big", target=" nine\n"),
        Prompt("<image>", [two], " a\n"),
        Prompt(" a", attend_next=True),
    ]
    rows = pack(prompts, tokenizer, 7)
    assert rows == [
        [tokenizer.encode(prompts[0]), tokenizer.encode(prompts[2])],
        *([tokenizer.encode(p)] for p in prompts[1::2]),
    ]
    batch = collate(rows, tokenizer)
    assert batch.input_ids[0].tolist() == ids("<image>", " a", " two", "\n", "<image>", " a", "\n")
    assert batch.document_start.tolist() == [
        [True, *[False] * 3, True, *[False] * 2],
        [*[False] * 3, True, *[False] * 3],
        [*[False] * 6, True],
    ]
    assert batch.targets[0].tolist() == [False] * 3 + [True, False, True, True]
    assert torch.equal(batch.media[0], torch.stack([one, two]))
    assert collate(prompts, tokenizer).document_start is None
    with pytest.raises(ValueError, match="pack: prompts must be of at most 3 tokens, got 4"):
        pack(prompts, tokenizer, 3)


def test_a_few_shots_stand_before_the_query():
    one, two, three = images(3)
    support = [Shot([one], "a cat"), Shot([two], "a dog")]
    prompt = few_shot(support, Shot([three], "a cow"))
    assert prompt.text == "<image>Output: a cat<|endofchunk|><image>Output: a dog<|endofchunk|><image>Output:"
    assert all(a is b for a, b in zip(prompt.media, [one, two, three], strict=True))
    assert prompt.target == ""
    assert few_shot(support, Shot([three], "a cow"), target=True).target == " a cow<|endofchunk|>"


def test_zero_shots_show_the_form_by_text_alone():
    one, two, three = images(3)
    support = [Shot([one], "red", "What colour?"), Shot([two], "{answer}", "Who said {question}?")]
    prompt = few_shot(support, Shot([three], "no", "Is it?"), QUESTION, text_only=True)
    assert prompt.text == (
        "Question: What colour? Answer: red<|endofchunk|>Question: Who said {question}? Answer: {answer}<|endofchunk|>"
        "<image>Question: Is it? Answer:"
    )
    assert len(prompt.media) == 1
    assert prompt.media[0] is three
    assert few_shot([], Shot([three])).text == "<image>Output:"
    with pytest.raises(ValueError, match=r"few_shot: template must hold \{answer\} once, got '<image>'"):
        few_shot([], Shot([three]), "<image>")
