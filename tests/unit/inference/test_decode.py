"""Generation in batches is what each sequence gives alone, and that is what the plain computation gives."""

from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ilvr_ds.errors import BatchError, ConfigError
from ilvr_ds.inference.decode import texts_of
from ilvr_ds.inference.prompt import prompt_of_ids
from ilvr_ds.inference.sampling import Sampling

WAYS = {
    "greedy": {},
    "sampled": {"sampling": Sampling(temperature=1.0)},
    "top_p": {"sampling": Sampling(temperature=0.8, top_p=0.9)},
    "early_end": {"early_end": True, "sampling": Sampling(temperature=1.5)},
    "two_spans": {"max_spans": 2},
}
# rounding, grown by being fed back for dozens of steps through a network with large weights
FED_BACK = {"rtol": 1e-2, "atol": 2e-3}


@pytest.fixture(scope="module")
def decoder(decoding):
    return decoding.decoder()


@pytest.mark.parametrize("way", WAYS)
def test_sixteen_together_are_sixteen_alone(decoding, decoder, way):
    prompts, how = decoding.prompts(16), decoding.settings(**WAYS[way])
    together = decoder.generate(prompts, how)
    alone = [decoder.generate([prompt], how)[0] for prompt in prompts]
    assert [g.id for g in together] == [p.id for p in prompts]
    for a, b in zip(together, alone, strict=True):
        assert a.tokens == b.tokens
        assert (a.text, a.display, a.end, a.spans_skipped) == (b.text, b.display, b.end, b.spans_skipped)
        torch.testing.assert_close(a.latents, b.latents, **FED_BACK)
    # the batch is a real mix: spans and none, ends at different steps
    assert len({len(g.tokens) for g in together}) >= 3
    assert len({g.spans_opened for g in together}) >= 2
    assert {g.end for g in together} >= {"stop"}


