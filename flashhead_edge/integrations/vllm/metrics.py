"""What FlashHead counts in vLLM's worker, for Prometheus. The counters lie on the device; the worker copies them now and then.

Two ways out of the worker, which is another process than the one that serves vLLM's /metrics:
- where PROMETHEUS_MULTIPROC_DIR is set (by the user, or by vLLM with several API servers), prometheus_client's own files in
  that folder: vLLM's /metrics adds up what any of its processes wrote there;
- a loopback port of the worker's, where the user names one.

Threads here make no CUDA call, which would break a graph that is being captured: they read what the worker's own thread copied.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

from flashhead_edge.errors import DeviceError

NAMES = {
    "states_flash": "states whose logits FlashHead computed",
    "states_dense": "states whose logits the dense head computed, above the crossover",
    "states_dense_asked": "states whose logits the dense head computed, for a request that wants them exact",
    "clusters_opened": "clusters opened",
    "exact_rows": "rows of the head scored exactly",
    "capped": "states of which a cap cut off tokens within a margin",
}
EVERY_SECONDS = 5.0
_SERVED: set[int] = set()  # ports of this process
_COUNTERS: dict[str, Any] = {}  # of this process, in prometheus_client's files


def publish(counts: Callable[[], dict[str, int]], model: str) -> None:
    """Add ``flashhead_<name>_total{model=...}`` to vLLM's own /metrics every few seconds, where vLLM collects from several processes.

    That is where PROMETHEUS_MULTIPROC_DIR is set: prometheus_client's own switch, which its callers look at as well.

    Args:
        counts: gives the present value of each of NAMES.
    """
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return
    from prometheus_client import Counter  # vLLM needs it itself

    for name, text in NAMES.items():
        if name not in _COUNTERS:
            _COUNTERS[name] = Counter(f"flashhead_{name}", text, ["model"])
    counters = {name: _COUNTERS[name].labels(model) for name in NAMES}
    before = dict.fromkeys(NAMES, 0)

    def run() -> None:
        never = threading.Event()
        while not never.wait(EVERY_SECONDS):
            for name, value in counts().items():
                counters[name].inc(value - before[name])
                before[name] = value

    threading.Thread(target=run, name="flashhead-metrics", daemon=True).start()


def serve(port: int, counts: Callable[[], dict[str, int]], model: str) -> None:
    """Serve ``flashhead_<name>_total{model=...}`` on 127.0.0.1.

    Does nothing where this process serves the port already: beside a model, its draft with a head of its own has the same settings.

    Args:
        counts: gives the present value of each of NAMES; called once a request.
    Raises:
        DeviceError: prometheus_client is not installed, or the port is taken.
    """
    if port in _SERVED:
        return
    try:
        from prometheus_client import CollectorRegistry, start_http_server
        from prometheus_client.core import CounterMetricFamily
    except ImportError as error:
        raise DeviceError("flashhead: metrics_port needs prometheus_client, which is not installed; pip install prometheus_client") from error

    class Collector:
        def collect(self) -> Iterator[Any]:
            found = counts()
            for name, text in NAMES.items():
                family = CounterMetricFamily(f"flashhead_{name}", text, labels=["model"])
                family.add_metric([model], found[name])
                yield family

    registry = CollectorRegistry()
    registry.register(Collector())
    try:
        start_http_server(port, addr="127.0.0.1", registry=registry)
    except OSError as error:
        raise DeviceError(f"flashhead: metrics_port {port} cannot be opened ({error}), expected a free port; name another") from error
    _SERVED.add(port)
