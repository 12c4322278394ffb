"""The stored crossover: what it is kept under, what a damaged file says, what `auto` makes of it."""

import dataclasses
import json
import logging

import pytest
import torch

from flashhead_edge.cases import CASES, made_index, made_rows
from flashhead_edge.errors import DeviceError, SettingsError
from flashhead_edge.kernels import head
from flashhead_edge.kernels.crossover import crossover_file, head_fingerprint, store_crossover, stored_crossover

DEVICE = "NVIDIA H100 80GB HBM3"
MEASURED = [{"batch": 8, "dense": 220.0, "flash": 221.0}]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture(scope="module")
def index():
    return made_index(CASES[0])


@pytest.mark.parametrize("crossovers", [{"tokens": 1, "logits": 8}, {"tokens": None, "logits": 3}])
def test_what_is_stored_is_read(index, crossovers):
    assert stored_crossover(DEVICE, index, "bfloat16") is None
    path = store_crossover(DEVICE, index, "bfloat16", crossovers, MEASURED, "flashhead bench head out --store")
    found = stored_crossover(DEVICE, index, "bfloat16")
    assert (found["crossovers"], found["measured"], found["device"]) == (crossovers, MEASURED, DEVICE)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_device_type_shape_and_head_each_have_their_own(index):
    tighter = dataclasses.replace(index, probe=dataclasses.replace(index.probe, margin=1.5))
    other = made_index(CASES[1])
    files = {crossover_file(DEVICE, index, "bfloat16"), crossover_file("Orin", index, "bfloat16"), crossover_file(DEVICE, index, "float16")}
    files |= {crossover_file(DEVICE, i, "bfloat16") for i in (tighter, other, dataclasses.replace(index, fingerprint="other"))}
    assert len(files) == 6
    assert head_fingerprint(index) == head_fingerprint(made_index(CASES[0]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        (
            json.dumps({"format": 2, "crossovers": {"tokens": 0, "logits": 1}}),
            "tokens is 0, expected a batch of 1 or more, or null, in format 2; delete",
        ),
        (json.dumps({"format": 2, "crossovers": {"tokens": 1}}), "that of logits is 'absent'"),
        (json.dumps({"format": 1, "crossover": 4}), "that of tokens is 'absent'"),
        (json.dumps({"format": 2}), "that of tokens is 'absent'"),
        ("[]", "that of tokens is 'absent'"),
    ],
)
def test_a_damaged_file_is_refused(index, text, message):
    path = crossover_file(DEVICE, index, "bfloat16")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(SettingsError, match=message):
        stored_crossover(DEVICE, index, "bfloat16")


@pytest.mark.parametrize(
    ("crossover", "level", "words"),
    [
        ("nothing", logging.WARNING, "no crossover is kept for this head"),
        (None, logging.INFO, "the dense head at no batch that was measured where tokens are wanted, for batches of 5 and more where logits are"),
        (6, logging.INFO, "the dense head for batches of 6 and more where tokens are wanted, for batches of 5 and more where logits are, the flash head else"),
    ],
)
def test_auto_says_what_it_takes(index, caplog, crossover, level, words):
    if crossover != "nothing":
        store_crossover(DEVICE, index, "bfloat16", {"tokens": crossover, "logits": 5}, MEASURED, "")
    with caplog.at_level(logging.INFO, logger="flashhead_edge.kernels.head"):
        found = head.chosen_crossovers(DEVICE, index, torch.zeros(1, dtype=torch.bfloat16))
    assert found == dict.fromkeys(("tokens", "logits"), head.UNMEASURED) if crossover == "nothing" else {"tokens": crossover, "logits": 5}
    ((_, said, text),) = caplog.record_tuples
    assert said == level and words in text and "5,003 x 256 (bfloat16) on NVIDIA H100 80GB HBM3" in text


@pytest.mark.parametrize("bias", [False, True])
def test_from_the_crossover_on_a_step_is_the_dense_head(index, bias):
    """Without a GPU: the dense side of `auto` is torch alone."""
    weight = torch.from_numpy(made_rows(CASES[0])).bfloat16()
    extra = torch.linspace(-1, 1, len(weight), dtype=torch.bfloat16) if bias else None
    flash = head.CudaHead(index, weight, extra, torch.empty(0), [], [], torch.empty(0), "sm_90", dense_from=3, logits_dense_from=2)
    assert [flash.takes_dense(n) for n in (2, 3, 64)] == [False, True, True]
    assert [flash.takes_dense(n, logits=True) for n in (1, 2)] == [False, True]
    assert not dataclasses.replace(flash, dense_from=None).takes_dense(64)
    hidden = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    step = flash.step(hidden)
    logits = hidden.bfloat16() @ weight.T if extra is None else torch.addmm(extra, hidden.bfloat16(), weight.T)
    assert torch.equal(step.token, logits.argmax(1)) and torch.equal(flash.token(hidden), step.token)
    assert torch.equal(flash.logits(hidden), logits.float())
    assert torch.equal(step.logits, logits.float()) and torch.equal(step.ids[1], torch.arange(5_003))
    assert step.counts.tolist() == [[0, 0, 0, 0, 0, 5_003]] * 3 and not step.capped.any()


def test_another_choice_is_refused(index):
    with pytest.raises(SettingsError, match="choice is 'fast', expected 'flash' or 'auto'"):
        head.cuda_head(index, torch.zeros(1), choice="fast")  # type: ignore[arg-type]


def test_rows_in_a_type_without_a_kernel_are_refused_before_a_device_is_asked(index):
    with pytest.raises(DeviceError, match="its rows are float32, expected float16 or bfloat16"):
        head.cuda_head(index, torch.zeros(index.vocab_size, index.hidden_size))
