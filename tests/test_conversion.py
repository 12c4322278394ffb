"""From a model folder to a checkpoint on a tiny real model: the promise holds, twice is the same, bad input leaves nothing."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_checkpoints import content, save_model, save_tokenizer
from small_models import VOCAB, small_model

from flashhead_edge.calibration import FIRST, default_positions, describe, own_target
from flashhead_edge.caps import with_gates
from flashhead_edge.capture import SAMPLE_LENGTH, _forced, _sample, _second_reading, capture_ids, chat_frame, recording, sample_own_text
from flashhead_edge.checkpoint import load_model, load_tokenizer, read_head, read_index, read_published
from flashhead_edge.conversion import calibrate, convert
from flashhead_edge.costs import bytes_per_step
from flashhead_edge.errors import CheckpointError, FlashHeadError, SettingsError
from flashhead_edge.fitting import fold_of
from flashhead_edge.reference import dense_tokens, torch_head


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def converted(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "out"
    return out, convert(model, out, positions=4000, target=0.95)


def test_the_promise_holds_on_fresh_own_text(converted):
    """Another seed's text, four thousand positions: agreement within the summary's interval, whose target it was held to."""
    out, summary = converted
    head = read_head(out)
    runner, tokenizer = load_model(out), load_tokenizer(out)
    fresh = sample_own_text(runner, tokenizer, head.vocab_size, 4000, seed=9).states.float()
    found = torch_head(read_index(out, head), head.weight).step(fresh)
    agreement = float((found.token == dense_tokens(head.weight, None, fresh, head.vocab_size)).float().mean())
    assert agreement >= 0.95
    assert summary["texts"][0]["top1_agreement_interval"][0] >= own_target(0.95)
    assert summary["reached"]


def test_no_step_reads_more_than_the_summary_says(converted):
    """Margins three times as wide, on states unlike any text, run into the caps, and the caps hold."""
    out, summary = converted
    head = read_head(out)
    index = read_index(out, head)
    hidden = torch.randn(512, index.hidden_size, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 1.5, 512)[:, None]
    gates = [index.probe, *(s.gate for s in index.stages)]
    wide = with_gates(index, [3 * g.margin for g in gates], [g.cap for g in gates])
    step = torch_head(wide, head.weight).step(hidden)
    read = bytes_per_step(index, step.counts.numpy(), 2 * index.hidden_size)
    assert step.capped.any()
    assert read.max() <= summary["most_bytes_per_step"]
    assert summary["lost_to_caps"] <= summary["texts"][0]["misses"]


def test_padding_is_never_returned(converted):
    """The model has 131 rows, its tokenizer names 127."""
    out, _ = converted
    index = read_index(out)
    assert index.vocab_size == 127
    assert int(index.token_table.max()) == 126


def test_twice_is_the_same(model, converted, tmp_path):
    out, _ = converted
    convert(model, tmp_path / "again", positions=4000, target=0.95)
    assert content(tmp_path / "again") == content(out)


def test_calibrate_again_keeps_clusters_and_weights(model, converted, tmp_path):
    convert(model, tmp_path / "out", positions=4000, target=0.95)
    before = read_index(tmp_path / "out")
    (tmp_path / "text.txt").write_text("t1 t2 t3 t4 t5 t60 t61 t62 " * 200)
    summary = calibrate(tmp_path / "out", target=0.9, texts=[str(tmp_path / "text.txt")], positions=4000)
    after = read_index(tmp_path / "out", read_head(tmp_path / "out"))
    assert np.array_equal(before.token_table, after.token_table)
    assert [t["name"] for t in summary["texts"]] == ["own text", "text.txt"]
    assert after.summary["target_agreement"] == 0.9
    assert calibrate(tmp_path / "out", positions=4000)["target_agreement"] == 0.9  # its own, where none is given
    text = summary["texts"][1]
    assert text["required"] == 0.9
    assert text["top1_agreement_interval"][0] >= 0.9


def test_published_head_needs_no_calibration(model, tmp_path):
    summary = convert(model, tmp_path / "out", head="published")
    index = read_index(tmp_path / "out", read_head(tmp_path / "out"))
    assert summary["head"] == "published"
    assert index.rotation is None
    assert index.stages == ()
    assert index.probe.cap == read_published(tmp_path / "out").n_probes == max(1, len(index.token_table) // 16)
    with pytest.raises(CheckpointError, match="a published head, which is calibrated on nothing"):
        calibrate(tmp_path / "out")


@pytest.mark.parametrize("family", ["gpt2", "phi", "gemma2", "opt", "llama_tied"])
def test_families_convert(family, tmp_path):
    """Bias, soft-cap, a projection before the head, tied weights: the calibrated head agrees with the dense one."""
    source = save_model(tmp_path / "model", family)
    summary = convert(source, tmp_path / "out", positions=1500, target=0.9)
    head = read_head(tmp_path / "out")
    runner = load_model(tmp_path / "out")
    ids = torch.randint(VOCAB, (600,), generator=torch.Generator().manual_seed(0))
    states = capture_ids(runner, ids, window=128)
    found = torch_head(read_index(tmp_path / "out", head), head.weight, head.bias).step(states)
    dense = dense_tokens(head.weight, head.bias, states, head.vocab_size)
    assert float((found.token == dense).float().mean()) >= 0.9
    assert summary["positions"] >= 1500


def test_device_model_changes_the_price(model, tmp_path):
    summary = convert(model, tmp_path / "out", positions=1500, target=0.9, device_model="h100")
    assert summary["device"] == "h100"
    # a head so small costs nothing but its rounds: one code, and centroids without tables that all must make
    assert len(summary["plan"]["codes"]) == 1
    assert summary["plan"]["centroids"].startswith("bits")
    with pytest.raises(SettingsError, match="device model toaster: not known, expected one of orin-nano"):
        convert(model, tmp_path / "other", device_model="toaster")


BAD = [
    ({"target": 1.0}, "target agreement is 1, expected 0.5 to below 1"),
    ({"target": 0.2}, "target agreement is 0.2"),
    ({"positions": 10}, "positions is 10, expected at least 1,000"),
    ({"head": "best"}, "head is 'best', expected one of fitted, published"),
    ({"texts": ["nowhere.txt"]}, "calibration text nowhere.txt: no such file"),
]


@pytest.mark.parametrize(("options", "words"), BAD)
def test_settings_out_of_range(model, tmp_path, options, words):
    with pytest.raises(SettingsError) as caught:
        convert(model, tmp_path / "out", **options)
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_empty_and_binary_texts(model, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(SettingsError, match="it is empty"):
        convert(model, tmp_path / "out", texts=[str(tmp_path / "empty.txt")])
    (tmp_path / "binary.txt").write_bytes(b"ab\xff\xfe")
    with pytest.raises(SettingsError, match="byte 2 is not UTF-8"):
        convert(model, tmp_path / "out", texts=[str(tmp_path / "binary.txt")])
    with pytest.raises(SettingsError, match="it is a folder, expected a text file"):
        convert(model, tmp_path / "out", texts=[str(model)])
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []


def test_what_cannot_work_is_found_before_any_work(model, tmp_path, monkeypatch):
    """A text that is none, a place that cannot be written, a device that is not there: nothing was loaded by then."""
    monkeypatch.setattr("flashhead_edge.conversion.read_head", None)
    (tmp_path / "binary.txt").write_bytes(b"ab\xff\xfe")
    with pytest.raises(SettingsError, match="byte 2 is not UTF-8"):
        convert(model, tmp_path / "out", texts=[str(tmp_path / "binary.txt")])
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file cannot be written .*, expected a folder where a checkpoint may be made"):
        convert(model, tmp_path / "file" / "out")
    with pytest.raises(SettingsError, match="head published: it is calibrated on nothing, expected no calibration text"):
        convert(model, tmp_path / "out", head="published", texts=[str(tmp_path / "file")])
    with pytest.raises(SettingsError, match="device banana: torch cannot use it, expected one of cpu"):
        load_model(model, device="banana")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["binary.txt", "file"]


def test_what_calibrate_cannot_do_is_found_before_any_work(model, converted, tmp_path, monkeypatch):
    out, _ = converted
    before = content(out)
    monkeypatch.setattr("flashhead_edge.conversion.read_head", None)
    with pytest.raises(CheckpointError, match="expected a FlashHead checkpoint; make one with flashhead convert"):
        calibrate(model)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(FlashHeadError, match="MB are needed, 0 MB are free"):
        calibrate(out)
    monkeypatch.undo()
    with pytest.raises(SettingsError, match="device banana: torch cannot use it"):
        calibrate(out, torch_device="banana")
    assert content(out) == before


def test_damaged_body_is_said(tmp_path):
    """A NaN in a body's weight: no head can be calibrated on what such a model says."""
    runner = small_model("llama")
    with torch.no_grad():
        runner.model.layers[0].mlp.down_proj.weight[3, 5] = torch.nan
    runner.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    with pytest.raises(CheckpointError, match="hidden states: NaN or infinity found, expected finite values"):
        convert(tmp_path / "model", tmp_path / "out", positions=1000)
    assert not (tmp_path / "out").exists()


