"""Reports as CSV: one row for each file, target and batch, units in the columns' names."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable

from deploykit.report.model import Report
from deploykit.report.points import Point, points
from deploykit.report.wording import clean
from deploykit.types import DeviceDescription, MachineState, Measurement

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
    "accelerator": "GPU it ran on, empty if none did",
    "runtime": "name and version",
    "ran_as": "precision that really ran, as the runtime says",
    "kernels": "computing kernels of the loaded file and how many of each",
    "batch_images": "images a call",
    "threads": "computing threads",
    "samples": "timed calls",
    "p50_ms": "median time of a call",
    "p50_low_ms": "lower end of its 95 % interval",
    "p50_high_ms": "upper end of its 95 % interval",
    "p90_ms": "90th percentile, empty if there were too few samples",
    "p99_ms": "99th percentile, empty if there were too few samples",
    "withheld": "why a percentile is empty, or the figures are noisy",
    "noisy": "true if the times are too noisy to be used",
    "time_ratio": "time against the original's on the same target",
    "time_ratio_low": "lower end of its 95 % interval",
    "time_ratio_high": "upper end of its 95 % interval",
    "time_ratio_noisy": "true if that interval is too wide for a comparison",
    "throughput_images_per_s": "batch over the median",
    "peak_rss_bytes": "most memory the process held",
    "device_memory_bytes": "most memory held on the GPU",
    "load_ms": "time to load the file",
    "first_call_ms": "first call of a file just loaded; some runtimes plan or compile in it",
    "energy_mj": "millijoules of one call",
    "energy_source": "what counted them, or why nothing did",
    "governor": "what chooses the processor's clock",
    "cpu_mhz_before": "mean clock of the cores used, when the measurement began",
    "cpu_mhz_after": "the same, when it ended",
    "temperature_c_before": "hottest processor sensor, degrees Celsius",
    "temperature_c_after": "the same, when it ended",
    "throttled_times": "times the cores used slowed down for heat meanwhile",
    "gpu_mhz_after": "clock of the GPU when it ended",
    "gpu_temperature_c_after": "of the GPU when it ended, degrees Celsius",
    "gpu_throttled": "why the GPU's clock was held down, before or after",
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
        row |= _measured(m)
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


def _measured(m: Measurement) -> dict[str, object]:
    return {
        "target": m.target,
        "device": m.device.device,
        "accelerator": m.device.accelerator,
        "runtime": m.device.runtime,
        "ran_as": m.ran_as,
        "kernels": ", ".join(f"{count} {name}" for name, count in sorted(m.kernels.items())),
        "batch_images": m.batch,
        "threads": m.device.threads,
        "samples": m.samples,
        "p50_ms": m.p50_ms,
        "p50_low_ms": m.p50_low_ms,
        "p50_high_ms": m.p50_high_ms,
        "p90_ms": m.p90_ms,
        "p99_ms": m.p99_ms,
        "withheld": m.withheld,
        "noisy": m.noisy,
        "time_ratio": m.ratio,
        "time_ratio_low": m.ratio_low,
        "time_ratio_high": m.ratio_high,
        "time_ratio_noisy": None if m.ratio is None else m.comparison_noisy,
        "throughput_images_per_s": 1000 * m.batch / m.p50_ms if m.p50_ms > 0 else None,
        "peak_rss_bytes": m.peak_rss_bytes,
        "device_memory_bytes": m.device_memory_bytes,
        "load_ms": m.load_ms,
        "first_call_ms": m.first_call_ms,
        "energy_mj": m.energy_mj,
        "energy_source": m.energy,
        **_machine(m.device),
    }


def _machine(device: DeviceDescription) -> dict[str, object]:
    """How fast and how warm it was. Old reports and other devices don't tell."""
    before, after = device.before or MachineState(), device.after or MachineState()
    known = before.throttled is not None and after.throttled is not None
    return {
        "governor": device.governor,
        "cpu_mhz_before": before.cpu_mhz,
        "cpu_mhz_after": after.cpu_mhz,
        "temperature_c_before": before.temperature_c,
        "temperature_c_after": after.temperature_c,
        "throttled_times": (after.throttled or 0) - (before.throttled or 0) if known else None,
        "gpu_mhz_after": after.gpu_mhz,
        "gpu_temperature_c_after": after.gpu_temperature_c,
        "gpu_throttled": ", ".join(dict.fromkeys([*before.gpu_throttled, *after.gpu_throttled])),
    }
