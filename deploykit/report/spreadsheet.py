"""Reports as CSV: one row for each file, target and batch, units in the columns' names."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable

from deploykit.report.model import Report
from deploykit.report.points import Point, points
from deploykit.report.wording import clean

__all__ = ["COLUMNS", "csv_text"]

COLUMNS = {
    "source": "folder or file the report was read from",
    "model": "backbone",
    "weights": "where its weights came from; 'untrained' rows have no accuracy",
    "run_bits": "what the recipe asked for",
    "started_utc": "start of the run, ISO 8601",
    "deploykit_version": "what made the report",
    "verdict": "of the whole run",
    "exit_code": "of the whole run",
    "artifact": "original, a step on the way (pruned …), compressed, or a peer's",
    "format": "of the file",
    "precision": "of the file: fp32, w8a8 …",
    "algorithm": "what quantised it; empty for a float file",
    "file_bytes": "size on disk",
    "file_sha256": "of the file",
    "target": "what ran it; empty if nothing timed it",
    "device": "machine it ran on",
    "runtime": "name and version",
    "batch_images": "images a call",
    "threads": "computing threads",
    "samples": "timed calls",
    "p50_ms": "median time of a call",
    "p50_low_ms": "lower end of its 95 % interval",
    "p50_high_ms": "upper end of its 95 % interval",
    "p90_ms": "90th percentile, empty if there were too few samples",
    "p99_ms": "99th percentile, empty if there were too few samples",
    "noisy": "true if the times are too noisy to be used",
    "time_ratio": "time against the original's on the same target",
    "time_ratio_low": "lower end of its 95 % interval",
    "time_ratio_high": "upper end of its 95 % interval",
    "throughput_images_per_s": "batch over the median",
    "peak_rss_bytes": "most memory the process held",
    "load_ms": "time to load the file",
    "top1_percent": "accuracy of the file",
    "drop_points": "top-1 lost against the original, on the same images",
    "drop_low_points": "lower end of its 95 % interval",
    "drop_high_points": "upper end of its 95 % interval",
    "accuracy_images": "images it was measured on",
    "accuracy_data": "which images",
    "parity_passed": "true if every comparison with the model it came from held",
    "parity_min_sqnr_db": "the worst of them",
}
"""Name of each column and what is in it."""


def csv_text(reports: Iterable[tuple[str, Report]]) -> str:
    """All rows of all reports under one heading (RFC 4180, ``\\n`` line ends); unknown is empty.

    Args:
        reports: each with the name of where it was read from.
    """
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(COLUMNS), lineterminator="\n")
    writer.writeheader()
    for source, report in reports:
        for point in points(report):
            writer.writerow({name: _cell(v) for name, v in _row(source, report, point).items()})
    return stream.getvalue()


def _cell(value: object) -> object:
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str):
        return value
    text = clean(value)
    # A spreadsheet would take it for a formula, and names come from files we did not write.
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text


def _row(source: str, report: Report, point: Point) -> dict[str, object]:
    artifact, m, accuracy = point.artifact, point.measurement, point.accuracy
    row: dict[str, object] = {
        "source": source,
        "model": report.model,
        "weights": report.weights.label,
        "run_bits": report.bits,
        "started_utc": report.started,
        "deploykit_version": report.deploykit_version,
        "verdict": report.verdict,
        "exit_code": report.exit_code,
        "artifact": artifact.name,
        "format": artifact.format,
        "precision": m.precision if m else artifact.precision,
        "algorithm": artifact.algorithm,
        "file_bytes": artifact.bytes,
        "file_sha256": artifact.sha256,
        "top1_percent": point.top1,
    }
    if m is not None:
        row |= {
            "target": m.target,
            "device": m.device.device,
            "runtime": m.device.runtime,
            "batch_images": m.batch,
            "threads": m.device.threads,
            "samples": m.samples,
            "p50_ms": m.p50_ms,
            "p50_low_ms": m.p50_low_ms,
            "p50_high_ms": m.p50_high_ms,
            "p90_ms": m.p90_ms,
            "p99_ms": m.p99_ms,
            "noisy": m.noisy,
            "time_ratio": m.ratio,
            "time_ratio_low": m.ratio_low,
            "time_ratio_high": m.ratio_high,
            "throughput_images_per_s": 1000 * m.batch / m.p50_ms if m.p50_ms > 0 else None,
            "peak_rss_bytes": m.peak_rss_bytes,
            "load_ms": m.load_ms,
        }
    if accuracy is not None:
        row |= {
            "drop_points": accuracy.drop,
            "drop_low_points": accuracy.drop_low,
            "drop_high_points": accuracy.drop_high,
            "accuracy_images": accuracy.images,
            "accuracy_data": accuracy.data,
        }
    if point.parity:
        row |= {
            "parity_passed": all(one.passed for one in point.parity),
            "parity_min_sqnr_db": min(one.sqnr_db for one in point.parity),
        }
    return row
