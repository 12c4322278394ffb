"""What FlashHead counts in vLLM's worker, for Prometheus: on a loopback port, where the user names one.

vLLM's own /metrics is served by another process, and no official route leads there from a worker. The counters lie on the
device and are copied when somebody asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from flashhead_edge.errors import DeviceError

NAMES = {
    "steps_flash": "states whose logits FlashHead computed",
    "steps_dense": "states whose logits the dense head computed, above the crossover",
    "steps_dense_asked": "states whose logits the dense head computed, for a request that wants them exact",
    "clusters_opened": "clusters opened",
    "exact_rows": "rows of the head scored exactly",
    "capped": "states of which a cap cut off tokens within a margin",
}


_SERVED: set[int] = set()  # ports of this process


def serve(port: int, counts: Callable[[], dict[str, int]], model: str) -> None:
    """Serve ``flashhead_<name>_total{model=...}`` on 127.0.0.1.

    Args:
        counts: gives the present value of each of NAMES; called once a request.
    Does nothing where this process serves the port already: beside a model, its draft with a head of its own has the same settings.
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
