"""The processes of `bench.onnx`: `python -m flashhead_edge.bench.onnx_worker JSON`. Each opens what the JSON object names, then answers one line a request.

A process of its own for each engine and number of threads, so that its memory is its own; several answer in turn, so that
a slow stretch of the machine hits all of them. Replies leave by the stdout that the process was given; whatever libraries
print goes to stderr.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

Answer = Callable[[dict[str, Any]], dict[str, Any]]
PROMPT_BLOCK = 64  # states of one dense product where agreement is measured


def main() -> None:
    began = time.perf_counter()
    task = json.loads(sys.argv[1])
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    answer = OPENERS[task["kind"]](task, began)
    for line in sys.stdin:
        replies.write(json.dumps(answer(json.loads(line))) + "\n")
        replies.flush()


def memory(name: str) -> int:
    """Bytes that this process has in memory: VmRSS now, VmHWM at the most.

    Linux' own count, where there is one: getrusage's peak begins with that of the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        return next(1024 * int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(f"{name}:"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def in_turn(names: list[str], turn: int) -> Iterator[str]:
    """The names, another one first each turn: none always follows the same one."""
    return iter(names[turn % len(names) :] + names[: turn % len(names)])


# heads


def flash_head(path: str, threads: int) -> Any:
    """Our head as a session decodes with it: an `OneState`."""
    from flashhead_edge.jetson.onnxruntime_sessions import open_model
    from flashhead_edge.jetson.onnxruntime_step import OneState

    return OneState(open_model(Path(path), threads))


def dense_head(path: str, threads: int, vocab_size: int) -> Callable[[Any], Any]:
    """A dense head with everything bound: a call that puts a state [1, d] in and returns its logits [1, V], the same array each time."""
    import numpy as np

    from flashhead_edge.jetson.onnxruntime_sessions import open_model

    session = open_model(Path(path), threads)
    binding: Any = session.io_binding()
    (given,) = session.get_inputs()
    state, logits = np.zeros((1, given.shape[1]), np.float32), np.zeros((1, vocab_size), np.float32)
    binding.bind_input(given.name, "cpu", 0, np.float32, state.shape, state.ctypes.data)
    binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)

    def run(hidden: Any) -> Any:
        state[:] = hidden
        session.run_with_iobinding(binding)
        return logits

    return run


def open_heads(task: dict[str, Any], began: float) -> Answer:
    """Heads over the same states, each state by all of them before the next.

    task: `head` (our head), `others` (of ours too, paths by name), `dense` (paths by name), `states` (a file), `threads`, `vocab_size`.
    """
    import numpy as np

    states: Any = np.load(task["states"])
    flash = flash_head(task["head"], task["threads"])
    others = {name: flash_head(path, task["threads"]).run for name, path in task["others"].items()}
    heads = {task["name"]: flash.run} | others | {name: dense_head(path, task["threads"], task["vocab_size"]) for name, path in task["dense"].items()}

    def round_of(number: int) -> dict[str, Any]:
        seconds: dict[str, list[float]] = {name: [] for name in heads}
        for i, state in enumerate(states):
            for name in in_turn(list(heads), i + number):
                start = time.perf_counter()
                heads[name](state)
                seconds[name].append(time.perf_counter() - start)
        return {"seconds": seconds}

    def steps() -> dict[str, Any]:
        tokens, counts, capped = [], [], []
        for state in states:
            flash.run(state)
            tokens.append(int(flash.token[0]))
            counts.append(flash.counts[0].tolist())
            capped.append(bool(flash.capped[0]))
        return {"tokens": tokens, "counts": counts, "capped": capped}

    def repeat(name: str, count: int) -> dict[str, Any]:
        for i in range(count):
            heads[name](states[i % len(states)])
        return {"steps": count}

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if request["do"] == "repeat":
            return repeat(request["name"], request["steps"])
        return steps() if request["do"] == "steps" else round_of(request["round"])

    return answer


def open_agreement(task: dict[str, Any], began: float) -> Answer:
    """Tokens of heads on many states; of dense ones in blocks. task: as for `open_heads`."""
    import numpy as np

    from flashhead_edge.jetson.onnxruntime_sessions import open_model

    states: Any = np.load(task["states"])

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for name, path in task["dense"].items():
            session = open_model(Path(path), task["threads"])
            blocks = [states[i : i + PROMPT_BLOCK] for i in range(0, len(states), PROMPT_BLOCK)]
            out[name] = [int(t) for block in blocks for t in session.run(["logits"], {"hidden_states": block})[0].argmax(1)]
        session = open_model(Path(task["head"]), task["threads"])
        found = [session.run(["token", "counts", "capped"], {"hidden_states": state[None]}) for state in states]
        out[task["name"]] = [int(token[0]) for token, _, _ in found]
        return {"tokens": out, "counts": [c[0].tolist() for _, c, _ in found], "capped": sum(int(cap[0]) for _, _, cap in found)}

    return answer


# whole models with one body and several heads


def open_models(task: dict[str, Any], began: float) -> Answer:
    """A body's decode loop with our head, with a dense one, and with none, and of ONNX Runtime's own body with the dense one.

    The head is given `states`, since what a body with random weights says opens nothing like a real one's states; the body
    goes on with tokens of its own choice.
    task: `export` (a folder), `dense` (a path), `dense_name`, `plain_name` (of the dense head with each body), `states`, `threads`, `vocab_size`,
    `prompt`, `tokens`.
    """
    import numpy as np

    from flashhead_edge.jetson.onnxruntime_backend import open_folder

    states: Any = np.load(task["states"])
    backend = open_folder(Path(task["export"]), task["threads"], None)
    product = dense_head(task["dense"], task["threads"], task["vocab_size"])
    body, plain, head = backend.body(), open_folder(Path(task["export"]), task["threads"], None, native=False).body(), backend.head
    random = np.random.default_rng(1)
    ids = random.integers(0, task["vocab_size"], task["prompt"] + task["tokens"]).tolist()
    starts = {b: (b.feed(ids[: task["prompt"]]), b.snapshot())[1] for b in (body, plain)}

    def dense(state: Any) -> int:
        return int(product(state)[0].argmax())

    heads: Mapping[str, tuple[Any, Callable[[Any], int]]] = {
        "flash": (body, lambda state: int(head.step(state).token[0])),
        task["dense_name"]: (body, dense),
        task["plain_name"]: (plain, dense),
        "none": (body, lambda state: 0),
    }

    def text_of(name: str, number: int) -> int:
        using, choose = heads[name]
        using.restore(starts[using])
        for i, token in enumerate(ids[task["prompt"] :]):
            using.feed([token])
            choose(states[(number + i) % len(states)][None])
        return int(task["tokens"])

    def round_of(number: int) -> dict[str, Any]:
        seconds = {}
        for name in in_turn(list(heads), number):
            using, _ = heads[name]
            using.restore(starts[using])
            begin = time.perf_counter()
            text_of(name, number)
            seconds[name] = time.perf_counter() - begin
        return {"seconds": seconds}

    return lambda request: {"steps": text_of(request["name"], 0)} if request.get("do") == "repeat" else round_of(request["round"])


# engines


@dataclasses.dataclass(frozen=True)
class Engine:
    """An engine that is ready to decode, and what its start took."""

    tokens: Callable[[list[int], int], Iterator[int]]  # a prompt's greedy continuation of so many tokens, end tokens or not
    imported: int  # bytes in memory after the imports


def open_engine(task: dict[str, Any], began: float) -> Answer:
    """An engine. task: `engine` (a name in ENGINES), `model` (folder or file), `threads`, `prompt` (token ids), `tokens`."""
    engine = ENGINES[task["engine"]](task)
    next(engine.tokens(task["prompt"], 2))
    first = time.perf_counter() - began

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if request["do"] == "start":
            return {"first_token_seconds": first, "peak_bytes": memory("VmHWM") - engine.imported}
        start = time.perf_counter()
        found, marks = [], []
        for token in engine.tokens(task["prompt"], task["tokens"]):
            found.append(token)
            marks.append(time.perf_counter())
        if request["do"] == "repeat":
            return {"steps": len(found)}
        rate = (len(found) - 1) / (marks[-1] - marks[0])
        return {"tokens": found, "prompt_seconds": marks[0] - start, "tokens_per_second": rate, "peak_bytes": memory("VmHWM") - engine.imported}

    return answer


def flashhead(task: dict[str, Any]) -> Engine:
    """Our own session: an exported folder."""
    import jinja2  # noqa: F401
    import onnxruntime  # noqa: F401
    import tokenizers  # noqa: F401

    from flashhead_edge.generation import stream
    from flashhead_edge.jetson import open_engine as opened

    imported = memory("VmRSS")
    # without end tokens the text goes on as long as it is asked to; pieces of text are left out, as they are for the others
    engine = dataclasses.replace(opened(task["model"], threads=task["threads"]), stop_ids=frozenset(), tokenizer=None)
    return Engine(lambda ids, n: (token.id for token in stream(engine, ids, n)), imported)


def genai(task: dict[str, Any]) -> Engine:
    """ONNX Runtime GenAI over a folder that it understands."""
    import onnxruntime_genai as og

    imported = memory("VmRSS")
    config = og.Config(task["model"])
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": task["threads"]}}}}))
    model = og.Model(config)
    tokenizer = og.Tokenizer(model)

    def tokens(ids: list[int], n: int) -> Iterator[int]:
        settings = og.GeneratorParams(model)
        settings.set_search_options(do_sample=False, min_length=len(ids) + n, max_length=len(ids) + n)
        generator = og.Generator(model, settings)
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])

    assert tokenizer is not None
    return Engine(tokens, imported)


def llama_cpp(task: dict[str, Any]) -> Engine:
    """llama.cpp by llama-cpp-python over a GGUF file."""
    import itertools

    import llama_cpp as module

    imported = memory("VmRSS")
    context = -(-(len(task["prompt"]) + task["tokens"]) // 256) * 256
    model = module.Llama(task["model"], n_ctx=context, n_threads=task["threads"], n_threads_batch=task["threads"], verbose=False)

    def tokens(ids: list[int], n: int) -> Iterator[int]:
        model.reset()  # else the prompt would be found in the cache
        return itertools.islice(model.generate(ids, temp=0.0), n)

    return Engine(tokens, imported)


ENGINES: dict[str, Callable[[dict[str, Any]], Engine]] = {"flashhead": flashhead, "genai": genai, "llama.cpp": llama_cpp}
OPENERS: dict[str, Callable[[dict[str, Any], float], Answer]] = {
    "heads": open_heads,
    "agreement": open_agreement,
    "models": open_models,
    "engine": open_engine,
}

if __name__ == "__main__":
    main()
