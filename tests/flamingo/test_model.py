"""A fresh Flamingo is its language model; a trained one has new parameters only."""

import copy

import pytest
import torch
from transformers import DynamicCache

from flamingo import Batch, Flamingo, Prompt, collate
from flamingo.language import call_names, decoder_layers
from flamingo.train import target_loss
from tests.flamingo.conftest import FAMILIES, images, tiny_flamingo, tiny_lm
from tests.support.calls import Calls

SDPA = [family for family in FAMILIES if family != "mpt"]  # for which transformers has none


def prompts() -> list[Prompt]:
    """0, 1 and 3 images; texts of unequal lengths."""
    one, two, three, four = images(4)
    return [
        Prompt(" a big seven\n"),
        Prompt("<image>", [one], " a handwritten one\n"),
        Prompt("<image> a two\n<image><image> big", [two, three, four], " three\n"),
    ]


def ragged(tokenizer) -> Batch:
    return collate(prompts(), tokenizer)


def logits(model: Flamingo, batch: Batch) -> torch.Tensor:
    conditioning = model.condition(batch.media, len(batch.input_ids))
    return model(batch.input_ids, conditioning, batch.media_locations, batch.attention_mask)


def plain_logits(lm: torch.nn.Module, batch: Batch) -> torch.Tensor:
    positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
    return lm(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=positions, use_cache=False
    ).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_closed_gates_give_the_bits_of_the_language_model(family, dtype, tokenizer):
    batch = ragged(tokenizer)
    model, plain = tiny_flamingo(family), tiny_lm(family).eval()
    model.lm.to(dtype), plain.to(dtype)
    with torch.no_grad():
        assert torch.equal(logits(model, batch), plain_logits(plain, batch))


def test_open_gates_do_not_reach_the_language_model_called_directly(family, tokenizer):
    batch = ragged(tokenizer)
    model = tiny_flamingo(family, gates=0.5)
    with torch.no_grad():
        plain = plain_logits(tiny_lm(family).eval(), batch)
        assert not torch.allclose(logits(model, batch), plain, atol=0.1)
        assert torch.equal(plain_logits(model.lm, batch), plain)


def test_a_failing_pass_leaves_the_language_model_plain(tokenizer):
    batch = ragged(tokenizer)
    model = tiny_flamingo(gates=0.5)
    conditioning = model.condition(batch.media, len(batch.input_ids))
    with pytest.raises(IndexError):
        model(batch.input_ids + 1000, conditioning, batch.media_locations, batch.attention_mask)
    with torch.no_grad():
        assert torch.equal(plain_logits(model.lm, batch), plain_logits(tiny_lm().eval(), batch))


def test_padding_changes_nothing(family, tokenizer):
    batch = ragged(tokenizer)
    model = tiny_flamingo(family, gates=0.5)
    with torch.no_grad():
        together = logits(model, batch)
        for row, (ids, mask) in enumerate(zip(batch.input_ids, batch.attention_mask.bool(), strict=True)):
            media = batch.media[row : row + 1] if batch.media_locations[row].any() else None
            locations = batch.media_locations[row : row + 1, mask]
            alone = model(ids[None, mask], model.condition(media, 1), locations, torch.ones_like(ids[None, mask]))
            torch.testing.assert_close(together[row, mask], alone[0], atol=1e-4, rtol=1e-4)


def test_padding_on_the_right_changes_nothing(family, tokenizer):
    model = tiny_flamingo(family, gates=0.5)
    rows = prompts()
    left, right = (collate(rows, tokenizer, padding=side) for side in ("left", "right"))
    with torch.no_grad():
        a, b = logits(model, left)[left.attention_mask.bool()], logits(model, right)[right.attention_mask.bool()]
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("attend", ["latest", "all", "group"])
@pytest.mark.parametrize(("family", "attention"), [*((f, "eager") for f in FAMILIES), *((f, "sdpa") for f in SDPA)])
def test_packed_documents_are_as_in_rows_of_their_own(family, attention, attend, tokenizer):
    """Positions, attention of the language model and images are each kept within a document."""
    model = tiny_flamingo(family, gates=0.5, attend=attend)
    model.lm.set_attn_implementation(attention)
    documents = [*prompts(), Prompt(" a big nine\n")]
    packed = collate([documents[:2], documents[2:], documents[1:2]], tokenizer)
    assert packed.document_start.sum(1).tolist() == [2, 2, 1]
    with torch.no_grad():
        found = model(
            packed.input_ids,
            model.condition(packed.media, 3),
            packed.media_locations,
            packed.attention_mask,
            document_start=packed.document_start,
        )[packed.attention_mask.bool()]
        apart = [logits(model, collate([document], tokenizer))[0] for document in (*documents, documents[1])]
    torch.testing.assert_close(found, torch.cat(apart), atol=1e-4, rtol=1e-4)


