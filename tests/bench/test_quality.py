"""`flashhead bench quality`: a tiny model over four kinds of the harness's tasks from local files and a text, offline."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cli_tools import one_document, write_flashhead, write_model
from rich.console import Console
from small_heads import few_probes

from flashhead_edge.bench import quality_compare as compare
from flashhead_edge.bench.quality import bench_quality, check_room, one_task, opened
from flashhead_edge.checkpoint import open_source
from flashhead_edge.cli import main
from flashhead_edge.errors import SettingsError
from flashhead_edge.intervals import wilson
from flashhead_edge.progress import silent
from flashhead_edge.records.form import check_record

pytest.importorskip("lm_eval", reason="needs the extra quality")

from flashhead_edge.bench import quality_tasks as tasks
from flashhead_edge.bench.quality_lm import HeadLM

QUESTIONS = "\n\n".join(f"Question: What is {i} and {i}?\nAnswer: It is\n{2 * i}.\n#### {2 * i}" for i in range(1, 5)) + "\n"
ARTICLES = " \n = First = \n \n Some words of it @-@ and more . \n\n = = A part = = \n \n Other words . \n\n = Second = \n \n Words , again . \n"
CHOICES = [
    {"id": str(i), "question": f"Which is number {i}?", "choices": {"text": ["one", "the other", "none"], "label": ["A", "B", "C"]}, "answerKey": "B"}
    for i in range(5)
]
LAMBADA = [{"text": f"He went to the house and saw number {i} there"} for i in range(6)]


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Documents of four tasks, a text, and two checkpoints of one model: with a head that leaves nothing out, and with a bad one."""
    folder = tmp_path_factory.mktemp("quality")
    model = write_model(folder / "tiny")
    settings = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "!"}), encoding="utf-8")
    (folder / "gsm8k.txt").write_text(QUESTIONS, encoding="utf-8")
    (folder / "wikitext.txt").write_text(ARTICLES, encoding="utf-8")
    (folder / "own.txt").write_text("Some text to measure on. " * 30, encoding="utf-8")
    names = {"gsm8k": folder / "gsm8k.txt", "wikitext": folder / "wikitext.txt"}
    names["arc_easy"] = lines(folder / "arc.jsonl", CHOICES)
    names["lambada_openai"] = lines(folder / "lambada.jsonl", LAMBADA)
    return SimpleNamespace(
        folder=folder,
        tasks=[f"{n}={f}" for n, f in names.items()],
        text=folder / "own.txt",
        open=write_flashhead(model, folder / "open"),
        bad=bad(model, folder),
    )


