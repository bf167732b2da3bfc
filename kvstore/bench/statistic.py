"""From samples to a row of figures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from kvstore.bench.cases import Line

Rows = list[dict[str, Any]]
Samples = Mapping[str, Sequence[float]]  # case -> one figure per repeat


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """Median, lowest and highest, and the samples themselves."""
    return {"median": statistics.median(samples), "low": min(samples), "high": max(samples), "samples": list(samples)}


def row(suite: str, line: Line, samples: Samples, errors: Mapping[str, str], unit: str = "ms") -> dict[str, Any]:
    """A line's figures. A ratio is the median of the repeats' ratios: both were measured side by side."""
    made: dict[str, Any] = {"suite": suite, "case": line.case, "unit": unit, **line.more}
    if line.subject not in samples:
        return {**made, "error": errors.get(line.subject, "not measured")}
    own = samples[line.subject]
    made |= summary(own)
    if line.limit is not None and line.limit in samples:
        made |= {"limit_name": line.limit_name or line.limit, "limit": statistics.median(samples[line.limit])}
    made["beside"] = {}
    for column, case in line.beside.items():
        if case in samples:
            ratios = [other / mine for other, mine in zip(samples[case], own, strict=False) if mine]
            ratio = statistics.median(ratios) if ratios else None
            made["beside"][column] = {**summary(samples[case]), "ratio": ratio}
        elif case in errors:
            made["beside"][column] = {"error": errors[case]}
    return made