def test_packed_rows_have_the_loss_of_their_documents(tokenizer):
    model = tiny_flamingo(gates=0.5)
    packed = collate([prompts()], tokenizer)
    torch.testing.assert_close(target_loss(model, packed), target_loss(model, ragged(tokenizer)))


def test_packed_documents_are_refused_where_they_cannot_be_kept_apart(tokenizer):
    model, packed = tiny_flamingo(), collate([prompts()], tokenizer)
    texts = (packed.input_ids, model.condition(packed.media, 1), packed.media_locations, packed.attention_mask)
    with pytest.raises(ValueError, match="Flamingo: document_start must be None with a cache"):
        model(*texts, document_start=packed.document_start, cache=DynamicCache(config=model.lm.config))


def test_a_language_model_that_would_misread_packed_documents_is_refused(tokenizer, monkeypatch):
    model, packed = tiny_flamingo("mpt"), collate([prompts()], tokenizer)
    monkeypatch.setattr("flamingo.model.call_names", lambda lm: {"cache": "past_key_values"})
    texts = (packed.input_ids, model.condition(packed.media, 1), packed.media_locations, packed.attention_mask)
    with pytest.raises(ValueError, match="document_start must be None"):
        model(*texts, document_start=packed.document_start)


def test_a_language_model_that_gives_all_logits_is_cut_to_those_asked_for(tokenizer, monkeypatch):
    model, batch = tiny_flamingo(gates=0.5), ragged(tokenizer)
    inputs = (batch.input_ids, model.condition(batch.media, 3), batch.media_locations, batch.attention_mask)
    wanted = (0, 3, torch.tensor([1, 4]))
    with torch.no_grad():
        expected = [model(*inputs, logits_to_keep=keep) for keep in wanted]
        names = {name: called for name, called in call_names(model.lm).items() if name != "logits_to_keep"}
        monkeypatch.setattr("flamingo.model.call_names", lambda lm: names)
        for keep, logits_kept in zip(wanted, expected, strict=True):
            torch.testing.assert_close(model(*inputs, logits_to_keep=keep), logits_kept)


def test_some_rows_see_the_next_image(tokenizer):
    """In them, text before an image sees it and text behind the last one sees nothing."""
    one, two = images(2)
    text = [Prompt(" a<image> two", [x], attend_next=following) for x in (one, two) for following in (True, False)]
    model = tiny_flamingo(gates=0.5)
    seen = []
    model.blocks[0].register_forward_hook(lambda block, args, output: seen.append(output))
    batch = collate(text, tokenizer)
    with torch.no_grad():
        model(
            batch.input_ids,
            model.condition(batch.media, 4),
            batch.media_locations,
            batch.attention_mask,
            attend_next=batch.attend_next,
        )
    moved = (seen[0][:2] - seen[0][2:]).abs().amax(-1) > 1e-3
    assert moved.tolist() == [[True, True, False], [False, True, True]]


@pytest.mark.parametrize(("offset", "below"), [(0, 0), (2, 2), (3, 3)])
def test_nothing_below_the_first_block_is_kept_for_backward(family, tokenizer, offset, below):
    model = tiny_flamingo(family, gates=0.5, every=4, offset=offset).train()
    grown = []
    for layer in decoder_layers(model.lm):
        layer.register_forward_hook(lambda layer, args, output: grown.append(first(output).requires_grad))
    target_loss(model, ragged(tokenizer)).backward()
    assert grown == [index >= below for index in range(4)]