def test_existing_output_is_refused_before_any_work(model, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="exists"):
        convert(model, tmp_path / "out")


def test_summary_is_json_and_says_what_was_chosen(converted):
    _, summary = converted
    text = json.dumps(summary)
    assert "searched" in text
    assert summary["chosen"].startswith("clusters of ")
    assert [p["target_agreement"] for p in summary["frontier"]] == sorted({0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, summary["target_agreement"]})
    assert describe(FIRST) == "clusters of 32, rotation 4 bits, centroids product24, rows product12 + bits48 + bits128, state power 0.5"


def test_captured_states_give_the_models_own_logits():
    """What is captured, times the head's rows, is what the model says: also where a window ends."""
    for family in ("llama", "gpt2", "opt", "phi"):
        runner = small_model(family).eval()
        ids = torch.randint(VOCAB, (50,), generator=torch.Generator().manual_seed(0))
        states = capture_ids(runner, ids, window=20)
        head = runner.get_output_embeddings()
        with torch.no_grad():
            want = torch.cat([runner(input_ids=ids[None, i : i + 20]).logits[0] for i in (0, 20, 40)])
        got = states @ head.weight.detach().T + (0 if head.bias is None else head.bias.detach())
        assert torch.allclose(got, want, atol=1e-5)


def test_recording_leaves_the_model_as_it_was():
    runner = small_model("llama").eval()
    ids = torch.tensor([[1, 2, 3]])
    before = runner(input_ids=ids).logits

    def interrupted():
        with recording(runner, compute=False) as seen:
            runner(input_ids=ids)
            assert seen[0].shape == (1, 3, 32)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert torch.equal(runner(input_ids=ids).logits, before)


