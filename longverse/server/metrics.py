"""Counters in Prometheus' text format (version 0.0.4)."""

import threading
from collections import defaultdict

FIRST_TOKEN = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)  # seconds
PER_TOKEN = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)

Labels = tuple[tuple[str, str], ...]


class Metrics:
    """All that is counted. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counters: dict[str, dict[Labels, float]] = defaultdict(lambda: defaultdict(float))
        self._histograms: dict[str, tuple[tuple[float, ...], list[int], list[float]]] = {
            "longverse_first_token_seconds": (FIRST_TOKEN, [0] * (len(FIRST_TOKEN) + 1), [0.0]),
            "longverse_token_seconds": (PER_TOKEN, [0] * (len(PER_TOKEN) + 1), [0.0]),
        }

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        with self._lock:
            self._counters[name][tuple(sorted(labels.items()))] += amount

    def observe(self, name: str, value: float) -> None:
        with self._lock:
            bounds, buckets, total = self._histograms[name]
            place = next((n for n, bound in enumerate(bounds) if value <= bound), len(bounds))
            buckets[place] += 1
            total[0] += value

    def render(self, gauges: dict[str, float], counters: dict[str, float] | None = None) -> str:
        """Everything as text; `gauges` are the values of this moment, `counters` what others count."""
        lines: list[str] = []

        def family(name: str, kind: str) -> None:
            lines.append(f"# HELP {name} {HELP.get(name, name)}")
            lines.append(f"# TYPE {name} {kind}")

        with self._lock:
            for name in sorted(self._counters):
                family(name, "counter")
                for labels, value in sorted(self._counters[name].items()):
                    lines.append(f"{name}{_labels(labels)} {value:.15g}")
            for name, (bounds, buckets, total) in self._histograms.items():
                family(name, "histogram")
                running = 0
                for bound, amount in zip((*map(str, bounds), "+Inf"), buckets, strict=True):
                    running += amount
                    lines.append(f'{name}_bucket{{le="{bound}"}} {running}')
                lines.append(f"{name}_sum {total[0]:.6f}")
                lines.append(f"{name}_count {running}")
        for kind, values in (("counter", counters or {}), ("gauge", gauges)):
            for name, value in sorted(values.items()):
                family(name, kind)
                lines.append(f"{name} {value:.15g}")
        return "\n".join(lines) + "\n"


HELP = {
    "longverse_requests_total": "Requests by path and status.",
    "longverse_prompt_tokens_total": "Tokens of prompts.",
    "longverse_reused_tokens_total": "Of them, tokens that a kept session held already.",
    "longverse_generated_tokens_total": "Tokens written.",
    "longverse_cancelled_total": "Requests whose client left or that the stop of the server ended.",
    "longverse_first_token_seconds": "From a request's arrival to its first token.",
    "longverse_token_seconds": "Mean seconds a token of an answer, the first not counted.",
    "longverse_requests_waiting": "Requests in the queue.",
    "longverse_requests_active": "Requests in work.",
    "longverse_sessions": "Sessions kept.",
    "longverse_session_bytes": "Memory that kept sessions touch.",
    "longverse_sessions_evicted_total": "Sessions dropped for room.",
    "longverse_documents": "Documents in the library.",
    "longverse_memory_bytes": "Resident memory of the process.",
    "longverse_window_tokens": "The longest conversation.",
}


def _labels(labels: Labels) -> str:
    if not labels:
        return ""
    escaped = ((name, value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")) for name, value in labels)
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped) + "}"
