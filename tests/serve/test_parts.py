"""The server's parts without a server: turns, calls of tools, readers that are too slow."""

from __future__ import annotations

import asyncio
import time

import pytest

pytest.importorskip("starlette")

from small_decoders import made_at_once

from flashhead_edge.decoding import Sampling
from flashhead_edge.errors import EngineError, SettingsError
from flashhead_edge.jetson import open_engine
from flashhead_edge.jetson.onnxruntime_sessions import vector_unit
from flashhead_edge.jetson.onnxruntime_texts import SharedCache
from flashhead_edge.serve.limits import Limits
from flashhead_edge.serve.mailbox import Mailbox
from flashhead_edge.serve.metrics import Metrics
from flashhead_edge.serve.orders import Order
from flashhead_edge.serve.rotation import Rotation
from flashhead_edge.serve.texts import Decoder, Text
from flashhead_edge.serve.tools import Call, CallReader, form_of

NATIVE = pytest.mark.skipif(vector_unit() in (None, "plain"), reason="this installation has no native body: no C compiler, or a processor without AVX2")


def test_hosts_have_equal_turns_and_so_have_their_users_and_texts():
    rotation, paths = Rotation(), [("a", "u", "1"), ("a", "u", "2"), ("a", "v", "3"), ("b", "w", "4")]
    turns = [rotation.next(paths) for _ in range(80)]
    assert [turns.count(p) for p in paths] == [10, 10, 20, 40]
    newcomer = ("c", "x", "5")
    turns = [rotation.next([*paths, newcomer]) for _ in range(60)]
    assert turns.count(newcomer) == 20  # neither all of the first turns nor none
    rotation.keep([newcomer])
    assert set(rotation.turns) == {("c",), ("c", "x"), newcomer}


def test_who_goes_along_has_had_a_turn():
    rotation, paths = Rotation(), [("a", "u", "1"), ("a", "u", "2"), ("b", "w", "3")]
    first = rotation.next(paths)
    rotation.along(first, paths)
    assert rotation.turns == dict.fromkeys([("a",), ("a", "u"), ("b",), ("b", "w"), *paths], 1)