@pytest.mark.parametrize("images", [(0,), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("way", WAYS)
def test_is_the_plain_computation(decoding, decoder, way, images):
    prompts, how = decoding.prompts(4, images), decoding.settings(**WAYS[way], stop_tokens=())
    network = decoding.network()
    for prompt, generation in zip(prompts, decoder.generate(prompts, how), strict=True):
        expected = decoding.slowly(network, decoding.vocabulary, prompt, how)
        assert expected["smallest_margin"] > 1e-4  # no tie that rounding decides
        assert generation.tokens == expected["tokens"]
        torch.testing.assert_close(generation.latents, expected["latents"], **FED_BACK)


@settings(deadline=None, max_examples=12)
@given(st.permutations(range(8)), st.integers(1, 8), st.sampled_from([1, 30, 10_000]))
def test_order_batch_size_and_prefill_budget_change_nothing(decoding, order, batch_size, budget):
    how = decoding.settings(sampling=Sampling(1.0), max_new_tokens=20)
    expected = {g.id: g.tokens for g in decoding.decoder().generate(decoding.prompts(8), how)}
    shuffled = [decoding.prompts(8)[i] for i in order]
    found = decoding.decoder(prefill_tokens=budget).generate(shuffled, how, batch_size)
    assert [g.id for g in found] == [f"p{i}" for i in order]
    assert {g.id: g.tokens for g in found} == expected


def test_spans_are_k_latents_and_an_end(decoding, decoder):
    v, how = decoding.vocabulary, decoding.settings(stop_tokens=())
    generations = decoder.generate(decoding.prompts(8), how)
    assert sum(g.spans_opened for g in generations) > 5
    for g in generations:
        tokens = list(g.tokens)
        assert tokens.count(v.latent_start) == g.spans_opened == len(g.span_lengths)
        assert g.latents.shape == (tokens.count(v.latent_pad), decoding.small.width)
        for place in (i for i, token in enumerate(tokens) if token == v.latent_start):
            span = tokens[place + 1 : place + 2 + how.latent_size]
            assert span == ([v.latent_pad] * how.latent_size + [v.latent_end])[: len(span)]


def test_latents_go_back_in(decoding, decoder):
    """With the pads' embedding in their place, as code that drops the latents has it, the text would be another."""
    prompt, how = decoding.prompts(8)[0], decoding.settings(stop_tokens=(), max_new_tokens=30)
    generation = decoder.generate([prompt], how)[0]
    assert generation.spans_opened
    network, v = decoding.network(), decoding.vocabulary
    network.set_attn_implementation("eager")
    ids = torch.tensor([*prompt.input_ids.tolist(), *generation.tokens])
    inputs = network.model.language_model.embed_tokens(ids).detach()
    pads = ids == v.latent_pad

    def last_hidden(inputs):
        positions = torch.arange(len(ids)).expand(3, 1, -1)
        with torch.no_grad():
            output = network.model.language_model(inputs_embeds=inputs[None], position_ids=positions, use_cache=False)
        return output.last_hidden_state[0]

    without = last_hidden(inputs)
    inputs[pads] = generation.latents
    within = last_hidden(inputs)
    before = pads.nonzero()[:, 0] - 1
    torch.testing.assert_close(within[before], generation.latents, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(without[before[1:]], generation.latents[1:], atol=1e-2)


def test_max_spans_forbids_and_counts(decoding, decoder):
    free = decoder.generate(decoding.prompts(12), decoding.settings(stop_tokens=()))
    assert max(g.spans_opened for g in free) >= 2
    assert all(g.spans_skipped == 0 for g in free)
    for limit in (0, 1):
        held = decoder.generate(decoding.prompts(12), decoding.settings(stop_tokens=(), max_spans=limit))
        assert all(g.spans_opened <= limit for g in held)
        assert all(g.tokens.count(decoding.vocabulary.latent_start) <= limit for g in held)
        # what it said before the first span refused is what it says unheld; and it did want another
        wanted = [a for a in free if a.spans_opened > limit]
        assert all(b.spans_skipped > 0 for a, b in zip(free, held, strict=True) if a in wanted)
        assert wanted


def test_early_end_leaves_when_the_model_says_so(decoding, decoder):
    how = {"stop_tokens": (), "sampling": Sampling(temperature=3.0), "max_new_tokens": 120}
    forced = decoder.generate(decoding.prompts(12), decoding.settings(**how))
    early = decoder.generate(decoding.prompts(12), decoding.settings(**how, early_end=True))
    closed = lambda g: g.span_lengths if g.end != "length_in_span" else g.span_lengths[:-1]  # noqa: E731
    assert {n for g in forced for n in closed(g)} == {decoding.small.latents}
    lengths = [n for g in early for n in closed(g)]
    assert max(lengths) == decoding.small.latents
    assert min(lengths) < decoding.small.latents
    for g in early:
        assert g.latents.shape[0] == sum(g.span_lengths)
        assert sum(g.span_lengths) <= g.tokens.count(decoding.vocabulary.latent_pad)  # the text may say one, too


def test_max_new_tokens_inside_a_span_is_counted(decoding, decoder):
    whole = decoder.generate(decoding.prompts(8), decoding.settings(stop_tokens=()))
    generation = next(g for g in whole if decoding.vocabulary.latent_pad in g.tokens[:-1])
    place = generation.tokens.index(decoding.vocabulary.latent_pad)
    prompt = next(p for p in decoding.prompts(8) if p.id == generation.id)
    cut = decoder.generate([prompt], decoding.settings(stop_tokens=(), max_new_tokens=place + 1))[0]
    assert cut.tokens == generation.tokens[: place + 1]
    assert (cut.end, cut.unterminated, cut.spans_opened, cut.span_lengths) == ("length_in_span", True, 1, (1,))
    assert cut.latents.shape == (1, decoding.small.width)
    assert cut.display.endswith("⟦1 latents⟧")
    at_start = decoder.generate([prompt], decoding.settings(stop_tokens=(), max_new_tokens=place))[0]
    assert (at_start.end, at_start.span_lengths, len(at_start.latents)) == ("length_in_span", (0,), 0)
    one_more = decoding.settings(stop_tokens=(), max_new_tokens=place + decoding.small.latents + 1)
    assert decoder.generate([prompt], one_more)[0].end == "length"


def test_ends(decoding, decoder):
    generations = decoder.generate(decoding.prompts(12), decoding.settings(max_new_tokens=12))
    assert {g.end for g in generations} >= {"stop", "length"}
    for g in generations:
        assert g.unterminated == (g.end != "stop")
        assert (g.tokens[-1] == decoding.vocabulary.im_end) == (g.end == "stop")
        assert decoding.vocabulary.im_end not in g.tokens[:-1]
        assert g.unterminated is False or len(g.tokens) == 12


def test_seeds_are_the_sequences_own(decoding, decoder):
    how = decoding.settings(sampling=Sampling(1.0), stop_tokens=())
    prompt = decoding.prompts(1)[0]
    again = [prompt_of_ids("x", prompt.input_ids, prompt.grids, prompt.pixels, 54, seed) for seed in (1, 2, 1)]
    first, second, third = decoder.generate(again, how)
    assert first.tokens == third.tokens
    assert first.tokens != second.tokens


def test_places_are_filled_as_they_become_free(decoding, decoder):
    """Prompts are taken one batch at a time, and results come before the last prompt was taken."""
    taken = []

    def prompts():
        for prompt in decoding.prompts(12):
            taken.append(prompt.id)
            yield prompt

    stream = decoder.stream(prompts(), decoding.settings(), batch_size=4)
    first = list(islice(stream, 1))
    assert len(first) == 1
    assert 4 <= len(taken) < 12
    assert {number for number, _ in [*first, *stream]} == set(range(12))


def test_nothing_to_do(decoding, decoder):
    assert decoder.generate([], decoding.settings()) == []


def test_the_backbone_is_left_as_it_was(decoding):
    decoder = decoding.decoder()
    backbone = decoder.backbone.train()
    before = backbone.config.text_config._attn_implementation
    batch = decoding.small.batch([decoding.small.sample(0)])
    hidden = backbone.decode(backbone.embed(batch.input_ids), batch)
    decoder.generate(decoding.prompts(3), decoding.settings(max_new_tokens=5))
    assert backbone.training
    assert backbone.config.text_config._attn_implementation == before
    assert torch.equal(backbone.decode(backbone.embed(batch.input_ids), batch), hidden)
    assert hidden.requires_grad


def test_images_that_do_not_fit_are_named(decoding, decoder):
    prompt = decoding.prompts(1, images=(1,))[0]
    with pytest.raises(BatchError, match="image"):
        prompt_of_ids("x", prompt.input_ids, [], prompt.pixels[:0], decoding.vocabulary.image_pad)
    with pytest.raises(BatchError, match="'x' is empty"):
        empty = prompt_of_ids("x", prompt.input_ids[:0], [], prompt.pixels[:0], decoding.vocabulary.image_pad)
        decoder.generate([empty], decoding.settings())


@pytest.mark.parametrize(
    "wrong", [{"max_new_tokens": 0}, {"latent_size": 0}, {"max_spans": -1}, {"stop_tokens": (57,)}]
)
def test_impossible_settings_are_refused(decoding, decoder, wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        decoder.generate(decoding.prompts(1), decoding.settings(**wrong))


def test_texts(decoding, decoder):
    v, tokenizer = decoding.vocabulary, decoder.tokens
    start, pad, end = v.latent_start, v.latent_pad, v.latent_end
    tokens = [1, start, pad, pad, end, 2, 3, start, end, 4, end, v.im_end]  # a stray end marker in the text
    assert texts_of(tokens, [2, 0], tokenizer) == ("1 2 3 4 ", "1 ⟦2 latents⟧2 3 ⟦0 latents⟧4 ")
    assert texts_of([start, pad], [1], tokenizer) == ("", "⟦1 latents⟧")
    assert texts_of([pad, 5], [], tokenizer) == ("5 ", "5 ")