def first(output: torch.Tensor | tuple) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def test_backward_makes_no_gradient_of_what_is_frozen(tokenizer):
    """Each frozen matrix is in one product of backward, for its input; media and the text below have no gradient."""
    model = tiny_flamingo(gates=0.5).train()
    loss = target_loss(model, ragged(tokenizer))
    with Calls() as calls:
        loss.backward()
    frozen = [name for name, p in model.lm.named_parameters() if p.ndim == 2 and "embed_tokens" not in name]
    assert len(calls.args("mm")) == len(frozen)
    of_blocks, of_resampler = (wanted[0] for *_, wanted, _ in calls.args("media_kv_backward"))
    assert (of_blocks, of_resampler) == (True, False)
    assert [wanted[0] for *_, wanted, _ in calls.args("gated_cross_attention_backward")] == [True, False]


def test_logits_are_those_of_the_columns_asked_for(family, tokenizer):
    model, batch = tiny_flamingo(family, gates=0.5), ragged(tokenizer)
    inputs = (batch.input_ids, model.condition(batch.media, 3), batch.media_locations, batch.attention_mask)
    with torch.no_grad():
        whole = model(*inputs)
        torch.testing.assert_close(model(*inputs, logits_to_keep=2), whole[:, -2:])
        columns = torch.tensor([1, 4])
        torch.testing.assert_close(model(*inputs, logits_to_keep=columns), whole[:, columns])


def test_only_new_parameters_are_trained(family, tokenizer):
    model = tiny_flamingo(family, gates=0.5).train()
    target_loss(model, ragged(tokenizer)).backward()
    new = model.new_parameters()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == new.keys()
    assert {name.partition(".")[0] for name in new} == {"resampler", "blocks"}
    for name, p in model.named_parameters():
        if name in new:
            assert p.grad is not None, name
            assert p.grad.abs().max() > 0, name
        else:
            assert p.grad is None, name
    assert not model.lm.training
    assert not model.vision.training


def test_behind_closed_gates_only_the_gates_learn_at_first(tokenizer):
    model = tiny_flamingo().train()
    target_loss(model, ragged(tokenizer)).backward()
    moved = {name for name, p in model.new_parameters().items() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved == {name for name in model.new_parameters() if name.endswith("_gate")}


def test_new_state_round_trips(tokenizer):
    batch = ragged(tokenizer)
    trained, fresh = tiny_flamingo(gates=0.5), tiny_flamingo()
    with torch.no_grad():
        for p in trained.new_parameters().values():
            p.add_(torch.randn_like(p), alpha=0.1)
        expected = logits(trained, batch)
        assert not torch.allclose(logits(fresh, batch), expected, atol=0.1)
        fresh.load_new_state_dict(trained.new_state_dict())
        assert torch.equal(logits(fresh, batch), expected)


def test_state_of_other_names_is_refused():
    state = tiny_flamingo().new_state_dict()
    state["blocks.9.attn_gate"] = state.pop("blocks.0.attn_gate")
    with pytest.raises(ValueError, match=r"blocks.0.attn_gate.*blocks.9.attn_gate"):
        tiny_flamingo().load_new_state_dict(state)


def test_a_deep_copy_runs_its_own_blocks(tokenizer):
    batch = ragged(tokenizer)
    model = tiny_flamingo(gates=0.5)
    with torch.no_grad():
        before = logits(model, batch)
        twin = copy.deepcopy(model)
        assert torch.equal(logits(twin, batch), before)
        twin.blocks[0].attn_gate.zero_()
        assert not torch.equal(logits(twin, batch), before)
        assert torch.equal(logits(model, batch), before)


def test_gates_are_listed_per_block():
    model = tiny_flamingo(gates=0.5)
    torch.testing.assert_close(model.gates(), torch.full((2, 2), 0.5).tanh())


def test_media_tokens_without_media_are_refused(tokenizer):
    batch = ragged(tokenizer)
    model = tiny_flamingo()
    with pytest.raises(ValueError, match="conditioning must hold media"):
        model(batch.input_ids, model.condition(None, 3), batch.media_locations, batch.attention_mask)
    with pytest.raises(ValueError, match="num_media"):
        model(batch.input_ids, model.condition(batch.media[:, :2], 3), batch.media_locations, batch.attention_mask)