@pytest.mark.parametrize(
    ("form", "text", "said", "calls"),
    [
        ("tagged", 'Let me see. <tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "Let me see. ", [Call("f", '{"a": 1}')]),
        ("tagged", '<tool_call>{"name": "f", "arguments": {}}</tool_call>\n<tool_call>{"name": "g"}</tool_call>', "", [Call("f", "{}"), Call("g", "{}")]),
        ("tagged", "1 <tool 2 < 3", "1 <tool 2 < 3", []),
        ("tagged", "<tool_call>{broken</tool_call>", "<tool_call>{broken</tool_call>", []),
        ("tagged", '<tool_call>{"name": "other", "arguments": {}}</tool_call>', '<tool_call>{"name": "other", "arguments": {}}</tool_call>', []),
        ("bare", ' {"name": "f", "parameters": {"a": "ü"}}', "", [Call("f", '{"a": "ü"}')]),
        ("bare", '{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}', "", [Call("f", "{}"), Call("g", "{}")]),
        ("bare", '{"x": 1}', '{"x": 1}', []),
        ("bare", "Hello {", "Hello {", []),
    ],
    ids=range(9),
)
def test_calls_are_read_from_the_text_piece_by_piece(form, text, said, calls):
    reader = CallReader(form, ("f", "g"))
    pieces = "".join(reader.push(c) for c in text)
    rest, found = reader.finish()
    assert (pieces + rest, found) == (said, calls)


def test_templates_say_how_calls_look():
    assert form_of("{% if tools %}<tool_call>{% endif %}") == "tagged"
    assert form_of('{% if tools %}{"name": "parameters"}{% endif %}') == "bare"
    with pytest.raises(Exception, match="the model's chat template knows none"):
        form_of("{{ messages }}")


def test_a_token_that_is_part_of_a_character_has_its_own_bytes():
    """Of vocabularies over bytes, in either way of writing them; of others none are claimed."""
    from types import SimpleNamespace

    from flashhead_edge.serve.answers import byte_letters, token_bytes

    text = "\u00e9\U0001f44f a\n"
    letters = {byte: letter for letter, byte in byte_letters().items()}
    assert len(letters) == 256 and letters[ord(" ")] == "\u0120"
    pieces = ["".join(letters[b] for b in text.encode()), "<0x0A>", "\u4f60", None]
    tokenizer = SimpleNamespace(backend=SimpleNamespace(id_to_token=lambda token: pieces[token]))
    assert [token_bytes(tokenizer, i) for i in range(4)] == [text.encode(), b"\n", None, None]


def test_limits_are_checked():
    with pytest.raises(SettingsError, match="serve: waiting is 0, expected more than 0"):
        Limits(waiting=0)


def order(ids, tokens):
    return Order(tuple(ids), tokens, Sampling(), (), None, None, False, False)


def test_a_place_is_kept_for_newcomers_once_there_have_been_two_users(engine, monkeypatch):
    """Where there is none beside the wanted ones: who is the only one has all places, and later all but one."""
    decoder = Decoder(engine, Limits(), Metrics("tiny"), 2)
    monkeypatch.setattr(Decoder, "alive", True)
    late = time.monotonic() + 60

    def come(user, name):
        decoder.submit([Text(order([1], 5), ("host", user, name), None, 0, late)])
        assert decoder._admit()
        return sorted(text.path[1:] for text in decoder.active)

    assert come("a", "1") == [("a", "1")] and come("a", "2") == [("a", "1"), ("a", "2")]
    assert come("b", "3") == [("a", "1"), ("a", "2")] and come("a", "4") == [("a", "1"), ("a", "2")]
    decoder._leave(decoder.active[0])
    assert come("a", "5") == [("a", "2"), ("b", "3")]  # b came first
    decoder._leave(decoder.active[1])
    assert come("a", "6") == [("a", "2")]  # the place that is left is not a's
    assert come("c", "7") == [("a", "2"), ("c", "7")]


def test_text_whose_reader_is_too_slow_is_given_up_and_others_go_on(engine):
    """Nobody takes from the first mailbox: its text ends at the limit, the one beside it is whole."""
    metrics = Metrics("tiny")
    decoder = Decoder(engine, Limits(unread_tokens=200), metrics, 2)  # more than the quick one has: on a busy machine it is read late, too

    async def run():
        slow, quick = Mailbox(), Mailbox()
        late = time.monotonic() + 60
        decoder.thread.start()
        decoder.submit([Text(order([1, 2, 3], 500), ("a", "", "1"), slow, 0, late), Text(order([4, 5, 6], 100), ("b", "", "2"), quick, 0, late)])
        tokens, ended = 0, ""
        while not ended:
            for piece in await quick.take():
                assert piece.error is None, piece.error
                tokens, ended = tokens + 1, piece.ended
        while time.monotonic() < late and not (slow.pieces and slow.pieces[-1].error):
            await asyncio.sleep(0.01)
        return tokens, [p.error and p.error.code for p in await slow.take()]

    tokens, left = asyncio.run(run())
    decoder.close()
    decoder.thread.join(10)
    assert tokens == 100
    assert left == ["reader_too_slow"]
    assert not decoder.thread.is_alive()
    assert len(decoder.caches) == 2


@pytest.fixture
def passes(coded_model, monkeypatch):
    """An engine whose body takes several texts in a pass, and how many each pass had."""
    engine, run, found = open_engine(coded_model, threads=1), SharedCache.run, []

    def counted(self, texts, ids):
        found.append(len(texts))
        return run(self, texts, ids)

    monkeypatch.setattr(SharedCache, "run", counted)
    return engine, found


@NATIVE
def test_texts_at_once_share_passes_and_are_what_each_is_alone(passes):
    """Greedy and drawn, short and long, with a prompt that is read in parts while others are made (one ends before it is read), and a dense one."""
    engine, found = passes
    drawn = Sampling(temperature=1.0, seed=3)
    orders = [
        Order((1, 2, 3), 60, Sampling(), (), None, None, False, False),
        Order((9, 8), 40, drawn, (), None, 2, False, False),
        Order(tuple(i % 250 for i in range(1200)), 30, Sampling(), (), None, None, False, False),
        Order((5, 5, 5, 5), 3, drawn, (), None, None, True, False),
        Order((40, 41), 60, Sampling(), (), None, None, False, True),
    ]
    want = [made_at_once(engine, [one])[0][0] for one in orders]
    assert set(found) == {1}
    found.clear()
    tokens, ended = made_at_once(engine, orders)
    assert tokens == want
    assert set(ended) <= {"max_new_tokens", "stop token"}
    assert max(found) == 4 and sum(found) - len(found) > 100  # reads of the weights that were not made


@NATIVE
def test_one_whose_token_fails_in_a_shared_pass_harms_no_other(passes, monkeypatch):
    """A pass that fails is made again text by text: only whose fault it was ends with an error."""
    engine, _ = passes
    run = SharedCache.run

    def failing(self, texts, ids):
        if any(text.length > 20 and text.start == 256 for text in texts):  # the second's room
            raise EngineError("planted: expected nothing of the kind; go on")
        return run(self, texts, ids)

    orders = [order([1, 2, 3], 60), order([4, 5], 60), order([6, 7], 60)]
    want = [made_at_once(engine, [one])[0][0] for one in orders]
    monkeypatch.setattr(SharedCache, "run", failing)
    tokens, ended = made_at_once(engine, orders)
    assert sorted(ended) == ["engine_failed", *2 * ["max_new_tokens"]]
    for i, how in enumerate(ended):
        assert tokens[i] == (want[i] if how == "max_new_tokens" else want[i][: len(tokens[i])])


def test_text_that_fails_harms_no_other(engine, monkeypatch):
    """Whatever goes wrong in one text's step, the next text is made as if nothing had been."""
    from flashhead_edge.serve import texts as module

    real = module.stream

    def failing(engine, ids, *arguments, **more):
        if ids[0] == 13:
            raise ZeroDivisionError("planted")
        return real(engine, ids, *arguments, **more)

    monkeypatch.setattr(module, "stream", failing)
    decoder = Decoder(engine, Limits(), Metrics("tiny"), 2)

    async def run():
        decoder.thread.start()
        found = []
        for first in (13, 14):
            box = Mailbox()
            decoder.submit([Text(order([first, 2], 3), ("a", "", str(first)), box, 0, time.monotonic() + 60)])
            pieces = []
            while not pieces or not (pieces[-1].ended or pieces[-1].error):
                pieces += await box.take()
            found.append(pieces)
        return found

    bad, good = asyncio.run(run())
    decoder.close()
    decoder.thread.join(10)
    assert bad[-1].error.status == 500 and "planted" not in str(bad[-1].error)
    assert [p.ended for p in good] == ["", "", "max_new_tokens"]