def bad(model: Path, folder: Path) -> Path:
    """A checkpoint whose head opens 12 of 32 clusters, chosen badly."""
    from flashhead_edge.checkpoint import PublishedClusters, open_source, read_head, write_checkpoint

    source = open_source(model)
    head = read_head(source)
    index = few_probes(head.weight, 12, fingerprint=head.fingerprint)
    means = index.centroids.data.view("float16").reshape(index.n_clusters, -1).astype("float32")
    write_checkpoint(source, folder / "bad", index, PublishedClusters(means, index.token_table.argsort(None, kind="stable") // 8, 12))
    return folder / "bad"


@pytest.fixture(scope="module")
def manager() -> Any:
    """The harness's index of tasks, read once: it takes seconds."""
    return tasks.TaskManager()


@pytest.fixture(scope="module")
def documents(files: SimpleNamespace, manager: Any) -> dict[str, Any]:
    """What both checkpoints gave, with answers of 32 tokens."""
    options: dict[str, Any] = {"command": "flashhead bench quality", "limit": 3, "shots": 1, "prompts": 2, "positions": 200}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "TaskManager", lambda: manager)
        patch.setattr(HeadLM, "max_gen_toks", 32)
        return {name: bench_quality(getattr(files, name), files.tasks, [files.text], **options) for name in ("open", "bad")}


def parts(document: dict[str, Any]) -> dict[str, Any]:
    return {p["task"]: p for t in document["tasks"] for p in t["parts"]}


def test_a_head_that_leaves_nothing_out_answers_as_the_dense_head(documents: dict[str, Any]) -> None:
    found = parts(documents["open"])
    assert {n: p["items"] for n, p in found.items()} == {"gsm8k": 3, "wikitext": 2, "arc_easy": 3, "lambada_openai": 3}
    for part in found.values():
        for s in [part["equal_texts"], *(part["equal_answers"] or {}).values()]:
            assert s is None or (s["same"] == s["of"] == part["items"] and s["interval"] == list(wilson(s["of"], s["of"])))
        for m in part["metrics"]:
            assert m["flash"] == pytest.approx(m["dense"], rel=1e-4)  # float32 probabilities of some hundred tokens
    assert documents["open"]["texts"]["top1_agreement"] == 1


def test_a_bad_head_is_seen_in_every_measure(documents: dict[str, Any]) -> None:
    found = parts(documents["bad"])
    assert found["gsm8k"]["equal_texts"]["same"] < 3
    words = next(m for m in found["wikitext"]["metrics"] if m["metric"] == "word_perplexity")
    assert abs(math.log(words["flash"] / words["dense"])) > 0.1
    by_name = {t["task"]: t for t in documents["bad"]["tasks"]}
    assert 0 < by_name["gsm8k"]["steps"]["share"] < 1
    scored = by_name["wikitext"]["scored"]
    assert 0 < scored["exact_rows"]["share"] < 1 and 0 < scored["agreement"]["share"] < 1
    # a row that was scored exactly loses only what the normalising sum is off; the others have a cluster's score
    assert scored["loss"]["without"] > scored["loss"]["with_exact_row"]
    held, n = scored["exact_rows"]["same"], scored["tokens"]
    assert scored["loss"]["all"] * n == pytest.approx(scored["loss"]["with_exact_row"] * held + scored["loss"]["without"] * (n - held))


def test_perplexity_is_the_loss_that_was_tallied(documents: dict[str, Any]) -> None:
    """The harness's word perplexity of each head, from the losses: log(flash / dense) x words = loss above the dense head's x tokens."""
    part, task = parts(documents["bad"])["wikitext"], next(t for t in documents["bad"]["tasks"] if t["task"] == "wikitext")
    words = sum(len(re.split(r"\s+", row["page"])) for row in tasks.articles(ARTICLES))
    m = next(m for m in part["metrics"] if m["metric"] == "word_perplexity")
    assert words * math.log(m["flash"] / m["dense"]) == pytest.approx(task["scored"]["loss"]["all"] * task["scored"]["tokens"])


def test_records_pass_the_form_s_check(documents: dict[str, Any]) -> None:
    for document in documents.values():
        records = document["benchmark"]["records"]
        for i, r in enumerate(records):
            check_record(r, f"record {i}")
        assert len({r["run"] for r in records}) == 1
        told = {(r["quality"]["task"], r["quality"]["metric"]) for r in records}
        assert {
            ("gsm8k", "equal texts"), ("gsm8k", "equal answers (flexible-extract)"), ("wikitext", "word_perplexity"), ("arc_easy", "equal answers"),
            ("lambada_openai", "perplexity"), ("text", "agreement"), ("text", "equal greedy texts"),
        } <= told  # fmt: skip
        for r in records:
            q = r["quality"]
            assert q["higher_is_better"] == (not any(w in q["metric"] for w in ("perplexity", "bits", "loss")))
            assert ("kinds" in (q["note"] or "")) == (q["metric"].startswith(("acc", "word", "byte", "bits", "perplexity", "loss", "scored"))), q


def test_a_group_has_a_part_for_each_of_its_tasks(files: SimpleNamespace, manager: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a group asked for by name: its tasks answered in one run, one record of what was scored."""
    monkeypatch.setattr(tasks, "TaskManager", lambda: manager)
    loaded = tasks.load([tasks.parse(files.tasks[i]) for i in (2, 3)])
    group = tasks.Ready(tasks.Asked("two", None), tuple(r.tasks[0] for r in loaded), None)
    found = one_task(opened(open_source(files.bad), "cpu"), group, 2, silent)
    assert [(p["task"], p["items"], p["kind"]) for p in found["parts"]] == [("arc_easy", 2, "multiple_choice"), ("lambada_openai", 2, "loglikelihood")]
    choices = sum(len(c) + 1 for c in CHOICES[0]["choices"]["text"])  # a byte is a token, and a blank stands before each
    assert found["scored"]["tokens"] == 2 * (choices + len(" there"))


def test_the_verb_prints_one_document(files: SimpleNamespace, manager: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "TaskManager", lambda: manager)
    arguments = ["bench", "quality", str(files.bad), "--task", files.tasks[2], "--text", str(files.text), "--prompts", "1", "--positions", "100", "--json"]
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    out, err = capsys.readouterr()
    assert stop.value.code == 0, err
    document = one_document(out)
    assert document["tasks"][0]["parts"][0]["items"] == len(CHOICES)
    assert document["benchmark"]["records"][0]["command"].startswith("flashhead bench quality")
    assert "equal with both heads" in err and "own.txt" in err and "whole text equal" in err


def test_tables_show_every_kind(documents: dict[str, Any]) -> None:
    from flashhead_edge.report.quality import show_quality

    console = Console(width=200, file=io.StringIO())
    show_quality(documents["bad"], console)
    text = console.file.getvalue()
    for words in ("whole text", "answer (flexible-extract)", "steps of the dense text", "word_perplexity", "acc_norm", "with an exact row", "own.txt"):
        assert words in text


def test_kept_records_are_a_table(documents: dict[str, Any]) -> None:
    from flashhead_edge.records.folder import Entry
    from flashhead_edge.report.quality import quality_block

    records = documents["bad"]["benchmark"]["records"]
    rows = quality_block([Entry(r, str(i), "kept.json") for i, r in enumerate(records)]).splitlines()
    assert len(rows) == 2 + len(records)
    (texts,) = [row for row in rows if "| equal texts |" in row]
    same = parts(documents["bad"])["gsm8k"]["equal_texts"]["same"]
    assert texts.startswith("| gsm8k | equal texts | 3 | 100.00 % | ") and f"{100 * same / 3:.2f} %" in texts and texts.endswith("kept.json |")
    (words,) = [row for row in rows if "word_perplexity" in row]
    found = next(m for m in parts(documents["bad"])["wikitext"]["metrics"] if m["metric"] == "word_perplexity")
    assert f"| {found['dense']:,.4f} | {found['flash']:,.4f} |" in words


# --- comparing, by hand ---------------------------------------------------------------------------------------------------


def sample(item: int, answers: list[Any], name: str = "none", texts: list[Any] | None = None) -> dict[str, Any]:
    return {"doc_id": item, "filter": name, "filtered_resps": answers, "resps": texts or [answers]}


def test_answers_are_compared_by_kind() -> None:
    assert compare.answer("multiple_choice", sample(0, [(-3.0, False), (-1.0, False), (-1.0, True)])) == 1  # the first of equals
    assert compare.answer("multiple_choice", sample(0, [("-3.0", "False"), ("-10.0", "False")])) == 0  # numbers, not their text
    assert compare.answer("loglikelihood", sample(0, [(-3.0, True)])) == compare.answer("loglikelihood", sample(0, [(-9.0, True)])) == [True]
    assert compare.answer("generate_until", sample(0, ["42"])) == ["42"]


def test_a_task_compared_by_hand() -> None:
    """Item by item, whatever the order; a filter each; the whole text apart from its answer."""
    dense = [sample(i, [a], "pick", [[t]]) for i, a, t in ((0, "4", "it is 4"), (1, "5", "5"), (2, "6", "6"))]
    flash = [sample(i, [a], "pick", [[t]]) for i, a, t in ((2, "6", "6"), (0, "4", "maybe 4"), (1, "7", "7"))]
    results = {"alias": "made", "exact_match,pick": 0.5, "exact_match_stderr,pick": "N/A"}
    found = compare.compare_task("generate_until", results, results | {"exact_match,pick": 0.25}, (dense, flash))
    assert found["equal_answers"] == {"pick": compare.share(2, 3)} and found["equal_texts"] == compare.share(1, 3)
    assert found["metrics"] == [{"metric": "exact_match", "filter": "pick", "dense": 0.5, "flash": 0.25}]
    whole = compare.compare_task("loglikelihood_rolling", results, results, (dense, flash))
    assert whole["equal_answers"] is None and whole["equal_texts"] is None


def test_nothing_scored_is_none() -> None:
    assert compare.scored([]) is None


# --- documents ------------------------------------------------------------------------------------------------------------


def test_plain_texts_are_cut_into_documents() -> None:
    assert tasks.questions(QUESTIONS)[1] == {"question": "What is 2 and 2?", "answer": "It is\n4.\n#### 4"}
    assert len(tasks.questions(QUESTIONS)) == 4 and tasks.questions("no question") == []
    pages = [row["page"] for row in tasks.articles(ARTICLES)]
    assert len(pages) == 2 and "A part" in pages[0] and pages[1].startswith(" = Second = ")
    assert "".join(pages) == ARTICLES.removeprefix(" \n")
    assert [r["page"] for r in tasks.articles("no title at all")] == ["no title at all"]


def test_examples_are_the_file_s_first_documents(files: SimpleNamespace, manager: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "TaskManager", lambda: manager)
    (ready,) = tasks.load([tasks.parse(files.tasks[0])], shots=2)
    (task,) = ready.tasks
    assert [d["question"] for d in task.eval_docs] == ["What is 3 and 3?", "What is 4 and 4?"]
    task.build_all_requests(limit=None, rank=0, world_size=1)
    prompt = task.instances[0].args[0]
    assert prompt == "\n\n".join(QUESTIONS.strip().split("\n\n")[:2]) + "\n\nQuestion: What is 3 and 3?\nAnswer:"
    (ready,) = tasks.load([tasks.parse(files.tasks[0])])
    assert ready.tasks[0].get_config("num_fewshot") == 0  # not the task's five, which a local file does not hold
    assert len(ready.tasks[0].eval_docs) == 4


GOOD = {"question": "a", "answer": "b"}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("gsm8k=x.jsonl", '{"question": "a"\n', r"x.jsonl: line 1 is not JSON \(.*\), expected one object a line"),
        ("gsm8k=x.jsonl", "[1]\n", r"line 1 is list, expected an object; correct it"),
        ("gsm8k=x.jsonl", json.dumps(GOOD) + '\n\n{"question": "a"}\n', r"line 3 is \['question'\], expected an object with \['answer', 'question'\]"),
        ("gsm8k=x.jsonl", '{"other": "a"}\n' * 2, r"task gsm8k: the documents of .*x.jsonl do not fit \('question' is undefined\)"),
        ("gsm8k=x.jsonl", " \n", "x.jsonl: it is empty"),
        ("gsm8k=x.jsonl", json.dumps(GOOD), "1 documents found, expected more than the 1 that are examples"),
        ("gsm8k=x.txt", "no question here", "no document of gsm8k found, expected blocks of `Question: ...`"),
        ("arc_easy=x.txt", "words", "plain text is known for gsm8k, wikitext alone, expected JSON lines for arc_easy"),
        ("arc_easy=none.jsonl", None, "none.jsonl: no such file"),
        ("no_such_task", None, "lm-evaluation-harness has no task of that name"),
        ("mmlu=x.jsonl", '{"question": "a"}\n' * 2, "task mmlu: it is a group of tasks"),
        ("gsm8k", None, r"its documents cannot be fetched \(.*\), expected a network or a local file; give --task gsm8k=FILE"),
        ("=x", None, "expected NAME or NAME=FILE"),
        ("gsm8k=", None, "expected NAME or NAME=FILE"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(
    name: str, content: str | None, words: str, manager: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "TaskManager", lambda: manager)
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name.partition("=")[2]).write_text(content, encoding="utf-8")
    with pytest.raises(SettingsError, match=words) as error:
        tasks.load([tasks.parse(name)], shots=1)
    assert "\n" not in str(error.value)


def test_tasks_that_run_code_are_refused(manager: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    task = SimpleNamespace(UNSAFE_CODE=True)
    monkeypatch.setattr(tasks, "TaskManager", lambda: SimpleNamespace(task_index={"made": 1}, load=lambda _: {"tasks": {"made": task}}))
    with pytest.raises(SettingsError, match="task made: it runs code that the model writes"):
        tasks.load([tasks.Asked("made", None)])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tasks": []}, "no task and no text given"),
        ({"tasks": ["a"], "limit": 0}, "limit is 0, expected 1 or more"),
        ({"tasks": ["a"], "shots": -1}, "shots is -1"),
        ({"tasks": ["a"], "prompts": -1}, "prompts is -1"),
        ({"texts": ["nowhere.txt"]}, "nowhere.txt: no such file"),
    ],
)
def test_bad_settings_are_refused_first(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=words):
        bench_quality(tmp_path, **options)


def test_a_verb_without_anything_to_measure_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "quality", "somewhere"])
    assert stop.value.code == 2 and "nothing to measure" in capsys.readouterr().err


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path, files: SimpleNamespace, manager: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "TaskManager", lambda: manager)
    folder = write_flashhead(write_model(tmp_path / "model"), tmp_path / "out")
    with pytest.raises(SettingsError, match="the tokenizer has no end token"):
        bench_quality(folder, [files.tasks[2]])


def test_answers_longer_than_the_context_are_refused() -> None:
    task = SimpleNamespace(OUTPUT_TYPE="generate_until", task_name="made", config=SimpleNamespace(generation_kwargs={"max_gen_toks": 300}))
    check_room(task, 301)
    with pytest.raises(SettingsError, match="task made: answers of up to 300 tokens, expected fewer than the model's context of 300"):
        check_room(task, 300)