def test_own_text_is_seeded_and_full(model):
    runner, tokenizer = load_model(model), load_tokenizer(model)
    a, b, c = (sample_own_text(runner, tokenizer, 127, 1000, seed=s) for s in (0, 0, 1))
    assert a.digest == b.digest != c.digest
    assert torch.equal(a.states, b.states)
    assert len(a.states) == 10 * SAMPLE_LENGTH  # six samples of temperature 1, two of 1.4 read twice


@pytest.mark.parametrize("rows", [2, 3, 5, 256])
def test_a_second_reading_stays_in_the_fold_of_its_first(rows, model, monkeypatch):
    """Whatever the batches: a state and its second reading are never held out from each other's centroids."""
    monkeypatch.setattr("flashhead_edge.capture._batch_rows", lambda model, length: rows)
    done, pairs = 0, []

    def sample(*args):
        nonlocal done
        states, ids = _sample(*args)
        done += len(states)
        return states, ids

    def again(model, ids, progress):
        nonlocal done
        states = _second_reading(model, ids, progress)
        pairs.append((torch.arange(done - len(states), done), torch.arange(done, done + len(states))))
        done += len(states)
        return states

    monkeypatch.setattr("flashhead_edge.capture._sample", sample)
    monkeypatch.setattr("flashhead_edge.capture._second_reading", again)
    own = sample_own_text(load_model(model), load_tokenizer(model), 127, 3000)
    folds = fold_of(len(own.states))
    assert done == len(own.states)
    assert all(torch.equal(folds[first], folds[second]) for first, second in pairs)
    assert len(pairs) >= 1
    assert 0.4 < float(folds.float().mean()) < 0.6


@pytest.mark.parametrize(("target", "positions"), [(0.9, 60_000), (0.995, 60_000), (0.999, 120_000), (0.9999, 240_000)])
def test_deeper_targets_ask_for_more_positions(target, positions):
    assert default_positions(target) == positions


def test_own_chats_hold_a_turn_and_an_answer(model):
    """The template's tokens stand after each user's turn, and the states are those of the whole chat read at once."""
    runner, tokenizer = load_model(model), load_tokenizer(model)
    tokenizer.chat_template = "{% for m in messages %}t3 {{ m.content }} t4{% endfor %}{% if add_generation_prompt %} t5{% endif %}"
    frame = chat_frame(tokenizer)
    assert tokenizer.decode(frame.before).split() == ["t3"]
    assert tokenizer.decode(frame.after).split() == ["t4", "t5"]
    turns = [4, 7, SAMPLE_LENGTH - 1]
    start = torch.tensor([frame.before]).expand(3, -1)
    states, ids = _sample(runner, start, _forced([(n, frame.after) for n in turns]), 127, [], torch.Generator().manual_seed(0), 1.0, lambda share: None)
    for i, (row, n) in enumerate(zip(ids.tolist(), turns)):
        after = row[1 + n :][: len(frame.after)]  # the first id is the last of `before`
        assert after == frame.after[: len(after)]
        whole = capture_ids(runner, torch.tensor(frame.before[:-1] + row))[-SAMPLE_LENGTH:]
        assert torch.allclose(states.view(3, SAMPLE_LENGTH, -1)[i], whole, atol=1e-5)  # float32 sums in another order


def test_a_vocabulary_of_seven(tmp_path, caplog):
    """So few tokens that every step scores them all: there is no tail to fit, and nothing is missed but by margins."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=7, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=256)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model", 7)
    summary = convert(tmp_path / "model", tmp_path / "out", positions=1500, target=0.9)
    assert summary["reached"]
    assert "on a head of 7 tokens FlashHead gains nothing" in caplog.text
    assert sorted(read_index(tmp_path / "out").token_table[read_index(tmp_path / "out").token_table >= 0].tolist()) == list(range(7))
