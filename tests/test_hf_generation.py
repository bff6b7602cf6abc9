"""What Transformers checks of its own `generate`, asked of ours: batches, stops, streams, seeds, return types."""

from __future__ import annotations

import functools
import itertools
import string
import threading

import drop_in
import pytest
import tiny
import torch
import transformers
from drop_in import ENDS, PAD, ROWS, Push, arguments, batch, model, new_tokens
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import GenerationConfig, TextIteratorStreamer, TextStreamer
from transformers.generation import GenerateDecoderOnlyOutput

from specproxy import SpeculationStats
from specproxy.streaming import RowStreamer

RECORDED = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
DRAW = {"do_sample": True, "temperature": 1.5, "top_k": 0}
WINDOWS = (0, 1, 4)


@functools.cache
def letters():
    """Byte-level tokens of one or two letters: stop strings may begin and end inside a token."""
    pairs = ["an", "er", "th", "in", "st", "on", "re", "es", "at", "ou", "qu"]
    words = ["<pad>", "<eos>", "\u0120", *string.ascii_lowercase, *pairs]
    table = {word: i for i, word in enumerate(words)}
    assert len(table) == tiny.VOCAB_SIZE
    inner = Tokenizer(BPE(table, merges=[(a, b) for a, b in pairs]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def text(ids):
    return letters().decode(ids, clean_up_tokenization_spaces=False)


@functools.cache
def long_rows():
    """Greedy tokens of every row, 24 of each."""
    return new_tokens(model().generate(*batch(), max_new_tokens=24, num_draft_tokens=0))


def cut_at(prompt, tokens, stops):
    """Tokens up to and with the first that completes a stop string."""
    for t in range(len(tokens)):
        before, now = text(prompt + tokens[:t]), text(prompt + tokens[: t + 1])
        if any(stop in now[max(0, len(before) - len(stop) + 1) :] for stop in stops):
            return tokens[: t + 1]
    return tokens


def padded(rows):
    width = max(map(len, rows))
    return [row + [PAD] * (width - len(row)) for row in rows]


@pytest.mark.parametrize("count", WINDOWS)
@pytest.mark.parametrize("acceptance", ["rejection", "block", "coupled"])
def test_a_batch_equals_its_rows_alone(count, acceptance):
    settings = {**DRAW, "max_new_tokens": 10, "num_draft_tokens": count, "acceptance": acceptance}
    seeds = [4, 5, 6]
    together = new_tokens(model().generate(*batch(), seed=seeds, **settings))
    for prompt, seed, row in zip(ROWS, seeds, together, strict=True):
        alone = model().generate(torch.tensor([prompt]), seed=[seed], **settings)
        assert row == alone[0, len(prompt) :].tolist()
    assert len(set(map(tuple, together))) == 3


@pytest.mark.parametrize("count", WINDOWS)
def test_left_padding_changes_nothing(count):
    settings = {"max_new_tokens": 12, "num_draft_tokens": count, "repetition_penalty": 1.3, **RECORDED}
    reference = model().generate(*batch(), **settings)
    for filler, extra in ((39, 0), (7, 5)):
        ids, mask = batch(filler, extra)
        output = model().generate(ids, mask, **settings)
        assert torch.equal(output.sequences[:, : ids.shape[1]], ids), "the prompts come back as given"
        assert new_tokens(output.sequences, ids.shape[1]) == new_tokens(reference.sequences)
        assert drop_in.largest_gap(output.scores, reference.scores, [12, 12, 12]) < 1e-5


def test_permuted_rows_are_permuted_tokens():
    ids, mask = batch()
    order = torch.tensor([2, 0, 1])
    seeds = torch.tensor([4, 5, 6])
    settings = {**DRAW, "max_new_tokens": 10}
    rows = model().generate(ids, mask, seed=seeds, **settings)
    assert torch.equal(model().generate(ids[order], mask[order], seed=seeds[order], **settings), rows[order])


@pytest.mark.parametrize("count", WINDOWS)
def test_end_tokens_end_rows_one_by_one(count):
    ends = {long_rows()[0][9], long_rows()[1][2]}
    expected = [row[:n] for row, n in zip(long_rows(), drop_in.counts_of(long_rows(), ends), strict=True)]
    assert len({len(row) for row in expected}) > 1
    for given in (sorted(ends), torch.tensor(sorted(ends))):
        output = model().generate(
            *batch(), eos_token_id=given, pad_token_id=PAD, max_new_tokens=24, num_draft_tokens=count
        )
        assert new_tokens(output) == padded(expected)
    single = long_rows()[0][9]
    one = drop_in.counts_of(long_rows(), {single})
    output = model().generate(
        *batch(), eos_token_id=single, pad_token_id=PAD, max_new_tokens=24, num_draft_tokens=count
    )
    assert new_tokens(output) == padded([row[:n] for row, n in zip(long_rows(), one, strict=True)])


def stops():
    """A token's text, one that spans two tokens, and one that begins inside a token, of every row's own text."""
    texts = [text(row) for row in long_rows()]
    return {
        "one": [texts[0][5:6]],
        "across": [texts[0][4:8]],
        "list": [texts[0][10:13], texts[1][6:10], texts[2][3:6]],
        "never": ["no such text"],
    }


@pytest.mark.parametrize("count", WINDOWS)
@pytest.mark.parametrize("kind", ["one", "across", "list", "never"])
def test_stop_strings_cut_at_the_token_that_completes_them(count, kind):
    own = stops()[kind]
    expected = [cut_at(prompt, row, own) for prompt, row in zip(ROWS, long_rows(), strict=True)]
    assert (expected == long_rows()) == (kind == "never")
    settings = {"tokenizer": letters(), "max_new_tokens": 24, "num_draft_tokens": count, "pad_token_id": PAD}
    output = model().generate(*batch(), stop_strings=own[0] if len(own) == 1 else own, **settings)
    assert new_tokens(output) == padded(expected)


def test_stop_strings_cut_inside_an_accepted_block():
    """The last token is a draft, and the plain run accepted the next draft of the same block too."""
    ids = torch.tensor([ROWS[0]])
    settings = {"max_new_tokens": 24, "num_draft_tokens": 4, "return_dict_in_generate": True}
    free = model().generate(ids, **settings).speculation.token_sources[0]
    at = next(t for t in range(24) if free[t : t + 2] == ["draft", "draft"] and t > 0)
    stop = text(long_rows()[0][: at + 1])[-6:]
    output = model().generate(ids, stop_strings=stop, tokenizer=letters(), **settings)
    assert new_tokens(output.sequences) == [cut_at(ROWS[0], long_rows()[0], [stop])]
    assert len(output.speculation.token_sources[0]) == at + 1 == output.speculation.num_new_tokens
    assert output.speculation.token_sources[0][-1] == "draft"


def test_stop_strings_equal_transformers():
    """At alpha = 0, an end id at hand so that Transformers pads the rows that have ended."""
    texts = [text(row) for row in new_tokens(model(0.0).generate(*batch(), max_new_tokens=16))]
    case = {"stop_strings": [texts[0][6:9], texts[2][4:7]], "tokenizer": letters(), "eos_token_id": 1}
    case |= {"pad_token_id": PAD, "max_new_tokens": 16}
    ids, mask = batch()
    theirs = tiny.shared_trio("llama").base.generate(ids, attention_mask=mask, do_sample=False, **case)
    assert PAD in theirs[:, 7:]
    for count in (0, 4):
        assert torch.equal(model(0.0).generate(ids, mask, num_draft_tokens=count, **case), theirs)


@pytest.mark.parametrize("count", WINDOWS)
@pytest.mark.parametrize("skip", [True, False])
def test_text_streamer_prints_the_text(count, skip, capsys):
    ids = torch.tensor([ROWS[0]])
    output = model().generate(
        ids, streamer=TextStreamer(letters(), skip_prompt=skip), max_new_tokens=10, num_draft_tokens=count
    )
    assert capsys.readouterr().out == letters().decode(output[0, len(ROWS[0]) if skip else 0 :]) + "\n"


def test_iterator_streamer_yields_the_text_from_a_thread():
    ids = torch.tensor([ROWS[0]])
    streamer = TextIteratorStreamer(letters(), skip_prompt=True, timeout=60)
    case = {"input_ids": ids, "streamer": streamer, "max_new_tokens": 16, "logits_processor": [Push()]}
    thread = threading.Thread(target=model().generate, kwargs=case)
    thread.start()
    pieces = list(streamer)
    thread.join()
    expected = model().generate(ids, max_new_tokens=16, logits_processor=[Push()])
    assert "".join(pieces) == text(expected[0, len(ROWS[0]) :].tolist())


@pytest.mark.parametrize("count", WINDOWS)
def test_row_streamer_follows_every_row(count):
    events = []
    streamer = RowStreamer(lambda row, ids: events.append((row, list(ids))), lambda row: events.append((row, "end")))
    case = {"eos_token_id": ENDS, "pad_token_id": PAD, "max_new_tokens": 12, "num_draft_tokens": count}
    output = model().generate(*batch(), streamer=streamer, **case)
    rows = new_tokens(output)
    lengths = drop_in.counts_of(rows, set(ENDS))
    assert len(set(lengths)) > 1
    for row, length in enumerate(lengths):
        own = [what for index, what in events if index == row]
        assert own[-1] == "end" and own.count("end") == 1
        assert list(itertools.chain(*own[:-1])) == rows[row][:length]
        assert all(own[:-1]), "an empty block was sent"
        if count == 0:
            assert all(len(block) == 1 for block in own[:-1])
    if count == 4:
        assert any(len(what) > 1 for _, what in events if what != "end"), "blocks arrive as they are accepted"
    assert [row for row, what in events if what == "end"] != [row for row, _ in events][-3:], "ends come as they happen"


def test_row_streamer_counts_returned_sequences():
    got = {}
    streamer = RowStreamer(lambda row, ids: got.setdefault(row, []).extend(ids))
    ids = torch.tensor([ROWS[0]])
    output = model().generate(ids, streamer=streamer, num_return_sequences=3, seed=1, max_new_tokens=8, **DRAW)
    assert [got[row] for row in range(3)] == new_tokens(output)


def test_returned_sequences_are_independent_draws():
    settings = {**DRAW, "seed": 9, "max_new_tokens": 8}
    output = model().generate(*batch(), num_return_sequences=3, **settings, **RECORDED)
    assert output.sequences.shape == (9, 15)
    assert output.scores[0].shape == output.logits[0].shape == (9, tiny.VOCAB_SIZE)
    ids, _ = batch()
    assert torch.equal(output.sequences[:, :7], ids.repeat_interleave(3, dim=0))
    rows = new_tokens(output.sequences)
    assert len(set(map(tuple, rows))) == 9
    for first in (0, 3, 6):  # copies share their prompt's logits, and nothing but those
        for copy in (first + 1, first + 2):
            torch.testing.assert_close(output.logits[0][copy], output.logits[0][first])
    own = {"expert_input_ids": batch()[0], "expert_attention_mask": batch()[1]}
    assert torch.equal(model().generate(*batch(), num_return_sequences=3, **settings, **own), output.sequences)


def test_seeds_and_generators_reproduce():
    def draw(**more):
        return model().generate(*batch(), max_new_tokens=10, **DRAW, **more)

    generator = torch.Generator().manual_seed(3)
    first, second = draw(generator=generator), draw(generator=generator)
    assert not torch.equal(first, second)
    again = torch.Generator().manual_seed(3)
    assert torch.equal(draw(generator=again), first) and torch.equal(draw(generator=again), second)
    torch.manual_seed(12)
    state = torch.get_rng_state()
    loose = draw()
    assert not torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(12)
    assert torch.equal(draw(), loose) and not torch.equal(draw(), loose)
    state = torch.get_rng_state()
    assert torch.equal(draw(seed=5), draw(seed=5)) and not torch.equal(draw(seed=5), draw(seed=6))
    model().generate(*batch(), max_new_tokens=2)
    assert torch.equal(torch.get_rng_state(), state), "a seeded or greedy call leaves torch's generator alone"


def test_return_types_and_lengths():
    ends = {long_rows()[1][2]}
    lengths = drop_in.counts_of([row[:12] for row in long_rows()], ends)
    assert min(lengths) < max(lengths)
    case = arguments({}, eos_token_id=sorted(ends), num_draft_tokens=4)
    plain = model().generate(*batch(), **case)
    assert isinstance(plain, torch.Tensor) and plain.dtype == torch.int64
    output = model().generate(*batch(), **case, **RECORDED)
    assert isinstance(output, GenerateDecoderOnlyOutput)
    assert torch.equal(output.sequences, plain) and torch.equal(output["sequences"], plain)
    assert isinstance(output.speculation, SpeculationStats)
    assert isinstance(output.scores, tuple) and isinstance(output.logits, tuple)
    assert len(output.scores) == len(output.logits) == max(lengths)
    assert output.past_key_values is None and output.attentions is None and output.hidden_states is None
    for t, (scores, logits) in enumerate(zip(output.scores, output.logits, strict=True)):
        for each in (scores, logits):
            assert each.shape == (3, tiny.VOCAB_SIZE) and each.dtype == torch.float32
            assert each.isnan().all(dim=1).tolist() == [t >= length for length in lengths]
            assert not each[[t < length for length in lengths]].isnan().any()
    bare = model().generate(*batch(), **case, return_dict_in_generate=True)
    assert bare.scores is None and bare.logits is None
    (output.logits[0] * torch.ones(1, requires_grad=True)).nansum().backward()  # the records are ordinary tensors


def test_greedy_tokens_are_the_argmax_of_their_scores():
    output = model().generate(*batch(), **arguments({"repetition_penalty": 1.6}, num_draft_tokens=4, **RECORDED))
    assert torch.stack(output.scores).argmax(-1).T.tolist() == new_tokens(output.sequences)
    assert torch.stack(output.logits).argmax(-1).T.tolist() != new_tokens(output.sequences)


def test_configuration_from_a_saved_folder(tmp_path):
    settings = {"do_sample": True, "temperature": 1.4, "top_k": 9, "typical_p": 0.9, "max_new_tokens": 9}
    GenerationConfig(**settings, eos_token_id=ENDS, pad_token_id=PAD, bos_token_id=2).save_pretrained(tmp_path)
    loaded = GenerationConfig.from_pretrained(tmp_path)
    output = model().generate(*batch(), generation_config=loaded, seed=2)
    assert torch.equal(output, model().generate(*batch(), **settings, eos_token_id=ENDS, pad_token_id=PAD, seed=2))
    assert not torch.equal(output, model().generate(*batch(), **{**settings, "typical_p": None}, seed=2))
